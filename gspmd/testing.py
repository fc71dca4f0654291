"""For tests of your own program: partitioned equals unpartitioned.

gspmd.testing.assert_equivalent(loss, params, batch, mesh="data=2,model=4", in_specs=...)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from gspmd.arguments import path_names
from gspmd.planner import plan
from gspmd.specs import AnyMesh, Rules


def assert_equivalent(
    fn: Callable[..., Any],
    *args: Any,
    mesh: AnyMesh,
    in_specs: Any = None,
    out_specs: Any = None,
    rules: Rules | None = None,
    grad: bool = True,
    rtol: float = 1e-4,
) -> None:
    """Returns if `fn(*args)` partitioned over a simulated `mesh` equals `fn(*args)`.

    Integers and booleans must be equal; floats within `rtol` of the largest entry of their array,
    which is what another order of summation may change. With `grad`, so must the gradients of the
    sum of all float results with respect to all float arguments.

    Raises:
      AssertionError: they differ; the message names the result or gradient, and the largest error.
    """
    options: dict[str, Any] = {"mesh": mesh, "rules": rules}
    made = plan(fn, *args, in_specs=in_specs, out_specs=out_specs, **options)
    _compare("result", made.simulate(*args), fn(*args), rtol)
    smooth = tuple(i for i, x in enumerate(args) if _is_smooth(x))
    if grad and smooth:
        gradient = jax.grad(lambda *xs: _total(fn(*xs)), argnums=smooth)
        made = plan(gradient, *args, in_specs=in_specs, **options)
        _compare("gradient", made.simulate(*args), gradient(*args), rtol)


def _is_smooth(arg: Any) -> bool:
    leaves = tree_util.tree_leaves(arg)
    return bool(leaves) and all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves)


def _total(results: Any) -> jax.Array:
    leaves = [x for x in tree_util.tree_leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((jnp.sum(x, dtype=jnp.float32) for x in leaves), jnp.zeros(()))


def _compare(what: str, got: Any, expected: Any, rtol: float) -> None:
    pairs = zip(tree_util.tree_leaves_with_path(got), tree_util.tree_leaves(expected), strict=True)
    for (path, mine), theirs in pairs:
        name = "/".join((what, *path_names(path)))
        a, b = np.asarray(mine), np.asarray(theirs)
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(
                f"{name} is {a.dtype}{list(a.shape)} partitioned, {b.dtype}{list(b.shape)} whole."
            )
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            if not np.array_equal(a, b):
                raise AssertionError(
                    f"{name} differs in {int(np.sum(a != b))} of {a.size} entries."
                )
            continue
        wide = np.complex128 if jnp.issubdtype(b.dtype, jnp.complexfloating) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        finite = np.isfinite(b)
        scale = float(np.max(np.abs(b), where=finite, initial=0.0))
        error = float(np.max(np.abs(np.where(finite, a - b, 0)), initial=0.0))
        same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
        if not same or not error <= rtol * max(scale, 1e-30):
            raise AssertionError(
                f"{name} differs by {error:.3g}, where its largest entry is {scale:.3g}: more than "
                f"rtol={rtol:g} allows."
            )
