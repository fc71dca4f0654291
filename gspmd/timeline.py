"""schedule: when each fusion and each collective of a program runs on one device.

A device computes one thing at a time and its network carries one collective at a time, each in the
order of the program among what is ready. A collective that is asynchronous runs while the device
computes what does not depend on it; any other stops the computation.
"""

import dataclasses
import heapq
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A piece of work of `seconds`, after the tasks numbered `after`.

    `network` says that the network does it, `alone` that nothing else runs meanwhile.
    """

    seconds: float
    after: tuple[int, ...] = ()
    network: bool = False
    alone: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """`start` and `exposed` have an entry for each task, in seconds; `seconds` is the end.

    `exposed` is for how long a network task kept the device from computing.
    """

    seconds: float
    start: tuple[float, ...]
    exposed: tuple[float, ...]


def schedule(tasks: Sequence[Task]) -> Schedule:
    """The schedule that starts what is ready as soon as a unit is free, in the tasks' order."""
    waiting = [len(set(task.after)) for task in tasks]
    then: list[list[int]] = [[] for _ in tasks]
    for i, task in enumerate(tasks):
        for j in set(task.after):
            then[j].append(i)
    units = Units(tasks)
    for i, count in enumerate(waiting):
        if not count:
            units.add(i)
    while done := units.step():
        for i in done:
            for j in then[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    units.add(j)
    assert not any(waiting), "the tasks wait for each other"
    return Schedule(units.now, tuple(units.start), tuple(units.exposed))


class Units:
    """The two units of a device, what is ready for each, and what each is at."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.now = 0.0
        self.start = [0.0] * len(tasks)
        self.exposed = [0.0] * len(tasks)
        self._ready: dict[bool, list[int]] = {False: [], True: []}  # by whether for the network
        self._at: dict[bool, tuple[float, int] | None] = {False: None, True: None}

    def add(self, i: int) -> None:
        """Task `i` is ready."""
        heapq.heappush(self._ready[self.tasks[i].network], i)

    def step(self) -> list[int]:
        """Starts what can start and goes on to the next end; the tasks that ended there."""
        self._begin()
        running = [at for at in self._at.values() if at is not None]
        if not running:
            return []
        end = min(end for end, _ in running)
        network = self._at[True]
        if self._at[False] is None and network is not None:
            self.exposed[network[1]] += end - self.now
        self.now = end
        done: list[int] = []
        for unit, at in self._at.items():
            if at is not None and at[0] <= end:
                self._at[unit] = None
                done.append(at[1])
        return done

    def _begin(self) -> None:
        for unit in (True, False):
            ready, other = self._ready[unit], self._at[not unit]
            if self._at[unit] is not None or not ready:
                continue
            task = self.tasks[ready[0]]
            if other is not None and (task.alone or self.tasks[other[1]].alone):
                continue  # it is next, and waits for the other unit
            i = heapq.heappop(ready)
            self.start[i] = self.now
            self._at[unit] = (self.now + task.seconds, i)
