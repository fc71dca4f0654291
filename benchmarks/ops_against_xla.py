"""Wire bytes and run time of each op class of jax.lax, by this library and by XLA's partitioner.

    python benchmarks/ops_against_xla.py [--quick] [--only CLASS ...] [--rounds N]

The cases stand in `op_cases.py`. Both sides get the same function, arguments that lie as stated,
and must leave the results as stated: ours through `gspmd.plan`, XLA's through `jax.jit` with the
same `in_shardings` and `out_shardings`. Dims that their axes do not divide are cut out of padded
ones inside of the function, for both alike, as `jax.jit` refuses them at its boundary.

Bytes are those that one device sends: ours as planned, and, like XLA's, as counted in the optimized
HLO. Times are of calls on 8 CPU devices, alternating between the two; the median of their ratios is
given. The values of both are compared with those on one device. A case in which either fails stays
in the table and says so, also where the process dies of it.
"""

import argparse
import collections
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax, tree_util
from jax.sharding import AxisType, Mesh, NamedSharding
from op_case import Case, Tensor
from op_cases import cases
from table import Table, show
from worker import doing, measure_all, work

import gspmd
from gspmd import hlo

DEVICES = 8
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    "OPENBLAS_NUM_THREADS": "1",  # threads of 8 devices wait for each other where cores are few
    "TF_CPP_MIN_LOG_LEVEL": "2",  # else XLA tells of each gather that it is not happy with
}
ROUNDS = 9
SECONDS = 1.0  # of timing a case, after which it gets no more rounds than it has, and at least 3
TOLERANCE = 1e-4  # of the largest entry: sums in another order
FAR_BELOW = 4  # times less than XLA that a named case sends
SIDES = ("gspmd", "XLA")
TIMING = "timing"


@dataclasses.dataclass
class Row:
    """What was measured of one case; None where a side failed, and `notes` say how."""

    planned: float | None = None
    ours: float | None = None
    theirs: float | None = None
    time: float | None = None
    wrong: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


# ------------------------------------------------------------------------------- one case, measured


@dataclasses.dataclass(frozen=True)
class Subject:
    """A case as both sides see it: flat results, and boundaries that the axes divide."""

    case: Case
    devices: Mesh

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        inner = map(self._cut, args, self.case.ins)
        outs = tree_util.tree_leaves(self.case.fn(*inner))
        return tuple(map(self._pad, outs, self.case.outs))

    @property
    def __name__(self) -> str:
        return self.case.name

    def shardings(self, tensors: Sequence[Tensor]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(self.devices, tensor.spec) for tensor in tensors)

    def arguments(self) -> list[Any]:
        """The padded arguments, on the devices."""
        given = zip(self.case.arguments(), self.case.ins, strict=True)
        padded = [np.pad(x, self._widths(tensor)) if x.ndim else x for x, tensor in given]
        shardings = self.shardings(self.case.ins)
        return [jax.device_put(x, at) for x, at in zip(padded, shardings, strict=True)]

    def _widths(self, tensor: Tensor) -> list[tuple[int, int]]:
        padded = tensor.padded(self.devices.shape)
        return [(0, to - n) for n, to in zip(tensor.shape, padded, strict=True)]

    def _cut(self, x: Any, tensor: Tensor) -> Any:
        if x.shape == tensor.shape:
            return x
        return self._constrain(lax.slice(x, (0,) * x.ndim, tensor.shape), tensor)

    def _pad(self, x: Any, tensor: Tensor) -> Any:
        widths = [(low, high, 0) for low, high in self._widths(tensor)]
        if not any(high for _, high, _ in widths):
            return x
        return lax.pad(self._constrain(x, tensor), np.zeros((), x.dtype), widths)

    def _constrain(self, x: Any, tensor: Tensor) -> Any:
        return lax.with_sharding_constraint(x, NamedSharding(self.devices, tensor.spec))


Call = Callable[..., Any]


def measure(case: Case, skip: Sequence[str], rounds: int) -> Row:
    """The row of `case`, without the parts of `skip`; says on the way which it is at."""
    row, subject = Row(), Subject(case, _mesh(case.mesh))
    args = subject.arguments()
    expected = _on_one_device(case)
    calls: list[Call] = []
    for side in SIDES:
        if side in skip:
            continue
        doing(side, "compiling")
        try:
            call = (_ours if side == "gspmd" else _theirs)(subject, args, row)
            doing(side, "running")
            got = [np.asarray(x) for x in call(*args)]
        except Exception as error:  # whatever a side has to say goes into the table
            row.notes.append(f"{side}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            continue
        calls.append(call)
        if (off := _difference(got, expected)) is not None:
            row.wrong.append(side)
            row.notes.append(f"{side}'s values are wrong: {off}")
    if len(calls) == len(SIDES) and rounds and TIMING not in skip:
        doing(TIMING, "running both")
        row.time = _time_ratio(calls, args, rounds)
    return row


def _ours(subject: Subject, args: Sequence[Any], row: Row) -> Call:
    plan = gspmd.plan(
        subject,
        *args,
        mesh=subject.devices,
        in_specs=tuple(tensor.spec for tensor in subject.case.ins),
        out_specs=tuple(tensor.spec for tensor in subject.case.outs),
    )
    row.planned = plan.wire_bytes
    codes = collections.Counter(finding.code for finding in plan.findings)
    row.notes += [f"{code} x{n}" if n > 1 else code for code, n in codes.items()]
    row.ours = _sent(plan.compile())
    return plan.run


def _theirs(subject: Subject, args: Sequence[Any], row: Row) -> Call:
    jitted = jax.jit(
        subject.__call__,
        in_shardings=subject.shardings(subject.case.ins),
        out_shardings=subject.shardings(subject.case.outs),
    )
    row.theirs = _sent(jitted.lower(*args).compile())
    return jitted


def _sent(compiled: jax.stages.Compiled) -> float:
    text = compiled.as_text() or ""
    return sum(sent.bytes * sent.trips for sent in hlo.collectives(text))


def _on_one_device(case: Case) -> list[np.ndarray]:
    """The results on whole operands, of the logical shapes."""
    outs = jax.jit(lambda *args: tree_util.tree_leaves(case.fn(*args)))(*case.arguments())
    return [np.asarray(x) for x in outs]


def _difference(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> str | None:
    """How `got`, padding aside, differs from what is expected; None if it does not."""
    for x, right in zip(got, expected, strict=True):
        x = x[tuple(slice(n) for n in right.shape)]
        if not np.issubdtype(right.dtype, np.inexact):
            if not np.array_equal(x, right):
                return f"{np.mean(x != right):.0%} of them"
            continue
        off = np.abs(x - right).max(initial=0) / max(np.abs(right).max(initial=0), 1e-30)
        if not off <= TOLERANCE:
            return f"off by {off:.0e} of the largest"
    return None


def _time_ratio(calls: Sequence[Call], args: Sequence[Any], rounds: int) -> float:
    """The median of the ratios of the first call's time to the second's, in alternating calls."""
    ratios: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(ratios) < rounds and (len(ratios) < 3 or time.perf_counter() < end):
        order = (0, 1) if len(ratios) % 2 else (1, 0)  # neither always finds the caches warm
        seconds = {i: _seconds(calls[i], args) for i in order}
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _seconds(call: Call, args: Sequence[Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call(*args))
    return time.perf_counter() - began


@functools.cache
def _mesh_of(axes: tuple[tuple[str, int], ...]) -> Mesh:
    names, sizes = zip(*axes, strict=True)
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(names))


def _mesh(axes: dict[str, int]) -> Mesh:
    return _mesh_of(tuple(axes.items()))


# ------------------------------------------------------------------------ the table and the verdict


def table(measured: Sequence[tuple[Case, Row]]) -> Table:
    rows = [
        [
            case.group,
            case.name,
            _bytes(row.planned),
            _bytes(row.ours),
            _bytes(row.theirs),
            _ratio(row),
            "" if row.time is None else f"{row.time:.2f}",
            "; ".join(row.notes),
        ]
        for case, row in measured
    ]
    columns = (
        "class", "case", "planned B", "ours B", "XLA B", "ours / XLA", "time / XLA", "findings",
    )  # fmt: skip
    title = f"Sent by each of {DEVICES} devices, and run time"
    return Table(title, columns, rows, words=2, width=150)


def _bytes(count: float | None) -> str:
    return "failed" if count is None else f"{count:,.0f}"


def _ratio(row: Row) -> str:
    if row.ours is None or row.theirs is None:
        return ""
    if not row.theirs:
        return "more" if _most(row) else ""
    return f"{_most(row) / row.theirs:.2g}"


def _most(row: Row) -> float:
    """What we send, as planned or as compiled."""
    return max((x for x in (row.planned, row.ours) if x is not None), default=math.inf)


def verdict(measured: Sequence[tuple[Case, Row]]) -> list[str]:
    """What the table comes to, with every case that it speaks against."""
    both = [(c, r) for c, r in measured if r.ours is not None and r.theirs is not None]
    above = [_name(c) for c, r in both if r.theirs is not None and _most(r) > r.theirs * 1.0001]
    named = [(c, r) for c, r in both if c.named]
    near = [_name(c) for c, r in named if _most(r) and _most(r) > (r.theirs or 0) / FAR_BELOW]
    more = [_name(c) for c, r in measured if r.planned is not None and (r.ours or 0) > r.planned]
    fails = {
        side: [_name(c) for c, r in measured if side in r.wrong or value(r) is None]
        for side, value in (("gspmd", lambda r: r.ours), ("XLA", lambda r: r.theirs))
    }
    times = [r.time for _, r in measured if r.time is not None]
    slower = [f"{_name(c)} ({r.time:.1f})" for c, r in measured if (r.time or 0) > 1.25]
    ours, theirs = fails["gspmd"], fails["XLA"]
    far = f"neither zero nor {FAR_BELOW} times below XLA: {len(near)} of {len(named)} named cases"
    lines = [
        _line(f"above XLA's bytes: {len(above)} of {len(both)} cases", above, not above),
        _line(far, near, not near),
        _line(f"sent more than was planned: {len(more)}", more, not more),
        _line(f"failed or wrong, ours: {len(ours)}", ours, not ours),
        _line(f"failed or wrong, XLA's: {len(theirs)}", theirs),
    ]
    if times:
        middle = f"run time: {statistics.median(times):.2f} of XLA's in the middle"
        lines.append(_line(f"{middle}; more than 1.25 in {len(slower)} cases", slower))
    return lines


def _line(what: str, names: Sequence[str], met: bool | None = None) -> str:
    target = "" if met is None else "met: " if met else "MISSED: "
    listed = "".join(f"\n  {name}" for name in names)
    return f"{target}{what}{listed}"


def _name(case: Case) -> str:
    return f"{case.group}: {case.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one case a class, to try the script")
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing; 0: bytes alone")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    everything = list(cases())
    if given.work:
        work(lambda i, skip: dataclasses.asdict(measure(everything[i], skip, given.rounds)))
        return
    groups = dict.fromkeys(case.group for case in everything)
    if unknown := set(given.only or ()) - set(groups):
        parser.error(f"no class {sorted(unknown)}; there are {', '.join(groups)}")
    numbers = [i for i, c in enumerate(everything) if not given.only or c.group in given.only]
    if given.quick:
        first = {everything[i].group: i for i in reversed(numbers)}
        numbers = sorted(first.values())
    rounds = min(given.rounds, 1) if given.quick else given.rounds
    command = [sys.executable, __file__, "--work", "--rounds", str(rounds)]
    found = measure_all(command, ENVIRONMENT, numbers)
    measured: list[tuple[Case, Row]] = []
    for number, (row, died) in found.items():
        notes = [f"{part}: {how}" for part, how in died.items()]
        measured.append((everything[number], Row(**row | {"notes": notes + row["notes"]})))
    show(table(measured))
    print()
    print("\n".join(verdict(measured)))


if __name__ == "__main__":
    main()
