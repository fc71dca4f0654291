"""JAX's own primitive harnesses as cases: each planned on drawn meshes and specs, and simulated.

`jax._src.internal_test_util.test_harnesses` exercises every primitive of `jax.lax`, 5,483 cases in
132 groups on a CPU. What is drawn for a case depends on its name alone.
"""

import dataclasses
import functools
import math
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.internal_test_util import test_harnesses

import gspmd
from gspmd import P, run

DEVICES = 24  # the most that a drawn mesh has: all of them are simulated
GENERATORS = ("threefry2x32", "threefry4x32", "philox2x32", "philox4x32", "rbg", "unsafe_rbg")
GATHERED = ("gathered", "no-rule")  # the findings that tell of operands made whole
ROUNDING = 4  # units in the last place of the largest entry, for another order of summation


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One use of one primitive. `make` gives the arguments of `fn`, the same at each call.

    `accept(args, got)` says what is wrong with results that need not be those of `fn` itself.
    """

    group: str
    name: str
    fn: Callable[..., Any]
    make: Callable[[], Sequence[Any]]
    accept: Callable[[Sequence[Any], Sequence[np.ndarray]], str] | None = None


@dataclasses.dataclass(frozen=True)
class Draw:
    """A mesh, and specs for the flat arguments and results of a case."""

    mesh: dict[str, int]
    in_specs: tuple[P | None, ...]
    out_specs: tuple[P | None, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one case fared on one draw; `wrong` says what is wrong, and is empty if all is right."""

    case: str
    draw: Draw
    gathered: bool = False
    wrong: str = ""

    def __str__(self) -> str:
        d = self.draw
        at = f"mesh {d.mesh}, in_specs {d.in_specs}, out_specs {d.out_specs}"
        return f"{self.case}: {at}: {self.wrong or 'right'}"


Row = tuple[str, int, int, int, int]
"""A group, its cases, and how many outcomes were right, were wrong, and gathered operands."""


@functools.cache
def cases() -> dict[str, tuple[Case, ...]]:
    """All cases by group: JAX's, in its order, and some of ours for what JAX's leave out."""
    groups: dict[str, list[Case]] = {}
    for harness in test_harnesses.all_harnesses:
        if harness.filter("cpu"):
            groups.setdefault(harness.group_name, []).append(_of_jax(harness))
    for case in (*_keys(), *_narrow()):
        groups.setdefault(case.group, []).append(case)
    return {group: tuple(found) for group, found in groups.items()}


def _of_jax(harness: Any) -> Case:
    def make() -> Sequence[Any]:
        # JAX's factories of arguments take nothing but the legacy generator.
        rng = np.random.RandomState(zlib.crc32(harness.fullname.encode()))
        return harness.dyn_args_maker(rng)

    accept = None
    if harness.group_name == "approx_top_k":
        accept = functools.partial(recalled, largest=harness.params["is_max"])
    return Case(harness.group_name, harness.name, harness.dyn_fun, make, accept)


def recalled(args: Sequence[Any], got: Sequence[np.ndarray], *, largest: bool) -> str:
    """What is wrong with an approximate top-k: it may miss some, and choose among equals.

    Of the first entries 95 % are to be expected; twice as many may be missing in a small sample.
    """
    (x,), (values, index) = args, got
    wide, k = x.astype(np.float64), values.shape[-1]
    if not np.array_equal(np.take_along_axis(x, index, -1), values):
        return "the values are not those at the indices"
    if any(len(set(row)) < k for row in index.reshape(-1, k)):
        return "an entry is chosen twice"
    last = np.sort(wide if largest else -wide, -1)[..., -k, None]
    missed = int(np.sum((values if largest else -values).astype(np.float64) < last))
    return f"{missed} of {values.size} entries missed" if missed > 1 + values.size // 10 else ""


def _keys() -> list[Case]:
    """What is done with typed keys, for each generator that JAX ships."""
    uses: dict[str, Callable[[Any], Any]] = {
        "bits": lambda keys: jax.vmap(lambda key: jax.random.bits(key, (4, 6)))(keys),
        "split": lambda keys: jax.random.key_data(
            jax.vmap(lambda key: jax.random.split(key))(keys)
        ),
        "fold_in": lambda keys: jax.vmap(jax.random.fold_in)(keys, jnp.arange(6)),
        "reversed": lambda keys: keys[::-1],
        "normal": lambda keys: jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys),
        "wrapped": lambda keys: jax.random.key_data(keys),
    }
    return [
        Case("keys", f"{impl}_{use}", fn, lambda impl=impl: [_six_keys(impl)])
        for impl in GENERATORS
        for use, fn in uses.items()
    ]


def _six_keys(impl: str) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.key, impl=impl))(np.arange(6))


def _narrow() -> list[Case]:
    """Types narrower than a byte, or with a byte's floats."""
    uses: dict[str, Callable[[Any, Any], Any]] = {
        "product": lambda x, y: jnp.dot(
            x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32
        ),
        "convert": lambda x, y: (x.astype(jnp.float32), y.astype(jnp.bfloat16)),
        "moved": lambda x, y: (x.T, jnp.concatenate([y, y], 1), y[:, ::-1]),
        "sorted": lambda x, y: (jnp.max(x, axis=1), jnp.where(y[:6, :1] > 0, x[:, :1], y[:6, :1])),
    }
    types = ("int4", "uint4", "float8_e4m3fn", "float8_e5m2")

    def make(dtype: str) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        low = 0 if dtype.startswith("u") else -3
        return [rng.integers(low, 4, shape).astype(dtype) for shape in ((6, 10), (10, 7))]

    return [
        Case("narrow", f"{dtype}_{use}", fn, functools.partial(make, dtype))
        for dtype in types
        for use, fn in uses.items()
    ]


def sample(found: Sequence[Case], count: int) -> list[Case]:
    """`count` cases, or all if there are fewer, spread over the group from its first on."""
    if len(found) <= count:
        return list(found)
    return [found[i * len(found) // count] for i in range(count)]


# --- drawing


def draw(case: Case, number: int) -> Draw:
    """The draw of that number: a mesh of 1 to 4 axes of size 1 to 4, and specs."""
    rng = random.Random(f"{case.group}/{case.name}/{number}")
    mesh = _mesh(rng)
    args = case.make()
    outs = jax.eval_shape(case.fn, *args)
    in_specs = tuple(_spec(rng, np.ndim(x), mesh) for x in jax.tree.leaves(args))
    open_specs = (None,) * len(jax.tree.leaves(outs))
    # Without arguments the results alone can be split.
    given = not in_specs or rng.random() < 0.3
    out_specs = tuple(_spec(rng, len(x.shape), mesh) for x in jax.tree.leaves(outs))
    return Draw(mesh, in_specs, out_specs if given else open_specs)


def _mesh(rng: random.Random) -> dict[str, int]:
    while True:
        sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
        if 1 < math.prod(sizes) <= DEVICES:
            return dict(zip("xyzw", sizes, strict=False))


def _spec(rng: random.Random, rank: int, mesh: dict[str, int]) -> P | None:
    """Most axes split some dim or other, so that some dims are split over several."""
    if rng.random() < 0.1:
        return None
    dims: list[list[str]] = [[] for _ in range(rank)]
    for axis in rng.sample(list(mesh), len(mesh)):
        if rank and rng.random() < 0.75:
            dims[rng.randrange(rank)].append(axis)
    return P(*(tuple(axes) if len(axes) > 1 else axes[0] if axes else None for axes in dims))


# --- judging


def judge(case: Case, numbers: Sequence[int]) -> list[Outcome]:
    """The outcomes of a case on the draws of these numbers."""
    args = case.make()
    want = [np.asarray(x) for x in _plain(jax.jit(case.fn)(*args))]
    return [_outcome(case, args, want, draw(case, number)) for number in numbers]


def _outcome(case: Case, args: Sequence[Any], want: Sequence[np.ndarray], drawn: Draw) -> Outcome:
    name = f"{case.group}/{case.name}"
    try:
        specs = jax.tree.unflatten(jax.tree.structure(tuple(args)), drawn.in_specs)
        outs = jax.tree.structure(jax.eval_shape(case.fn, *args))
        plan = gspmd.plan(
            case.fn,
            *args,
            mesh=drawn.mesh,
            in_specs=specs,
            out_specs=jax.tree.unflatten(outs, drawn.out_specs),
        )
        gathered = any(finding.code in GATHERED for finding in plan.findings)
        found = run.replicas(plan.program, plan.mesh, jax.tree.leaves(args), poison=True)
    except Exception as error:  # whatever it is, the table counts it and the test shows it
        return Outcome(name, drawn, wrong=f"{type(error).__name__}: {error}")
    copies = [np.asarray(x) for x in _plain(found)]
    return Outcome(name, drawn, gathered, _compared(case, args, want, copies))


def _compared(
    case: Case, args: Sequence[Any], want: Sequence[np.ndarray], found: Sequence[np.ndarray]
) -> str:
    """What is wrong with the results, of which each group of devices has a copy."""
    if case.accept is not None:
        # Groups may differ in number, but all copies of a result are alike.
        for i, copies in enumerate(found):
            if any(not np.array_equal(copy, copies[0]) for copy in copies):
                return f"result {i}: the devices disagree"
        return case.accept(args, [copies[0] for copies in found])
    scale = max((_size(x) for x in jax.tree.leaves(args)), default=0.0)
    for i, (expected, copies) in enumerate(zip(want, found, strict=True)):
        for copy in copies:
            if wrong := difference(f"result {i}", copy, expected, scale):
                return wrong
    return ""


def _plain(results: Any) -> list[Any]:
    """The results' arrays, keys by their words."""
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(results)
    ]


def difference(what: str, got: np.ndarray, want: np.ndarray, scale: float) -> str:
    """What is different: integers are compared exactly, floats within rounding.

    That is relative to the largest entry, of the arguments too, where terms may have cancelled.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{what} is {got.dtype}{list(got.shape)}, not {want.dtype}{list(want.shape)}"
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        count = int(np.sum(got != want))
        return f"{what}: {count} of {got.size} entries differ" if count else ""
    tolerance = ROUNDING * float(jnp.finfo(want.dtype).eps)
    a, b = _wide(got), _wide(want)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return f"{what}: other infinities or NaNs"
    error = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    if error <= tolerance * max(scale, _size(want)):  # False for NaN
        return ""
    return f"{what} differs by {error:.3g}, where the largest entry is {_size(want):.3g}"


def _wide(x: np.ndarray) -> np.ndarray:
    """Floats as numpy computes with them; a complex number as two."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = np.stack([x.real, x.imag])
    return x.astype(np.float64)


def _size(x: Any) -> float:
    """The largest finite entry; 0 for what is no number."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return 0.0
    wide = _wide(np.asarray(x))
    return float(np.max(np.abs(wide), where=np.isfinite(wide), initial=0.0))


# --- the table


def row(group: str, outcomes: Sequence[Outcome]) -> Row:
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    gathered = sum(outcome.gathered for outcome in outcomes)
    return group, len({x.case for x in outcomes}), len(outcomes) - wrong, wrong, gathered


def table(rows: Iterable[Row]) -> str:
    """A line for each group, by name, with the rows of its parts added up, and one for all."""
    total: dict[str, list[int]] = {}
    for group, *counts in sorted(rows):
        before = total.get(group, [0] * len(counts))
        total[group] = [a + b for a, b in zip(before, counts, strict=True)]
    total["all"] = [sum(column) for column in zip(*total.values(), strict=True)]
    lines = [("group", "cases", "right", "wrong", "gathered")]
    lines += [(group, *map(str, counts)) for group, counts in total.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(f"{x:>{n}}" for x, n in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
