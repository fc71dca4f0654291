"""The arguments of a call, flat: what is traced, what is static, and the name of every leaf."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import tree_util

from gspmd.errors import TraceError, nearest
from gspmd.specs import key_name

OPTIONS = (
    "mesh", "in_specs", "out_specs", "rules", "donate_argnums", "static_argnums", "strict",
    "effort", "options",
)  # fmt: skip
"""The keywords of `gspmd.plan` and `gspmd.partition`: all others are the function's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arguments:
    """The array leaves of a call in order, and how to put the call together again.

    `tree` is the structure of `(args, kwargs)` without the static arguments. `parameters` are the
    names of the arguments in that `args`, `names` the pytree path of each leaf: `params/mlp/wi`.
    `owners` is, for each leaf, the position of its argument in the call; -1 for a keyword.
    """

    leaves: tuple[Any, ...]
    tree: Any
    names: tuple[str, ...]
    parameters: tuple[str, ...]
    owners: tuple[int, ...]
    statics: tuple[tuple[int, Any], ...]

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The `args` and `kwargs` of the call, statics included, with other leaves."""
        args, kwargs = tree_util.tree_unflatten(self.tree, leaves)
        args = list(args)
        for i, value in self.statics:  # in ascending order, so that each finds its place
            args.insert(i, value)
        return tuple(args), kwargs


def flatten_arguments(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    static_argnums: int | Sequence[int] = (),
) -> Arguments:
    """The flat arguments of `fn(*args, **kwargs)`.

    Raises:
      TraceError: `fn` does not take these arguments, or one of them is no array.
    """
    if not callable(fn):
        raise TraceError(
            f"gspmd takes a function to partition first, got {_shown(fn)} of type "
            f"{type(fn).__name__}."
        )
    kwargs = dict(kwargs or {})
    static = positions(static_argnums, len(args), "static_argnums", fn)
    roots = _roots(fn, args, kwargs)
    dynamic = [i for i in range(len(args)) if i not in static]
    leaves: list[Any] = []
    names: list[str] = []
    owners: list[int] = []
    for owner, root, value in (
        *((i, roots[i], args[i]) for i in dynamic),
        *((-1, name, kwargs[name]) for name in sorted(kwargs)),
    ):
        for path, leaf in tree_util.tree_leaves_with_path(value):
            leaves.append(leaf)
            names.append("/".join((root, *path_names(path))))
            owners.append(owner)
    return Arguments(
        leaves=tuple(leaves),
        tree=tree_util.tree_structure((tuple(args[i] for i in dynamic), kwargs)),
        names=tuple(names),
        parameters=tuple(roots[i] for i in dynamic),
        owners=tuple(owners),
        statics=tuple((i, args[i]) for i in static),
    )


def positions(
    argnums: int | Sequence[int], count: int, what: str, fn: Callable[..., Any]
) -> tuple[int, ...]:
    """The positions that `argnums` names, sorted, counted from the front.

    Raises:
      TraceError: there is no such argument.
    """
    numbers = tuple(argnums) if isinstance(argnums, Iterable) else (argnums,)
    for i in numbers:
        if not isinstance(i, (int, np.integer)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TraceError(
                f"{what}={argnums!r}: write the position of an argument, or a tuple of them, such "
                "as 0 or (0, 1)."
            )
        if not -count <= i < count:
            raise TraceError(
                f"{what} names argument {i} of {function_name(fn)}, but it was given {count} "
                f"positional arguments; use {-count} to {count - 1}."
            )
    return tuple(sorted({i % count for i in numbers}))


def path_names(path: Sequence[Any]) -> list[str]:
    """The steps of a pytree path, without the `.value` which flax.nnx puts behind each Variable."""
    steps = list(path)
    if len(steps) > 1 and isinstance(steps[-1], tree_util.GetAttrKey) and steps[-1].name == "value":
        steps.pop()
    return [key_name(key) for key in steps]


def abstract(leaf: Any, name: str = "argument") -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a scalar or a ShapeDtypeStruct, as JAX would see it.

    Raises:
      TraceError: `leaf` is none of these.
    """
    try:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            dtype = leaf.dtype  # maybe of a precision that is switched off; a PRNG key has none
            if isinstance(dtype, np.dtype):
                dtype = jax.dtypes.canonicalize_dtype(dtype)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, weak_type=leaf.weak_type)
        if hasattr(leaf, "__jax_array__"):  # an array by protocol, such as gspmd.Uneven
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
    except (TypeError, AttributeError) as error:
        raise TraceError(
            f"{name} is {_shown(leaf)} of type {type(leaf).__name__}, which is no array; name its "
            "argument in static_argnums, or close over it."
        ) from error


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 40 and "\n" not in text else "an object"


def function_name(fn: Callable[..., Any]) -> str:
    """How a message calls `fn`."""
    while hasattr(fn, "func"):  # functools.partial
        fn = fn.func  # pyright: ignore[reportFunctionMemberAccess]
    return getattr(fn, "__name__", type(fn).__name__)


def _roots(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """The name of each positional argument, by the signature of `fn`."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin
        return [f"arg{i}" for i in range(len(args))]
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"{function_name(fn)}{signature} cannot be called with {len(args)} positional "
            f"arguments{_keywords(kwargs)}: {error}{_meant(kwargs, signature)}"
        ) from error
    roots: list[str] = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            roots += [f"{name}/{i}" for i in range(len(args) - len(roots))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            roots.append(name)
    return roots[: len(args)]


def _meant(kwargs: Mapping[str, Any], signature: inspect.Signature) -> str:
    """The end of the sentence: the keyword that a misspelt one resembles, if any."""
    known = (*signature.parameters, *OPTIONS)
    unknown = next((name for name in kwargs if name not in signature.parameters), "")
    return nearest(unknown, known)


def _keywords(kwargs: Mapping[str, Any]) -> str:
    return f" and keywords {', '.join(kwargs)}" if kwargs else ""
