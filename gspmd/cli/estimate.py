"""What plans would cost on hardware, by mesh shape: the rows of `gspmd sweep`."""

import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import math
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence

from gspmd import meshes
from gspmd.cli.load import Rules, make_plan, read_subject
from gspmd.cli.terminal import InputError
from gspmd.errors import GspmdError
from gspmd.meshes import Topology


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is planned for each mesh: a target of the command line with what is said beside it.

    `batch`, `strategy`, `optimizer` and `microbatches` are for the reference models; `batch` is per
    device. `trips` is how often a loop without a bound runs.
    """

    target: str
    rules: Rules | None = None
    strategy: str | None = None
    batch: float | None = None
    optimizer: str | None = None
    effort: int = 1
    microbatches: int | None = None
    trips: int | None = None

    def examples(self, devices: int) -> int | None:
        """The examples of a step on so many devices; None where nothing is said.

        Raises:
          InputError: there are none.
        """
        if self.batch is None:
            return None
        if (found := round(self.batch * devices)) < 1:
            raise InputError(
                f"--batch {self.batch:g} on {devices} devices is {found} examples in a step; give "
                f"at least {1 / devices:g} a device."
            )
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One mesh shape on one topology: what a report says, or why there is none."""

    topology: str
    devices: int
    mesh: str
    wire_bytes: float = math.nan
    peak_bytes: float = math.nan
    memory: float = math.nan
    compute: float = math.nan
    hidden: float = math.nan
    exposed: float = math.nan
    step: float = math.nan
    mfu: float = math.nan
    hfu: float = math.nan
    bubble: float = 0.0  # seconds in which stages of a pipeline have nothing to work on
    failure: str = ""

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory


def shapes(devices: int, axes: Sequence[str]) -> Iterator[str]:
    """Every mesh of `axes` with so many devices: "data=8,model=1", "data=4,model=2", ..."""
    for sizes in _factorings(devices, len(axes)):
        yield ",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))


def _factorings(n: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (n,)
        return
    for first in range(n, 0, -1):
        if n % first == 0:
            yield from ((first, *rest) for rest in _factorings(n // first, count - 1))


def read_shapes(text: str, axes: Sequence[str], devices: int) -> list[str]:
    """The meshes of `--mesh-shapes`: all of them, or `16x64,32x32`.

    Raises:
      InputError: a shape is malformed, or holds another number of devices.
    """
    if text == "all":
        return list(shapes(devices, axes))
    found: list[str] = []
    for entry in text.split(","):
        sizes = entry.strip().split("x")
        if len(sizes) != len(axes) or not all(size.isdecimal() and int(size) for size in sizes):
            raise InputError(
                f"--mesh-shapes: {entry!r} is not a shape of {len(axes)} axes "
                f"({', '.join(axes)}); write all, or 16x64,32x32."
            )
        if math.prod(map(int, sizes)) != devices:
            raise InputError(
                f"--mesh-shapes: {entry} has {math.prod(map(int, sizes))} devices, the topology "
                f"has {devices}."
            )
        found.append(",".join(f"{a}={size}" for a, size in zip(axes, sizes, strict=True)))
    return found


def sweep(
    request: Request, names: Sequence[str], axes: Sequence[str], text: str, processes: int
) -> tuple[int, Iterator[Row]]:
    """How many rows there are, and the rows as they are found: each topology's in their order.

    Raises:
      GspmdError: a topology is unknown, a shape does not fit it, or it gets no example.
    """
    for name in names:
        request.examples(meshes.topology(name).devices)
    jobs = [
        (name, mesh)
        for name in names
        for mesh in read_shapes(text, axes, meshes.topology(name).devices)
    ]
    return len(jobs), _rows(request, jobs, processes)


def _rows(request: Request, jobs: Sequence[tuple[str, str]], processes: int) -> Iterator[Row]:
    find = functools.partial(_row, request)
    if processes < 2 or len(jobs) < 2:
        yield from itertools.starmap(find, jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # jax's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        yield from pool.map(functools.partial(_next_row, request), *zip(*jobs, strict=True))


def _next_row(request: Request, name: str, mesh: str) -> Row:
    """The row, in a process that makes one after the other and nothing else."""
    gc.freeze()  # what was loaded and traced so far stays: to look through it again is a third more
    return _row(request, name, mesh)


def _row(request: Request, name: str, mesh: str) -> Row:
    """The row of one mesh; what cannot be planned or placed says why."""
    topology = meshes.topology(name)
    try:
        return estimate(request, topology, mesh)
    except GspmdError as error:
        return Row(name, topology.devices, mesh, failure=str(error))


def estimate(request: Request, topology: Topology, mesh: str) -> Row:
    """The row of one mesh.

    Raises:
      GspmdError: the program cannot be planned for it, or the mesh not placed.
    """
    subject = read_subject(
        request.target,
        mesh=mesh,
        strategy=request.strategy,
        batch=request.examples(topology.devices),
        optimizer=request.optimizer,
        microbatches=request.microbatches,
    )
    plan = make_plan(subject, mesh, request.rules or {}, effort=request.effort)
    made = plan.report(topology.chip, topology, trips=request.trips)
    return Row(
        topology.name,
        topology.devices,
        mesh,
        plan.wire_bytes,
        made.peak_bytes,
        topology.chip.device_memory,
        made.seconds.compute,
        made.seconds.hidden,
        made.seconds.exposed,
        made.seconds.step,
        made.mfu,
        made.hfu,
        sum(row.bubble for row in made.pipelines),
    )


def check_found(rows: Sequence[Row]) -> None:
    """Raises InputError if there is a reason for each of the rows why it has no numbers."""
    if all(row.failure for row in rows):
        raise InputError(
            f"none of the {len(rows)} mesh shapes can be reported on; of {rows[0].mesh}: "
            f"{rows[0].failure}"
        )


def best(rows: Iterable[Row]) -> list[Row]:
    """For each topology the quickest mesh that fits, in the order of their devices."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.fits and not row.failure:
            found[row.topology] = min(found.get(row.topology, row), row, key=lambda r: r.step)
    return sorted(found.values(), key=lambda row: row.devices)
