"""What a collective takes: bytes over the links that its groups use, and hops.

Every group of devices along the same axes runs the same collective at the same time, so groups
whose paths overlap share the links. The schedules are those which attain the bounds: on the dims
of a torus all at once, in both directions; over switches by doubling; in a hierarchy the outer
level carries what the inner has gathered or reduced, and the levels are busy at the same time.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from gspmd.errors import MeshError, nearest
from gspmd.meshes import routes
from gspmd.meshes.placement import Placement
from gspmd.meshes.topology import Level
from gspmd.sharding import Axes, show_axes

Pairs = tuple[tuple[int, int], ...]
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute")


@dataclasses.dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one collective: of its bytes alone, of its hops alone, and in `total`.

    Blocks follow one another, so that most of the shorter of the two passes during the longer.
    """

    bandwidth: float
    latency: float
    total: float


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """A collective along `axes`, of an operand of `bytes` a device, that runs `trips` times."""

    kind: str
    bytes: float
    axes: Axes
    trips: int = 1


def seconds(
    kind: str,
    bytes: float,
    axes: Axes,
    placement: Placement,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Time:
    """What a collective along `axes` takes, of which each device brings an operand of `bytes`.

    `pairs` are sender and receiver of a `collective_permute`, by their index along `axes`; without
    them, each sends to the next.

    Raises:
      MeshError: `kind` is no collective, `axes` are not of the mesh, `pairs` name devices that are
        not along them, or `bytes` is no number of bytes.
    """
    if not 0 <= bytes < math.inf:
        raise MeshError(f"{kind} of {bytes} bytes a device; give a number that is at least 0.")
    rate = _rate(kind, tuple(axes), placement, None if pairs is None else tuple(pairs))
    return rate.of(bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class _Busy:
    """What works as one, such as the dims of a torus: seconds for each byte of the operand.

    A block takes `latency` to pass it, and the last one `rest` to arrive when it is done. Of what
    is sent, `block` is sent last: seconds for each byte of the operand.
    """

    byte: float
    latency: float
    rest: float
    block: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Rate:
    """How the time of a collective follows from its bytes.

    It goes `phases` times through all of `busy`, which takes a block at least `latency`.
    """

    busy: tuple[_Busy, ...]
    latency: float = 0.0
    phases: int = 1
    start: float = 0.0

    def of(self, bytes: float) -> Time:
        """The time for an operand of `bytes`."""
        if not self.busy:
            return Time(0.0, 0.0, 0.0)
        last = max(x.byte * bytes + x.rest for x in self.busy)
        first = max(x.block for x in self.busy) * bytes + self.latency
        return Time(
            self.phases * bytes * max(x.byte for x in self.busy),
            self.start + self.phases * self.latency,
            self.start + self.phases * max(last, first),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
    """What a group takes of a level: `size` units; `share` groups use each of its links."""

    level: Level
    size: int
    share: int
    wraps: bool

    @property
    def out(self) -> float:
        """Bytes/s into the unit that has the least, from all sides, for this group."""
        return (2 if self.wraps else 1) * self.level.bandwidth / self.share

    @property
    def latency(self) -> float:
        """Seconds between the two units of the group that are farthest apart."""
        hops = self.share * (self.size // 2 if self.wraps else self.size - 1)
        return hops * self.level.latency


@functools.lru_cache(maxsize=8192)
def _rate(kind: str, axes: Axes, placement: Placement, pairs: Pairs | None) -> _Rate:
    if kind not in KINDS:
        raise MeshError(
            f"{kind!r} is no collective{nearest(kind, KINDS)} There are {', '.join(KINDS)}."
        )
    axes = tuple(dict.fromkeys(axes))
    for axis in axes:
        if axis not in placement.mesh.names:
            raise MeshError(
                f"the mesh {placement.mesh} has no axis {axis!r}"
                f"{nearest(axis, placement.mesh.names)}"
            )
    size = placement.mesh.size(axes)
    for pair in pairs or ():
        if not all(0 <= i < size for i in pair):
            raise MeshError(
                f"the pair {pair} of a {kind} names a device that is not along {show_axes(axes)}, "
                f"which has {size}; number them from 0 to {size - 1}."
            )
    if size == 1:
        return _Rate(())
    start = placement.topology.chip.start
    if kind == "collective_permute":
        pairs = tuple((i, (i + 1) % size) for i in range(size)) if pairs is None else pairs
        met = routes.load(axes, placement, pairs)
        busy = _Busy(met.busiest, met.latency, met.hop, met.alone)
        return _Rate((busy,), met.latency, start=start)
    tiers = _tiers(axes, placement)
    if kind == "all_to_all":
        busy = _exchanged(tiers, size)
        latency = max(x.latency for x in busy)  # a message goes one way or another
    else:
        busy = _gathered(tiers, size if kind == "all_gather" else 1)
        latency = sum(x.latency for x in busy)  # a block goes all the way
        busy = [dataclasses.replace(x, rest=latency - x.latency + x.rest) for x in busy]
    return _Rate(
        busy=tuple(busy),
        latency=latency,
        phases=2 if kind == "all_reduce" else 1,  # it scatters the sums, then gathers them
        start=start,
    )


Tier = tuple[_Span, ...]


def _tiers(axes: Axes, placement: Placement) -> tuple[Tier, ...]:
    """The levels that a group along `axes` spans, innermost first, by what works as one.

    That is the dims of a torus, and a switch with the spines above it.
    """
    tiers: list[list[_Span]] = []
    joins = False
    for level in placement.topology.levels:
        parts = [p for a in axes for p in placement.parts.get(a, ()) if p.level == level.name]
        size = math.prod(part.size for part in parts)
        reach = max((part.size * part.stride for part in parts), default=1)
        wraps = level.shape == "ring" and reach == level.size
        span = _Span(level, size, reach // size, wraps)
        if level.shape == "spine" or (level.torus and joins):
            tiers[-1].append(span)
        else:
            tiers.append([span])
        joins = level.torus
    return tuple(map(tuple, tiers))


def _gathered(tiers: Sequence[Tier], times: int) -> list[_Busy]:
    """What is busy when `times` the operand is gathered, or scattered."""
    below, busy = 1, list[_Busy]()
    for tier in tiers:
        used = [span for span in tier if span.size > 1]
        if not used:
            continue
        n = math.prod(span.size for span in used)
        if tier[0].level.torus:
            # By these dims at least this much must come, whichever dims are gathered first.
            byte = max(
                (math.prod(x.size for x in dims) - 1) / n / sum(x.out for x in dims)
                for k in range(1, len(used) + 1)
                for dims in itertools.combinations(used, k)
            )
            hop = max(span.level.latency for span in used)
            byte *= times / below
            latency = sum(span.latency for span in used)
            busy.append(_Busy(byte, latency, hop, byte / (n - 1) / _alone(used)))
        else:
            byte = max(
                (1 - 1 / _above(tier, i)) / (below * _below(tier, i) * span.level.bandwidth)
                for i, span in enumerate(tier)
            )
            # Whoever has a block sends it to one who has not: so many times.
            steps = [math.ceil(math.log2(span.size)) for span in tier]
            hops = [x * _height(tier, i) for i, x in enumerate(steps)]
            hop = max(_height(tier, i) for i, x in enumerate(steps) if x)
            byte *= times
            last = max(_last_step(x.size) * _above(tier, i + 1) for i, x in enumerate(tier))
            busy.append(_Busy(byte, sum(hops), hop, byte * last / (n - 1)))
        below *= n
    return busy


def _alone(dims: Sequence[_Span]) -> int:
    """How much faster a block passes these dims where no other group is on its way."""
    return min(span.share for span in dims)


def _last_step(n: int) -> int:
    """Blocks that one of `n` devices sends in the largest step of doubling what each has."""
    half = 1 << (n - 1).bit_length() >> 1
    return max(half // 2, n - half) if n > 1 else 0


def _above(tier: Tier, i: int) -> int:
    """Units of level `i` that the switches of this level, and the spines above it, join."""
    return math.prod(span.size for span in tier[i:])


def _below(tier: Tier, i: int) -> int:
    return math.prod(span.size for span in tier[:i])


def _height(tier: Tier, i: int) -> float:
    """Seconds from a unit to another through the switches of level `i` of `tier`."""
    return sum(span.level.latency for span in tier[: i + 1])


def _exchanged(tiers: Sequence[Tier], size: int) -> list[_Busy]:
    """What is busy, for each byte of the operand, when each sends every other its part."""
    within, busy = 1, list[_Busy]()
    for tier in tiers:
        used = [i for i, span in enumerate(tier) if span.size > 1]
        if not used:
            continue
        within *= math.prod(span.size for span in tier)
        stays = within / size  # of the operand: what is meant for this tier or for one below
        if tier[0].level.torus:
            # The links in the middle carry what each half sends to the other.
            byte = max((n.size // 2) * (n.size - n.size // 2) / n.size / n.out for n in tier)
            hop = max(tier[i].level.latency for i in used)
            byte *= stays
            latency = sum(tier[i].latency for i in used)
            block = byte / (size - 1) / _alone([tier[i] for i in used])
            busy.append(_Busy(byte, latency, hop, block))
        else:
            # A port carries what goes over the spines above its switch as well.
            byte = max((1 - 1 / _above(tier, i)) / x.level.bandwidth for i, x in enumerate(tier))
            height = _height(tier, used[-1])
            byte *= stays
            busy.append(_Busy(byte, height, height, byte / (size - 1)))
    return busy
