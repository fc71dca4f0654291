"""Collectives, block by block, over the links of a topology's graph.

What `gspmd.meshes.network` says in formulas happens here: every block passes every link of its
path, waits where the link is busy, and is sent on when all of it has arrived. Links and what they
carry come from `Topology.graph`, groups from `Placement.device_array`; nothing is shared with the
formulas. A schedule is a graph of sends: a `Send` waits for those before it.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog

from gspmd.meshes import Placement, Topology

Link = tuple[Any, Any]


@dataclasses.dataclass(slots=True)
class Send:
    """One block over one directed link, once the blocks `after` have arrived.

    Of the blocks that wait for a link, that with the highest `urgency` goes first.
    """

    link: Link
    bytes: float
    after: list["Send"]
    urgency: float = 0.0


class Network:
    """The topology as a graph, and where its devices are in it."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.graph = topology.graph()
        self.levels = topology.levels
        sizes = [level.size for level in self.levels]
        self.places = [math.prod(sizes[:k]) for k in range(len(sizes) + 1)]

    def at(self, device: int, k: int) -> int:
        """Which unit of level `k` holds `device`, in the unit of the level above."""
        return device // self.places[k] % self.levels[k].size

    def moved(self, device: int, k: int, to: int) -> int:
        """The device in unit `to` of level `k`, elsewhere where `device` is."""
        return device + (to - self.at(device, k)) * self.places[k]

    def chip(self, device: int) -> int:
        return device // self.topology.chip.devices

    def path(self, a: int, b: int, k: int) -> list[Link]:
        """The links from device `a` to `b` through the switches of level `k`."""
        if self.levels[k].shape == "switch":
            if self.places[k] < self.topology.chip.devices:
                return [(self.chip(a), self.chip(a))]
            switch = (self.levels[k].name, a // self.places[k + 1])
            return [(self.chip(a), switch), (switch, self.chip(b))]
        leaf = k
        while self.levels[leaf].shape == "spine":
            leaf -= 1
        up: list[Any] = [self.chip(a)]
        down: list[Any] = [self.chip(b)]
        for i in range(leaf, k):
            up.append((self.levels[i].name, a // self.places[i + 1]))
            down.append((self.levels[i].name, b // self.places[i + 1]))
        top = (self.levels[k].name, a // self.places[k + 1])
        return list(itertools.pairwise([*up, top, *reversed(down)]))

    def steps(self, a: int, k: int, count: int) -> list[Link] | None:
        """The links along dim `k` from `a`, `count` units up or down; None where there are none."""
        links: list[Link] = []
        here = a
        for _ in range(abs(count)):
            at = (self.at(here, k) + (1 if count > 0 else -1)) % self.levels[k].size
            there = self.moved(here, k, at)
            if not self.graph.has_edge(self.chip(here), self.chip(there)):
                return None
            links.append((self.chip(here), self.chip(there)))
            here = there
        return links

    def run(self, sends: Sequence[Send]) -> list[float]:
        """When each of `sends` has arrived, in seconds."""
        waits = [len(send.after) for send in sends]
        number = {id(send): i for i, send in enumerate(sends)}
        then: list[list[int]] = [[] for _ in sends]
        for i, send in enumerate(sends):
            for before in send.after:
                then[number[id(before)]].append(i)
        queues: dict[Link, list[tuple[float, int]]] = {}
        free: dict[Link, bool] = {}
        events: list[tuple[float, int, int]] = []  # time, 0: a block arrives, 1: a link is free

        def begin(link: Link, now: float) -> None:
            if free.get(link, True) and queues.get(link):
                _, i = heapq.heappop(queues[link])
                free[link] = False
                edge = self.graph.edges[link]
                done = now + sends[i].bytes / edge["bandwidth"]
                heapq.heappush(events, (done, 1, i))
                heapq.heappush(events, (done + edge["latency"], 0, i))

        def ready(i: int) -> None:
            heapq.heappush(queues.setdefault(sends[i].link, []), (-sends[i].urgency, i))

        for i, count in enumerate(waits):
            if count == 0:
                ready(i)
        for link in list(queues):
            begin(link, 0.0)
        arrived = [-1.0] * len(sends)
        while events:
            now, kind, i = heapq.heappop(events)
            if kind == 1:
                free[sends[i].link] = True
                begin(sends[i].link, now)
                continue
            arrived[i] = now
            for j in then[i]:
                waits[j] -= 1
                if waits[j] == 0:
                    ready(j)
                    begin(sends[j].link, now)
        assert min(arrived) >= 0, "a send waits for what never arrives"
        return arrived


Group = list[int]
"""Devices, by their index along the axes."""


def groups_along(placement: Placement, axes: Sequence[str]) -> list[Group]:
    names = placement.mesh.names
    order = [names.index(a) for a in names if a not in axes] + [names.index(a) for a in axes]
    return placement.device_array().transpose(order).reshape(-1, placement.mesh.size(axes)).tolist()


def simulated(
    kind: str,
    bytes: float,
    axes: Sequence[str],
    placement: Placement,
    pairs: Sequence[tuple[int, int]] | None = None,
    pieces: int = 32,
) -> float:
    """Seconds of a collective of operands of `bytes`, each block of which is cut into `pieces`."""
    network = Network(placement.topology)
    groups = groups_along(placement, axes)
    size = len(groups[0])
    if kind == "collective_permute":
        pairs = pairs or [(i, (i + 1) % size) for i in range(size)]
        sends = list(_messages(network, groups, pairs, bytes, pieces, rotate=False))
        return max(network.run(urgent(sends)))
    if kind == "all_to_all":
        pairs = [(i, (i + r) % size) for r in range(1, size) for i in range(size)]
        sends = list(_messages(network, groups, pairs, bytes / size, pieces, rotate=True))
        return max(network.run(urgent(sends)))
    shard = bytes if kind == "all_gather" else bytes / size
    sends = [x for tree in _trees(network, groups, shard, pieces) for x in tree]
    gathered = network.run(urgent(sends))
    if kind == "all_gather":
        return max(gathered)
    scattered = max(network.run(_backwards(sends, gathered)))
    return scattered + (max(gathered) if kind == "all_reduce" else 0.0)


def urgent(sends: list[Send]) -> list[Send]:
    """The same sends: the more follow one after the other, the more urgent is the first."""
    for send in reversed(sends):
        for before in send.after:
            before.urgency = max(before.urgency, send.urgency + 1)
    return sends


def _backwards(sends: list[Send], arrived: list[float]) -> list[Send]:
    """Sums that come together on the paths on which blocks spread out: the last goes first."""
    turned = {
        id(send): Send(send.link[::-1], send.bytes, [], when)
        for send, when in zip(sends, arrived, strict=True)
    }
    for send in sends:
        for before in send.after:
            turned[id(before)].after.append(turned[id(send)])
    return [turned[id(send)] for send in reversed(sends)]


def _members(network: Network, group: Group) -> list[list[int]]:
    """The units of each level in which `group` has devices, which are a grid."""
    units = [sorted({network.at(d, k) for d in group}) for k in range(len(network.levels))]
    assert math.prod(map(len, units)) == len(group)
    return units


def _trees(network: Network, groups: list[Group], shard: float, pieces: int) -> list[list[Send]]:
    """How each piece of each device's shard spreads over its group.

    Outer switches come first, then the dims of the torus, then what is within a chip or a node. The
    dims are gone through in every order at once: by one order go as many bytes as make the busiest
    link least busy.
    """
    orders = _orders(network, _members(network, groups[0]))
    load = [
        _loads(itertools.chain.from_iterable(_spread(network, groups, order, 1.0, 0)))
        for order in orders
    ]
    shares = _balanced(network, load)
    return [
        tree
        for piece in range(pieces)
        for order, share in zip(orders, shares, strict=True)
        if share > 1e-9
        for tree in _spread(network, groups, order, shard * share / pieces, piece)
    ]


def _orders(network: Network, members: list[list[int]]) -> list[tuple[int, ...]]:
    used = [k for k, units in enumerate(members) if len(units) > 1]
    torus = [k for k in used if network.levels[k].torus]
    first = torus[0] if torus else 0
    outer = tuple(k for k in reversed(used) if k > first and k not in torus)
    inner = tuple(k for k in reversed(used) if k <= first and k not in torus)
    return [(*outer, *dims, *inner) for dims in itertools.permutations(torus)]


def _loads(sends: Iterable[Send]) -> dict[Link, float]:
    load: dict[Link, float] = {}
    for send in sends:
        load[send.link] = load.get(send.link, 0.0) + send.bytes
    return load


def _balanced(network: Network, loads: list[dict[Link, float]]) -> list[float]:
    """The share of each of the loads that makes the busiest link least busy."""
    links = sorted({link for load in loads for link in load}, key=str)
    busy = np.array(
        [[load.get(x, 0.0) / network.graph.edges[x]["bandwidth"] for load in loads] for x in links]
    )
    busy = np.unique(busy / busy.max(), axis=0)
    n = len(loads)
    found = linprog(
        c=[0.0] * n + [1.0],
        A_ub=np.hstack([busy, -np.ones((len(busy), 1))]),
        b_ub=np.zeros(len(busy)),
        A_eq=[[1.0] * n + [0.0]],
        b_eq=[1.0],
    )
    return found.x[:n].tolist()


def _spread(
    network: Network, groups: list[Group], order: Sequence[int], bytes: float, turn: int
) -> Iterator[list[Send]]:
    """A tree for each device of each group: how its block of `bytes` reaches all of the group."""
    for group in groups:
        members = _members(network, group)
        for source in group:
            tree: list[Send] = []
            holders: dict[int, Send | None] = {source: None}
            for k in order:
                for device, got in list(holders.items()):
                    along = _line if network.levels[k].torus else _doubling
                    holders.update(along(network, k, members[k], device, got, bytes, tree, turn))
            yield tree


def _chain(links: Sequence[Link], bytes: float, after: list[Send], tree: list[Send]) -> Send:
    """The last of the sends over `links`, one after the other; all are added to `tree`."""
    for link in links:
        tree.append(Send(link, bytes, after))
        after = [tree[-1]]
    return tree[-1]


def _line(
    network: Network,
    k: int,
    units: list[int],
    device: int,
    got: Send | None,
    bytes: float,
    tree: list[Send],
    turn: int,
) -> Iterator[tuple[int, Send]]:
    """Both ways along a dim of the torus, all the way to the ends, or half of the way around."""
    n, size = len(units), network.levels[k].size
    mine = units.index(network.at(device, k))
    gaps = {(b - a) % size for a, b in itertools.pairwise([*units, units[0]])}
    around = len(gaps) == 1 and network.steps(device, k, size) is not None
    # Where the farthest can be reached both ways, blocks take turns.
    up = (n - 1 + turn % 2) // 2 if around else n - 1 - mine
    for sign, count in ((1, up), (-1, n - 1 - up if around else mine)):
        here, last = device, got
        for j in range(1, count + 1):
            to = units[(mine + sign * j) % n]
            links = network.steps(here, k, sign * ((sign * (to - network.at(here, k))) % size))
            assert links is not None
            last = _chain(links, bytes, [] if last is None else [last], tree)
            here = network.moved(here, k, to)
            yield here, last


def _doubling(
    network: Network,
    k: int,
    units: list[int],
    device: int,
    got: Send | None,
    bytes: float,
    tree: list[Send],
    turn: int,
) -> Iterator[tuple[int, Send]]:
    """Over a switch: whoever has the block sends it to one who has not."""
    n = len(units)
    mine = units.index(network.at(device, k))
    devices = [network.moved(device, k, units[(mine + r) % n]) for r in range(n)]
    have: list[list[Send]] = [[] if got is None else [got]]  # what the next send waits for
    while len(have) < n:
        for r in range(min(len(have), n - len(have))):
            there = devices[len(have)]
            send = _chain(network.path(devices[r], there, k), bytes, have[r], tree)
            have[r] = [send]  # one step after the other
            have.append([send])
            yield there, send


def _messages(
    network: Network,
    groups: list[Group],
    pairs: Sequence[tuple[int, int]],
    bytes: float,
    pieces: int,
    rotate: bool,
) -> Iterator[Send]:
    """Blocks from sender to receiver, each by a shortest path, half each way where two are."""
    torus = [k for k, level in enumerate(network.levels) if level.torus]
    outside = torus[-1] if torus else -1
    for piece, (i, j) in itertools.product(range(pieces), pairs):
        for group in groups:
            a, b = group[i], group[j]
            differ = [k for k in range(len(network.levels)) if network.at(a, k) != network.at(b, k)]
            dims = [k for k in torus if k in differ]
            if not differ:
                continue
            if differ[-1] > outside or not dims:
                ways = [network.path(a, b, differ[-1])]
            else:
                turn = piece % len(dims) if rotate else 0
                ways = _routes(network, a, b, dims[turn:] + dims[:turn])
            for way in ways:
                sends: list[Send] = []
                _chain(way, bytes / pieces / len(ways), [], sends)
                yield from sends


def _routes(network: Network, a: int, b: int, dims: Sequence[int]) -> list[list[Link]]:
    """The shortest paths from `a` to `b` that go along one of `dims` after the other."""
    if not dims:
        return [[]]
    k, *rest = dims
    size, to = network.levels[k].size, network.at(b, k)
    ahead = (to - network.at(a, k)) % size
    ways = [network.steps(a, k, ahead), network.steps(a, k, ahead - size)]
    open_ways = [way for way in ways if way is not None]
    shortest = min(map(len, open_ways))
    there = network.moved(a, k, to)
    return [
        way + more
        for way in open_ways
        if len(way) == shortest
        for more in _routes(network, there, b, rest)
    ]
