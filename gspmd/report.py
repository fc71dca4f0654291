"""Report: what a plan costs on a chip: time, memory, and the share of the peak that it reaches.

`gspmd.performance` makes it.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from gspmd.cost import Bound
from gspmd.errors import GspmdError
from gspmd.findings import Finding
from gspmd.memory import Memory
from gspmd.meshes import Chip, Placement, Topology
from gspmd.sharding import Axes, show_axes


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
        return max(0.0, self.communication - self.exposed)


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
        return max(0.0, self.seconds - self.exposed)


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
        allowed = self.peak * self.seconds.step  # none where there are no products, or no ops
        return flops / allowed if allowed else 0.0

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


PARTS = (
    "flops.model", "flops.hardware", "flops.counted", "seconds.compute", "seconds.communication",
    "seconds.exposed", "seconds.step", "peak_bytes", "mfu", "hfu", "utilization",
)  # fmt: skip


Place = tuple[str, str]
"""Where an op comes from: its phase, and its line."""


def repeated(places: Iterable[Place]) -> frozenset[Place]:
    """Those of `places` at which rematerialization repeats what ran forward too."""
    places = frozenset(places)
    return frozenset(
        (phase, line)
        for phase, line in places
        if phase == "rematerialized" and ("forward", line) in places
    )


def counted(rows: Iterable[OpRow]) -> list[OpRow]:
    """The rows of which the FLOPs are counted as utilization."""
    rows = list(rows)
    again = repeated((row.phase, row.source) for row in rows)
    return [row for row in rows if (row.phase, row.source) not in again]


def _why(made: Report, what: str, most: int) -> str:
    if what in ("mfu", "hfu", "utilization") and not made.dtype:
        return f"{what} 0 %: the program has no matrix products, and so no peak to be compared with"
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
        return _largest(what, made.peak_bytes, rows, most, show_size)
    if what not in PARTS:
        raise GspmdError(f"a report has no number {what!r}; it has {', '.join(PARTS)}.")
    kind, _, name = what.partition(".")
    total = getattr(getattr(made, kind), name)
    if kind == "flops":
        parts = made.ops if name == "hardware" else counted(made.ops)
        rows = [
            (row.flops * row.trips, row.name, row.type, f"{row.phase}, {row.source}")
            for row in parts
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


def show_size(count: float) -> str:
    """`12.3 GB`: as memory is measured against a chip's."""
    return f"{count / 1e9:.4g} GB"


def show_pipeline(row: PipelineRow, step: float) -> str:
    """`4 stages, 16 microbatches, a bubble of 3 in 19 ticks: 0.25 s, 8.1 % of a step`."""
    return (
        f"{row.stages} stages, {row.microbatches} microbatches, a bubble of {row.ticks - row.busy} "
        f"in {row.ticks} ticks: {row.bubble:.4g} s, {100 * row.bubble / step:.1f} % of a step"
    )


def show_energy(made: Report) -> str:
    """`0.12 kWh a step, the chips alone`, or what it takes and is not published."""
    if made.joules is None:
        return f"not published: the mean power of {made.chip.name}"
    return f"{made.joules / 3.6e6:.4g} kWh a step, the chips alone"


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
            f"without rematerialization {100 * made.utilization:.1f} %"
            if made.dtype
            else "of no peak: there are no matrix products",
        ),
        (
            "memory",
            f"{show_size(made.peak_bytes)} of {show_size(made.chip.device_memory)} a device"
            f"{'' if made.fits else ': does not fit'}",
        ),
        *(("pipeline", show_pipeline(row, s.step)) for row in made.pipelines),
    ]
    rows.append(("energy", show_energy(made)))
    head = f"# {made.name} on {made.devices} devices of {made.topology.name}"
    lines = [head, *(f"{name:<14} {text}" for name, text in rows)]
    return "\n".join(lines + [f"finding        {finding}" for finding in made.findings])
