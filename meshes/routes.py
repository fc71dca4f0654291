"""The paths of a permutation's blocks, and which link has the most of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gspmd.meshes.placement import Placement
from gspmd.meshes.topology import Level
from gspmd.sharding import Axes


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What blocks of equal size meet, in seconds for each byte of a block, and in seconds.

    The busiest link takes `busiest`, the slowest `alone` for what one chip sends another; the
    longest path takes `latency`, and the last hop of one `hop`.
    """

    busiest: float = 0.0
    alone: float = 0.0
    latency: float = 0.0
    hop: float = 0.0


def load(axes: Axes, placement: Placement, pairs: Sequence[tuple[int, int]]) -> Load:
    """What sending along `axes` meets, if each first of `pairs` has a block for each second.

    Each block goes by a shortest path, x first; over switches by its sender's own port.
    """
    levels, chip = placement.topology.levels, placement.topology.chip.devices
    ends = np.asarray(pairs, np.int64).reshape(-1, 2)
    groups = _groups(axes, placement)
    src, dst = groups[:, ends[:, 0]].ravel(), groups[:, ends[:, 1]].ravel()
    src, dst = src[src != dst], dst[src != dst]
    busiest = alone = hop = 0.0
    latency = np.zeros(src.size)
    open_ = np.ones(src.size, bool)  # whether a block does not go over a network further out
    leaves = ~open_  # whether it goes over this network
    for k, level in reversed([*enumerate(levels)]):
        moves = open_ & (placement.topology.at(src, k) != placement.topology.at(dst, k))
        leaves |= moves
        if level.torus:
            most, hops, part = _along(placement, k, src[moves], dst[moves])
            latency[moves] += hops * level.latency
            link = level.bandwidth * chip
            together = part * _pairs(src[moves] // chip, dst[moves] // chip)
            ends_here = k == 0 or not levels[k - 1].torus
        else:
            # A spine is reached through all ports of the devices below a switch together.
            ports = placement.topology.below(k) if level.shape == "spine" else 1
            most = max(_most(x[leaves] // ports) for x in (src, dst))
            latency[leaves] += level.latency
            link = level.bandwidth * ports
            together, moves = 1.0, leaves
            ends_here = level.shape == "switch"
        busiest = max(busiest, most / link)
        if moves.any():
            alone, hop = max(alone, together / link), max(hop, level.latency)
        if ends_here:
            open_, leaves = open_ & ~leaves, np.zeros(src.size, bool)
    return Load(busiest, alone, float(latency.max(initial=0.0)), hop)


def _groups(axes: Axes, placement: Placement) -> np.ndarray:
    """The devices of each group along `axes`, but for groups that are copies of others.

    Where a level plays no part, all of its units are alike; ports within a unit are shared.
    """
    mesh, topology = placement.mesh, placement.topology
    order = [mesh.names.index(a) for a in mesh.names if a not in axes]
    order += [mesh.names.index(a) for a in axes]
    groups = placement.device_array().transpose(order).reshape(-1, mesh.size(axes))
    used = {part.level for axis in axes for part in placement.parts.get(axis, ()) if part.size > 1}
    outermost = max((k for k, x in enumerate(topology.levels) if x.name in used), default=-1)
    for k, level in enumerate(topology.levels):
        if level.name not in used and (level.torus or k > outermost):
            groups = groups[topology.at(groups[:, 0], k) == 0]
    return groups


def _along(
    placement: Placement, k: int, src: np.ndarray, dst: np.ndarray
) -> tuple[float, np.ndarray, float]:
    """What blocks meet along dim `k` of a torus.

    That is how many go over the busiest link, how many links each passes, and which part of a block
    passes one link.
    """
    topology, level = placement.topology, placement.topology.levels[k]
    here, there = topology.at(src, k), topology.at(dst, k)
    # On this dim a block has the coordinates of its receiver in the dims before it.
    below = topology.below(k)
    line = dst % below // topology.chip.devices + src // (below * level.size) * below
    _, line = np.unique(line, return_inverse=True)
    if level.shape == "line":
        hops = np.abs(there - here)
        ways = ((here, hops * (there > here)), (there, hops * (there < here)))
        return max(_most_over(first, way, 1, line, level) for first, way in ways), hops, 1.0
    ahead = (there - here) % level.size
    back = level.size - ahead
    # Where both ways are as long, half of the block goes either way.
    up = np.where(ahead == back, 0.5, ahead < back)
    busiest = max(
        _most_over(here, ahead, up, line, level), _most_over(there, back, 1 - up, line, level)
    )
    return busiest, np.minimum(ahead, back), float(np.maximum(up, 1 - up).max(initial=0.0))


def _most_over(
    first: np.ndarray,
    hops: np.ndarray,
    share: np.ndarray | float,
    line: np.ndarray,
    level: Level,
) -> float:
    """The most blocks on a link in one direction: each is on `hops` links from its `first` on."""
    if not first.size:
        return 0.0
    # Unrolled: a path that wraps around ends past the last link.
    width = 2 * level.size
    starts = line * width + first
    share = np.broadcast_to(share, first.shape)
    change = np.bincount(starts, share, (int(line.max()) + 1) * width)
    change -= np.bincount(starts + hops, share, change.size)
    blocks = change.reshape(-1, width).cumsum(axis=1)
    return float((blocks[:, : level.size] + blocks[:, level.size :]).max())


def _pairs(a: np.ndarray, b: np.ndarray) -> int:
    """How often the most frequent pair occurs."""
    both = a * (int(b.max(initial=0)) + 1) + b
    return int(np.unique(both, return_counts=True)[1].max(initial=0))


def _most(numbers: np.ndarray) -> int:
    """How often the most frequent of `numbers` occurs."""
    return int(np.bincount(numbers).max()) if numbers.size else 0
