"""match_call: the flat arguments of a call, if they are those that the plan was made for."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import tree_util

from gspmd._compat import is_tracer
from gspmd.arguments import path_names
from gspmd.errors import ArgumentError
from gspmd.ir import Value
from gspmd.sharding import show_type
from gspmd.uneven import Uneven

_NUMBERS = (bool, int, float, complex)  # each kind holds those before it
_SHOWN = 4  # names in one message


def match_call(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    name: str,
    parameters: Sequence[str],
    tree: Any,
    values: Sequence[Value],
    statics: Sequence[tuple[int, Any]],
) -> list[Any]:
    """The leaves of `(args, kwargs)` without the static arguments.

    `tree`, `values` and `statics` are the plan's; `name` is the function's, `parameters` are those
    of the arguments that are not static.

    Raises:
      ArgumentError: the structure, a shape, a dtype or a static argument differs, or an argument
        has been donated to an earlier call.
    """
    for i, planned in statics:
        if i >= len(args) or not _equal(args[i], planned):
            given = f"is called with {args[i]!r}" if i < len(args) else "is called without it"
            raise ArgumentError(
                f"{name}: the static argument at position {i} was planned as {planned!r}, and "
                f"{given}; plan again for it, or call the result of gspmd.partition, which does."
            )
    static = {i for i, _ in statics}
    dynamic = tuple(x for i, x in enumerate(args) if i not in static)
    flat, given_tree = tree_util.tree_flatten((dynamic, dict(kwargs)))
    if given_tree != tree:
        raise ArgumentError(_other_structure(name, dynamic, kwargs, parameters, values))
    for x, value in zip(flat, values, strict=True):
        if not _is_planned(x, value):
            _check(name, x, value)
    return flat


def _is_planned(x: Any, value: Value) -> bool:
    """Whether `x` is an array at hand of the very type; there is nothing more to check then."""
    return (
        isinstance(x, jax.Array)
        and not is_tracer(x)
        and x.shape == value.shape
        and x.dtype == value.dtype
        and not x.is_deleted()
    )


def _equal(a: Any, b: Any) -> bool:
    return a is b or bool(np.all(a == b))  # an array may be static where nothing hashes it


def _other_structure(
    name: str,
    dynamic: Sequence[Any],
    kwargs: Mapping[str, Any],
    parameters: Sequence[str],
    values: Sequence[Value],
) -> str:
    """What a call lacks and has too much, by the names of its leaves."""
    surplus = [f"argument {i}" for i in range(len(parameters), len(dynamic))]
    roots = dict(zip((*parameters, *surplus), dynamic, strict=False)) | dict(kwargs)
    given = [
        "/".join((root, *path_names(path)))
        for root, value in roots.items()
        for path, _ in tree_util.tree_leaves_with_path(value)
    ]
    planned = [value.name for value in values]
    lacks = _some([x for x in planned if x not in given])
    has = _some([x for x in given if x not in planned])
    if not lacks and not has:
        differ = "has the same names, but in other containers, or by keyword instead of position"
    else:
        differ = " and ".join(
            f"{verb} {names}" for verb, names in (("lacks", lacks), ("adds", has)) if names
        )
    return (
        f"{name} was planned for other arguments: this call {differ}; call it alike, or plan again "
        "for these."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check(name: str, x: Any, value: Value) -> None:
    """Raises unless `x` is an array that can be passed for the input `value`."""
    where = f"{name}: argument {value.name}"
    planned = show_type(value.shape, value.dtype)
    if isinstance(x, _NUMBERS) and not isinstance(x, np.generic):
        if value.shape:
            raise _other_shape(where, value, ())
        if not _holds(value.dtype, x):
            raise ArgumentError(
                f"{where} was planned as {planned}, which does not hold {x!r}; convert it, or plan "
                "again for this type."
            )
        return
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ArgumentError(
            f"{where} is a ShapeDtypeStruct, which is enough to plan but holds no numbers to "
            "compute with; pass an array."
        )
    if not isinstance(x, (jax.Array, Uneven, np.ndarray, np.generic)) and not hasattr(
        x, "__jax_array__"
    ):
        raise ArgumentError(
            f"{where} is something of type {type(x).__name__}, which is no array; pass an array "
            f"of {planned}."
        )
    if x.shape != value.shape:
        raise _other_shape(where, value, x.shape)
    if x.dtype != value.dtype and _canonical(x.dtype) != value.dtype:
        raise ArgumentError(
            f"{where} was planned as {planned}, and is called with {show_type(x.shape, x.dtype)}; "
            "convert it, or plan again for this type."
        )
    if isinstance(x, (jax.Array, Uneven)) and not is_tracer(x) and x.is_deleted():
        raise ArgumentError(
            f"{where} has been deleted: an earlier call was given its memory, by donate_argnums; "
            "use the result of that call, or do not donate it."
        )


def _other_shape(where: str, value: Value, shape: Sequence[int]) -> ArgumentError:
    return ArgumentError(
        f"{where} was planned with shape {value.shape}, and is called with {tuple(shape)}; plan "
        "again for this shape, or call the result of gspmd.partition, which does."
    )


def _canonical(dtype: Any) -> Any:
    """What JAX makes of a dtype: numpy's 64 bits become 32, unless they are switched on."""
    try:
        return jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:  # of objects, or of PRNG keys
        return dtype


def _holds(dtype: Any, x: Any) -> bool:
    """Whether a scalar of `dtype` can be `x`, as JAX converts Python's numbers."""
    kinds = (np.bool_, np.integer, np.floating, np.complexfloating)
    if not isinstance(dtype, np.dtype):
        return False
    kind = next((i for i, k in enumerate(kinds) if jax.numpy.issubdtype(dtype, k)), -1)
    if kind < next(i for i, number in enumerate(_NUMBERS) if isinstance(x, number)):
        return False
    try:
        np.asarray(x, dtype)
    except OverflowError:
        return False
    return True
