"""A case, measured: the sides compiled, counted, compared and timed.

`measure` runs in a process of its own (`worker.py`), whose environment has the devices.
"""

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from devices import devices_mesh
from jax import tree_util
from jax.sharding import Mesh
from plain import in_plain_jax, shardings
from worker import doing

import gspmd
from gspmd import hlo

# As for a program whose collectives are to be counted: each one apart.
OPTIONS = {"cpu": None, "tpu": {"xla_tpu_enable_async_collective_fusion": False}}
LONGEST = {"cpu": 180, "tpu": 1500}  # seconds that a side may take to compile
ROUNDS = 25
SECONDS = 6.0  # of timing a case, after which it gets no more rounds than it has, and at least 5
TOLERANCE = 2e-3  # of the largest entry: sums in another order, through a whole training step
OURS, XLA = "gspmd", ("Shardy", "GSPMD")
SIDES = (OURS, *XLA)
TIMING = "timing"
MOST = 12  # collectives of a program that are told one by one

Call = Callable[..., Any]


@dataclasses.dataclass
class Side:
    """One compiled program: what a device sends by kind, in how many collectives a call.

    `live` and `reported` bytes of a device's memory are those of `memory.py`.
    """

    sent: dict[str, float]
    collectives: int
    live: float
    reported: float
    flops: float  # of one device, a loop's body once
    compile_seconds: float
    seconds: float | None = None  # a call, where it can run
    largest: list[str] = dataclasses.field(default_factory=list)

    @property
    def bytes(self) -> float:
        return sum(self.sent.values())


@dataclasses.dataclass
class Row:
    """What was measured of one case; a side that failed is missing, and `notes` say how."""

    planned: float | None = None
    plan_seconds: float | None = None
    sides: dict[str, Side] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def ratio(self, what: str) -> float | None:
        """Ours over XLA's; None where there is nothing to compare.

        XLA's is the better of its two, but not in seconds: of two runs of one program, too, one is
        the faster.
        """
        ours = getattr(self.sides.get(OURS), what, None)
        names = XLA[:1] if what == "seconds" else XLA
        theirs = [getattr(self.sides[name], what) for name in names if name in self.sides]
        if ours is None or not theirs or None in theirs:
            return None
        best = min(theirs)
        return ours / best if best else 1.0 if not ours else math.inf


def measure(case: Case, platform: str, skip: Sequence[str]) -> Row:
    """The row of `case`, without the parts of `skip`; says on the way which it is at."""
    row, mesh = Row(), devices_mesh(platform, case.mesh)
    args = arguments(case, mesh) if platform == "cpu" else None
    calls: dict[str, Call] = {}
    for name in SIDES:
        if name in skip:
            continue
        doing(name, "compiling", LONGEST[platform])
        try:
            calls[name] = (_ours if name == OURS else _theirs)(case, platform, mesh, name, row)
        except Exception as error:  # whatever a side has to say goes into the table
            row.notes.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
    if args is not None:
        calls = {name: calls[name] for name in _compared(calls, args, row)}
        if TIMING not in skip:
            doing(TIMING, "running all")
            for name, seconds in _times(calls, args).items():
                row.sides[name].seconds = seconds
    return row


def _ours(case: Case, platform: str, mesh: Mesh, name: str, row: Row) -> Call:
    donate = case.donate if platform == "tpu" else ()  # elsewhere a call is followed by its like

    def plan() -> gspmd.Plan:
        return gspmd.plan(
            case.fn,
            *case.args,
            mesh=mesh if platform == "cpu" else case.mesh,
            in_specs=case.in_specs,
            out_specs=case.out_specs,
            rules=case.rules,
            donate_argnums=donate,
        )

    plan()  # the first time, JAX traces what it keeps
    began = time.perf_counter()
    made = plan()
    row.plan_seconds, row.planned = time.perf_counter() - began, made.wire_bytes
    codes = collections.Counter(finding.code for finding in made.findings)
    row.notes += [f"{code} x{n}" if n > 1 else code for code, n in codes.items()]
    began = time.perf_counter()
    compiled = made.compile(None if platform == "cpu" else mesh, OPTIONS[platform])
    row.sides[name] = _side(compiled, time.perf_counter() - began)
    return made.run


def _theirs(case: Case, platform: str, mesh: Mesh, name: str, row: Row) -> Call:
    jax.clear_caches()
    jax.config.update("jax_use_shardy_partitioner", name == "Shardy")
    try:
        jitted = jax.jit(
            in_plain_jax(case.fn, case.args, mesh, case.rules),
            in_shardings=shardings(case.in_specs, mesh, case.rules),
            out_shardings=shardings(case.out_specs, mesh, case.rules),
            donate_argnums=case.donate if platform == "tpu" else (),
        )
        lowered = jitted.lower(*case.args)
        began = time.perf_counter()
        compiled = lowered.compile(OPTIONS[platform])
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    row.sides[name] = _side(compiled, time.perf_counter() - began)
    return compiled


def _side(compiled: jax.stages.Compiled, seconds: float) -> Side:
    sent: dict[str, float] = collections.defaultdict(float)
    found = hlo.collectives(compiled.as_text() or "")
    for one in found:
        sent[one.kind] += one.bytes * one.trips
    memory = compiled.memory_analysis()
    assert memory is not None
    reported = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    largest = sorted(found, key=lambda one: -one.bytes * one.trips)[:MOST]
    return Side(
        dict(sent),
        sum(one.trips for one in found if one.bytes),
        float(memory.peak_memory_in_bytes),
        reported,
        float((compiled.cost_analysis() or {}).get("flops", 0)),
        seconds,
        largest=[_told(one) for one in largest],
    )


def _told(one: hlo.Sent) -> str:
    """A collective in a line: what it sends in all, and its results."""
    shape = one.line.split(" = ")[1].split(f" {one.kind}")[0]
    shapes = " ".join(f"{dtype}[{dims}]" for dtype, dims in hlo.ARRAY.findall(shape))
    return f"{one.bytes * one.trips:.3g} B by {one.trips} x {one.kind} over {one.group} to {shapes}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


def _compared(calls: Mapping[str, Call], args: Sequence[Any], row: Row) -> list[str]:
    """Those of `calls` that run; `row` says where our values are not XLA's."""
    got: dict[str, list[np.ndarray]] = {}
    for name, call in calls.items():
        doing(name, "running")
        try:
            got[name] = [np.asarray(x) for x in tree_util.tree_leaves(call(*args))]
        except Exception as error:
            row.notes.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
            del row.sides[name]
    right = next((got[name] for name in XLA if name in got), None)
    if OURS in got and right is not None:
        off = max(map(_off, got[OURS], right))
        row.wrong += [f"off by {off:.0e} of the largest"] * (not off <= TOLERANCE)
    return list(got)


def _off(x: np.ndarray, right: np.ndarray) -> float:
    """The largest difference, as a share of the largest entry; NaN where either has one."""
    return float(np.abs(x - right).max(initial=0) / max(np.abs(right).max(initial=0), 1e-30))


def _times(calls: Mapping[str, Call], args: Sequence[Any]) -> dict[str, float]:
    """The median seconds of each call, in rounds of one call of each."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + SECONDS
    for i in range(ROUNDS):
        if i >= 5 and time.perf_counter() > end:
            break
        order = list(calls)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            began = time.perf_counter()
            jax.block_until_ready(calls[name](*args))
            took[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def arguments(case: Case, mesh: Mesh) -> tuple[Any, ...]:
    """Arguments of the case's shapes on the devices: small numbers, tokens, fresh optimizers."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if any(getattr(key, "key", None) in ("opt", "step") for key in path):
            return np.zeros(leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return random.integers(0, 256, leaf.shape).astype(leaf.dtype)
        return (0.1 * random.normal(size=leaf.shape)).astype(leaf.dtype)

    drawn = tree_util.tree_map_with_path(draw, case.args)
    at = shardings(case.in_specs, mesh, case.rules)
    return jax.device_put(drawn, jax.tree.broadcast(at, drawn))
