"""fuse: which ops a compiler computes together, and so which values ever exist in memory.

XLA merges what is cheap into its consumer: elementwise ops and data movement go into the kernel
that reads them, and what follows a matrix product is applied to its result on the way out. A value
between two such ops is never written. (XLA's instruction fusion, which looks at consumers first: a
value of which every reader can take in the computation is computed by each of them anew.)
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from gspmd.ir import COLLECTIVES, Op, Program, Value, values_of
from gspmd.rules import factor_rule, product_of

# They pass on what they read, in another place.
MOVES = frozenset(
    (
        "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "pad", "concatenate", "rev",
        "iota", "tile", "split", "stack", "unstack", "dynamic_slice", "empty", "select_n", "copy",
        # what the partitioner adds
        "shard", "mask", "pad_to", "relabel", "owner", "cut", "cut_block", "cut_pieces", "thin",
        "dilate", "assemble", "join_blocks", "join_pieces", "crop", "own_rows", "apart",
    )
)  # fmt: skip
# They put values side by side; a product wants that done before.
_JOINS = ("concatenate", "pad", "stack", "assemble", "join_blocks", "join_pieces")
# What XLA does not compute again for each entry that it is broadcast to: `IsExpensive`, and
# `ReusesOperandElements`, in its `InstructionFusion::ShouldFuse`.
_EXPENSIVE = frozenset(
    (
        "exp", "exp2", "expm1", "log", "log1p", "log2", "pow", "tan", "tanh", "sin", "cos", "erf",
        "erfc", "erf_inv", "logistic", "sqrt", "rsqrt", "cbrt", "atan2", "div", "rem", "lgamma",
        "digamma", "threefry2x32",
    )
)  # fmt: skip
_REDUCES = ("reduce_", "arg", "fold", "total", "first_of")
# They write a part of an operand's memory, and leave the rest as it is.
IN_PLACE = ("dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter_mul")
# They read as many entries of their first operand as they return.
PICKS = ("gather", "dynamic_slice", "slice")


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Ops that run as one: `reads` and `writes` are in memory, all else between them is not.

    A control-flow op, a collective, a sort or the like stands alone. `replaces` tells, for each of
    `writes`, of which of `reads` it can take the memory: those of which each entry is read before
    what takes its place is written, and not after.
    """

    ops: tuple[Op, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    replaces: tuple[tuple[Value, ...], ...] = ()

    @functools.cached_property
    def root(self) -> Op:
        """The op that gives the first result, and the fusion its name."""
        return next((op for op in self.ops if self.writes[:1] == op.outs[:1]), self.ops[-1])


def fuse(program: Program) -> tuple[Fusion, ...]:
    """The fusions of a program, in order; bodies of its control flow are programs of their own.

    An op that several fusions read from may be in all of them, as the compiler would have it.
    """
    kinds = {op: _kind(op) for op in program.ops}
    stored = _stored(program, kinds)
    makers = {out: op for op in program.ops for out in op.outs}
    found: list[Fusion] = []
    for op in program.ops:
        writes = tuple(v for v in op.outs if v in stored)
        if not writes and op.outs and not op.effects:
            continue  # computed where it is read
        ops, reads = _inlined(op, stored, makers)
        found.append(Fusion(ops, reads, writes))
    return tuple(
        dataclasses.replace(one, replaces=tuple(_replaced(one, out, kinds) for out in one.writes))
        for one in _with_products(found, kinds)
    )


Kinds = Mapping[Op, str]


def _kind(op: Op) -> str:
    """How `op` merges: "entry" by entry or as a "move" into any reader, as a "product", as a
    "reduce", which is the last of its fusion, or "alone"."""
    if op.bodies or op.effects or op.name in COLLECTIVES or op.name in IN_PLACE:
        return "alone"
    if product_of(op) is not None:
        return "product"
    if op.name.startswith(_REDUCES):
        of_one = all(_count(x) <= _count(op.outs[0]) for x in values_of(op.ins))
        return "move" if of_one else "reduce"  # along dims of size 1 there is nothing to reduce
    if op.name in MOVES:
        return "entry" if op.name in ("select_n", "copy") else "move"
    return "entry" if factor_rule(op).elementwise else "alone"


def _stored(program: Program, kinds: Kinds) -> frozenset[Value]:
    """The values that are written to memory: of every op's results, those not merely passed on.

    Consumers come first, as in XLA: each takes in what it can of those that it reads from.
    """
    readers: Mapping[Value, list[Op]] = collections.defaultdict(list)
    for op in program.ops:
        for x in dict.fromkeys(values_of(op.ins)):
            readers[x].append(op)
    makers = {out: op for op in program.ops for out in op.outs}
    stored = set(values_of(program.outs))
    roots: dict[Op, frozenset[Op]] = {}  # of the fusions that each op is in
    full: set[Op] = set()  # the roots of those that have their product
    for op in reversed(program.ops):
        kind = kinds[op]
        into = frozenset(root for out in op.outs for r in readers[out] for root in roots[r])
        if (
            kind in ("alone", "reduce")
            or not stored.isdisjoint(op.outs)
            or not all(_takes_in(r, op, kinds) for out in op.outs for r in readers[out])
            or (
                (len(into) > 1 or (op.name == "add_any" and not full.isdisjoint(into)))
                and kind != "product"
                and _finishes(op, readers, makers, kinds)
            )
            or (kind == "product" and (len(into) > 1 or not full.isdisjoint(into)))
            or (_is_mask(op) and not full.isdisjoint(into))
        ):
            stored.update(op.outs)
            into = frozenset((op,))
        roots[op] = into
        if kind == "product":
            full |= into
    return frozenset(stored)


def _takes_in(reader: Op, op: Op, kinds: Kinds) -> bool:
    """Whether `reader` can compute what `op` gives by itself, if need be many times."""
    kind = kinds[reader]
    if kind == "alone" or (kind == "product" and op.name in _JOINS):
        return False
    if op.name not in _EXPENSIVE or kind in ("product", "reduce"):
        return True
    return max(map(_count, reader.outs)) <= max(map(_count, op.outs))


def _finishes(
    op: Op, readers: Mapping[Value, list[Op]], makers: Mapping[Value, Op], kinds: Kinds
) -> bool:
    """Whether `op` is what follows a product on its way out, and joins it with as large a value:
    to store the one is less than to keep the two."""
    wide = _wide(op)
    return len(wide) > 1 and any(_is_product(x, readers, makers, kinds) for x in wide)


def _is_product(
    x: Value, readers: Mapping[Value, list[Op]], makers: Mapping[Value, Op], kinds: Kinds
) -> bool:
    """Whether `x` is a product, maybe converted or moved, that has one reader."""
    while x in makers and len(readers[x]) == 1:
        op = makers[x]
        if kinds[op] not in ("entry", "move") or len(_wide(op)) != 1:
            return kinds[op] == "product"
        (x,) = _wide(op)
    return False


def _is_mask(op: Op) -> bool:
    """Whether `op` says of each entry of a wider value whether it is to be used: where a product is
    to be masked so, the compiler makes the mask before, which is less to read."""
    tells = op.outs[:1] != () and op.outs[0].dtype == bool
    return tells and any(x.dtype != bool for x in _wide(op))


def _wide(op: Op) -> list[Value]:
    """The operands that are as large as the result."""
    size = max(map(_count, op.outs))
    return [x for x in dict.fromkeys(values_of(op.ins)) if _count(x) >= size]


def _count(x: Value) -> int:
    return math.prod(x.shape)


def _inlined(
    root: Op, stored: frozenset[Value], makers: Mapping[Value, Op]
) -> tuple[tuple[Op, ...], tuple[Value, ...]]:
    """`root` after the ops that are computed inside of it, and the stored values that they read."""
    ops: dict[Op, None] = {}
    reads: dict[Value, None] = {}
    waiting = [(root, False)]
    while waiting:
        op, visited = waiting.pop()
        if op in ops:
            continue
        if visited:
            ops[op] = None
            continue
        waiting.append((op, True))
        inner = [x for x in values_of(op.ins) if x in makers and x not in stored]
        waiting += [(makers[x], False) for x in reversed(inner)]
        reads.update((x, None) for x in values_of(op.ins) if x in stored or x not in makers)
    return tuple(ops), tuple(reads)


def _with_products(fusions: Sequence[Fusion], kinds: Kinds) -> Iterator[Fusion]:
    """`fusions`, with each reduction of a product run as the product is, where nothing reads what
    that gives before. Of several, none can need the result of another, which is there too late."""
    found: list[Fusion | None] = []
    fresh: dict[Value, int] = {}  # what products give, and nobody has read yet: place in `found`
    late: set[Value] = set()  # what such reductions give
    for fusion in fusions:
        sources = {fresh[x] for x in fusion.reads if x in fresh}
        if sources:
            fresh = {x: i for x, i in fresh.items() if i not in sources}
        alone = late.isdisjoint(fusion.reads)
        if kinds[fusion.root] == "reduce" and len(sources) == 1 and alone:
            place = sources.pop()
            product = found[place]
            assert product is not None
            reads = [x for x in fusion.reads if x not in product.writes]
            fusion = Fusion(
                tuple(dict.fromkeys((*product.ops, *fusion.ops))),
                tuple(dict.fromkeys((*product.reads, *reads))),
                (*product.writes, *fusion.writes),
            )
            found[place] = None
            late.update(fusion.writes[len(product.writes) :])
        if any(kinds[op] == "product" for op in fusion.ops):
            fresh.update((x, len(found)) for x in fusion.writes)
        found.append(fusion)
    yield from (fusion for fusion in found if fusion is not None)


def _replaced(fusion: Fusion, out: Value, kinds: Kinds) -> tuple[Value, ...]:
    """The values in whose memory a fusion can write its result `out`."""
    op = fusion.root
    if op.name in IN_PLACE:
        return values_of(op.ins[:1])
    if op.name == "all_reduce":
        return values_of((op.ins[op.outs.index(out)],))
    if kinds[op] == "alone":
        return ()
    like = [x for x in fusion.reads if x.shape == out.shape]
    return tuple(x for x in like if _by_entry(fusion, x, kinds))


def _by_entry(fusion: Fusion, x: Value, kinds: Kinds) -> bool:
    """Whether a fusion only reads the entry of `x` at the place at which it writes."""
    held = {x}
    for op in fusion.ops:
        if held.isdisjoint(values_of(op.ins)) or kinds[op] == "reduce":
            continue
        if kinds[op] != "entry":
            return False
        held.update(op.outs)
    return True
