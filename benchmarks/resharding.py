"""Resharding at the bound: every pair of shardings, its bytes next to a lower bound and to XLA's.

For each mesh and rank, every source (sums owed over every set of axes left) with every target (that
may still owe some of them). Targets: a geometric mean of at most 1.1 times the bound, never more
bytes than XLA sends, never more memory than the larger of source and target takes, and no pair that
gathers the whole tensor on the way from one split to another.

    python benchmarks/resharding.py [--quick] [--only 2x2|4x2|2x2x2|4x4]

The bound (`lower_bound`): what a device needs and does not hold, for the device that needs most.
A sum of n summands takes more: for each element, n - 1 sends until some device has its sum, and one
more for each further device that wants it; one of those that want it can be that first device if
it holds a summand itself. No device gets by with less than its whole target. XLA compiles the
identity from one sharding to the other for CPU devices (a sum owed: the sum over a split dim, and
only targets that owe nothing); its bytes are counted in the optimized HLO.
"""

import argparse
import collections
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from table import Table, show

from gspmd import hlo
from gspmd.reshard import ReshardPlan, reshard_steps
from gspmd.sharding import Axes, Mesh, Sharding

MESHES = {
    "2x2": Mesh((("x", 2), ("y", 2))),
    "4x2": Mesh((("x", 4), ("y", 2))),
    "4x4": Mesh((("x", 4), ("y", 4))),
    "2x2x2": Mesh((("x", 2), ("y", 2), ("z", 2))),
}
SHAPES = {2: (32, 16), 3: (64, 32, 16)}
FLOAT = np.dtype(np.float32)
BATCH = 150  # pairs that XLA compiles as one program
FAST: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


class Pair(NamedTuple):
    """A source and a target."""

    src: Sharding
    dst: Sharding

    @property
    def owed(self) -> Axes:
        """The axes over which a sum is to be paid."""
        return tuple(axis for axis in self.src.partial if axis not in self.dst.partial)


class Measured(NamedTuple):
    """A pair, the plan for it, and what it is held against; XLA's bytes where there are any."""

    pair: Pair
    plan: ReshardPlan
    bound: float
    held: float  # bytes of the larger of source and target
    xla: float | None


def splits(mesh: Mesh, rank: int) -> list[tuple[Axes, ...]]:
    """Every way to split the dims of a tensor over a mesh."""
    found: dict[tuple[Axes, ...], None] = {}
    for count in range(len(mesh.names) + 1):
        for axes in itertools.permutations(mesh.names, count):
            for cuts in itertools.combinations_with_replacement(range(count + 1), rank - 1):
                ends = itertools.pairwise((0, *cuts, count))
                found[tuple(axes[start:stop] for start, stop in ends)] = None
    return list(found)


def shardings(mesh: Mesh, rank: int) -> Iterator[Sharding]:
    """Every split, owing sums over every set of the axes left."""
    for dims in splits(mesh, rank):
        left = [axis for axis in mesh.names if all(axis not in axes for axes in dims)]
        for count in range(len(left) + 1):
            for partial in itertools.combinations(left, count):
                yield Sharding(dims, partial)


def pairs(mesh: Mesh, rank: int) -> list[Pair]:
    """Every source with every other target that owes nothing which the source does not."""
    states = list(shardings(mesh, rank))
    return [
        Pair(src, dst)
        for src, dst in itertools.product(states, repeat=2)
        if src != dst and set(dst.partial) <= set(src.partial)
    ]


# --------------------------------------------------------------------------------------- the bound


def lower_bound(shape: Sequence[int], size: float, mesh: Mesh, pair: Pair) -> float:
    """Bytes that some device cannot but send or receive, for elements of `size` bytes."""
    held, wanted = (_held(mesh, pair, state) for state in pair)
    element = math.prod(shape) / held[0].size * size
    if not pair.owed:
        lacks = wanted & ~held
        return float(lacks.reshape(len(lacks), -1).sum(axis=1).max() * element)
    # What stays owed is owed by each group of devices for itself: look at the first one.
    group = [i for i, at in enumerate(_devices(mesh)) if not any(at[a] for a in pair.dst.partial)]
    held, wanted = held[group], wanted[group]
    sends = mesh.size(pair.owed) - 1 + wanted.sum(axis=0) - (held & wanted).any(axis=0)
    most = wanted.reshape(len(group), -1).sum(axis=1).max()
    return float(max(most, sends.sum() / len(group)) * element)


def _devices(mesh: Mesh) -> list[dict[str, int]]:
    """The position of each device along each axis."""
    indices = itertools.product(*(range(size) for _, size in mesh.axes))
    return [dict(zip(mesh.names, index, strict=True)) for index in indices]


def _held(mesh: Mesh, pair: Pair, state: Sharding) -> np.ndarray:
    """Per device which cells it has under `state`: the dims are cut as finely as `pair` does."""
    fine = [math.lcm(mesh.size(a), mesh.size(b)) for a, b in zip(*_dims(pair), strict=True)]
    found = np.zeros((mesh.devices, *fine), bool)
    for i, at in enumerate(_devices(mesh)):
        cells: list[slice] = []
        for axes, n in zip(state.dims, fine, strict=True):
            block, index = n // mesh.size(axes), 0
            for axis in axes:
                index = index * mesh.size((axis,)) + at[axis]
            cells.append(slice(index * block, (index + 1) * block))
        found[(i, *cells)] = True
    return found


def _dims(pair: Pair) -> tuple[tuple[Axes, ...], tuple[Axes, ...]]:
    return pair.src.dims, pair.dst.dims


# -------------------------------------------------------------------------------------- XLA's side


def xla_bytes(mesh: Mesh, shape: tuple[int, ...], todo: Sequence[Pair]) -> list[float]:
    """What a device sends in XLA's program for each pair, all compiled as one.

    Each tensor has one more dim, of a prime size of its own, by which its collectives are known.
    """
    kinds = (AxisType.Auto,) * len(mesh.axes)
    devices = jax.make_mesh(tuple(size for _, size in mesh.axes), mesh.names, kinds)
    primes = list(itertools.islice(_primes(101), len(todo)))
    operands: list[jax.ShapeDtypeStruct] = []
    ins: list[NamedSharding] = []
    for (src, _), prime in zip(todo, primes, strict=True):
        owed = (mesh.size(src.partial),) if src.partial else ()
        operands.append(jax.ShapeDtypeStruct((*owed, *shape, prime), FLOAT))
        ins.append(NamedSharding(devices, P(*([src.partial] if owed else []), *src.dims)))
    outs = [NamedSharding(devices, P(*pair.dst.dims)) for pair in todo]

    def identity(*xs: jax.Array) -> list[jax.Array]:
        return [jnp.sum(x, axis=0) if x.ndim > len(shape) + 1 else x for x in xs]

    lowered = jax.jit(identity, in_shardings=ins, out_shardings=outs).lower(*operands)
    sent = dict.fromkeys(primes, 0.0)
    for collective in hlo.collectives(lowered.compile(FAST).as_text() or ""):
        # Collectives of several pairs may be one, a tuple: each has its share.
        result = collective.line.partition(" = ")[2].partition(f" {collective.kind}")[0]
        sizes = [[int(n) for n in d.split(",")] for d in re.findall(r"\[([\d,]+)\]", result)]
        together = sum(map(math.prod, sizes))
        for dims in sizes:
            (prime,) = (p for p in primes if p in dims)
            sent[prime] += collective.bytes * math.prod(dims) / together
    return [sent[prime] / prime for prime in primes]


def _primes(start: int) -> Iterator[int]:
    for n in itertools.count(start):
        if all(n % k for k in range(2, math.isqrt(n) + 1)):
            yield n


def xla_of(name: str, rank: int, todo: Sequence[int]) -> dict[int, float]:
    """XLA's bytes for the pairs with these numbers: a process per batch, which has the devices."""
    batches = [todo[i : i + BATCH] for i in range(0, len(todo), BATCH)]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")
    count = MESHES[name].devices
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"

    def compile_batches(mine: Sequence[Sequence[int]]) -> dict[int, float]:
        command = [sys.executable, __file__, "--compile", name, "--rank", str(rank)]
        given = json.dumps(list(map(list, mine)))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, input=given)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return {int(n): sent for n, sent in json.loads(done.stdout.splitlines()[-1]).items()}

    workers = min(os.cpu_count() or 1, len(batches)) or 1
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(compile_batches, [batches[i::workers] for i in range(workers)])
        return dict(itertools.chain.from_iterable(part.items() for part in parts))


def compile_batches(name: str, rank: int) -> dict[int, float]:
    """`xla_of`'s other end: the batches are given as JSON."""
    every, found = pairs(MESHES[name], rank), dict[int, float]()
    for batch in json.load(sys.stdin):
        sent = xla_bytes(MESHES[name], SHAPES[rank], [every[n] for n in batch])
        found.update(zip(batch, sent, strict=True))
    return found


# ---------------------------------------------------------------------------------------- the table


class Case(NamedTuple):
    """All that was measured of a mesh and a rank, and the CPU seconds that planning took."""

    name: str
    rank: int
    measured: list[Measured]
    seconds: float


def measure(name: str, rank: int, sample: int) -> Case:
    """All pairs, or about `sample` of them, spread evenly; 0 for all."""
    mesh, shape = MESHES[name], SHAPES[rank]
    every = pairs(mesh, rank)
    stride = max(1, len(every) // sample) | 1 if sample else 1
    numbers = list(range(0, len(every), stride))
    began = time.process_time()
    plans = [reshard_steps(shape, FLOAT, mesh, *every[n]) for n in numbers]
    seconds = time.process_time() - began
    xla = xla_of(name, rank, [n for n in numbers if not every[n].dst.partial])
    measured: list[Measured] = []
    for n, plan in zip(numbers, plans, strict=True):
        bound = lower_bound(shape, FLOAT.itemsize, mesh, every[n])
        held = max(math.prod(s.local_shape(shape, mesh)) * FLOAT.itemsize for s in every[n])
        measured.append(Measured(every[n], plan, bound, held, xla.get(n)))
    return Case(name, rank, measured, seconds)


def summary(cases: Sequence[Case]) -> Table:
    """The ratios of each case, apart for pairs that owe a sum and pairs that do not."""
    rows: list[list[str]] = []
    for case in cases:
        each = f"{case.seconds / len(case.measured) * 1e3:.2f}"
        for owing in (False, True):
            chosen = [m for m in case.measured if bool(m.pair.owed) == owing]
            what = f"{case.name}, rank {case.rank}, {'a sum owed' if owing else 'nothing owed'}"
            rows.append([what, f"{len(chosen):,}", each, *_ratios(chosen)])
    columns = (
        "mesh", "pairs", "ms each", "/ bound", "most", "at it", "memory", "/ XLA", "most", "less",
        "gathered", "target",
    )  # fmt: skip
    title = (
        "Bytes on the wire: geometric mean and most over the bound and over XLA's, pairs at the "
        "bound and below XLA's;\nmost memory over the larger of source and target; pairs gathered "
        "whole (target: mean <= 1.1, XLA <= 1, memory <= 1, none gathered)"
    )
    return Table(title, columns, rows, width=140)


def _ratios(chosen: Sequence[Measured]) -> list[str]:
    bound = [m.plan.wire_bytes / m.bound for m in chosen if m.bound]
    free = all(m.plan.wire_bytes == 0 for m in chosen if not m.bound)
    against = [(m.plan.wire_bytes, m.xla) for m in chosen if m.xla is not None]
    xla = [ours / theirs for ours, theirs in against if theirs]
    never_above = all(ours <= theirs * (1 + 1e-9) for ours, theirs in against)
    memory = max(m.plan.peak_bytes / m.held for m in chosen)
    gathered = sum(map(_gathers_all, chosen))
    mean = _mean(bound)
    met = mean <= 1.1 and free and never_above and memory <= 1 and not gathered
    at_it = sum(ratio < 1 + 1e-9 for ratio in bound) / len(bound)
    less = sum(ours < theirs * (1 - 1e-9) for ours, theirs in against) / len(against)
    cells = [f"{mean:.3f}", f"{max(bound):.2f}", f"{at_it:.0%}", f"{memory:.2f}"]
    cells += [f"{_mean(xla):.3f}", f"{max(xla):.2f}", f"{less:.0%}", str(gathered)]
    return [*cells, "met" if met else "MISSED"]


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _gathers_all(m: Measured) -> bool:
    """Whether the tensor is whole on every device on the way from one split to another."""
    between = [step.dst for step in m.plan.steps][:-1]
    return bool(m.pair.dst.axes) and any(not (s.axes or s.partial) for s in between)


def above(cases: Sequence[Case]) -> Table:
    """The ways that send more than the bound."""
    count: collections.Counter[tuple[str, str, float]] = collections.Counter()
    example: dict[tuple[str, str, float], str] = {}
    for case in cases:
        for m in case.measured:
            if m.bound and m.plan.wire_bytes > m.bound * (1 + 1e-9):
                way = ", ".join(step.kind for step in m.plan.steps)
                key = (case.name, way, round(m.plan.wire_bytes / m.bound, 2))
                count[key] += 1
                example.setdefault(key, f"{m.pair.src} -> {m.pair.dst}")
    rows = [
        [mesh, f"{n:,}", f"{ratio:.2f}", way, example[mesh, way, ratio]]
        for (mesh, way, ratio), n in count.most_common(16)
    ]
    title = (
        "Above the bound: sums are completed evenly where summands are, then handed to others;\n"
        "the bound counts as if every device could send all the time"
    )
    return Table(title, ("mesh", "pairs", "/ bound", "way", "for instance"), rows, width=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="some pairs, to try the script")
    parser.add_argument("--only", choices=tuple(MESHES), help="one mesh")
    parser.add_argument("--compile", choices=tuple(MESHES), help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if given.compile:
        print(json.dumps(compile_batches(given.compile, given.rank)))
        return
    names = [given.only] if given.only else list(MESHES)
    sample = functools.partial(measure, sample=40 if given.quick else 0)
    cases = [sample(name, rank) for name in names for rank in SHAPES]
    show(summary(cases))
    show(above(cases))


if __name__ == "__main__":
    main()
