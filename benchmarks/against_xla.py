"""Whole models by this library and by XLA's partitioner: bytes, memory and time, side by side.

    python benchmarks/against_xla.py [--cpu | --tpu] [--quick] [--only CASE ...] [--details]

The cases stand in `cases.py`. All sides get the same function with the same annotations, and the
same shardings of arguments and results: ours through `gspmd.plan`, XLA's through `jax.jit`, where
the annotations are `with_sharding_constraint`s (`plain.py`): once Shardy spreads them, once GSPMD.

`--cpu` compiles small sizes for 8 CPU devices, compares the values and takes the times of calls,
which alternate between the sides. `--tpu` compiles the sizes of the paper ahead of time for 1024
cores, which needs libtpu and no TPU. Without either, both are made as far as they can be.

Bytes are those that one device sends, counted in the optimized HLO (`hlo.py`). Memory is what the
compiler's `memory_analysis()` has, in two ways: the most bytes that are `live` at once, and what it
has `reported` as arguments, results and temporaries, less what the results take over, where a TPU's
temporaries count their holes twice (see `memory.py`). In bytes of both kinds XLA's number is that
of its better propagation; in time, that of `jax.jit` as it is.
Flops are the compiler's count, a loop's body once: they tell where work is repeated.
"""

import argparse
import dataclasses
import fnmatch
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cases import Case, cases
from devices import TOPOLOGY
from sides import OURS, SIDES, XLA, Row, Side, measure
from table import Table, show
from worker import measure_all, work

DEVICES = 8
ENVIRONMENT = {
    "cpu": {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"},
    "tpu": {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
}
EVERYWHERE = {
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",  # threads of 8 devices wait for each other where cores are few
    "TF_CPP_MIN_LOG_LEVEL": "2",  # else XLA tells of each gather that it is not happy with
}
SIZES = {"cpu": "small", "tpu": "paper"}

EQUAL_TIME = 1 / 0.97
ROUNDING = 1.0001
MEAN_BYTES, MEAN_SPEED = 0.75, 1.15

# ------------------------------------------------------------------------ the table and the verdict

Measured = Sequence[tuple[Case, Row]]

_KINDS = {
    "all-gather": "AG", "all-reduce": "AR", "reduce-scatter": "RS", "all-to-all": "A2A",
    "collective-permute": "CP", "collective-broadcast": "CB",
}  # fmt: skip


def table(platform: str, measured: Measured) -> Table:
    rows: list[list[str]] = []
    for case, row in measured:
        for name in SIDES:
            rows.append([case.name if name == OURS else "", name, *_cells(row, name)])
            if name == OURS:
                rows[-1][-1] = "; ".join(_notes(platform, case, row))
    unit = "GB" if platform == "tpu" else "MB"
    columns = (
        "case", "side", f"{unit} sent", "x", "by kind", "number", f"live {unit}", "x",
        "reported", "x", "flops", "ms", "x", "plan s", "compile s", "notes",
    )  # fmt: skip
    where = f"TPU {TOPOLOGY}, ahead of time" if platform == "tpu" else f"{DEVICES} CPU devices"
    return Table(f"Sent by each device: {where}", columns, rows, words=2, width=200)


def _cells(row: Row, name: str) -> list[str]:
    side = row.sides.get(name)
    if side is None:
        return ["failed", *[""] * 13]
    unit = 1e9 if side.reported > 1e8 else 1e6
    ratios = [
        row.ratio(what) if name == OURS else None
        for what in ("bytes", "live", "reported", "flops", "seconds")
    ]
    less, live, reported, more, faster = ("" if x is None else f"{x:.2f}" for x in ratios)
    kinds = " ".join(f"{_KINDS[k]} {side.sent[k] / unit:.3g}" for k in _KINDS if side.sent.get(k))
    return [
        f"{side.bytes / unit:.4g}",
        less,
        kinds,
        f"{side.collectives}",
        f"{side.live / unit:.3g}",
        live,
        f"{side.reported / unit:.3g}",
        reported,
        more,
        "" if side.seconds is None else f"{side.seconds * 1e3:.1f}",
        faster,
        "" if name != OURS or row.plan_seconds is None else f"{row.plan_seconds:.2f}",
        f"{side.compile_seconds:.1f}",
        "",
    ]


def _notes(platform: str, case: Case, row: Row) -> list[str]:
    """What failed, and for each number that is missed the collective that costs it."""
    notes = [f"WRONG: {how}" for how in row.wrong] + row.notes
    limits = {"bytes": case.bytes * ROUNDING}
    limits |= (
        {"seconds": EQUAL_TIME} if platform == "cpu" else {"live": case.peak, "reported": case.peak}
    )
    over = [what for what, limit in limits.items() if (row.ratio(what) or 0) > limit]
    return [*notes, f"above in {', '.join(over)}: {_costly(row)}"] if over else notes


def _costly(row: Row) -> str:
    """The largest collective of the kind in which we exceed XLA by most."""
    ours = row.sides[OURS]
    theirs = min((row.sides[name] for name in XLA if name in row.sides), key=lambda x: x.bytes)
    excess = {kind: sent - theirs.sent.get(kind, 0) for kind, sent in ours.sent.items()}
    kind = max(excess, key=lambda kind: excess[kind], default="")
    one = next((told for told in ours.largest if f" {kind} " in told), "no collective")
    return one if excess and excess[kind] > 0 else f"nothing more is sent; {one}"


def verdict(platform: str, measured: Measured) -> list[str]:
    """The numbers asked for, each met or not, with the cases that speak against them."""
    lines = list(_each(measured, "bytes", "wire bytes", lambda case: case.bytes * ROUNDING))
    lines += _mean(measured, "bytes", "wire bytes", MEAN_BYTES)
    if platform == "cpu":
        lines += _each(measured, "seconds", "step time", lambda case: EQUAL_TIME)
        lines += _mean(measured, "seconds", "step time", 1 / MEAN_SPEED)
    else:
        for what in ("live", "reported"):
            lines += _each(measured, what, f"peak memory, {what},", lambda case: case.peak)
    failed = [case.name for case, row in measured if OURS not in row.sides or row.wrong]
    lines.append(_line(f"failed or wrong, ours: {len(failed)}", failed, not failed))
    theirs = [f"{c.name} ({s})" for c, r in measured for s in XLA if s not in r.sides]
    lines.append(_line(f"failed, XLA's: {len(theirs)}", theirs))
    return lines


def _each(
    measured: Measured, what: str, name: str, limit: Callable[[Case], float]
) -> Iterator[str]:
    found = [(case, row.ratio(what)) for case, row in measured]
    known = [(case, ratio) for case, ratio in found if ratio is not None]
    above = [
        f"{case.name}: {ratio:.2f}, at most {limit(case):.2f}"
        for case, ratio in known
        if ratio > limit(case)
    ]
    yield _line(
        f"{name} within the limit in {len(known) - len(above)} of {len(known)} cases",
        above,
        not above,
    )


def _mean(measured: Measured, what: str, name: str, limit: float) -> Iterator[str]:
    found = [row.ratio(what) for _, row in measured]
    known = [ratio for ratio in found if ratio is not None and 0 < ratio < math.inf]
    if known:
        mean = statistics.geometric_mean(known)
        yield _line(
            f"{name}, geometric mean: {mean:.2f} of XLA's, at most {limit:.2f}", (), mean <= limit
        )


def _line(what: str, names: Sequence[str], met: bool | None = None) -> str:
    target = "" if met is None else "met: " if met else "MISSED: "
    listed = "".join(f"\n  {name}" for name in names)
    return f"{target}{what}{listed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cpu", action="store_true", help="small sizes on 8 CPU devices alone")
    where.add_argument("--tpu", action="store_true", help="paper sizes ahead of time alone")
    parser.add_argument("--quick", action="store_true", help="two cases on CPU, to try the script")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these, such as 'dense*'")
    parser.add_argument("--details", action="store_true", help="list the largest collectives too")
    parser.add_argument("--work", choices=("cpu", "tpu"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        listed = list(cases(SIZES[given.work]))
        work(lambda i, skip: dataclasses.asdict(measure(listed[i], given.work, skip)))
        return
    platforms = ["cpu"] * (not given.tpu) + ["tpu"] * (given.tpu or not (given.cpu or given.quick))
    for platform in platforms:
        if platform == "tpu" and not importlib.util.find_spec("libtpu"):
            raise SystemExit("The TPU compiler is missing: pip install libtpu, or gspmd[tpu].")
        measured = _measured(platform, parser, given)
        show(table(platform, measured))
        print()
        print("\n".join(verdict(platform, measured)))
        if given.details:
            print("\n".join(_details(measured)))


def _measured(
    platform: str, parser: argparse.ArgumentParser, given: argparse.Namespace
) -> list[tuple[Case, Row]]:
    """The cases that are asked for, each in a process of its own; tells how far it is."""
    listed = list(cases(SIZES[platform]))
    asked = [
        i
        for i, case in enumerate(listed)
        if not given.only or any(fnmatch.fnmatchcase(case.name, only) for only in given.only)
    ]
    if not asked:
        parser.error(f"no case {given.only}; there are {', '.join(case.name for case in listed)}")
    command = [sys.executable, __file__, "--work", platform]
    measured: list[tuple[Case, Row]] = []
    for i in asked[:2] if given.quick else asked:
        (found,) = measure_all(command, EVERYWHERE | ENVIRONMENT[platform], [i]).values()
        measured.append((listed[i], _row(*found)))
        ratios = {
            what: measured[-1][1].ratio(what)
            for what in ("bytes", "seconds", "live", "reported", "flops")
        }
        told = ", ".join(f"{what} {x:.2f}" for what, x in ratios.items() if x is not None)
        print(f"{platform}: {listed[i].name}: {told or 'failed'}", file=sys.stderr, flush=True)
    return measured


def _row(found: Mapping[str, Any], died: Mapping[str, str]) -> Row:
    row = Row(**found)
    row.sides = {name: Side(**side) for name, side in found["sides"].items()}
    row.notes = [f"{part}: {how}" for part, how in died.items()] + row.notes
    return row


def _details(measured: Measured) -> Iterator[str]:
    for case, row in measured:
        for name, side in row.sides.items():
            yield f"\n{case.name}, {name}:"
            yield from (f"  {told}" for told in side.largest)


if __name__ == "__main__":
    main()
