"""Report: what a plan costs on a chip: time, memory, and the share of the peak that it reaches.

Each fusion takes the longest of its arithmetic and its memory traffic, each collective what the
links of the topology allow, and the schedule says which collectives the computation hides.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gspmd import meshes
from gspmd.collectives import axes_of, is_collective, pairs_of
from gspmd.cost import Bound, cost, main_dtype, products
from gspmd.errors import GspmdError, MeshError, nearest
from gspmd.findings import Finding, Pipeline, pipelines
from gspmd.fusion import Fusion, fuse
from gspmd.ir import COLLECTIVES, Op, Program, bytes_of, trip_count
from gspmd.memory import Memory, memory
from gspmd.meshes import Chip, Placement, Topology, Traffic, network
from gspmd.sharding import Axes, Mesh, root_axis, show_axes
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

SLOW = 0.1
"""The share of a step from which on an axis that crosses slices or nodes is worth a finding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of matrix products and convolutions in one step, two for a multiplication and addition.

    `model` is what the program needs on one device of unlimited size, without rematerialization
    and without what stages of a pipeline do in its bubble; all else is what one device executes,
    with padding and replication: `hardware` all of it, `counted` without what rematerialization
    repeats, as the tables of the GSPMD paper count.
    """

    model: float
    hardware: float
    counted: float


@dataclasses.dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one step on each device: `step` is `compute` and the `exposed` communication."""

    step: float
    compute: float
    communication: float
    exposed: float

    @property
    def hidden(self) -> float:
        """Communication that runs while the device computes."""
        return self.communication - self.exposed


@dataclasses.dataclass(frozen=True, slots=True)
class OpRow:
    """A fusion: what one execution costs, and how often it runs in a step."""

    name: str
    source: str
    phase: str
    type: str
    trips: int
    flops: float
    bytes: float
    seconds: float
    bound: Bound


@dataclasses.dataclass(frozen=True, slots=True)
class CollectiveRow:
    """A collective of the plan, by its number: seconds of one execution, and those not hidden.

    `overlap` says why it can be hidden, or why not.
    """

    number: int
    kind: str
    axes: Axes
    trips: int
    bytes: float
    seconds: float
    exposed: float
    overlap: str
    source: str
    phase: str

    @property
    def hidden(self) -> float:
        return self.seconds - self.exposed


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineRow:
    """A pipeline: `seconds` are those of its loops in a step, forward and backward.

    Each stage works in `busy` of the `ticks` of a loop; `bubble` are the seconds of the others.
    """

    stages: int
    microbatches: int
    ticks: int
    busy: int
    seconds: float
    bubble: float
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step of a plan costs on `devices` devices of a chip.

    `mfu` and `hfu` are model and hardware FLOPs over the peak of all devices in the time of a step;
    `utilization` is that of the GSPMD paper, which leaves out what is computed a second time.
    """

    name: str
    chip: Chip
    topology: Topology
    placement: Placement
    devices: int
    peak: float  # FLOP/s of one device, in the dtype of most of the work
    dtype: str
    flops: Flops
    seconds: Seconds
    memory: Memory
    ops: tuple[OpRow, ...]
    collectives: tuple[CollectiveRow, ...]
    findings: tuple[Finding, ...]
    pipelines: tuple[PipelineRow, ...] = ()

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the devices' peaks allow in a step: 1.0 is the peak."""
        return self._share(self.flops.model / self.devices)

    @property
    def hfu(self) -> float:
        """Executed FLOPs over what a device's peak allows in a step."""
        return self._share(self.flops.hardware)

    @property
    def utilization(self) -> float:
        """Executed FLOPs but for rematerialized ones over a device's peak (GSPMD, section 5)."""
        return self._share(self.flops.counted)

    @property
    def peak_bytes(self) -> float:
        """Most bytes that are live at once on one device."""
        return self.memory.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds that."""
        return self.peak_bytes <= self.chip.device_memory

    @property
    def joules(self) -> float | None:
        """Energy of all chips in a step, at the chip's mean power, without the building's share.

        None where that power is not published.
        """
        mean = self.chip.power.mean
        return None if mean is None else self.topology.chips * mean * self.seconds.step

    def _share(self, flops: float) -> float:
        return flops / (self.peak * self.seconds.step) if self.seconds.step else 0.0

    def why(self, what: str, most: int = 8) -> str:
        """What a number of the report is made of: its largest parts, each with its source line.

        Args:
          what: one of PARTS.
          most: how many parts to name; the rest is summed up.

        Raises:
          GspmdError: there is no such number.
        """
        return _why(self, what, most)

    def __str__(self) -> str:
        return show(self)


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
    chip = meshes.chip(chip) if isinstance(chip, str) else chip
    if isinstance(topology, str):
        topology = meshes.topology(topology)
    if topology is None:
        topology = meshes.smallest(chip, work.mesh.devices)
    if isinstance(topology, Topology):
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
    dtype = main_dtype((op, p, _trips(n, assumptions)) for op, p, n in products(work.program))
    return _with_findings(
        Report(
            name=work.name,
            chip=chip,
            topology=where.topology,
            placement=where,
            devices=work.mesh.devices,
            peak=chip.peak_flops(dtype) if dtype is not None else 0.0,
            dtype=str(dtype) if dtype is not None else "",
            flops=_flops(work, assumptions, piped),
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
            "it runs, report(..., trips=100), or write it as a scan or fori_loop of fixed length."
        )
    return assumptions.trips


def _trips(trips: int, assumptions: Assumptions) -> int:
    return trips if trips >= 0 else abs(trips) * (assumptions.trips or 1)


def _named(fusion: Fusion) -> str:
    """The product of a fusion, else its last op, and how many ops it holds."""
    heavy = [op.name for op in fusion.ops if op.name in ("dot_general", "conv_general_dilated")]
    return f"{(heavy or [fusion.root.name])[0]} + {len(fusion.ops) - 1}"


def _source(op: Op) -> str:
    return str(op.source) if op.source else "(boundary)"


def _phase(op: Op) -> str:
    return op.source.phase if op.source else "boundary"


def _flops(work: Work, assumptions: Assumptions, piped: Iterable[Pipeline]) -> Flops:
    def total(program: Program, again: bool) -> float:
        return sum(
            product.flops * _trips(trips, assumptions)
            for op, product, trips in products(program)
            if again or _phase(op) != "rematerialized"
        )

    idle = sum(
        pipeline.bubble * total(body, False) * pipeline.ticks * _trips(trips, assumptions)
        for pipeline in piped
        for op, trips in _loops(work.model, pipeline)
        for body in op.bodies
    )
    return Flops(
        total(work.model, False) - idle, total(work.program, True), total(work.program, False)
    )


def _loops(program: Program, pipeline: Pipeline) -> Iterator[tuple[Op, int]]:
    """The loops of a pipeline, but not those within them, and how often they run."""
    for op in program.ops:
        if pipeline.runs(op):
            yield op, 1
            continue
        for body in op.bodies:
            yield from ((loop, n * trip_count(op)) for loop, n in _loops(body, pipeline))


def _findings(made: Report) -> Iterable[Finding]:
    if not made.fits:
        yield Finding(
            "memory",
            f"{_size(made.peak_bytes)} are live at once on each device, of which {made.chip.name} "
            f"has {_size(made.chip.device_memory)}; split more, rematerialize, or take more chips",
            bytes=made.peak_bytes,
        )
    slow: dict[str, float] = collections.defaultdict(float)
    for row in made.collectives:
        for axis in row.axes:
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


PARTS = (
    "flops.model", "flops.hardware", "flops.counted", "seconds.compute", "seconds.communication",
    "seconds.exposed", "seconds.step", "peak_bytes", "mfu", "hfu", "utilization",
)  # fmt: skip


def _why(made: Report, what: str, most: int) -> str:
    if what in ("mfu", "hfu", "utilization"):
        flops = {"mfu": made.flops.model / made.devices, "hfu": made.flops.hardware}
        return (
            f"{what} {100 * getattr(made, what):.1f} %: "
            f"{flops.get(what, made.flops.counted):.4g} FLOPs a device, over "
            f"{made.peak:.4g} FLOP/s of {made.chip.name} in {made.dtype} x "
            f"{made.seconds.step:.4g} s a step"
        )
    if what == "peak_bytes":
        rows = [(b.bytes, f"{b.kind} {b.name}", b.type, b.source) for b in made.memory.buffers]
        return _largest(what, made.peak_bytes, rows, most, _size)
    if what not in PARTS:
        raise GspmdError(f"a report has no number {what!r}; it has {', '.join(PARTS)}.")
    kind, _, name = what.partition(".")
    total = getattr(getattr(made, kind), name)
    if kind == "flops":
        rows = [
            (row.flops * row.trips, row.name, row.type, f"{row.phase}, {row.source}")
            for row in made.ops
            if name == "hardware" or row.phase != "rematerialized"
        ]
        total = sum(row[0] for row in rows)
        head = _largest("on each device", total, rows, most, lambda x: f"{x:.4g} FLOPs")
        return f"flops.{name} {getattr(made.flops, name):.4g}\n{head}"
    ops = [(r.seconds * r.trips, r.name, r.type, f"{r.phase}, {r.source}") for r in made.ops]
    sent = {
        part: [
            (getattr(r, part) * r.trips, f"#{r.number} {r.kind}", show_axes(r.axes), r.source)
            for r in made.collectives
        ]
        for part in ("seconds", "exposed")
    }
    rows = {
        "compute": ops,
        "communication": sent["seconds"],
        "exposed": sent["exposed"],
        "step": ops + sent["exposed"],
    }[name]
    return _largest(what, total, rows, most, lambda x: f"{1e3 * x:.4g} ms")


def _largest(
    what: str,
    total: float,
    rows: Iterable[tuple[float, str, str, str]],
    most: int,
    unit: Any,
) -> str:
    """A line for each of the largest rows, those of one source line and name added up."""
    sums: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    for amount, *key in rows:
        sums[key[0], key[1], key[2]] += amount
    ranked = sorted(((n, key) for key, n in sums.items() if n), key=lambda one: -one[0])
    lines = [
        f"  {100 * n / total:5.1f} %  {unit(n):>12}  {name}  {kind}  {source}"
        for n, (name, kind, source) in ranked[:most]
    ]
    rest = sum(n for n, _ in ranked[most:])
    if rest:
        lines.append(f"  {100 * rest / total:5.1f} %  {unit(rest):>12}  {len(ranked) - most} more")
    return "\n".join([f"{what} {unit(total)}", *lines])


def _size(count: float) -> str:
    return f"{count / 1e9:.4g} GB"


def show_pipeline(row: PipelineRow, step: float) -> str:
    """`4 stages, 16 microbatches, a bubble of 3 in 19 ticks: 0.25 s, 8.1 % of a step`."""
    return (
        f"{row.stages} stages, {row.microbatches} microbatches, a bubble of {row.ticks - row.busy} "
        f"in {row.ticks} ticks: {row.bubble:.4g} s, {100 * row.bubble / step:.1f} % of a step"
    )


def show(made: Report) -> str:
    """The report in a dozen lines."""
    s, f = made.seconds, made.flops
    rows = [
        ("step", f"{s.step:.4g} s = {s.compute:.4g} s compute + {s.exposed:.4g} s exposed"),
        ("communication", f"{s.communication:.4g} s, of which {s.hidden:.4g} s are hidden"),
        ("model FLOPs", f"{f.model:.4g}; each device executes {f.hardware:.4g}"),
        (
            "utilization",
            f"MFU {100 * made.mfu:.1f} %, HFU {100 * made.hfu:.1f} %, "
            f"without rematerialization {100 * made.utilization:.1f} %",
        ),
        (
            "memory",
            f"{_size(made.peak_bytes)} of {_size(made.chip.device_memory)} a device"
            f"{'' if made.fits else ': does not fit'}",
        ),
        *(("pipeline", show_pipeline(row, s.step)) for row in made.pipelines),
    ]
    if made.joules is not None:
        rows.append(("energy", f"{made.joules / 3.6e6:.4g} kWh a step, the chips alone"))
    head = f"# {made.name} on {made.devices} devices of {made.topology.name}"
    lines = [head, *(f"{name:<14} {text}" for name, text in rows)]
    return "\n".join(lines + [f"finding        {finding}" for finding in made.findings])
