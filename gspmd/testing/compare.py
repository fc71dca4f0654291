"""Comparing arrays: what another order of summation may change, and what it may not."""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspmd.errors import GspmdError
from gspmd.local import is_key
from gspmd.sharding import show_type


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far floats may be apart: `rtol` of the largest entry of their array, plus `atol`.

    `rtol` is at least four roundings of the array's dtype.
    """

    rtol: float = 1e-4
    atol: float = 1e-6

    def __post_init__(self) -> None:
        for name, given in dataclasses.asdict(self).items():
            if not isinstance(given, numbers.Real) or not float(given) >= 0:
                raise GspmdError(
                    f"{name}={given!r}: a tolerance is a number, 0 or more, such as 1e-4."
                )

    def of(self, dtype: Any, scale: float) -> float:
        """The largest error allowed where the largest entry is `scale`."""
        return max(self.rtol, 4 * float(jnp.finfo(dtype).eps)) * scale + self.atol


def difference(copies: Any, want: Any, tolerance: Tolerance) -> str | None:
    """How `copies[i]`, each of which should be `want`, differ from it; None if they do not."""
    got, expected = _numbers(copies), _numbers(want)
    if got.shape[1:] != expected.shape or got.dtype != expected.dtype:
        is_, should = show_type(got.shape[1:], got.dtype), show_type(expected.shape, expected.dtype)
        return f"is {is_} partitioned, {should} whole"
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        wrong = np.any(got != expected, axis=0)
        count = int(np.sum(wrong))
        return f"differs in {count} of {wrong.size} entries" if count else None
    wide = np.complex128 if jnp.issubdtype(expected.dtype, jnp.complexfloating) else np.float64
    a, b = got.astype(wide), expected.astype(wide)
    finite = np.isfinite(b)
    with np.errstate(invalid="ignore"):
        errors = np.where(finite, np.abs(a - b), 0)
    same = np.array_equal(
        np.where(finite, 0, a), np.where(finite, 0, np.broadcast_to(b, a.shape)), equal_nan=True
    )
    scale = float(np.max(np.abs(b), where=finite, initial=0.0))
    error = float(np.max(errors, initial=0.0))
    if same and error <= tolerance.of(expected.dtype, scale):
        return None
    if not same:
        return "differs where it is infinite or not a number"
    return (
        f"differs by {error:.3g}, where its largest entry is {scale:.3g}: more than "
        f"rtol={tolerance.rtol:g} and atol={tolerance.atol:g} allow"
    )


def _numbers(x: Any) -> np.ndarray:
    """`x` as a numpy array; the words of PRNG keys."""
    if isinstance(x, jax.Array) and is_key(x.dtype):
        x = jax.random.key_data(x)
    return np.asarray(x)
