"""Is a user's rule right? An op on drawn operands, whole and in the pieces that its rule allows.

Each factor is split in 2 and in 3 and, where it may be, unevenly, so that the last pieces hold
padding: the operands in the reduced dims are neutral there, anything elsewhere. The pieces' results
are put together as the factor's kind says.
"""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspmd.ir import Literal, Op, Value, values_of
from gspmd.rules.cases import Case, Words
from gspmd.rules.factor import Dims, FactorRule
from gspmd.rules.pieces import cut_all, equal, join_all

SMALL = 1 << 16  # entries of all operands together that are no trouble to compute with
LARGEST = 1 << 22  # ... and those that may be tried where no smaller operands will do

_KIND = 'give the factor its kind in kinds={"k": "max"}, or write _ for a dim that stays whole'


class CannotRun(Exception):
    """The op does not run here on operands that we draw; the text says why."""


def refute(op: Op, rule: FactorRule, words: Sequence[Words]) -> str:
    """The first claim of `rule` that does not hold of `op` on `words`; empty if all do.

    Raises:
      CannotRun: the whole op does not run.
    """
    case = Case(op, tuple(words))
    try:
        (whole,) = _run(case, [words])
    except Exception as error:  # whatever a user's primitive raises
        raise CannotRun(_said(error)) from error
    for parts in _splits(rule):
        if fault := _split_fault(case, rule, parts, whole):
            return f"{_named(rule, *parts.popitem())}: {fault}; {_KIND}"
    for group in rule.linear:
        if fault := _sum_fault(case, group):
            return f"linear={group} says that it is linear in these operands, but {fault}"
    return ""


def draw(op: Op, rng: np.random.Generator) -> list[Words]:
    """Operands of the op's types: normal floats, small whole numbers.

    Raises:
      CannotRun: of another type than a number.
    """
    return [_draw(x.shape, x.dtype, rng) for x in values_of(op.ins)]


def at_sizes(op: Op, rule: FactorRule, sizes: Sequence[int]) -> Op:
    """`op` on operands whose factors have other `sizes`; the results get the shapes they come to.

    Raises:
      CannotRun: it does not exist at these sizes.
    """
    ins = tuple(
        dataclasses.replace(x, shape=_shape(x.shape, dims, sizes)) if isinstance(x, Value) else x
        for x, dims in zip(op.ins, rule.ins, strict=True)
    )
    return with_results(dataclasses.replace(op, ins=ins))


def with_results(op: Op) -> Op:
    """`op` with results of the shapes that JAX says come of its operands.

    Raises:
      CannotRun: JAX refuses the operands.
    """
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in values_of(op.ins)]

    def whole(*xs: Any) -> list[Any]:
        rest = iter(xs)
        assert op.call is not None
        operands = [x.value if isinstance(x, Literal) else next(rest) for x in op.ins]
        outs = op.call(*operands, **op.params)
        return list(outs) if isinstance(outs, list | tuple) else [outs]

    try:
        with _on_its_own():
            found = jax.eval_shape(whole, *avals)
    except Exception as error:  # whatever a user's primitive raises
        raise CannotRun(_said(error)) from error
    first = 1 + max((x.id for x in values_of(op.ins)), default=0)
    outs = tuple(Value(first + i, x.shape, x.dtype) for i, x in enumerate(found))
    return dataclasses.replace(op, outs=outs)


def shrunken(rule: FactorRule) -> list[int]:
    """Small sizes for the factors: equal where they were equal, else different."""
    small: dict[int, int] = {}
    for n in sorted(set(rule.sizes)):
        small[n] = min(n, 6 * (1 + sum(k > 6 for k in small)))
    return [small[n] for n in rule.sizes]


def entries(op: Op) -> int:
    """The number of entries of all operands together."""
    return sum(math.prod(x.shape) for x in op.ins)


# --- the pieces


def _splits(rule: FactorRule) -> Generator[dict[int, int]]:
    compound = {f for dims in (*rule.ins, *rule.outs) for fs in dims if len(fs) > 1 for f in fs}
    held = {f for dims in rule.ins for factors in dims for f in factors}
    for factor, (n, kind) in enumerate(zip(rule.sizes, rule.kinds, strict=True)):
        if kind == "whole" or n < 2 or factor not in held:
            continue
        ways = [k for k in (2, 3) if n % k == 0]
        if factor not in compound:
            ways.append(next(k for k in range(2, n + 2) if n % k))
        yield from ({factor: k} for k in ways)


def _split_fault(
    case: Case, rule: FactorRule, parts: Mapping[int, int], whole: Sequence[Words]
) -> str:
    """How the result of the pieces differs from the whole one, or nothing."""
    pieces, sizes = cut_all(case, parts, rule)
    try:
        results = _run(case, list(pieces.values()))
    except Exception as error:  # whatever a user's primitive raises
        return f"on a piece it does not run: {_said(error)}"
    for i, (dims, out) in enumerate(zip(rule.outs, case.op.outs, strict=True)):
        expected = _shape(out.shape, dims, sizes)
        for outs in results:
            if outs[i].shape != expected:
                return f"a piece of result {i} has shape {outs[i].shape}, by the rule {expected}"
    try:
        shapes = [out.shape for out in case.op.outs]
        joined = join_all(dict(zip(pieces, results, strict=True)), parts, rule, sizes, shapes)
    except AssertionError:
        return "the pieces differ from each other in a result that lacks the factor"
    return _difference(joined, whole, "put together from its pieces", "whole")


def _sum_fault(case: Case, group: Sequence[int]) -> str:
    """How the result on a sum differs from the sum of the results, or nothing."""
    values = [i for i, x in enumerate(case.op.ins) if isinstance(x, Value)]
    if not set(group) <= set(values):
        return ""
    halves: list[list[Words]] = [list(case.words), list(case.words), list(case.words)]
    for i in group:
        x = case.words[values.index(i)]
        if x.dtype == np.bool_:
            return ""
        first = np.flip(x)
        for words, part in zip(halves, (first, x - first, first + (x - first)), strict=True):
            words[values.index(i)] = part
    try:
        one, other, both = _run(case, halves)
    except Exception as error:  # whatever a user's primitive raises
        return f"on a summand it does not run: {_said(error)}"
    added = [np.asarray(a + b).astype(c.dtype) for a, b, c in zip(one, other, both, strict=True)]
    return _difference(added, both, "added up from two summands", "on their sum")


def _difference(found: Sequence[Words], whole: Sequence[Words], how: str, other: str) -> str:
    for i, (x, y) in enumerate(zip(found, whole, strict=True)):
        if not equal(x, y):
            at = _worst(x, y)
            return (
                f"result {i} is {x[at]:.6g} at {list(map(int, at))} {how}, and {y[at]:.6g} {other}"
            )
    return ""


def _worst(x: Words, y: Words) -> tuple[Any, ...]:
    """Where two arrays differ most."""
    wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
    a, b = x.astype(wide), y.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0, np.nan_to_num(np.abs(a - b), nan=np.inf))
    return np.unravel_index(np.argmax(gap), x.shape)


def _named(rule: FactorRule, factor: int, parts: int) -> str:
    padded = " with padding" if rule.sizes[factor] % parts else ""
    kind = {"pass": "passes"}.get(rule.kinds[factor], f"is reduced by {rule.kinds[factor]}")
    return (
        f"factor {rule.names[factor]!r} {kind}, by the rule; but with its {rule.sizes[factor]} "
        f"entries split in {parts}{padded}"
    )


def _shape(shape: Sequence[int], dims: Dims, sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        math.prod(sizes[f] for f in factors) if factors else n
        for n, factors in zip(shape, dims, strict=True)
    )


# --- running it


def _run(case: Case, batch: Sequence[Sequence[Words]]) -> list[list[Words]]:
    """The results on each of `batch`: compiled if there is a lowering, else as Python runs it."""

    def whole(words: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [case.run(xs) for xs in words]

    with _on_its_own():
        try:
            results = jax.jit(whole)(batch)
        except Exception as error:
            try:
                results = whole(batch)  # an impl alone will do
            except NotImplementedError:
                raise error from None
    return jax.tree.map(np.asarray, results)


@contextlib.contextmanager
def _on_its_own() -> Generator[None]:
    """Neither a trace nor a mesh that is under way has to do with what is computed here."""
    with (
        jax.ensure_compile_time_eval(),
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())),
    ):
        yield


def _draw(shape: Sequence[int], dtype: Any, rng: np.random.Generator) -> Words:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return rng.standard_normal(shape).astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return rng.integers(0, 4, shape).astype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(dtype)
    raise CannotRun(f"operands of type {dtype} cannot be drawn")


def _said(error: Exception) -> str:
    """One line of an error: its class and the start of its text."""
    text = " ".join(str(error).split()).rstrip(".")
    short = text if len(text) <= 120 else f"{text[:117]}..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__
