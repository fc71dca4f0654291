"""Rings: what a collective sends at once, sent block by block, with work on each block meanwhile.

The devices of a group pass blocks on to their neighbours, in one direction or in both at once. Of n
devices each sends n - 1 blocks, as in the collective that the ring stands for. Up to `UNROLLED`
devices the steps stand one after the other; of more, those that are alike are a `scan`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core.primitives import add_p, convert_element_type_p, slice_p

from gspmd import local
from gspmd.exchange import Pairs
from gspmd.ir import Layout, Literal, Op, Operand, Program, Value
from gspmd.rules.build import resized
from gspmd.sharding import Axes

UNROLLED = 8
INDEX = np.dtype(np.int32)

Shape = tuple[int, ...]


class Writer:
    """Collects the `ops` that stand for `origin`, whose new values get the numbers of `ids`."""

    def __init__(self, origin: Op, ids: "itertools.count[int]") -> None:
        self.origin, self.ids = origin, ids
        self.ops: list[Op] = []

    def value(self, shape: Sequence[int], dtype: Any, layout: Layout | None = None) -> Value:
        return Value(next(self.ids), tuple(shape), dtype, layout=layout)

    def local(
        self,
        name: str,
        call: Callable[..., Any],
        ins: Sequence[Operand],
        shape: Shape,
        dtype: Any,
        **params: Any,
    ) -> Value:
        """The result of `call(*ins, **params)` on each device."""
        return self.into(self.value(shape, dtype), name, call, ins, **params)

    def into(
        self, out: Value, name: str, call: Callable[..., Any], ins: Sequence[Operand], **params: Any
    ) -> Value:
        """`out`, as the result of `call(*ins, **params)` on each device."""
        frozen, source = MappingProxyType(params), self.origin.source
        self.ops.append(Op(name, tuple(ins), (out,), frozen, source=source, call=call))
        return out

    def like(
        self, op: Op, ins: Sequence[Operand], shape: Shape, dtype: Any, **params: Any
    ) -> Value:
        """The result of `op` on other operands, with some other params."""
        out = self.value(shape, dtype)
        changed = MappingProxyType({**op.params, **params})
        self.ops.append(dataclasses.replace(op, ins=tuple(ins), outs=(out,), params=changed))
        return out

    def permute(self, x: Value, axes: Axes, pairs: Pairs) -> Value:
        """What the sender of each (sender, receiver) holds, for the reason of `origin`."""
        out = self.value(x.shape, x.dtype)
        params = MappingProxyType({"axes": axes, "pairs": pairs})
        cause, source = self.origin.cause, self.origin.source
        self.ops.append(Op("collective_permute", (x,), (out,), params, source=source, cause=cause))
        return out

    def add(self, x: Value, y: Value) -> Value:
        return self.local("add", add_p.bind, [x, y], x.shape, x.dtype)

    def apart(self, x: Value) -> Value:
        """`x`, made before what uses it: XLA adds to a product while it makes it, if it may, and
        would so wait for what is to be added."""
        return self.local("apart", apart, [x], x.shape, x.dtype)

    def convert(self, x: Value, dtype: Any) -> Value:
        if x.dtype == dtype:
            return x
        params = {"new_dtype": dtype, "weak_type": False, "sharding": None}
        call = convert_element_type_p.bind
        return self.local("convert_element_type", call, [x], x.shape, dtype, **params)

    def mask(self, x: Value, dim: int, axes: Axes, size: int) -> Value:
        """`x` with zeros in place of what lies past the end of a dim of logical `size`."""
        params: dict[str, Any] = {"axes": axes, "dim": dim, "size": size, "reduction": "sum"}
        return self.local("mask", local.mask, [x], x.shape, x.dtype, **params)

    def pad(self, x: Value, dim: int, size: int) -> Value:
        """`x` with zeros appended to `dim` until it has `size` entries."""
        if x.shape[dim] == size:
            return x
        shape = resized(x, dim, size)
        return self.local("pad_to", local.pad_to, [x], shape, x.dtype, dim=dim, size=size)

    def trim(self, x: Value, shape: Shape) -> Value:
        """The first entries of each dim of `x`."""
        if x.shape == shape:
            return x
        limits = {"start_indices": (0,) * len(shape), "limit_indices": shape, "strides": None}
        return self.local("slice", slice_p.bind, [x], shape, x.dtype, **limits)

    def room(self, shape: Shape, dtype: Any, layout: Layout | None = None) -> Value:
        """Zeros, to put blocks into."""
        out = self.value(shape, dtype, layout)
        return self.into(out, "room", room, [], sizes=shape, kind=dtype)

    def take(self, x: Value, dim: int, size: int, at: Operand) -> Value:
        """Block `at` of `size` entries of a dim."""
        shape = resized(x, dim, size)
        return self.local("take_block", take_block, [x, at], shape, x.dtype, dim=dim, size=size)

    def put(self, whole: Value, block: Value, dim: int, at: Operand) -> Value:
        """`whole` with `block` as its block `at` of a dim."""
        ins = [whole, block, at]
        return self.local("put_block", put_block, ins, whole.shape, whole.dtype, dim=dim)

    def finish(self, renamed: Mapping[Value, Value]) -> list[Op]:
        """The ops, with the values of a loop that others know under their own names."""

        def new(x: Operand) -> Operand:
            return renamed.get(x, x) if isinstance(x, Value) else x

        return [
            dataclasses.replace(
                op, ins=tuple(map(new, op.ins)), outs=tuple(renamed.get(x, x) for x in op.outs)
            )
            for op in self.ops
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
    """Blocks that go one way: at `distance` from a device, those of the devices `side` of it.

    Each device is reached from `reach` others on that side.
    """

    side: str  # "ahead": of higher index in the group; "behind": of lower index
    reach: int


@dataclasses.dataclass(frozen=True, slots=True)
class Ring:
    """A group of `size` devices along `axes`, which pass blocks on in 1 or 2 `directions`."""

    axes: Axes
    size: int
    directions: int

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The shorter lane is behind; together they reach every other device once."""
        others = self.size - 1
        behind = others // 2 if self.directions == 2 else 0
        lanes = (Lane("ahead", others - behind), Lane("behind", behind))
        return tuple(lane for lane in lanes if lane.reach)

    @property
    def steps(self) -> int:
        """Steps in which something is sent."""
        return max(lane.reach for lane in self.lanes)

    def index(self, w: Writer, side: str, distance: Operand) -> Value:
        """The index in the group of the device that is so far ahead or behind."""
        call = {"ahead": ahead, "behind": behind}[side]
        return w.local(side, call, [distance], (), INDEX, axes=self.axes, size=self.size)

    def towards(self, side: str) -> Pairs:
        """Everyone sends to the next device on that side."""
        return _next(self.size, 1 if side == "ahead" else -1)

    def away(self, side: str) -> Pairs:
        """Everyone sends to the next device on the other side."""
        return _next(self.size, -1 if side == "ahead" else 1)


@functools.lru_cache(maxsize=256)
def _next(size: int, by: int) -> Pairs:
    return tuple((i, (i + by) % size) for i in range(size))


Consume = Callable[[Writer, Sequence[Value], Value, Value, "Sequence[Value | None]"], list[Value]]
"""(writer, constants, block, its index, state) -> state; None in a state of which nothing is known
yet: in the first step."""

Produce = Callable[[Writer, Sequence[Value], Value], Value]
"""(writer, constants, index of a block) -> this device's summand of that block."""


def gather(
    w: Writer,
    ring: Ring,
    shard: Value,
    consts: Sequence[Value],
    state: Sequence[Value | None],
    consume: Consume,
) -> list[Value]:
    """The state after `consume` has seen the shard of each device, each once.

    While it is at one, the next are on their way.
    """
    lanes = ring.lanes
    alike = min(lane.reach for lane in lanes) - 1  # steps in which each lane comes and goes
    own = ring.index(w, "ahead", Literal(0, INDEX))
    held = [w.permute(shard, ring.axes, ring.away(lane.side)) for lane in lanes]
    made = consume(w, consts, shard, own, state)

    def step(
        w: Writer, consts: Sequence[Value], carry: Sequence[Value], distance: Operand
    ) -> list[Value]:
        held, state = carry[: len(lanes)], list(carry[len(lanes) :])
        sent = [
            w.permute(x, ring.axes, ring.away(lane.side))
            for lane, x in zip(lanes, held, strict=True)
        ]
        for lane, x in zip(lanes, held, strict=True):
            state = consume(w, consts, x, ring.index(w, lane.side, distance), state)
        return [*sent, *state]

    carry = _repeated(w, ring, consts, [*held, *made], alike, step, reverse=False)
    held, made = carry[: len(lanes)], carry[len(lanes) :]
    for k in range(alike + 1, ring.steps + 1):
        here = [(lane, x) for lane, x in zip(lanes, held, strict=False) if lane.reach >= k]
        held = [w.permute(x, ring.axes, ring.away(lane.side)) for lane, x in here if lane.reach > k]
        for lane, x in here:
            at = ring.index(w, lane.side, Literal(k, INDEX))
            made = consume(w, consts, x, at, made)
    return made


def scatter(w: Writer, ring: Ring, consts: Sequence[Value], produce: Produce) -> Value:
    """The sum of all devices' summands of this device's block.

    While a device makes its own summand of a block, the sum of the others' is on its way to it.
    """
    lanes = ring.lanes
    alike = min(lane.reach for lane in lanes) - 1
    sums: list[Value] = []
    for k in range(ring.steps, alike, -1):
        here = [lane for lane in lanes if lane.reach >= k]
        sums = _grown(w, ring, here, sums, consts, produce, Literal(k, INDEX))

    def step(
        w: Writer, consts: Sequence[Value], carry: Sequence[Value], distance: Operand
    ) -> list[Value]:
        return _grown(w, ring, lanes, carry, consts, produce, distance)

    sums = _repeated(w, ring, consts, sums, alike, step, reverse=True)
    sent = [
        w.permute(x, ring.axes, ring.towards(lane.side))
        for lane, x in zip(lanes, sums, strict=True)
    ]
    total = w.apart(produce(w, consts, ring.index(w, "ahead", Literal(0, INDEX))))
    for x in sent:
        total = w.add(x, total)
    return total


def _grown(
    w: Writer,
    ring: Ring,
    lanes: Sequence[Lane],
    sums: Sequence[Value],
    consts: Sequence[Value],
    produce: Produce,
    distance: Operand,
) -> list[Value]:
    """The sum of each lane with one summand more; lanes that have no sum yet begin one."""
    sent = [
        w.permute(x, ring.axes, ring.towards(lane.side))
        for lane, x in zip(lanes, sums, strict=False)
    ]
    grown: list[Value] = []
    for i, lane in enumerate(lanes):
        mine = produce(w, consts, ring.index(w, lane.side, distance))
        grown.append(w.add(sent[i], w.apart(mine)) if i < len(sent) else mine)
    return grown


Step = Callable[[Writer, Sequence[Value], Sequence[Value], Operand], list[Value]]
"""(writer, constants, carry, distance) -> carry."""


def _repeated(
    w: Writer,
    ring: Ring,
    consts: Sequence[Value],
    carry: list[Value],
    count: int,
    step: Step,
    *,
    reverse: bool,
) -> list[Value]:
    """The carry after the steps at distances 1 to `count`, or down to 1."""
    if count < 2 or ring.size <= UNROLLED:
        for k in range(1, count + 1):
            distance = Literal(count + 1 - k if reverse else k, INDEX)
            carry = step(w, consts, carry, distance)
        return carry
    distances = w.local("distances", distances_to, [], (count,), INDEX, count=count)
    ins = [w.value(x.shape, x.dtype) for x in (*consts, *carry)]
    distance = w.value((), INDEX)
    inner = Writer(w.origin, w.ids)
    outs = step(inner, ins[: len(consts)], ins[len(consts) :], distance)
    body = Program((*ins, distance), tuple(inner.ops), tuple(outs))
    params = {
        "num_consts": len(consts), "num_carry": len(carry), "length": count, "reverse": reverse,
        "unroll": 1,
    }  # fmt: skip
    made = tuple(w.value(x.shape, x.dtype) for x in carry)
    operands = (*consts, *carry, distances)
    frozen, source = MappingProxyType(params), w.origin.source
    w.ops.append(Op("scan", operands, made, frozen, bodies=(body,), source=source))
    return list(made)


# --- on a device


def ahead(distance: jax.Array, *, axes: Axes, size: int) -> jax.Array:
    """The index of the device `distance` after this one."""
    return lax.rem(lax.axis_index(axes) + distance, np.int32(size))


def behind(distance: jax.Array, *, axes: Axes, size: int) -> jax.Array:
    """The index of the device `distance` before this one."""
    return lax.rem(lax.axis_index(axes) + (np.int32(size) - distance), np.int32(size))


def room(*, sizes: Shape, kind: Any) -> jax.Array:
    """Zeros."""
    return jnp.zeros(sizes, kind)


def distances_to(*, count: int) -> jax.Array:
    """1 to `count`."""
    return jnp.arange(1, count + 1, dtype=INDEX)


def apart(x: jax.Array) -> jax.Array:
    """`x`, which is not merged with what uses it."""
    return lax.optimization_barrier(x)


def take_block(x: jax.Array, at: jax.Array, *, dim: int, size: int) -> jax.Array:
    """Block `at` of a dim."""
    return lax.dynamic_slice_in_dim(x, at * size, size, dim)


def put_block(whole: jax.Array, block: jax.Array, at: jax.Array, *, dim: int) -> jax.Array:
    """`whole` with block `at` of a dim in place."""
    return lax.dynamic_update_slice_in_dim(whole, block, at * block.shape[dim], dim)
