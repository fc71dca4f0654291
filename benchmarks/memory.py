"""Memory of whole models, as predicted and as the TPU compiler gives it out: within 15 %.

    python benchmarks/memory.py [--only CASE ...] [--buffers]

The cases are those of `against_xla.py`, at the sizes of the paper, compiled ahead of time for 1024
cores, which needs libtpu and no TPU. What is compared, of one device:

* live: the most bytes that are live at once, `Memory.peak_bytes`, beside `peak_memory_in_bytes` of
  the compiler's `memory_analysis()`;
* placed: arguments, results and the block of memory that all temporaries are placed in,
  `Memory.reserved_bytes`, beside the sizes that the compiler writes down where it is asked to
  (`xla_dump_to`: its buffer assignment);
* reported: arguments, results and temporaries of `memory_analysis()`, less what the results take
  over. Its `temp_size_in_bytes` is no prediction's to meet: on TPUs it is the block of temporaries
  and, once more, what that has in holes, and more holes than there are where loops are, whose
  bodies' temporaries XLA's lower bound leaves out (`HeapSimulator::MinimumMemoryForModule`).
"""

import argparse
import dataclasses
import fnmatch
import importlib.util
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from against_xla import ENVIRONMENT, EVERYWHERE
from cases import Case, cases
from devices import TOPOLOGY, devices_mesh
from sides import LONGEST, OPTIONS
from table import Table, show
from worker import doing, measure_all, work

import gspmd
from gspmd.memory import Memory, memory
from gspmd.storage import STORAGE

TOLERANCE = 0.15
COMPILED = "TPU compiler"
_BLOCK = re.compile(r"^allocation \d+: size (\d+), preallocated-temp", re.MULTILINE)
MOST = 8  # buffers of a case that are told one by one


@dataclasses.dataclass
class Row:
    """Bytes of one case: predicted, and compiled; None where compiling failed."""

    live: float
    placed: float
    seconds: float  # that the prediction took
    buffers: list[str]
    compiled_live: float | None = None
    compiled_placed: float | None = None
    reported: float | None = None

    def ratio(self, what: str) -> float | None:
        """Predicted over compiled."""
        compiled = getattr(self, f"compiled_{what}")
        return getattr(self, what) / compiled if compiled else None


# ---------------------------------------------------------------------------------- in the process


def measure(case: Case, skip: Sequence[str]) -> Row:
    """The row of `case`; not compiled where `skip` says that this dies."""
    plan = gspmd.plan(
        case.fn,
        *case.args,
        mesh=case.mesh,
        in_specs=case.in_specs,
        out_specs=case.out_specs,
        rules=case.rules,
        donate_argnums=case.donate,
    )
    began = time.perf_counter()
    predicted = memory(plan.program, plan.traced.donated, STORAGE["tpu"])
    seconds = time.perf_counter() - began
    row = Row(predicted.peak_bytes, predicted.reserved_bytes, seconds, list(_largest(predicted)))
    if COMPILED in skip:
        return row
    doing(COMPILED, "compiling", LONGEST["tpu"])
    with tempfile.TemporaryDirectory() as folder:
        asked = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        mesh = devices_mesh("tpu", case.mesh)
        compiled = plan.compile(mesh, {**(OPTIONS["tpu"] or {}), **asked})
        found = compiled.memory_analysis()
        assert found is not None
        fixed = (
            found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        )
        row.compiled_live = found.peak_memory_in_bytes
        row.reported = fixed + found.temp_size_in_bytes
        block = _block(Path(folder))
        row.compiled_placed = None if block is None else fixed + block
    return row


def _block(folder: Path) -> float | None:
    """Bytes of the block of temporaries in HBM; None where the compiler did not write it down."""
    for file in folder.glob("*buffer-assignment.txt"):
        sizes = re.findall(
            r"^allocation \d+: size (\d+), preallocated-temp", file.read_text(), re.M
        )
        return float(sum(map(int, sizes)))
    return None


def _largest(found: Memory) -> Iterator[str]:
    for one in found.buffers[:MOST]:
        yield f"{one.bytes / 1e6:10,.1f} MB  {one.kind}  {one.name}  {one.type}  {one.source}"


# ------------------------------------------------------------------------ the table and the verdict

Measured = Sequence[tuple[Case, Row]]


def table(measured: Measured) -> Table:
    columns = (
        "case",
        "live GB",
        "compiled",
        "x",
        "placed GB",
        "compiled",
        "x",
        "reported",
        "s",
        "",
    )
    rows = [[case.name, *_cells(row)] for case, row in measured]
    where = f"Memory of one device: TPU {TOPOLOGY}, ahead of time"
    return Table(where, columns, rows, width=130)


def _cells(row: Row) -> list[str]:
    cells: list[str] = []
    for what in ("live", "placed"):
        compiled, ratio = getattr(row, f"compiled_{what}"), row.ratio(what)
        cells += [_gigabytes(getattr(row, what)), _gigabytes(compiled)]
        cells.append("" if ratio is None else f"{ratio:.3f}")
    return [*cells, _gigabytes(row.reported), f"{row.seconds:.3f}"]


def _gigabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.3f}"


def verdict(measured: Measured) -> Iterator[str]:
    """What was asked for, met or not, and the cases that speak against it."""
    yield from _within(measured, "live", "live bytes")
    yield from _within(measured, "placed", "bytes as they are placed")


def _within(measured: Measured, what: str, name: str) -> Iterator[str]:
    ratios = [(case.name, ratio) for case, row in measured if (ratio := row.ratio(what))]
    if not ratios:
        yield f"nothing compiled to compare {name} with"
        return
    off = [(case, ratio) for case, ratio in ratios if abs(ratio - 1) > TOLERANCE]
    mean = statistics.fmean(abs(ratio - 1) for _, ratio in ratios)
    met = "MISSED" if off else "met"
    share = f"{len(ratios) - len(off)} of {len(ratios)} cases"
    yield f"{met}: {name} within {TOLERANCE:.0%} in {share}; mean deviation {mean:.1%}"
    yield from (f"  {case}: {ratio:.3f}" for case, ratio in off)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these, such as 'dense*'")
    parser.add_argument("--buffers", action="store_true", help="list what is live at the peak too")
    parser.add_argument("--predict", action="store_true", help="compile nothing")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    listed = list(cases("paper"))
    if given.work:
        work(lambda i, skip: dataclasses.asdict(measure(listed[i], skip)))
        return
    if not given.predict and not importlib.util.find_spec("libtpu"):
        raise SystemExit("The TPU compiler is missing: pip install libtpu, or gspmd[tpu].")
    asked = [
        i
        for i, case in enumerate(listed)
        if not given.only or any(fnmatch.fnmatchcase(case.name, only) for only in given.only)
    ]
    if not asked:
        parser.error(f"no case {given.only}; there are {', '.join(case.name for case in listed)}")
    find: Callable[[int], Row] = _predicted if given.predict else _compiled
    measured = []
    for i in asked:
        measured.append((listed[i], find(i)))
        told = measured[-1][1].ratio("live")
        print(f"{listed[i].name}: {told or 'predicted'}", file=sys.stderr, flush=True)
    show(table(measured))
    print()
    print("\n".join(verdict(measured)))
    if given.buffers:
        for case, row in measured:
            print("\n".join((f"\n{case.name}:", *row.buffers)))


def _predicted(i: int) -> Row:
    return measure(list(cases("paper"))[i], [COMPILED])


def _compiled(i: int) -> Row:
    """The row of a case, measured in a process of its own."""
    command = [sys.executable, __file__, "--work"]
    environment = {**EVERYWHERE, **ENVIRONMENT["tpu"]}
    ((found, died),) = measure_all(command, environment, [i]).values()
    for part, how in died.items():
        print(f"{part}: {how}", file=sys.stderr)
    return Row(**found)


if __name__ == "__main__":
    main()
