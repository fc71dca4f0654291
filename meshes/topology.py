"""Topologies: chips and the levels of links and switches that join them."""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Iterator
from typing import Any, Literal

import networkx as nx
import numpy as np

from gspmd.errors import MeshError, nearest
from gspmd.meshes.chips import Chip, Links
from gspmd.meshes.chips import chip as read_chip

Shape = Literal["ring", "line", "switch", "spine"]


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """One way in which the devices of a topology are joined, `size` units of the level below.

    On a "ring" and a "line" each unit has a link to the next; "switch" joins any with any; "spine"
    is a switch of switches, which the same ports reach through the level below. `bandwidth` is what
    one JAX device can send, in bytes/s: to one neighbour on a ring or a line, in all on a switch;
    `latency` is seconds from a unit to the next. `hosts` says that it is the hosts' network.
    """

    name: str
    size: int
    shape: Shape
    bandwidth: float
    latency: float
    hosts: bool = False

    @property
    def torus(self) -> bool:
        return self.shape in ("ring", "line")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips, and the levels that join their devices, innermost first.

    Devices are numbered along the levels, the innermost fastest: as JAX numbers those of a slice.
    """

    name: str
    chip: Chip
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        if len(set(names)) != len(names):
            raise MeshError(f"the levels of {self.name} must have distinct names, got {names}.")
        for below, level in zip((None, *self.levels), self.levels, strict=False):
            if level.size < 1 or level.bandwidth <= 0:
                raise MeshError(
                    f"level {level.name!r} of {self.name} has size {level.size} and "
                    f"{level.bandwidth} bytes/s; both must be positive."
                )
            if level.shape == "spine" and (below is None or below.torus):
                raise MeshError(
                    f"level {level.name!r} of {self.name} is a spine, which joins switches, and "
                    "there is none below it."
                )

        self._check_chips()

    def _check_chips(self) -> None:
        """Raises unless the levels are those in a chip, then a torus of chips, then switches."""
        reached, switched = 1, False
        for level in self.levels:
            if level.torus and (switched or reached != self.chip.devices):
                raise MeshError(
                    f"level {level.name!r} of {self.name} is a {level.shape} of groups of "
                    f"{reached} devices; rings and lines join chips of {self.chip.devices}, so "
                    "give them after the cores of a chip and before all switches."
                )
            switched |= reached >= self.chip.devices and not level.torus
            reached = reached if level.torus else reached * level.size
        if reached % self.chip.devices:
            raise MeshError(
                f"{self.name} has {self.devices} devices, but {self.chip.name} chips have "
                f"{self.chip.devices} each; give it a level of {self.chip.devices} cores."
            )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.name, self.chip.name, self.levels))

    @property
    def devices(self) -> int:
        """JAX devices of all chips together."""
        return math.prod(level.size for level in self.levels)

    @property
    def chips(self) -> int:
        return self.devices // self.chip.devices

    def below(self, k: int) -> int:
        """Devices in one unit of level `k`."""
        return self._below[k]

    @functools.cached_property
    def _below(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate((x.size for x in self.levels), operator.mul, initial=1))

    def at(self, devices: np.ndarray, k: int) -> np.ndarray:
        """Which unit of level `k` holds each of `devices`, within the unit of the level above."""
        return devices // self._below[k] % self.levels[k].size

    def graph(self) -> "nx.Graph[Any]":
        """The chips, by number, and the switches, by level and number, with the links as edges.

        An edge has the "bandwidth" that it carries each way, in bytes/s, its "latency" in seconds,
        and the name of its "level". A chip of several devices has an edge to itself: what they
        exchange goes over it.
        """
        graph: nx.Graph[Any] = nx.Graph(name=self.name)
        graph.add_nodes_from(range(self.chips))
        below = 1
        for k, level in enumerate(self.levels):
            spines = itertools.takewhile(lambda x: x.shape == "spine", self.levels[k + 1 :])
            if level.size * math.prod(spine.size for spine in spines) > 1:
                graph.add_edges_from(self._edges(k, below))
            below *= level.size
        return graph

    def _edges(self, k: int, below: int) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
        """The links of level `k`, whose units are `below` devices each."""
        level, chip = self.levels[k], self.chip.devices
        link = {"level": level.name, "latency": level.latency}
        if below < chip:
            link["bandwidth"] = level.bandwidth * chip
            yield from ((n, n, link) for n in range(self.chips))
        elif level.torus:
            link["bandwidth"] = level.bandwidth * chip
            stride = below // chip
            numbers = np.arange(self.chips).reshape(-1, level.size, stride)
            yield from _links(numbers[:, :-1], numbers[:, 1:], link)
            if level.shape == "ring":
                yield from _links(numbers[:, -1], numbers[:, 0], link)
        else:
            # Half of the latency is on the way into the switch, half on the way out.
            joins = below if level.shape == "spine" else chip
            link |= {"bandwidth": level.bandwidth * joins, "latency": level.latency / 2}
            for unit in range(self.devices // joins):
                under = (self.levels[k - 1].name, unit) if level.shape == "spine" else unit
                yield under, (level.name, unit * joins // (below * level.size)), link

    def level(self, name: str) -> Level:
        """The level called `name`.

        Raises:
          MeshError: there is none.
        """
        for level in self.levels:
            if level.name == name:
                return level
        names = [level.name for level in self.levels]
        raise MeshError(
            f"{self.name} has no level {name!r}{nearest(name, names)} It has {', '.join(names)}."
        )

    def __str__(self) -> str:
        return self.name


def _links(
    a: np.ndarray, b: np.ndarray, link: dict[str, Any]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        yield x, y, link


def topology(name: str | Topology) -> Topology:
    """The topology that `name` describes: a chip, and how many of them lie where.

    "tpu-v4:8x8x16" is a slice of that shape, "tpu-v5e:16x16 x4 slices" four slices over the hosts'
    network, "h100:8x256" 256 nodes of 8, "h100:8x32x8" the same with 32 nodes to a leaf switch,
    "cpu:8" eight cores of this machine. A `Topology` is itself.

    Raises:
      MeshError: there is no such chip, or chips of this kind are never joined like this.
    """
    if isinstance(name, Topology):
        return name
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MeshError(
            f"a topology is a gspmd.meshes.Topology or the name of one, such as 'h100:8x4', got "
            f"{name!r} of type {type(name).__name__}."
        )
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise MeshError(
            f"{name!r} is not a topology; write a chip and how many lie along each dim, such as "
            "'tpu-v4:8x8x16', 'h100:8x256' or 'tpu-v5e:16x16 x4 slices'."
        )
    kind = read_chip(match["chip"])
    shape = tuple(int(n) for n in (match["shape"] or "1").split("x"))
    slices = int(match["slices"] or 1)
    if min(*shape, slices) == 0:
        raise MeshError(f"topology {name!r} has a dim of size 0; each must be at least 1.")
    return _built(name.strip(), kind, shape, slices)


def _built(name: str, kind: Chip, shape: tuple[int, ...], slices: int = 1) -> Topology:
    build = {"tpu": _tpu, "gpu": _gpu, "cpu": _cpu}[kind.platform]
    return Topology(name, kind, build(name, kind, shape, slices))


def smallest(chip: Chip | str, devices: int) -> Topology:
    """The topology of just as many `devices`, in as few slices or nodes as hold them.

    These are alike, and the slices as square as can be.

    Raises:
      MeshError: there is no such chip, or the chips do not come in such a number.
    """
    chip = read_chip(chip)
    chips, left = divmod(devices, chip.devices)
    if left or chips < 1:
        raise MeshError(
            f"{devices} devices are no whole number of {chip.name} chips of {chip.devices}; use "
            f"{(chips + 1) * chip.devices}."
        )
    found, shape, slices = _next(chips, chip)
    if found != chips:
        raise MeshError(
            f"{chips} chips of {chip.name} cannot be shared out evenly: a "
            f"{'node' if chip.platform == 'gpu' else 'slice'} is {_form(chip)}; use "
            f"{found * chip.devices} devices, '{_named(chip, shape, slices)}', or name the "
            "topology that you have."
        )
    return _built(_named(chip, shape, slices), chip, shape, slices)


def _named(chip: Chip, shape: tuple[int, ...], slices: int) -> str:
    several = f" x{slices} slices" if slices > 1 else ""
    return f"{chip.name}:{'x'.join(map(str, shape))}{several}"


def _next(chips: int, chip: Chip) -> tuple[int, tuple[int, ...], int]:
    """The first number from `chips` on that they come in, the shape of a slice, and how many.

    They come in as few slices, or nodes, as hold them, all alike.
    """
    if chip.platform == "cpu":
        return chips, (chips,), 1
    most = math.prod(chip.links.largest)
    for n in itertools.count(chips):
        groups = -(-n // most)
        if n % groups:
            continue
        if chip.platform == "gpu":
            return n, (n // groups, groups) if groups > 1 else (n,), 1
        if shapes := _tori(n // groups, chip.links):
            rings = {shape: all(_wrapping(shape, chip.links)) for shape in shapes}
            return n, max(shapes, key=lambda shape: (rings[shape], sorted(shape))), groups
    raise AssertionError("slices of the largest shape are as many as one likes")


def _form(chip: Chip) -> str:
    """What a slice, or a node, can be."""
    links = chip.links
    most = f"{math.prod(links.largest)} chips"
    if chip.platform == "gpu":
        return f"at most {most}"
    if len(links.largest) == 2:
        return f"part of {'x'.join(map(str, links.largest))}, {most}"
    cube = "x".join([str(links.wraps)] * 3)
    return f"part of a cube of {cube}, or whole cubes, at most {most}"


def _tori(chips: int, links: Links) -> list[tuple[int, ...]]:
    """The shapes that a slice of so many chips can have, as they are written: 2x2x4, 2x2x1."""
    shapes = [(a, chips // a) for a in range(1, math.isqrt(chips) + 1) if chips % a == 0]
    if len(links.largest) == 3:
        shapes = [
            (a, b, rest // b)
            for a, rest in shapes
            for b in range(a, math.isqrt(rest) + 1)
            if rest % b == 0
        ]
    shapes = [tuple(sorted(shape, key=lambda n: (n == 1, n))) for shape in shapes]
    return [shape for shape in shapes if _fits(shape, links)]


def _fits(shape: tuple[int, ...], links: Links) -> bool:
    """Whether a slice has this shape.

    A torus of two dims is wired; of three, whole cubes are joined in any shape, and only within one
    are there smaller slices, with sides of 1, 2 or 4.
    """
    if len(shape) == 2:
        return all(n <= m for n, m in zip(sorted(shape), links.largest, strict=True))
    cube = links.wraps or 1
    whole = all(n % cube == 0 for n in shape) and math.prod(shape) <= math.prod(links.largest)
    return whole or all(cube % n == 0 for n in shape)


def _wrapping(shape: tuple[int, ...], links: Links) -> tuple[bool, ...]:
    """Which dims of a slice wrap around; with three, that is between whole cubes."""
    wraps = tuple(links.wraps is not None and n % links.wraps == 0 for n in shape)
    return wraps if len(shape) < 3 or all(wraps) else (False,) * len(shape)


_NAME = re.compile(r"(?P<chip>[^:\s]+)(:(?P<shape>\d+(x\d+)*))?(\s+x\s*(?P<slices>\d+)\s+slices?)?")


def _tpu(name: str, kind: Chip, shape: tuple[int, ...], slices: int) -> tuple[Level, ...]:
    links, dims = kind.links, len(kind.links.largest)
    if shape == (1,):
        shape = (1,) * dims
    if len(shape) != dims:
        raise MeshError(
            f"topology {name!r} has {len(shape)} dims, but {kind.name} chips form a torus of "
            f"{dims}, of at most {'x'.join(map(str, links.largest))}."
        )
    if not _fits(shape, links):
        chips = math.prod(shape) * slices
        most = chips if kind.network is not None else math.prod(links.largest)
        _, possible, several = _next(min(chips, most), kind)
        raise MeshError(
            f"topology {name!r} is a slice of {'x'.join(map(str, shape))}, {math.prod(shape)} "
            f"chips, but one of {kind.name} is {_form(kind)}; write "
            f"'{_named(kind, possible, several)}'."
        )
    share = links.bandwidth / kind.devices
    levels = [
        Level(axis, n, "ring" if wrap else "line", share, links.latency)
        for axis, n, wrap in zip("xyz", shape, _wrapping(shape, links), strict=False)
    ]
    if kind.devices > 1:
        assert kind.between is not None
        port = kind.between
        levels.insert(0, Level("core", kind.devices, "switch", port.bandwidth, port.latency))
    if slices > 1:
        if kind.network is None:
            raise MeshError(
                f"topology {name!r} joins {slices} slices, but no bandwidth between slices of "
                f"{kind.name} is published; take one slice, or build a Topology by hand."
            )
        dcn = kind.network.bandwidth / kind.devices
        levels.append(Level("slices", slices, "switch", dcn, kind.network.latency, hosts=True))
    return tuple(levels)


def _gpu(name: str, kind: Chip, shape: tuple[int, ...], slices: int) -> tuple[Level, ...]:
    links, network = kind.links, kind.network
    (domain,) = links.largest
    node, *nodes = shape
    if slices > 1 or len(nodes) > 2:
        raise MeshError(
            f"topology {name!r}: GPUs have no slices, and at most three numbers: GPUs in a node, "
            f"nodes at a leaf switch, leaf switches; such as '{kind.name}:{domain}x32x8'."
        )
    if node > domain:
        raise MeshError(
            f"topology {name!r} has {node} GPUs in a node, but NVLink joins at most {domain} "
            f"of {kind.name}; write '{kind.name}:{domain}x{-(-math.prod(shape) // domain)}'."
        )
    nvlink = links.count * links.bandwidth
    levels = [Level("nvlink", node, "switch", nvlink, links.latency)]
    tree: tuple[tuple[str, Shape], ...] = (("network", "switch"), ("spine", "spine"))
    for size, (level, form) in zip(nodes, tree, strict=False):
        assert network is not None
        levels.append(Level(level, size, form, network.bandwidth, network.latency, hosts=True))
    return tuple(levels)


def _cpu(name: str, kind: Chip, shape: tuple[int, ...], slices: int) -> tuple[Level, ...]:
    cores, *more = shape
    if slices > 1 or more:
        raise MeshError(
            f"topology {name!r}: the cores of a CPU are a plain number; write "
            f"'cpu:{math.prod(shape) * slices}'."
        )
    return (Level("cores", cores, "switch", kind.links.bandwidth, kind.links.latency),)
