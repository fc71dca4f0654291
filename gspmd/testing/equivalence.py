"""assert_equivalent: a function partitioned computes what it computes whole, and its gradient."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, tree_util

from gspmd import run
from gspmd.arguments import flatten_arguments, path_names
from gspmd.errors import GspmdError
from gspmd.options import Options
from gspmd.plan import Plan
from gspmd.planner import plan
from gspmd.specs import AnyMesh, Rules
from gspmd.testing.compare import Tolerance, difference
from gspmd.testing.locate import first_difference

Target = Literal["simulated", "devices"]


def assert_equivalent(
    fn: Callable[..., Any],
    *args: Any,
    mesh: AnyMesh,
    in_specs: Any = None,
    out_specs: Any = None,
    rules: Rules | None = None,
    effort: int = 1,
    options: Options | None = None,
    grad: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    on: Target = "simulated",
) -> None:
    """Returns if `fn(*args)` partitioned over `mesh` equals `fn(*args)`.

    Integers and booleans must be equal. Floats may differ by `rtol` of the largest entry of their
    array, which is what another order of summation may change, plus `atol`; `rtol` counts as four
    roundings of the array's dtype where that is more (bfloat16). With `grad`, so must the
    gradients of a sum of all float results with respect to all float arguments; the summands have
    unequal weights, lest entries be mistaken for each other.

    Args:
      fn: any function that `gspmd.plan` takes.
      args: arrays, in pytrees.
      mesh, in_specs, out_specs, rules, effort, options: as in `gspmd.plan`.
      grad: compare gradients too; False for a function that has no reverse-mode derivative.
      rtol, atol: see above.
      on: "simulated", on one device that plays all of them: every copy of a result is compared,
        and the padding of uneven arguments is poisoned, so that none may leak. "devices": on the
        devices of `mesh`, or as many of this process.

    Raises:
      AssertionError: they differ. The message names the result or the gradient, its largest error,
        and the first intermediate value that differs: its op, source line, sharded type and error.
      GspmdError: a spec or the mesh does not fit, as in `gspmd.plan`.
    """
    if on not in ("simulated", "devices"):
        raise GspmdError(f'on={on!r}: it is "simulated" or "devices".')
    tolerance = Tolerance(rtol, atol)
    how: dict[str, Any] = {"mesh": mesh, "rules": rules, "effort": effort, "options": options}
    made = plan(fn, *args, in_specs=in_specs, out_specs=out_specs, **how)
    _compare("result", made, args, fn, tolerance, on)
    if grad and _is_smooth(fn, args):
        gradient = gradient_of(fn)
        made = plan(gradient, *args, in_specs=in_specs, **how)
        _compare("gradient", made, args, gradient, tolerance, on)


def gradient_of(fn: Callable[..., Any]) -> Callable[..., dict[str, jax.Array]]:
    """A function of the same arguments: the gradient by each float leaf, under its name.

    What is differentiated is the sum of all float results, their entries weighted.
    """

    @functools.wraps(fn)
    def gradient(*args: Any) -> dict[str, jax.Array]:
        flat = flatten_arguments(fn, args)
        smooth = {i: x for i, x in enumerate(flat.leaves) if _is_float(x)}

        def loss(smooth: dict[int, Any]) -> jax.Array:
            mixed = [smooth.get(i, x) for i, x in enumerate(flat.leaves)]
            return _weighted_sum(fn(*flat.rebuild(mixed)[0]))

        return {flat.names[i]: x for i, x in jax.grad(loss)(smooth).items()}

    return gradient


def _is_smooth(fn: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether floats come in and floats come out."""
    if not any(map(_is_float, tree_util.tree_leaves(args))):
        return False
    return any(map(_is_float, tree_util.tree_leaves(jax.eval_shape(fn, *args))))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _weighted_sum(results: Any) -> jax.Array:
    total = jnp.zeros(())
    for x in filter(_is_float, tree_util.tree_leaves(results)):
        x = jnp.asarray(x, jnp.float32)
        angle = jnp.zeros(x.shape)
        for dim in range(x.ndim):
            angle = angle * 7 + lax.broadcasted_iota(jnp.float32, x.shape, dim)
        total += jnp.sum(x * jnp.cos(angle))
    return total


def _compare(
    what: str,
    made: Plan,
    args: tuple[Any, ...],
    fn: Callable[..., Any],
    tolerance: Tolerance,
    on: Target,
) -> None:
    """Raises AssertionError unless the plan computes what `fn` computes."""
    leaves = made.flatten(args, {})
    wanted = tree_util.tree_leaves_with_path(jax.jit(fn)(*args))
    if on == "simulated":
        found = run.replicas(made.program, made.mesh, leaves, poison=True)
    else:
        found = [np.asarray(x)[None] for x in made.executable(*leaves)]
    for (path, want), copies in zip(wanted, found, strict=True):
        differ = difference(copies, want, tolerance)
        if differ is None:
            continue
        name = "/".join((what, *path_names(path)))
        first = first_difference(made, leaves, tolerance, on)
        raise AssertionError(f"{name} of {made.name} on {made.user_mesh} {differ}.\n{first}")
