"""Cutting arrays along factors, and putting results together again."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gspmd.ir import Value
from gspmd.local import neutral_value
from gspmd.rules.cases import Case, Words
from gspmd.rules.factor import REDUCTIONS, Dims, FactorRule

Device = tuple[int, ...]  # an index along each split factor


def cut_all(
    case: Case, parts: Mapping[int, int], rule: FactorRule
) -> tuple[dict[Device, list[Words]], list[int]]:
    """What each device holds, and the local sizes of the factors."""
    sizes = list(rule.sizes)
    values = [dims for x, dims in zip(case.op.ins, rule.ins, strict=True) if isinstance(x, Value)]
    pieces: dict[Device, list[Words]] = {(): list(case.words)}
    for factor, k in parts.items():
        kind = rule.kinds[factor] if rule.masked else "pass"
        cuts: dict[Device, list[Words]] = {}
        for device, xs in pieces.items():
            split = [
                cut(x, dims, sizes, factor, k,
                    neutral_value(kind, x.dtype) if kind in REDUCTIONS else _garbage(x.dtype))
                for x, dims in zip(xs, values, strict=True)
            ]  # fmt: skip
            cuts |= {(*device, i): [x[i] for x in split] for i in range(k)}
        pieces = cuts
        sizes[factor] = -(-sizes[factor] // k)
    return pieces, sizes


def join_all(
    outs: dict[Device, list[Words]],
    parts: Mapping[int, int],
    rule: FactorRule,
    sizes: list[int],
    shapes: Sequence[tuple[int, ...]],
) -> list[Words]:
    """The whole results, of the given `shapes`, from those of each device."""
    sizes = list(sizes)
    for factor, k in reversed(list(parts.items())):
        groups: dict[Device, list[list[Words]]] = {}
        for device, xs in outs.items():
            groups.setdefault(device[:-1], []).append(xs)
        n, kind = rule.sizes[factor], rule.kinds[factor]
        outs = {
            device: [
                join(pieces, dims, sizes, factor, _extent(dims, shape, factor, n), kind)
                for dims, shape, *pieces in zip(rule.outs, shapes, *results, strict=True)
            ]
            for device, results in groups.items()
        }
        assert all(len(results) == k for results in groups.values())
        sizes[factor] = n
    return outs[()]


def _place(dims: Dims, sizes: Sequence[int], factor: int) -> tuple[int, int, int] | None:
    """The dim that holds `factor`, and the sizes in it which are major and minor to the factor."""
    for dim, factors in enumerate(dims):
        if factor in factors:
            i = factors.index(factor)
            major, minor = factors[:i], factors[i + 1 :]
            return dim, math.prod(sizes[f] for f in major), math.prod(sizes[f] for f in minor)
    return None


def _extent(dims: Dims, shape: Sequence[int], factor: int, size: int) -> int:
    """The size of a factor in one tensor: dims that exchange entries may differ in it."""
    own = [n for factors, n in zip(dims, shape, strict=False) if factors == (factor,)]
    return own[0] if own else size


def cut(
    x: Words, dims: Dims, sizes: Sequence[int], factor: int, parts: int, filler: Any
) -> list[Words]:
    """The pieces of `x`, the last ones filled up; all of it for each if it lacks the factor."""
    place = _place(dims, sizes, factor)
    if place is None:
        return [x] * parts
    dim, major, minor = place
    n = _extent(dims, x.shape, factor, sizes[factor])
    block = -(-n // parts)
    x = x.reshape(*x.shape[:dim], major, n, minor, *x.shape[dim + 1 :])
    widths = [(0, block * parts - n if d == dim + 1 else 0) for d in range(x.ndim)]
    x = np.pad(x, widths, constant_values=filler)
    pieces = np.split(x, parts, dim + 1)
    return [p.reshape(*p.shape[:dim], major * block * minor, *p.shape[dim + 3 :]) for p in pieces]


def join(
    pieces: Sequence[Words], dims: Dims, sizes: Sequence[int], factor: int, n: int, kind: str
) -> Words:
    """What the pieces of a result make: side by side, reduced, or all the same."""
    place = _place(dims, sizes, factor)
    if place is None:
        if kind in REDUCTIONS:
            return reduce_pieces(pieces, kind)
        assert all(equal(p, pieces[0]) for p in pieces), "the pieces of a whole result differ"
        return pieces[0]
    dim, major, minor = place
    block = pieces[0].shape[dim] // (major * minor)
    split = [p.reshape(*p.shape[:dim], major, block, minor, *p.shape[dim + 1 :]) for p in pieces]
    x = np.concatenate(split, dim + 1)
    x = x[(slice(None),) * (dim + 1) + (slice(n),)]
    return x.reshape(*x.shape[:dim], major * n * minor, *x.shape[dim + 3 :])


UFUNCS = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def reduce_pieces(pieces: Sequence[Words], kind: str) -> Words:
    total = pieces[0]
    for piece in pieces[1:]:
        total = UFUNCS[kind](total, piece)
    return total


def equal(x: Words, y: Words) -> bool:
    """Integers exactly, floats up to the order of additions."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return np.array_equal(x, y)
    wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
    rtol = max(1e-4, 8 * float(jnp.finfo(x.dtype).eps))
    return np.allclose(x.astype(wide), y.astype(wide), rtol, 1e-5, equal_nan=True)


def _garbage(dtype: Any) -> Any:
    return np.nan if jnp.issubdtype(dtype, jnp.inexact) else 119 if dtype != np.bool_ else True
