"""Looped products: what a product waits for, or what waits for it, is sent while it is computed.

#1 %0: f32[8,6] = all_gather[x][dim=0] a    ->    %0: f32[8,5] = room
%1: f32[8,5] = dot_general %0, w                  %1: i32[] = ahead[axes=x] 0:i32
                                                  #1 %2: f32[2,6] = collective_permute[x] a
                                                  %3: f32[2,5] = dot_general a, w
                                                  %4: f32[8,5] = put_block[dim=0] %0, %3, %1
                                                  ... and so on with %2, the next device's block

The gathered dim may be one of the result (the partial products are put side by side), or the one
that is summed over (they are added up). A product that feeds a reduce_scatter is made block by
block, each summand added to the sum of the others' that arrives. ("Overlap communication with
dependent computation via decomposition", ASPLOS 2023.)
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.collectives import sent_by
from gspmd.ir import Op, Operand, Program, Value, bytes_of, next_id, values_of
from gspmd.optimize import ring
from gspmd.optimize.ring import Ring, Writer
from gspmd.optimize.timing import PRODUCT, product_seconds, saved
from gspmd.options import Target
from gspmd.rules import factor_rule
from gspmd.rules.build import resized
from gspmd.sharding import Mesh

SUMS = ("add", "add_any")


def loop_products(program: Program, mesh: Mesh, target: Target, *, always: bool) -> Program:
    """Turns gathers that feed products, and products that feed scatters, into rings.

    All of them with `always`, else where that is ahead on `target`. Each sends what the collective
    did. The largest collective is first to have a product that could go with several.
    """
    return _looped(program, mesh, target, always, itertools.count(next_id(program)))


def _looped(
    program: Program, mesh: Mesh, target: Target, always: bool, ids: "itertools.count[int]"
) -> Program:
    ops = [
        dataclasses.replace(
            op, bodies=tuple(_looped(body, mesh, target, always, ids) for body in op.bodies)
        )
        if op.bodies
        else op
        for op in program.ops
    ]
    scope = _Scope(dataclasses.replace(program, ops=tuple(ops)), mesh, target, always, ids)
    kinds = ("all_gather", "reduce_scatter")
    collectives = [op for op in ops if op.name in kinds and len(op.ins) == 1]
    for op in sorted(collectives, key=scope.sent, reverse=True):
        if op.name == "all_gather":
            scope.loop_gather(op)
        elif op.params.get("reduction", "sum") == "sum":
            scope.loop_scatter(op)
    return dataclasses.replace(program, ops=tuple(scope.ops))


@dataclasses.dataclass(frozen=True, slots=True)
class _Fed:
    """A product of which operand `side` is gathered along `dim`, factor `factor` of its rule.

    `other` and `out` are the dims of the other operand and of the result with that factor.
    """

    op: Op
    side: int
    dim: int
    factor: int
    other: int | None
    out: int | None

    @classmethod
    def of(cls, op: Op, x: Value, dim: int) -> "_Fed":
        rule, side = factor_rule(op), op.ins.index(x)
        (factor,) = rule.ins[side][dim]
        other, out = (_dim_of(dims, factor) for dims in (rule.ins[1 - side], rule.outs[0]))
        return cls(op, side, dim, factor, other, out)

    @property
    def weight(self) -> Value:
        x = self.op.ins[1 - self.side]
        assert isinstance(x, Value)
        return x

    def product(self, w: Writer, block: Value, weight: Value) -> Value:
        """The product of a block with what belongs to it of the other operand."""
        (out,) = self.op.outs
        ins = (block, weight) if self.side == 0 else (weight, block)
        if self.out is not None:
            shape = resized(out, self.out, block.shape[self.dim])
            return w.like(self.op, ins, shape, out.dtype)
        dtype = _wide(self.op)
        return w.like(self.op, ins, out.shape, dtype, preferred_element_type=dtype)


def _dim_of(dims: Sequence[tuple[int, ...]], factor: int) -> int | None:
    return next((i for i, factors in enumerate(dims) if factor in factors), None)


def _wide(op: Op) -> Any:
    """In what to add up partial products: as precisely as one product adds up its summands."""
    dtype, algorithm = op.outs[0].dtype, op.params.get("precision")
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    if not narrow or isinstance(algorithm, lax.DotAlgorithm | lax.DotAlgorithmPreset):
        return dtype
    return np.dtype(np.float32)


class _Scope:
    """One program or body whose collectives are being looped; `ops` is what it is by now."""

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        target: Target,
        always: bool,
        ids: "itertools.count[int]",
    ) -> None:
        self.mesh, self.target, self.always, self.ids = mesh, target, always, ids
        self.ops = list(program.ops)
        self.outs = set(values_of(program.outs))
        self.users: dict[Value, list[Op]] = collections.defaultdict(list)
        self.made: dict[Value, Op] = {}
        self.gone: set[Op] = set()
        for op in program.ops:
            self.made.update(dict.fromkeys(op.outs, op))
            for x in values_of(op.ins):
                self.users[x].append(op)

    def sent(self, op: Op) -> float:
        """Bytes that a device sends in a collective."""
        return sent_by(op, self.mesh)

    def ring(self, op: Op) -> Ring:
        axes = op.params["axes"]
        return Ring(axes, self.mesh.size(axes), max(1, self.target.directions))

    def only_user(self, x: Value) -> Op | None:
        """The one op that uses `x`, once."""
        return self.users[x][0] if len(self.users[x]) == 1 and x not in self.outs else None

    def free(self, op: Op) -> bool:
        """Whether `op` is a product that belongs to no ring yet."""
        if op.name != PRODUCT or op in self.gone:
            return False
        blocks = ("take_block", "collective_permute")
        return not any(
            (x in self.made and self.made[x].name in blocks)
            or any(user.name == "collective_permute" for user in self.users[x])
            for x in values_of(op.ins)
        )

    def worth(self, ring: Ring, block: float, products: Sequence[tuple[Op, int, int]]) -> bool:
        """Whether to loop `products` (op, factor, size of the factor in a block of bytes)."""
        if self.always:
            return True
        whole = sum(product_seconds(op, self.target) for op, _, _ in products)
        piece = sum(product_seconds(op, self.target, f, n) for op, f, n in products)
        return saved(whole, piece, block, ring, self.target) > 0

    # --- all_gather and the products that use it

    def loop_gather(self, op: Op) -> None:
        """Replaces a gather and the products of its result by a ring, if that may be."""
        (shard,), (whole,), dim = values_of(op.ins), op.outs, op.params["dim"]
        group = self.ring(op)
        if group.size < 2 or op in self.gone:
            return
        trim = self.only_user(whole)
        if trim is None or not _cuts_end(trim, dim):
            trim = None
        x = trim.outs[0] if trim is not None else whole
        users = [user for user in self.users[x] if self.free(user) and user.ins.count(x) == 1]
        start = self.ops.index(op)
        products, late, end = self._ready(start, x, users)
        size = shard.shape[dim]
        fed = [_Fed.of(user, x, dim) for user in products]
        block = bytes_of([shard])
        if not fed or not self.worth(group, block, [(f.op, f.factor, size) for f in fed]):
            return
        keep = x in self.outs or len(products) < len(self.users[x])
        if keep and not self.always:
            return  # XLA holds twice what a loop puts together: nearly double the peak of a layer
        made = _gather_ring(Writer(op, self.ids), group, shard, dim, x, fed, keep)
        replaced = {op, *products} if trim is None else {op, trim, *products}
        moved = {*late}
        rest = [o for o in self.ops[start:end] if o not in replaced and o not in moved]
        self.ops[start:end] = [*rest, *made, *late]
        self.gone |= replaced

    def _ready(self, start: int, x: Value, users: list[Op]) -> tuple[list[Op], list[Op], int]:
        """The users that need nothing of each other, what is to run after them, and where they end.

        Between the gather and the last of them may be what depends on the first.
        """
        left = len(users)
        after: set[Value] = {x}
        late: list[Op] = []
        ready: list[Op] = []
        waiting, end = 0, start + 1
        for i, op in enumerate(itertools.islice(self.ops, start + 1, None), start + 2):
            if not left:
                break
            if op in users:
                left -= 1
            others = [y for y in values_of(op.ins) if y is not x]
            if op in users and after.isdisjoint(others):
                ready.append(op)
                after.update(op.outs)
                waiting, end = len(late), i
            elif not after.isdisjoint(values_of(op.ins)):
                if op.effects:
                    break
                late.append(op)
                after.update(op.outs)
        return ready, late[:waiting], end

    # --- products and the reduce_scatter of their sum

    def loop_scatter(self, op: Op) -> None:
        """Replaces a scatter and the products that make its operand by a ring, if that may be."""
        (x,), dim, group = values_of(op.ins), op.params["dim"], self.ring(op)
        if group.size < 2 or self.only_user(x) is None:
            return
        pad = self.made.get(x)
        if pad is None or pad.name != "pad_to" or pad.params["dim"] != dim:
            pad = None
        total = x if pad is None else values_of(pad.ins)[0]
        parts = list(self._summands(total))
        size = op.outs[0].shape[dim]
        products = [
            (part, factor_rule(part).outs[0][dim][0], size)
            for part in parts
            if part.name == PRODUCT
        ]
        if not products or not self.worth(group, bytes_of(op.outs), products):
            return
        made = _scatter_ring(Writer(op, self.ids), group, op, parts)
        replaced = {op, *parts} if pad is None else {op, pad, *parts}
        at = self.ops.index(op)
        start = min(map(self.ops.index, replaced))
        rest = [o for o in self.ops[start:at] if o not in replaced]
        self.ops[start : at + 1] = [*rest, *made]
        self.gone |= replaced

    def _summands(self, x: Operand) -> Iterator[Op]:
        """The products that `x` is the sum of, and the additions, in order."""
        op = self.made.get(x) if isinstance(x, Value) else None
        if op is None or self.only_user(op.outs[0]) is None or op in self.gone:
            return
        if self.free(op):
            yield op
        elif op.name in SUMS and all(isinstance(y, Value) for y in op.ins):
            found = [part for y in op.ins for part in self._summands(y)]
            if found:
                yield from found
                yield op


def _cuts_end(op: Op, dim: int) -> bool:
    """Whether `op` takes the first entries of `dim`, and all of the others."""
    if op.name != "slice" or op.params["strides"] is not None or any(op.params["start_indices"]):
        return False
    (x,), (out,) = op.ins, op.outs
    return all(a == b or d == dim for d, (a, b) in enumerate(zip(x.shape, out.shape, strict=True)))


def _gather_ring(
    w: Writer, group: Ring, shard: Value, dim: int, whole: Value, fed: list[_Fed], keep: bool
) -> list[Op]:
    """The ops of a ring from which each of `fed` has its result, and `whole` too with `keep`."""
    size = shard.shape[dim]
    total = size * group.size
    uneven = total != whole.shape[dim]
    if uneven and any(f.out is None for f in fed):  # what the padding holds must not be added
        shard = w.mask(shard, dim, group.axes, whole.shape[dim])
    weights = [f.weight if f.other is None else w.pad(f.weight, f.other, total) for f in fed]
    state: list[Value | None] = [None] * len(fed)
    for i, f in enumerate(fed):
        if f.out is not None:
            (out,) = f.op.outs
            state[i] = w.room(resized(out, f.out, total), out.dtype)
    if keep:
        state.append(w.room(resized(whole, dim, total), whole.dtype))

    def consume(
        w: Writer, consts: Sequence[Value], block: Value, at: Value, state: Sequence[Value | None]
    ) -> list[Value]:
        grown: list[Value] = []
        for f, weight, so_far in zip(fed, consts, state, strict=False):
            if f.other is not None:
                weight = w.take(weight, f.other, size, at)
            part = f.product(w, block, weight)
            if so_far is None:
                grown.append(part)
            elif f.out is None:
                grown.append(w.add(so_far, part))
            else:
                grown.append(w.put(so_far, part, f.out, at))
        for so_far in state[len(fed) :]:
            assert so_far is not None
            grown.append(w.put(so_far, block, dim, at))
        return grown

    made = ring.gather(w, group, shard, weights, state, consume)
    names = [f.op.outs[0] for f in fed] + [whole] * keep
    done = [w.convert(w.trim(x, out.shape), out.dtype) for x, out in zip(made, names, strict=True)]
    return w.finish(dict(zip(done, names, strict=True)))


def _scatter_ring(w: Writer, group: Ring, op: Op, parts: list[Op]) -> list[Op]:
    """The ops of a ring that gives the result of the scatter `op` of the sum that `parts` make."""
    (result,), dim = op.outs, op.params["dim"]
    size = result.shape[dim]
    inside = {x for part in parts for x in part.outs}
    leaves: dict[tuple[Value, int | None], Value] = {}  # and where each is cut
    for part in parts:
        for x, at in zip(part.ins, _cuts(part, dim), strict=True):
            assert isinstance(x, Value)
            if x not in inside and (x, at) not in leaves:
                leaves[x, at] = x if at is None else w.pad(x, at, size * group.size)

    def produce(w: Writer, consts: Sequence[Value], at: Value) -> Value:
        blocks = {
            leaf: x if leaf[1] is None else w.take(x, leaf[1], size, at)
            for leaf, x in zip(leaves, consts, strict=True)
        }
        values: dict[Value, Value] = {}
        out = result
        for part in parts:
            operands = zip(values_of(part.ins), _cuts(part, dim), strict=True)
            ins = [values[x] if x in inside else blocks[x, d] for x, d in operands]
            out = values[part.outs[0]] = w.like(part, ins, result.shape, result.dtype)
        return out

    made = ring.scatter(w, group, list(leaves.values()), produce)
    return w.finish({made: result})


def _cuts(op: Op, dim: int) -> list[int | None]:
    """The dim of each operand of `op` that goes with `dim` of its result."""
    rule = factor_rule(op)
    (factor,) = rule.outs[0][dim]
    return [_dim_of(dims, factor) for dims in rule.ins]
