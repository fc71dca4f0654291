"""order: in which order a device runs the fusions of a program, so as to need little memory.

XLA does not keep the order of the program. It tries some, and takes the one that needs least (its
`hlo_memory_scheduler.cc`); two of them are tried here.
"""

import collections
import dataclasses
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence

from gspmd.fusion import Fusion, fuse
from gspmd.ir import Program, Value, values_of

Size = Callable[[Value], float]
Scratch = Callable[[Fusion], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """The fusions of a program, each after those it reads from, and the most bytes that are live at
    once of what they make."""

    fusions: tuple[Fusion, ...]
    peak: float


def order(program: Program, size: Size, scratch: Scratch) -> dict[Program, Order]:
    """The order of `program`, and of each body of its control flow.

    `size` tells the bytes of a value, `scratch` those that a fusion needs while it runs.
    """
    found: dict[Program, Order] = {}
    fusions = fuse(program)
    inside: dict[Fusion, float] = {}
    for fusion in fusions:
        for body in fusion.root.bodies:
            found.update(order(body, size, scratch))
        inside[fusion] = max((found[body].peak for body in fusion.root.bodies), default=0.0)
    graph = _Graph.of(fusions, program, size, lambda fusion: scratch(fusion) + inside[fusion])
    tried = [graph.listed(), graph.deepest()]
    found[program] = min(
        (Order(tuple(fusions[i] for i in numbers), graph.peak(numbers)) for numbers in tried),
        key=lambda one: one.peak,
    )
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Graph:
    """The fusions by number: who makes what in how many bytes, and who reads it.

    `results` counts how often the program returns a value, `over` are those that a fusion can
    write over.
    """

    fusions: Sequence[Fusion]
    makers: Mapping[Value, int]
    readers: Mapping[Value, Sequence[int]]
    sizes: Mapping[Value, float]
    results: Mapping[Value, int]
    made: Sequence[float]
    needed: Sequence[float]
    over: Sequence[Sequence[Value]]

    @classmethod
    def of(
        cls, fusions: Sequence[Fusion], program: Program, size: Size, scratch: Scratch
    ) -> "_Graph":
        makers = {x: i for i, fusion in enumerate(fusions) for x in fusion.writes}
        readers: dict[Value, list[int]] = {x: [] for x in makers}
        for i, fusion in enumerate(fusions):
            for x in fusion.reads:
                if x in makers:
                    readers[x].append(i)
        sizes = {x: size(x) for x in makers}
        made = [sum(map(sizes.__getitem__, fusion.writes)) for fusion in fusions]
        results = collections.Counter(values_of(program.outs))
        over = [[x for one in fusion.replaces for x in one[:1]] for fusion in fusions]
        return cls(fusions, makers, readers, sizes, results, made, [*map(scratch, fusions)], over)

    def sources(self, i: int) -> list[int]:
        """The fusions that fusion `i` reads from."""
        return list(
            dict.fromkeys(self.makers[x] for x in self.fusions[i].reads if x in self.makers)
        )

    def lazy(self, i: int) -> bool:
        """Whether fusion `i` reads nothing, such as one that makes zeros: it waits until needed."""
        return not self.fusions[i].reads and bool(self.fusions[i].writes)

    def peak(self, numbers: Sequence[int]) -> float:
        """The most bytes that are live at once, in this order."""
        left = {x: len(readers) + self.results.get(x, 0) for x, readers in self.readers.items()}
        now = most = 0.0
        for i in numbers:
            reused = sum(self.sizes[x] for x in self.over[i] if left.get(x) == 1)
            now += self.made[i]
            most = max(most, now + self.needed[i] - reused)
            for x in self.fusions[i].reads:
                if x in left:
                    left[x] -= 1
                    now -= 0 if left[x] else self.sizes[x]
        return most

    def deepest(self) -> list[int]:
        """Each fusion right after what it reads from: first what has the most readers besides, then
        what is the largest with all that it comes from (XLA's DFS scheduler)."""
        count = len(self.fusions)
        weight: list[tuple[int, float]] = []  # readers besides, and bytes
        for i in range(count):
            sources = self.sources(i)
            extra = sum(max(0, len(self.readers[x]) - 1) for x in self.fusions[i].writes)
            weight.append(
                (
                    extra + sum(weight[j][0] for j in sources),
                    self.made[i] + sum(weight[j][1] for j in sources),
                )
            )

        def heaviest(numbers: Iterable[int]) -> list[int]:
            return sorted(numbers, key=lambda j: (-weight[j][0], -weight[j][1], j))

        done: dict[int, None] = {}
        last = (i for i in range(count) if not any(map(self.readers.get, self.fusions[i].writes)))
        waiting = [(i, False) for i in reversed(heaviest(last))]
        while waiting:
            i, visited = waiting.pop()
            if i in done:
                continue
            if visited:
                done[i] = None
                continue
            waiting.append((i, True))
            waiting += [(j, False) for j in reversed(heaviest(self.sources(i)))]
        return list(done)

    def listed(self) -> list[int]:
        """Of those that can run, the one that frees most, less what it makes (XLA's list
        scheduler). A loop makes nothing: its results take the place of what it starts from."""
        return _Listing(self).all()


class _Listing:
    """What has run, what can run, and how much that would free."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.left = collections.Counter({x: len(found) for x, found in graph.readers.items()})
        self.left.update(graph.results)
        self.waiting = [len(graph.sources(i)) for i in range(len(graph.fusions))]
        self.price: dict[int, tuple[float, int, int]] = {}  # of what can run, the least first
        self.ready: list[tuple[float, int, int]] = []  # a heap of these, and of some of before
        self.done: dict[int, None] = {}

    def all(self) -> list[int]:
        lazy = [i for i in range(len(self.waiting)) if self.graph.lazy(i)]
        for i, count in enumerate(self.waiting):
            if not count and not self.graph.lazy(i):
                self.weigh(i)
        for i in lazy:
            self.release(i)
        while self.ready:
            price = heapq.heappop(self.ready)
            if self.price.get(price[-1]) == price:
                self.run(price[-1])
        for i in lazy:
            if i not in self.done:
                self.run(i)
        return list(self.done)

    def weigh(self, i: int) -> None:
        """Says anew what fusion `i` takes less what it frees; ties go to what more wait for, then
        to the first."""
        graph, fusion = self.graph, self.graph.fusions[i]
        freed = sum(graph.sizes[x] for x in fusion.reads if x in graph.sizes and self.left[x] == 1)
        takes = 0.0 if fusion.root.bodies else graph.made[i] + graph.needed[i]
        users = sum(len(graph.readers[x]) for x in fusion.writes)
        self.price[i] = (takes - freed, -users, i)
        heapq.heappush(self.ready, self.price[i])

    def run(self, i: int) -> None:
        """Fusion `i` runs, after what waited for it."""
        graph = self.graph
        for j in graph.sources(i):
            if j not in self.done:
                self.run(j)
        self.done[i] = None
        self.price.pop(i, None)
        for x in graph.fusions[i].reads:
            if x in graph.makers:
                self.left[x] -= 1
                if self.left[x] == 1:
                    for j in graph.readers[x]:
                        if j in self.price:
                            self.weigh(j)
        if not graph.lazy(i):
            self.release(i)

    def release(self, i: int) -> None:
        """Those that read of fusion `i` need not wait for it."""
        graph = self.graph
        for j in dict.fromkeys(j for x in graph.fusions[i].writes for j in graph.readers[x]):
            self.waiting[j] -= 1
            if not self.waiting[j] and not graph.lazy(j):
                self.weigh(j)
