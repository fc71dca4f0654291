"""assert_equivalent_shrunk: a plan for thousands of devices, checked on a handful.

The function is planned as given, on the big mesh. Then it is planned again for a mesh whose axes
have 2 devices each, with smaller arguments, and that plan is run and compared. What of the big plan
the small one has, and what not, is the answer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd.arguments import abstract, function_name, path_names
from gspmd.errors import GspmdError
from gspmd.local import is_key
from gspmd.plan import Plan
from gspmd.planner import plan
from gspmd.sharding import Axes, Mesh, root_axis, show_type
from gspmd.specs import AnyMesh, Rules, read_mesh
from gspmd.testing.coverage import Coverage
from gspmd.testing.equivalence import Target, assert_equivalent

KEPT = 4  # dims up to this size are structure (q, k and v; the taps of a window), and stay


def assert_equivalent_shrunk(
    fn: Callable[..., Any],
    *args: Any,
    mesh: AnyMesh,
    in_specs: Any = None,
    out_specs: Any = None,
    rules: Rules | None = None,
    small_mesh: AnyMesh | None = None,
    small_fn: Callable[..., Any] | None = None,
    small_args: Sequence[Any] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    on: Target = "simulated",
) -> Coverage:
    """What a shrunken run, which was right, exercised of the plan of `fn(*args)` on `mesh`.

    Nothing of the full size is computed or allocated. To check a gradient, give the function that
    computes it.

    Args:
      fn, args, mesh, in_specs, out_specs, rules: as in `gspmd.plan`; `args` may be, or hold,
        `jax.ShapeDtypeStruct`s, which `jax.eval_shape` makes of an initialization.
      small_mesh: a mesh with the axes of `mesh`; if None, each axis of more than 2 has 2 devices.
      small_fn: the function to run in place of `fn`, where that holds sizes of its own: the same
        model with a small configuration.
      small_args: the arguments to run it with, arrays or ShapeDtypeStructs. If None, they are those
        of `args` with smaller dims: equal sizes become equal sizes, larger ones larger ones, and
        what the axes divide stays divisible. Sizes up to 4 stay.
      rtol, atol, on: as in `assert_equivalent`.

    A ShapeDtypeStruct is filled with seeded random numbers: floats from 0.1 to 1, integers from 0
    up to the smallest shrunken size, lest an index be out of bounds.

    Raises:
      AssertionError: the shrunken run is wrong, as in `assert_equivalent`.
      GspmdError: the function cannot be traced with the shrunken arguments, or its results are not
        finite, so that comparing them would say nothing: give `small_fn` or `small_args`.
    """
    _check_small(small_fn, small_args)
    options: dict[str, Any] = {"in_specs": in_specs, "out_specs": out_specs, "rules": rules}
    full = plan(fn, *args, mesh=mesh, **options)
    axes = _small_mesh(full.user_mesh, small_mesh)
    sizes: dict[int, int] = {}
    given = small_args
    if given is None:
        sizes = shrunken_sizes(full, axes)
        given = tree_util.tree_map(lambda x: _shrunk(x, sizes), args)
    values = _filled(given, sizes)
    run = fn if small_fn is None else small_fn
    moved: dict[str, Any] = {
        "in_specs": _on_mesh(in_specs, axes), "out_specs": _on_mesh(out_specs, axes),
        "rules": rules, "mesh": dict(axes.axes) if small_mesh is None else small_mesh,
    }  # fmt: skip
    try:
        expected = jax.jit(run)(*values)
        small = plan(run, *values, **moved)
    except Exception as error:
        way_out = "small_args" if not sizes else "small_fn, which holds small sizes, or small_args"
        said = str(error) if isinstance(error, TypeError | ValueError) else repr(error)
        raise GspmdError(
            f"{function_name(run)} cannot be planned with the shrunken arguments "
            f"{_types(values)} on {axes} ({said.partition(chr(10))[0].rstrip('.')}); "
            f"give {way_out}."
        ) from error
    _check_finite(expected, run)
    assert_equivalent(run, *values, **moved, grad=False, rtol=rtol, atol=atol, on=on)
    return Coverage.of(full, small, sizes)


def shrunken_sizes(full: Plan, small: Mesh) -> dict[int, int]:
    """What each size of an argument's dim becomes where the mesh of `full` becomes `small`.

    Sizes keep their order, and who divides whom. A dim that axes divide in the full plan is divided
    by them in the small one, and else not, as far as that is possible.
    """
    even, uneven = _splits(full, small)
    sizes: dict[int, int] = {}
    for n in sorted({n for value in full.model.ins for n in value.shape}):
        if n <= KEPT:
            sizes[n] = n
            continue
        unit = math.lcm(*even.get(n, ()), *(m for d, m in sizes.items() if d and n % d == 0))
        least = max((*sizes.values(), KEPT)) + 1
        fits = (
            m
            for m in range(-(-least // unit) * unit, n, unit)
            if all(m % k for k in uneven.get(n, ()))
        )
        sizes[n] = next(fits, n)
    return sizes


def _splits(full: Plan, small: Mesh) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """By size of a dim: how many ways the small mesh will split it evenly, and how unevenly."""
    even: dict[int, set[int]] = {}
    uneven: dict[int, set[int]] = {}
    for value, sharding in full.propagated.shardings.items():
        for n, axes in zip(value.shape, sharding.dims, strict=True):
            ways = small.size(_roots(axes))
            if ways > 1:
                table = uneven if n % full.mesh.size(axes) else even
                table.setdefault(n, set()).add(ways)
    return even, uneven


def _roots(axes: Axes) -> Axes:
    return tuple(dict.fromkeys(root_axis(axis) for axis in axes))


def _small_mesh(full: Mesh, given: AnyMesh | None) -> Mesh:
    if given is None:
        return Mesh(tuple((name, min(size, 2)) for name, size in full.axes))
    small = read_mesh(given)[0]
    if small.names != full.names:
        raise GspmdError(
            f"small_mesh has axes {', '.join(small.names)}, the mesh {', '.join(full.names)}; "
            "give the same axes with smaller sizes."
        )
    if any(small.size((axis,)) > n for axis, n in full.axes):
        raise GspmdError(
            f"small_mesh is {small}, and the mesh {full}; give no axis more devices than it has."
        )
    return small


def _check_small(fn: Any, args: Any) -> None:
    """Raises GspmdError unless these may be `small_fn` and `small_args`."""
    if fn is not None and not callable(fn):
        raise GspmdError(
            f"small_fn is of type {type(fn).__name__}, which is no function; give the same model "
            "with a small configuration."
        )
    if args is not None and not isinstance(args, (tuple, list)):
        raise GspmdError(
            f"small_args is of type {type(args).__name__}; give a tuple with an entry for each "
            "argument, (x,) for one."
        )


def _on_mesh(specs: Any, mesh: Mesh) -> Any:
    """`specs` with NamedShardings moved to `mesh`."""
    target = AbstractMesh(tuple(size for _, size in mesh.axes), mesh.names)

    def move(spec: Any) -> Any:
        return NamedSharding(target, spec.spec) if isinstance(spec, NamedSharding) else spec

    def is_spec(x: Any) -> bool:
        return isinstance(x, P | NamedSharding) or x is None

    return tree_util.tree_map(move, specs, is_leaf=is_spec)


def _shrunk(x: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(x, bool | int | float | complex):
        return x
    aval = abstract(x)
    return jax.ShapeDtypeStruct(tuple(sizes[n] for n in aval.shape), aval.dtype)


def _filled(args: Sequence[Any], sizes: Mapping[int, int]) -> tuple[Any, ...]:
    """`args` with numbers in place of each ShapeDtypeStruct."""
    rng = np.random.default_rng(0)
    limit = min((m for n, m in sizes.items() if n > KEPT), default=KEPT)

    def fill(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if is_key(x.dtype):
            impl = jax.random.key_impl(jnp.zeros((), x.dtype))
            keys = jax.random.split(jax.random.key(0, impl=impl), math.prod(x.shape))
            return keys.reshape(x.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype)
        if x.dtype == np.bool_:
            return jnp.asarray(rng.integers(0, 2, x.shape), x.dtype)
        return jnp.asarray(rng.integers(0, limit, x.shape), x.dtype)

    return tuple(tree_util.tree_map(fill, tuple(args)))


def _check_finite(results: Any, fn: Callable[..., Any]) -> None:
    for path, x in tree_util.tree_leaves_with_path(results):
        if jnp.issubdtype(x.dtype, jnp.inexact) and x.size and not np.isfinite(x).any():
            name = "/".join(("result", *path_names(path)))
            raise GspmdError(
                f"{name} of {function_name(fn)} is nowhere finite with the random arguments "
                "that were made up for it, so that comparing it says nothing; give small_args."
            )


def _types(values: Sequence[Any]) -> str:
    leaves = [abstract(x) for x in tree_util.tree_leaves(values)]
    shown = [show_type(x.shape, x.dtype) for x in leaves[:6]]
    more = f" and {len(leaves) - 6} more" if len(leaves) > 6 else ""
    return ", ".join(shown) + more
