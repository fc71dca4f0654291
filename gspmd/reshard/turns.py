"""Turns: the way between two shardings where every dim nests, at no more bytes than needed.

Two splits of a dim *nest* where one lists the axes of the other and then more: (x) and (x, y). Each
device keeps what it holds of its target and fetches the rest: slice, reduce_scatter, all_reduce,
all_to_all, all_gather, in this order. Each is taken once at most (a slice or a gather once per dim)
and all pieces stay where they arrive, so that a device receives what it needs and lacks.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from gspmd.collectives import wire_bytes
from gspmd.sharding import Axes, Mesh, Sharding, show_axes

Shape = tuple[int, ...]
Digits = tuple[Axes, ...]  # axes per dim
NOTHING: Mapping[int, Axes] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """One collective, or a slice, over `axes`: what it makes a device send."""

    kind: str
    axes: Axes
    wire_bytes: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """From one sharding to the next, by one move; by several where no sharding lies between them.

    Permutes in a row exchange blocks (see `blocks`); without any move, every device has its own.
    `extra` are per dim the axes that split it in between only.
    """

    moves: tuple[Move, ...]
    src: Sharding
    dst: Sharding
    extra: Digits = ()

    @property
    def kind(self) -> str:
        """The kinds of the moves: `all_to_all`, `slice+reduce_scatter`."""
        return "+".join(dict.fromkeys(move.kind for move in self.moves)) or "slice"

    @property
    def axes(self) -> Axes:
        return tuple(dict.fromkeys(axis for move in self.moves for axis in move.axes))

    @property
    def wire_bytes(self) -> float:
        return sum(move.wire_bytes for move in self.moves)

    @property
    def collectives(self) -> int:
        return sum(move.kind != "slice" for move in self.moves)

    def __str__(self) -> str:
        return f"{self.kind}[{show_axes(self.axes)}] {self.src} -> {self.dst}"


def block(n: int, axes: Axes, mesh: Mesh) -> int:
    """Elements of a dim of size n on one device."""
    return -(-n // mesh.size(axes)) if axes else n


def nests(n: int, axes: Axes, prefix: Axes, mesh: Mesh) -> bool:
    """Blocks of `axes` lie inside the blocks of `prefix`, so that one step leads between the two.

    Not so for 6 elements over (x=2, y=2): blocks of 2 over (x, y) straddle the blocks of 3 over x.
    """
    rest = axes[len(prefix) :]
    return not prefix or block(n, axes, mesh) * mesh.size(rest) == block(n, prefix, mesh)


def common(a: Axes, b: Axes) -> int:
    """How many axes `a` and `b` begin with alike."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


Way = tuple[Step, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """What is resharded: logical shape, bytes of an element, and the mesh."""

    shape: Shape
    size: float
    mesh: Mesh

    def bytes(self, state: Sharding) -> float:
        """What a device holds of it."""
        return math.prod(state.local_shape(self.shape, self.mesh)) * self.size

    def peak(self, src: Sharding, way: Iterable[Step]) -> float:
        """The most that a device holds between two steps."""
        return max(map(self.bytes, (src, *(step.dst for step in way))))

    def nested(self, src: Sharding, dst: Sharding) -> bool:
        """Whether all dims nest."""
        return all(map(self.nested_dim, self.shape, src.dims, dst.dims))

    def nested_dim(self, n: int, a: Axes, b: Axes) -> bool:
        """Whether blocks of a dim of size n over `a` lie in those over `b`, or the reverse."""
        short, long = (a, b) if len(a) < len(b) else (b, a)
        return long[: len(short)] == short and nests(n, long, short, self.mesh)

    def waste(self, i: int, axes: Axes, prefix: Axes = ()) -> float:
        """How many times its size a dim takes over `axes`, padding included; it must nest."""
        n = self.shape[i]
        if not nests(n, axes, prefix, self.mesh):
            return math.inf
        return block(n, axes, self.mesh) * self.mesh.size(axes) / n if n else 1.0

    def free(self, state: Sharding) -> list[str]:
        """The axes along which the tensor is replicated, in the order of the mesh."""
        held = {*state.axes, *state.partial}
        return [axis for axis, size in self.mesh.axes if size > 1 and axis not in held]


def turn(tensor: Tensor, src: Sharding, dst: Sharding, extra: Digits = ()) -> Way:
    """The way between two shardings that nest, in between split along the axes `extra` as well."""
    return _Turn(tensor, src, dst, extra or ((),) * len(src.dims)).way()


def digits(src: Sharding, dst: Sharding, extra: Digits) -> Digits:
    """Per dim all axes that split it before, within or after a turn, major first."""
    sides = zip(src.dims, dst.dims, extra, strict=True)
    return tuple((b if len(b) > len(a) else a) + more for a, b, more in sides)


class _Turn:
    """A way between two shardings that nest, as it is built.

    A move turns some of a dim's digits on, which split it from then on, or off. Where those that
    are on come first in every dim, a sharding is reached, and a step ends.
    """

    def __init__(self, tensor: Tensor, src: Sharding, dst: Sharding, extra: Digits) -> None:
        self.tensor, self.dst, self.extra = tensor, dst, extra
        self.digits = digits(src, dst, extra)
        self.state = src
        self.on = [set(axes) for axes in src.dims]
        self.owed = {axis for axis in src.partial if axis not in dst.partial}
        self.waste = [tensor.waste(i, axes) for i, axes in enumerate(self.digits)]
        self.order = sorted(range(len(self.waste)), key=lambda i: -self.waste[i])
        self.noted: list[tuple[str, Axes, list[set[str]]]] = []  # with what was on before
        self.touched: set[str] = set()
        self.steps: list[Step] = []

    def way(self) -> Way:
        src, dst = self.state, self.dst
        held = set(src.axes)
        more = [b[len(a) :] + e for a, b, e in zip(src.dims, dst.dims, self.extra, strict=True)]
        less = [a[len(b) :] + e for a, b, e in zip(src.dims, dst.dims, self.extra, strict=True)]
        free = [tuple(a for a in axes if a not in held and a not in self.owed) for axes in more]
        first = [axes[: common(axes, own)] for axes, own in zip(more, free, strict=True)]
        for i, axes in enumerate(first):  # each of them a step of its own
            self._slice(i, axes)
        for i, axes in enumerate(free):
            self._slice(i, axes[len(first[i]) :])
        self._reduce_scatter([tuple(a for a in axes if a in self.owed) for axes in more])
        if self.owed:
            left = tuple(axis for axis in src.partial if axis in self.owed)
            self.owed.clear()
            self._did("all_reduce", left)
        self._all_to_all([tuple(a for a in axes if a in held) for axes in more])
        for i in self.order:
            rest = tuple(axis for axis in less[i] if axis in self.on[i])
            if rest:
                self._did("all_gather", rest)
        return tuple(self.steps)

    def _slice(self, i: int, axes: Axes) -> None:
        if axes:
            self._did("slice", axes, {i: axes})

    def _reduce_scatter(self, own: list[Axes]) -> None:
        if sum(map(bool, own)) > 1 and max(self.waste) > 1:  # one dim at a time: less padding
            for i in reversed(self.order):
                self._reduce_scatter([own[i] if j == i else () for j in range(len(own))])
        elif any(own):
            group = tuple(axis for axes in own for axis in axes)
            self.owed -= set(group)
            self._did("reduce_scatter", group, dict(enumerate(own)))

    def _all_to_all(self, own: list[Axes]) -> None:
        group = tuple(axis for axes in own for axis in axes)
        if group:
            self._did("all_to_all", group, dict(enumerate(own)))

    def _did(self, kind: str, axes: Axes, split: Mapping[int, Axes] = NOTHING) -> None:
        """Notes a move, after which `split` divides dims; ends the step at a sharding."""
        if kind != "all_reduce":
            off = {a for on in self.on for a in on}.intersection(axes)
            self.noted.append((kind, axes, [on.copy() for on in self.on]))
            self.on = [(on - off) | {*split.get(i, ())} for i, on in enumerate(self.on)]
        else:
            self.noted.append((kind, axes, self.on))
        self.touched.update(axes)
        reached = tuple(axes[: len(on)] for axes, on in zip(self.digits, self.on, strict=True))
        if all(map(self._is_reached, range(len(reached)), reached)):
            kept = (*self.dst.partial, *self.owed)
            self._end_step(owing(reached, self.state, kept))

    def _end_step(self, state: Sharding) -> None:
        ends = {*self.state.axes, *state.axes}
        extra = tuple(
            tuple(axis for axis in axes if axis in self.touched - ends) for axes in self.extra
        )
        self.steps.append(Step(self._moves(state, extra), self.state, state, extra))
        self.state = state
        self.noted.clear()
        self.touched.clear()

    def _moves(self, state: Sharding, extra: Digits) -> tuple[Move, ...]:
        """What was noted, those of a kind as one."""
        tensor, size = self.tensor, self.tensor.mesh.size
        every = digits(self.state, state, extra)
        local = self.state.local_shape(tensor.shape, tensor.mesh)
        piece = [
            -(-n // size(axes[len(held) :]))
            for n, axes, held in zip(local, every, self.state.dims, strict=True)
        ]
        found: dict[str, Move] = {}
        for kind, axes, on in self.noted:
            joined = (size(a for a in d if a not in o) for d, o in zip(every, on, strict=True))
            operand = math.prod(map(int.__mul__, piece, joined)) * tensor.size
            sent = wire_bytes(kind, size(axes), operand) if kind != "slice" else 0.0
            before = found.get(kind, Move(kind, ()))
            found[kind] = Move(kind, before.axes + axes, before.wire_bytes + sent)
        return tuple(found.values())

    def _is_reached(self, i: int, axes: Axes) -> bool:
        """Whether a dim is now split over `axes`, in blocks in which its pieces lie whole."""
        if self.on[i].difference(axes):
            return False
        n = self.tensor.shape[i]
        return axes == self.dst.dims[i] or nests(n, self.digits[i], axes, self.tensor.mesh)


def owing(dims: Digits, like: Sharding, kept: Iterable[str]) -> Sharding:
    """`dims`, owing what `like` owes over the axes `kept`."""
    partial = tuple(axis for axis in like.partial if axis in kept)
    return Sharding(dims, partial, like.reduction if partial else "sum")
