"""Elementwise ops work on shards, and what they give is gathered, where that is less.

#1 %0: f32[8] = all_gather[x] a              %0: f32[8@x] = add a, b
#2 %1: f32[8] = all_gather[x] b        ->    #1 %1: f32[8] = all_gather[x] %0
%2: f32[8] = add %0, %1

An all_reduce counts as a reduce_scatter with such a gather after it.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from gspmd import local
from gspmd.ir import Layout, Op, Operand, Program, Value, bytes_of, next_id, values_of
from gspmd.optimize.share import is_pure
from gspmd.rules import op_rule
from gspmd.sharding import Axes, Mesh

THINNEST = 8
"""Entries of a dim in each shard below which a sum is not scattered along it.

The TPU compiler makes an all_reduce again of a reduce_scatter into thinner shards (libtpu 0.0.42).
"""


def delay(program: Program, mesh: Mesh) -> Program:
    """Moves gathers behind trees of elementwise ops that read more of them than they give.

    What else a tree reads is cut into shards, which takes no bytes. What a tree gives is not
    gathered at all if all its readers cut it into the same shards. Uneven blocks stay.
    """
    return _delayed(program, mesh, itertools.count(next_id(program)))


@dataclasses.dataclass(frozen=True)
class _Split:
    """The shards that a tree works on: `dim` split over `axes`, into `parts` blocks."""

    axes: Axes
    dim: int
    parts: int

    def of(self, x: Value, new_id: int) -> Value:
        """The shard of a whole value."""
        shape = (*x.shape[: self.dim], x.shape[self.dim] // self.parts, *x.shape[self.dim + 1 :])
        layout = x.layout
        if layout is not None:
            split = layout.sharding.dims[self.dim] + self.axes
            layout = Layout(layout.shape, layout.sharding.with_dim(self.dim, split), layout.of)
        return dataclasses.replace(x, id=new_id, shape=shape, name="", layout=layout)

    def cut(self, x: Value, result: Value) -> bool:
        """Whether an operand of an elementwise op is cut where its result is."""
        return bool(x.shape) and x.shape[self.dim] == result.shape[self.dim]

    def divides(self, x: Value, result: Value) -> bool:
        """Whether `x` falls into equal shards, where it is cut, and is the same on all devices."""
        if not self.cut(x, result):
            return True
        if x.layout is None or x.shape[self.dim] % self.parts:
            return False
        sharding = x.layout.sharding
        return set(self.axes).isdisjoint((*sharding.axes, *sharding.partial))

    def cuts(self, op: Op) -> bool:
        """Whether `op` takes the same shards of a whole value."""
        same = op.name == "shard" and (op.params["axes"], op.params["dim"]) == (self.axes, self.dim)
        return same and op.params["size"] % self.parts == 0


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Elementwise ops up to `root`, and the collectives whose results they alone read."""

    root: Op
    split: _Split
    ops: frozenset[Op]
    leaves: frozenset[Op]
    gain: float  # what is gathered no more, less what is gathered in its place


class _Graph:
    """Who makes and who reads each value of a program."""

    def __init__(self, program: Program, mesh: Mesh) -> None:
        self.mesh = mesh
        self.place = {op: i for i, op in enumerate(program.ops)}
        self.elementwise = frozenset(op for op in program.ops if _is_elementwise(op))
        self.maker = {out: op for op in program.ops for out in op.outs}
        self.readers: dict[Value, list[Op | None]] = collections.defaultdict(list)
        for op in program.ops:
            for x in values_of(op.ins):
                self.readers[x].append(op)
        for x in values_of(program.outs):
            self.readers[x].append(None)

    def split_of(self, op: Op) -> _Split:
        axes: Axes = op.params["axes"]
        return _Split(axes, op.params.get("dim", 0), self.mesh.size(axes))

    def cutters(self, x: Value, split: _Split) -> list[Op]:
        """The readers of `x` that cut it into the shards of `split`."""
        return [op for op in self.readers[x] if op is not None and split.cuts(op)]

    def splits(self, root: Op) -> Iterator[_Split]:
        """Those of the collectives that elementwise ops lead from to `root`."""
        waiting, seen = list(values_of(root.ins)), set[Value]()
        while waiting:
            op = self.maker.get(x := waiting.pop())
            if x in seen or op is None:
                continue
            seen.add(x)
            if op.name == "all_gather":
                yield self.split_of(op)
            elif _is_sum(op):
                whole = self.split_of(op)
                for dim, n in enumerate(x.shape):
                    if n % whole.parts == 0 and n >= THINNEST * whole.parts:
                        yield dataclasses.replace(whole, dim=dim)
            elif op in self.elementwise:
                waiting += values_of(op.ins)

    def tree(self, root: Op, split: _Split) -> _Tree | None:
        """The largest tree that works on the shards of `split`; None if `root` cannot."""
        (out,) = root.outs
        ops, leaves = {root}, set[Op]()
        waiting = {root}
        while waiting:  # the last op first: by then it is known of its readers whether they join
            op = max(waiting, key=lambda op: self.place[op])
            waiting.remove(op)
            if op in leaves:
                continue
            for x in values_of(op.ins):
                if not split.divides(x, out):
                    return None
                maker = self.maker.get(x)
                if maker is None or x.shape != out.shape or not ops.issuperset(self.readers[x]):
                    continue
                if self.gathers(maker, split):
                    leaves.add(maker)
                elif maker in self.elementwise:
                    ops.add(maker)
                    waiting.add(maker)
        if not split.divides(out, out):
            return None
        whole = len(self.cutters(out, split)) < len(self.readers[out])
        gain = bytes_of(x for op in leaves for x in op.outs) - (bytes_of((out,)) if whole else 0.0)
        return _Tree(root, split, frozenset(ops), frozenset(leaves), gain)

    def gathers(self, op: Op, split: _Split) -> bool:
        """Whether `op` gathers shards of `split`, maybe of a sum."""
        if op.name == "all_gather":
            return self.split_of(op) == split
        return _is_sum(op) and op.params["axes"] == split.axes


def _delayed(program: Program, mesh: Mesh, ids: "itertools.count[int]") -> Program:
    ops: list[Op] = []
    for op in program.ops:
        if op.bodies and op.name != "shard_map":  # in which whole values may differ
            bodies = tuple(_delayed(body, mesh, ids) for body in op.bodies)
            op = dataclasses.replace(op, bodies=bodies)
        ops.append(op)
    program = dataclasses.replace(program, ops=tuple(ops))
    if not any(op.name == "all_gather" or _is_sum(op) for op in ops):
        return program
    graph = _Graph(program, mesh)
    trees: dict[Op, _Tree] = {}
    for op in reversed(ops):
        if op in trees or op not in graph.elementwise:
            continue
        grown = [graph.tree(op, split) for split in dict.fromkeys(graph.splits(op))]
        tree = max((tree for tree in grown if tree), key=lambda tree: tree.gain, default=None)
        if tree is not None and tree.gain > 0 and trees.keys().isdisjoint(tree.ops | tree.leaves):
            trees.update(dict.fromkeys(tree.ops | tree.leaves, tree))
    return _Writer(graph, trees, ids).rewrite(program) if trees else program


class _Writer:
    """Writes a program whose `trees` work on shards."""

    def __init__(
        self, graph: _Graph, trees: Mapping[Op, _Tree], ids: "itertools.count[int]"
    ) -> None:
        self.graph, self.trees, self.ids = graph, trees, ids
        self.ops: list[Op] = []
        self.shards: dict[tuple[Value, _Split], Value] = {}
        self.renamed: dict[Value, Value] = {}

    def rewrite(self, program: Program) -> Program:
        for op in program.ops:
            tree = self.trees.get(op)
            if tree is None:
                ins = tuple(map(self.now, op.ins))
                if not set(op.outs) <= self.renamed.keys():
                    self.ops.append(dataclasses.replace(op, ins=ins))
            elif op in tree.leaves:
                self.leaf(op, tree.split)
            else:
                self.inner(op, tree)
        outs = tuple(map(self.now, program.outs))
        return dataclasses.replace(program, ops=tuple(self.ops), outs=outs)

    def now(self, x: Operand) -> Operand:
        return self.renamed.get(x, x) if isinstance(x, Value) else x

    def new(self, x: Value, split: _Split) -> Value:
        made = self.shards[x, split] = split.of(x, next(self.ids))
        return made

    def leaf(self, op: Op, split: _Split) -> None:
        """Leaves out a gather; leaves of a sum its reduce_scatter."""
        (x,), (out,) = map(self.now, op.ins), op.outs
        if op.name == "all_gather":
            assert isinstance(x, Value)
            self.shards[out, split] = x
            return
        params = {"axes": split.axes, "dim": split.dim, "reduction": op.params["reduction"]}
        made = self.new(out, split)
        self.emit(op, "reduce_scatter", (x,), made, params)

    def inner(self, op: Op, tree: _Tree) -> None:
        """Writes an elementwise op on shards, and the gather after the last one."""
        (out,), split = op.outs, tree.split
        ins = tuple(self.shard(x, op, split) for x in op.ins)
        made = self.new(out, split)
        self.ops.append(dataclasses.replace(op, ins=ins, outs=(made,)))
        if op is not tree.root:
            return
        cutters = self.graph.cutters(out, split)
        self.renamed.update((cutter.outs[0], made) for cutter in cutters)
        if len(cutters) < len(self.graph.readers[out]):
            first = min(tree.leaves, key=lambda leaf: self.graph.place[leaf])
            params = {"axes": split.axes, "dim": split.dim}
            self.emit(first, "all_gather", (made,), out, params)

    def shard(self, x: Operand, reader: Op, split: _Split) -> Operand:
        """The part of an operand that goes with the shards of the result."""
        if not isinstance(x, Value) or not split.cut(x, reader.outs[0]):
            return self.now(x)
        if (x, split) not in self.shards:
            maker = self.graph.maker.get(x)
            if (
                maker is not None
                and maker.name == "all_gather"
                and self.graph.gathers(maker, split)
            ):
                (source,) = values_of(maker.ins)
                self.shards[x, split] = self.renamed.get(source, source)
            else:
                params = {"axes": split.axes, "dim": split.dim, "size": x.shape[split.dim]}
                made = Op("shard", (self.now(x),), (self.new(x, split),), MappingProxyType(params),
                          source=reader.source, call=local.shard)  # fmt: skip
                self.ops.append(made)
        return self.shards[x, split]

    def emit(
        self, like: Op, name: str, ins: tuple[Operand, ...], out: Value, params: Mapping[str, Any]
    ) -> None:
        params = MappingProxyType(dict(params))
        self.ops.append(dataclasses.replace(like, name=name, ins=ins, outs=(out,), params=params))


def _is_sum(op: Op) -> bool:
    return op.name == "all_reduce" and len(op.ins) == 1 and op.params["reduction"] == "sum"


def _is_elementwise(op: Op) -> bool:
    """Whether `op` does on shards what it does on whole values."""
    known = op_rule(op)
    if known is None or known.params or known.call or len(op.outs) != 1 or not op.outs[0].shape:
        return False
    return not op.bodies and is_pure(op) and known.factors(op).elementwise
