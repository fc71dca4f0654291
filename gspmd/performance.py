"""The performance model: what the program that each device runs costs on a chip.

Each fusion takes the longest of its arithmetic and its memory traffic, each collective what the
links of the topology allow, and the schedule says which collectives the computation hides.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from gspmd import meshes
from gspmd.collectives import axes_of, is_collective, pairs_of
from gspmd.cost import Run, cost, flops_of, main_dtype, products
from gspmd.errors import GspmdError, MeshError, nearest
from gspmd.findings import Finding, Pipeline, pipelines
from gspmd.fusion import Fusion, fuse
from gspmd.ir import COLLECTIVES, Op, Program, bytes_of
from gspmd.memory import memory
from gspmd.meshes import Chip, Placement, Topology, Traffic, network
from gspmd.optimize.drop_unused import drop_unused
from gspmd.report import (
    CollectiveRow,
    Flops,
    OpRow,
    PipelineRow,
    Place,
    Report,
    Seconds,
    counted,
    repeated,
    show_size,
)
from gspmd.sharding import Mesh, root_axis
from gspmd.storage import STORAGE
from gspmd.timeline import Task, schedule

ASYNCHRONOUS: Mapping[str, tuple[str, ...]] = {
    # XLA's defaults: a TPU gathers and permutes while it computes; its reductions, and its
    # all_to_alls, stop it (jax-ml/scaling-book, "roofline"; openxla/xla, latency hiding scheduler).
    "tpu": ("all_gather", "collective_permute"),
    # NCCL runs on a stream of its own.
    "gpu": ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute"),
    # The devices of a CPU send with the cores that compute.
    "cpu": (),
}
"""The collectives that run while a device of a platform computes."""

UNCOUNTED = frozenset(
    (
        "cholesky", "cholesky_update", "eig", "eigh", "fft", "ffi_call", "geqrf", "hessenberg",
        "householder_product", "lu", "ormqr", "pallas_call", "qr", "schur", "svd",
        "triangular_solve", "tridiagonal", "tridiagonal_solve",
    )
)  # fmt: skip
"""Ops that compute more than they read, by an algorithm of the library's that runs them."""

SLOW = 0.1
"""The share of a step from which on an axis that crosses slices or nodes is worth a finding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Assumptions:
    """What a report takes for granted; the defaults are the platform's.

    `asynchronous` are the collectives that run while a device computes. `trips` is how often a loop
    without a bound runs; there is no default.
    """

    asynchronous: tuple[str, ...]
    trips: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What is reported on: a plan's local program and the global one that it came from.

    `mesh` is that of the programs, `user_mesh` the same before any axis was cut into sub-axes.
    """

    name: str
    program: Program
    model: Program
    mesh: Mesh
    user_mesh: Mesh
    donated: tuple[bool, ...]


def of(
    work: Work,
    chip: Chip | str,
    topology: Topology | Placement | str | None,
    asynchronous: Iterable[str] | None,
    trips: int | None,
) -> Report:
    """The report that `Plan.report` returns, whose arguments these are."""
    chip = meshes.chip(chip)
    if topology is None:
        topology = meshes.smallest(chip, work.mesh.devices)
    if not isinstance(topology, Placement):
        topology = meshes.make_mesh(work.user_mesh, topology, traffic(work.program))
    if topology.topology.chip != chip:
        raise MeshError(
            f"the report is for {chip.name}, but topology {topology.topology.name} is made of "
            f"{topology.topology.chip.name}; name one kind of chip."
        )
    if topology.mesh != work.user_mesh:
        raise MeshError(
            f"the plan is for mesh {work.user_mesh}, and the placement for mesh {topology.mesh}; "
            "place the plan's mesh."
        )
    if trips is not None and (type(trips) is not int or trips < 1):
        raise GspmdError(
            f"trips={trips!r}: how often a loop without a bound runs is a whole number, at least 1."
        )
    kinds = ASYNCHRONOUS[chip.platform] if asynchronous is None else tuple(asynchronous)
    for kind in kinds:
        if not is_collective(kind):
            raise GspmdError(
                f"asynchronous has {kind!r}, which is no collective{nearest(kind, COLLECTIVES)} "
                f"There are {', '.join(COLLECTIVES)}."
            )
    return report(work, chip, topology, Assumptions(kinds, trips))


def traffic(program: Program) -> list[Traffic]:
    """What a placement of the program's mesh is chosen for."""
    return [
        Traffic(op.name, bytes_of(op.ins), tuple(map(root_axis, axes_of(op))), abs(trips))
        for op, trips in program.walk()
        if is_collective(op.name)
    ]


def report(work: Work, chip: Chip, where: Placement, assumptions: Assumptions) -> Report:
    """The report on work whose mesh is placed on a topology.

    Raises:
      MeshError: the chip has no peak for the program's dtype; a loop has no bound.
    """
    piped = pipelines(work.model)
    timer = _Timer(chip, where.refined(work.mesh), assumptions, _numbers(work.program), piped)
    step = timer.time(work.program, 1)
    times = functools.partial(_times, assumptions=assumptions)
    dtype = main_dtype(products(work.program, times))
    return _with_findings(
        Report(
            name=work.name,
            chip=chip,
            topology=where.topology,
            placement=where,
            devices=work.mesh.devices,
            peak=chip.peak_flops(dtype) if dtype is not None else 0.0,
            dtype=str(dtype) if dtype is not None else "",
            flops=Flops(
                _model_flops(work, times, piped),
                *(
                    sum(row.flops * row.trips for row in rows)
                    for rows in (timer.ops, counted(timer.ops))
                ),
            ),
            seconds=Seconds(
                step,
                sum(row.seconds * row.trips for row in timer.ops),
                sum(row.seconds * row.trips for row in timer.collectives),
                sum(row.exposed * row.trips for row in timer.collectives),
            ),
            memory=memory(work.program, work.donated, STORAGE[chip.platform]),
            ops=tuple(timer.ops),
            collectives=tuple(sorted(timer.collectives, key=lambda row: row.number)),
            findings=(),
            pipelines=tuple(
                PipelineRow(
                    p.stages,
                    p.microbatches,
                    p.ticks,
                    p.busy,
                    took,
                    took * p.bubble,
                    str(p.source or "(boundary)"),
                )
                for p, took in timer.loops.items()
            ),
        )
    )


def _with_findings(made: Report) -> Report:
    return dataclasses.replace(made, findings=tuple(_findings(made)))


def _numbers(program: Program) -> dict[Op, int]:
    ops = (op for op, _ in program.walk() if is_collective(op.name))
    return {op: i for i, op in enumerate(ops, start=1)}


class _Timer:
    """Times a program and its bodies, and keeps a row for each thing that takes time."""

    def __init__(
        self,
        chip: Chip,
        where: Placement,
        assumptions: Assumptions,
        numbers: Mapping[Op, int],
        piped: Iterable[Pipeline],
    ) -> None:
        self.chip, self.where, self.assumptions = chip, where, assumptions
        self.numbers = numbers
        self.loops = dict.fromkeys(piped, 0.0)  # seconds of a step in the loops of each pipeline
        self.ops: list[OpRow] = []
        self.collectives: list[CollectiveRow] = []

    def time(self, program: Program, trips: int) -> float:
        """Seconds of one run of `program`, which runs `trips` times in a step."""
        fusions = fuse(program)
        writers = {v: i for i, fusion in enumerate(fusions) for v in fusion.writes}
        tasks: list[Task] = []
        for fusion in fusions:
            after = tuple(writers[v] for v in fusion.reads if v in writers)
            tasks.append(dataclasses.replace(self._task(fusion, trips), after=after))
        done = schedule(tasks)
        for fusion, task, exposed in zip(fusions, tasks, done.exposed, strict=True):
            if task.network:
                self.collectives.append(self._sent(fusion.root, task, exposed, trips))
        return done.seconds

    def _task(self, fusion: Fusion, trips: int) -> Task:
        op = fusion.root
        if is_collective(op.name):
            pairs = pairs_of(op, self.where.mesh) if op.name == "collective_permute" else None
            took = network.seconds(op.name, bytes_of(op.ins), axes_of(op), self.where, pairs)
            alone = op.name not in self.assumptions.asynchronous
            return Task(took.total, network=True, alone=alone)
        if op.bodies:
            return Task(self._bodies(op, trips), alone=True)
        one = cost(fusion, self.chip)
        name = op.name if len(fusion.ops) == 1 else _named(fusion)
        types = ", ".join(v.type for v in fusion.writes)
        self.ops.append(
            OpRow(
                name, _source(op), _phase(op), types, trips, one.flops, one.bytes, one.seconds,
                one.bound,
            )
        )  # fmt: skip
        return Task(one.seconds)

    def _bodies(self, op: Op, trips: int) -> float:
        """Seconds of all runs of the bodies of `op`; of branches, those of the slowest."""
        if op.name == "cond":
            rows = len(self.ops), len(self.collectives)
            tried: list[tuple[float, list[OpRow], list[CollectiveRow]]] = []
            for body in op.bodies:
                seconds = self.time(body, trips)
                tried.append((seconds, self.ops[rows[0] :], self.collectives[rows[1] :]))
                del self.ops[rows[0] :], self.collectives[rows[1] :]
            seconds, ops, sent = max(tried, key=lambda one: one[0])
            self.ops += ops
            self.collectives += sent
            return seconds
        times = _times(op, self.assumptions)
        before = dict(self.loops)
        took = times * sum(self.time(body, trips * times) for body in op.bodies)
        for pipeline, seconds in before.items():
            if pipeline.runs(op):  # a loop within one of its ticks is none of its own
                self.loops[pipeline] = seconds + trips * took
        return took

    def _sent(self, op: Op, task: Task, exposed: float, trips: int) -> CollectiveRow:
        if task.alone:
            overlap = "stops the computation"
        elif exposed == 0:
            overlap = "hidden: runs while the device computes"
        elif exposed < task.seconds:
            overlap = "partly hidden: there is not enough to compute meanwhile"
        else:
            overlap = "exposed: all that is left to compute needs it"
        return CollectiveRow(
            self.numbers[op], op.name, axes_of(op), trips, bytes_of(op.ins), task.seconds, exposed,
            overlap, _source(op), _phase(op),
        )  # fmt: skip


def _times(op: Op, assumptions: Assumptions) -> int:
    if op.name == "scan":
        return op.params["length"]
    if op.name != "while":
        return 1
    if assumptions.trips is None:
        raise MeshError(
            f"the loop at {_source(op)} has no bound, so that its time is unknown; say how often "
            "it runs, with trips=100 or --trips 100, or write it as a scan or fori_loop of fixed "
            "length."
        )
    return assumptions.trips


def _named(fusion: Fusion) -> str:
    """The product of a fusion, else its last op, and how many ops it holds."""
    heavy = [op.name for op in fusion.ops if op.name in ("dot_general", "conv_general_dilated")]
    return f"{(heavy or [fusion.root.name])[0]} + {len(fusion.ops) - 1}"


def _source(op: Op) -> str:
    return str(op.source) if op.source else "(boundary)"


def _phase(op: Op) -> str:
    return "boundary" if op.source is None else op.source.phase


def _model_flops(work: Work, times: Callable[[Op], int], piped: Iterable[Pipeline]) -> float:
    """What the results need, each product once, and without the bubble of pipelines."""
    model = drop_unused(work.model, work.mesh)
    runs = list(products(model, times))
    again = repeated(map(_place, runs))

    def once(found: Iterable[Run]) -> float:
        return flops_of(run for run in found if _place(run) not in again)

    idle = sum(
        pipeline.bubble * once(products(body, times, n * pipeline.ticks))
        for pipeline in piped
        for op, n in _loops(model, pipeline, times)
        for body in op.bodies
    )
    return once(runs) - idle


def _place(run: Run) -> Place:
    return _phase(run[0]), _source(run[0])


def _loops(
    program: Program, pipeline: Pipeline, times: Callable[[Op], int]
) -> Iterator[tuple[Op, int]]:
    """The loops of a pipeline, but not those within them, and how often they run."""
    for op in program.ops:
        if pipeline.runs(op):
            yield op, 1
            continue
        for body in op.bodies:
            yield from ((loop, n * times(op)) for loop, n in _loops(body, pipeline, times))


def _findings(made: Report) -> Iterable[Finding]:
    if not made.fits:
        peak, there = show_size(made.peak_bytes), show_size(made.chip.device_memory)
        yield Finding(
            "memory",
            f"{peak} are live at once on each device, of which {made.chip.name} has {there}; "
            "split more, rematerialize, or take more chips",
            bytes=made.peak_bytes,
        )
    took: dict[tuple[str, str], float] = collections.defaultdict(float)
    for op in made.ops:
        if op.name in UNCOUNTED:
            took[op.name, op.source] += op.seconds * op.trips
    for (name, source), seconds in took.items():
        yield Finding(
            "uncounted",
            f"{name} at {source} counts with its memory traffic alone, "
            f"{100 * seconds / made.seconds.step:.0f} % of a step; what it computes comes on top",
        )
    slow: dict[str, float] = collections.defaultdict(float)
    for row in made.collectives:
        for axis in dict.fromkeys(map(root_axis, row.axes)):
            if made.placement.hosts((axis,)):
                slow[axis] += row.exposed * row.trips
    for axis, seconds in slow.items():
        share = seconds / made.seconds.step if made.seconds.step else 0.0
        if share > SLOW:
            yield Finding(
                "slow-axis",
                f"axis {axis!r} crosses the hosts' network, and its collectives take "
                f"{100 * share:.0f} % of a step; give it less to send, or another place",
            )
