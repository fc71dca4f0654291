"""Looking for a cheaper program: local search over the splits of ops, judged by the whole.

`choose` splits each op for its own sake. Here whole programs are compared: the ops that take part
in a collective are made to split otherwise, one kind of op at a time, the program is partitioned
anew, and what lowers the bytes sent, or the work where that weighs more, is kept. Ops of one task
(the same rule, shapes and goals) move together: the q, k and v of a layer, or all layers of an
unrolled model, so that the moves do not multiply with the layers.

The budget is a number of ops partitioned, never a time: every host must arrive at the same plan.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping

from gspmd.choose import Choice, Situation, Task, choose, led_by_result, pinned, ranked
from gspmd.collectives import sent_by
from gspmd.ir import COLLECTIVES, Op, Program, Value
from gspmd.options import ROOM, Target
from gspmd.partition import Partitioned, partition
from gspmd.sharding import Axes, Mesh, Sharding

STEPS = {0: 0, 1: 15_000, 2: 1_000_000}
"""Ops that a search may partition, by effort: half a second's worth, and half a minute's."""

Pins = Mapping[Task, tuple[Axes, ...]]
Move = tuple[Task, tuple[Axes, ...]]


def search(
    program: Program,
    shardings: Mapping[Value, Sharding],
    mesh: Mesh,
    target: Target,
    effort: int,
    room: int = ROOM,
) -> Partitioned:
    """The cheapest local program of `program` that `effort` lets it find; `room` as in `partition`.

    Effort 0 splits each op as propagation did its result; 1 and 2 look further.
    """
    made = functools.partial(partition, program, shardings, mesh, target, rules={}, room=room)
    if effort == 0:
        return made(led_by_result)
    best, pins = made(), dict[Task, tuple[Axes, ...]]()
    left = STEPS[effort] - best.visits
    moves, tried = _moves(program, best, mesh), set[Move]()
    while moves and left > 0:
        task, axes = move = moves.pop()
        tried.add(move)
        found = made(_pinning({**pins, task: axes}))
        left -= found.visits
        if cost(found, mesh) < cost(best, mesh) * (1 - 1e-9):
            best, pins = found, {**pins, task: axes}
            moves = [move for move in _moves(program, best, mesh) if move not in tried]
    return best


def cost(made: Partitioned, mesh: Mesh) -> float:
    """What a device sends, and does, in bytes sent."""
    return made.work + sum(sent for _, sent in _sent(made.program, mesh))


def _sent(program: Program, mesh: Mesh) -> Iterator[tuple[Op, float]]:
    """The collectives of a local program, each with what a device sends by it in all."""
    for op, trips in program.walk():
        if op.name in COLLECTIVES:
            yield op, abs(trips) * sent_by(op, mesh)


def _pinning(pins: Pins) -> Callable[[Situation], Choice]:
    def pick(situation: Situation) -> Choice:
        axes = pins.get(situation.task)
        choice = None if axes is None else pinned(situation, axes)
        return choice or choose(situation)

    return pick


def _moves(program: Program, made: Partitioned, mesh: Mesh) -> list[Move]:
    """Other splits for the ops around collectives, those last by which most might be saved."""
    blamed = _blamed(program, made, mesh)
    runs = {op: abs(trips) for op, trips in program.walk()}
    found: dict[Move, float] = {}
    for op, decided in made.decided.items():
        task = decided.situation.task
        for other in ranked(decided.situation) if task in blamed else ():
            if other.axes != decided.choice.axes:
                dearer = (other.cost - decided.choice.cost) * runs[op]
                found.setdefault((task, other.axes), blamed[task] - dearer)
    return sorted(found, key=lambda move: found[move])


def _blamed(program: Program, made: Partitioned, mesh: Mesh) -> dict[Task, float]:
    """What is sent for the operands of each task, of its results, and for the sums it owes."""
    makers = {out: op for op, _ in program.walk() for out in op.outs}
    blamed: dict[Task, float] = collections.defaultdict(float)
    for op, sent in _sent(made.program, mesh):
        cause = op.cause
        if cause is None:
            continue
        around = (cause.consumer, makers.get(cause.value), *(arose for _, arose in cause.sums))
        decided = [made.decided[op] for op in around if op is not None and op in made.decided]
        for task in dict.fromkeys(one.situation.task for one in decided):
            blamed[task] += sent
    return blamed
