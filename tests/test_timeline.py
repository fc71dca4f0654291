"""The schedule of a device and its network, against one made in small steps of time."""

import hypothesis
import hypothesis.strategies as st

from gspmd.timeline import Task, schedule


@st.composite
def tasks(draw: st.DrawFn) -> list[Task]:
    made: list[Task] = []
    for i in range(draw(st.integers(0, 9))):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        network = draw(st.booleans())
        alone = draw(st.booleans())
        made.append(Task(float(draw(st.integers(1, 5))), tuple(sorted(after)), network, alone))
    return made


def in_steps(tasks: list[Task]) -> tuple[float, list[float], list[float]]:
    """The end, the starts and what is exposed, found one second at a time."""
    left = [task.seconds for task in tasks]
    start = [-1.0] * len(tasks)
    exposed = [0.0] * len(tasks)
    running: set[int] = set()
    now = 0.0
    while any(left):
        for unit in (True, False):  # the network first
            if any(tasks[i].network is unit for i in running):
                continue
            if any(tasks[i].alone for i in running):
                continue
            ready = [
                i
                for i, task in enumerate(tasks)
                if task.network is unit and start[i] < 0 and not any(left[j] for j in task.after)
            ]
            if ready and not (tasks[ready[0]].alone and running):
                start[ready[0]] = now
                running.add(ready[0])
        computing = any(not tasks[i].network for i in running)
        for i in list(running):
            exposed[i] += not computing
            left[i] -= 1
            if not left[i]:
                running.remove(i)
        now += 1
    return now, start, exposed


@hypothesis.given(tasks())
def test_it_is_what_small_steps_find(drawn: list[Task]) -> None:
    made = schedule(drawn)
    assert (made.seconds, list(made.start), list(made.exposed)) == in_steps(drawn)


@hypothesis.given(tasks())
def test_it_ends_after_what_is_computed_and_what_is_exposed(drawn: list[Task]) -> None:
    made = schedule(drawn)
    computed = sum(task.seconds for task in drawn if not task.network)
    assert made.seconds == computed + sum(made.exposed)


@hypothesis.given(tasks())
def test_nothing_starts_before_what_it_waits_for(drawn: list[Task]) -> None:
    made = schedule(drawn)
    for task, start in zip(drawn, made.start, strict=True):
        assert all(start >= made.start[j] + drawn[j].seconds for j in task.after)


def test_a_gather_hides_behind_a_product() -> None:
    gather, product, reader = Task(2, network=True), Task(3), Task(1, after=(0, 1))
    assert schedule([gather, product, reader]).exposed == (0, 0, 0)
    assert schedule([gather, product, reader]).seconds == 4


def test_a_reduction_that_stops_the_computation_is_exposed() -> None:
    made = schedule([Task(2, network=True, alone=True), Task(3), Task(1, after=(0, 1))])
    assert made.exposed == (2, 0, 0)
    assert made.seconds == 6


def test_half_of_a_long_gather_is_hidden() -> None:
    made = schedule([Task(4, network=True), Task(2), Task(1, after=(0,))])
    assert made.exposed == (2, 0, 0)
