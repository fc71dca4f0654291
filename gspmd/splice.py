"""Slices that are concatenated, padded or added up again, as one op: rolls and their gradients.

%1 = slice %0 [3:24]
%2 = slice %0 [0:3]
%3 = concatenate %1, %2    ->    %3 = splice %0   (3:24, 0:3)

On its own each slice would be laid out evenly over the devices, and moved once more by the op that
reads it; together they move what is shifted, once.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from gspmd.ir import Literal, Op, Operand, Program, Value
from gspmd.rules.stretch import stretches_of


def splice(program: Program) -> Program:
    """`program` with each concatenation of slices along its dim, and each padded slice, one op."""
    made: dict[Value, Op] = {}
    ops: list[Op] = []
    for op in program.ops:
        op = _REWRITES.get(op.name, _kept)(op, made)
        if op.bodies:
            op = dataclasses.replace(op, bodies=tuple(map(splice, op.bodies)))
        ops.append(op)
        made.update(dict.fromkeys(op.outs, op))
    return dataclasses.replace(program, ops=tuple(ops))


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """A box of `source`: per dim the entries from `first` on, before `last`."""

    source: Operand
    first: tuple[int, ...]
    last: tuple[int, ...]

    def only(self, dim: int) -> bool:
        """Whether all other dims are whole."""
        sizes = zip(self.first, self.last, self.source.shape, strict=True)
        return all((a, b) == (0, n) or d == dim for d, (a, b, n) in enumerate(sizes))


def _cut_of(x: Operand, made: Mapping[Value, Op]) -> _Cut:
    """What `x` is cut out of: itself, if neither a slice nor a split made it."""
    op = made.get(x) if isinstance(x, Value) else None
    if op is not None and op.name == "slice" and set(op.params["strides"] or ()) <= {1}:
        return _Cut(op.ins[0], op.params["start_indices"], op.params["limit_indices"])
    first = [0] * len(x.shape)
    if op is not None and op.name == "split":
        dim = op.params["axis"]
        sizes = op.params["sizes"][: op.outs.index(x)]
        first[dim] = sum(sizes)
        last = tuple(a + n for a, n in zip(first, x.shape, strict=True))
        return _Cut(op.ins[0], tuple(first), last)
    return _Cut(x, tuple(first), x.shape)


def _kept(op: Op, made: Mapping[Value, Op]) -> Op:
    return op


def _joined(op: Op, made: Mapping[Value, Op]) -> Op:
    """A concatenate that takes its stretches from where the slices took them."""
    dim = op.params["dimension"]
    cuts = [(x, _cut_of(x, made)) for x in op.ins]
    cuts = [c if c.only(dim) else _cut_of(x, {}) for x, c in cuts]
    return _spliced(op, dim, [(c.source, c.first[dim], c.last[dim]) for c in cuts])


def _spliced(op: Op, dim: int, pieces: Sequence[tuple[Operand, int, int]]) -> Op:
    sources = tuple(dict.fromkeys(source for source, _, _ in pieces))
    if sources == op.ins:
        return op
    stretches = tuple((sources.index(source), first, last) for source, first, last in pieces)
    params = MappingProxyType({"dimension": dim, "stretches": stretches})
    return dataclasses.replace(op, name="splice", ins=sources, params=params, call=stretches_of)


def _shifted(op: Op, made: Mapping[Value, Op]) -> Op:
    """A pad of a slice, as a pad alone: what is cut off is a negative padding."""
    cut = _cut_of(op.ins[0], made)
    config: list[tuple[int, int, int]] = []
    rows = zip(cut.first, cut.last, cut.source.shape, op.params["padding_config"], strict=True)
    for first, last, n, (low, high, interior) in rows:
        if (first and low > 0) or (last < n and high > 0) or (interior and (first or last < n)):
            return op  # what was cut off would come back in place of the filler
        config.append((int(low) - first, int(high) - (n - last), interior))
    params = MappingProxyType({"padding_config": tuple(config)})
    return dataclasses.replace(op, ins=(cut.source, op.ins[1]), params=params)


def _added(op: Op, made: Mapping[Value, Op]) -> Op:
    """A sum of stretches with zeros around them, which fill a dim side by side."""
    placed = [_placed(x, made) for x in op.ins]
    found = sorted((p for p in placed if p is not None), key=lambda p: p.at)
    if len(found) < 2 or len({p.dim for p in found}) > 1:
        return op
    ends = itertools.accumulate(p.last - p.first for p in found)
    (dim,) = {p.dim for p in found}
    if [p.at for p in found] + [op.outs[0].shape[dim]] != [0, *ends]:
        return op
    return _spliced(op, dim, [(p.source, p.first, p.last) for p in found])


@dataclasses.dataclass(frozen=True, slots=True)
class _Placed:
    """Entries `first` to `last` of `source`, at index `at` of a dim which is zero elsewhere."""

    source: Operand
    dim: int
    first: int
    last: int
    at: int


def _placed(x: Operand, made: Mapping[Value, Op]) -> _Placed | None:
    """What of `x` is not zero, if a pad of one dim made it."""
    op = made.get(x) if isinstance(x, Value) else None
    if op is None or op.name != "pad" or not _is_zero(op.ins[1]):
        return None
    padded = [(d, config) for d, config in enumerate(op.params["padding_config"]) if any(config)]
    if len(padded) != 1 or padded[0][1][2]:
        return None
    ((dim, (low, _, _)),) = padded
    first, last = max(0, -low), min(op.ins[0].shape[dim], x.shape[dim] - low)
    return _Placed(op.ins[0], dim, first, last, first + low) if first < last else None


def _is_zero(x: Operand) -> bool:
    return isinstance(x, Literal) and x.value == 0


_REWRITES = {"concatenate": _joined, "pad": _shifted, "add": _added, "add_any": _added}
