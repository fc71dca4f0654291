"""make_jaxpr(fn, arguments): what JAX makes of a function, under the mesh context that it needs."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, tree_util
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from gspmd._compat import Sources, is_tracer, is_tracing
from gspmd.arguments import Arguments, abstract, function_name, path_names
from gspmd.errors import GspmdError, TraceError
from gspmd.sharding import Axes, Mesh


def make_jaxpr(
    fn: Callable[..., Any],
    arguments: Arguments,
    mesh: Mesh,
    sources: Sources,
    devices: jax.sharding.Mesh | None = None,
) -> tuple[Any, Any]:
    """The closed jaxpr of `fn` over the leaves of `arguments`, and its results' ShapeDtypeStructs.

    Which mesh context a function needs can only be found by trying: a bare PartitionSpec in
    `with_sharding_constraint` needs a mesh of Auto axes, a `shard_map` over a mesh with devices
    none, and `out_sharding=` one of Explicit axes.

    Raises:
      TraceError: JAX cannot trace `fn`.
    """

    def flat(*leaves: Any) -> Any:
        args, kwargs = arguments.rebuild(leaves)
        return _checked(fn(*args, **kwargs), fn)

    plain = [
        abstract(x, f"{name!r}") for x, name in zip(arguments.leaves, arguments.names, strict=True)
    ]
    ambient = jax.sharding.get_abstract_mesh()
    explicit = _explicit_mesh(ambient, arguments.leaves, mesh)
    typed = [_typed(x, leaf, explicit) for x, leaf in zip(plain, arguments.leaves, strict=True)]
    none = AbstractMesh((), ())
    auto = AbstractMesh(*_sizes_and_names(mesh), axis_types=(AxisType.Auto,) * len(mesh.axes))
    for known in (ambient, *(() if devices is None else (devices.abstract_mesh,))):
        if _fits(known, mesh, AxisType.Auto):
            auto = known  # one mesh for with_sharding_constraint and shard_map alike
    errors: list[Exception] = []
    for context, avals in ((auto, plain), (none, plain), (explicit, typed)):
        try:
            with _mesh_context(context):
                closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*avals)
            if any(map(is_tracer, closed.consts)) and not is_tracing():
                raise TraceError(
                    f"{function_name(fn)} uses a value that escaped from a function traced "
                    "earlier, by way of a global or a list; return it from there, and pass it."
                )
            if context is auto and any(map(_is_interpreted, _equations(closed.jaxpr))):
                return _without_mesh(flat, plain, closed, shapes)
            return closed, shapes
        except GspmdError:
            raise
        except Exception as error:
            errors.append(error)
            # An Explicit mesh turns with_sharding_constraint into an assert.
            if not (
                _about_meshes(error) or (len(errors) > 1 and isinstance(error, AssertionError))
            ):
                break
    is_typed = _fits(ambient, mesh, AxisType.Explicit) or any(
        is_explicit(sharding_of(leaf)) for leaf in arguments.leaves
    )
    untyped = [e for e in errors[:2] if "the mesh passed to shard_map" not in str(e)] or errors
    error = errors[-1] if is_typed else untyped[0]
    raise _trace_error(fn, error, sources) from error


def _without_mesh(
    flat: Callable[..., Any], avals: Sequence[Any], closed: Any, shapes: Any
) -> tuple[Any, Any]:
    """The jaxpr traced again where there is no mesh, if that loses no annotation.

    A kernel that is interpreted runs where all mesh axes are manual; it must not have been traced
    where they are not.
    """
    with _mesh_context(AbstractMesh((), ())):
        try:
            bare, shapes_again = jax.make_jaxpr(flat, return_shape=True)(*avals)
        except Exception:  # something in the function needs the mesh
            return closed, shapes

    def annotations(jaxpr: Any) -> int:
        return sum(eqn.primitive.name == "sharding_constraint" for eqn in _equations(jaxpr))

    if annotations(bare.jaxpr) < annotations(closed.jaxpr):
        return closed, shapes
    return bare, shapes_again


def _is_interpreted(eqn: Any) -> bool:
    return eqn.primitive.name == "pallas_call" and bool(eqn.params["interpret"])


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple) else (param,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _checked(results: Any, fn: Callable[..., Any]) -> Any:
    """`results`, if they are arrays and numbers in pytrees."""
    for path, leaf in tree_util.tree_leaves_with_path(results):
        try:
            jax.typeof(leaf)
        except TypeError as error:
            if hasattr(leaf, "__jax_array__"):
                continue
            where = "/".join(("out", *path_names(path)))
            raise TraceError(
                f"{function_name(fn)} returns at {where} something of type {type(leaf).__name__}, "
                "which is no array; return arrays, numbers or None."
            ) from error
    return results


def _sizes_and_names(mesh: Mesh) -> tuple[tuple[int, ...], Axes]:
    return tuple(size for _, size in mesh.axes), mesh.names


def _fits(context: AbstractMesh, mesh: Mesh, kind: AxisType) -> bool:
    same = dict(context.shape) == dict(mesh.axes)
    return same and all(axis_type == kind for axis_type in context.axis_types)


def _explicit_mesh(ambient: AbstractMesh, leaves: Sequence[Any], mesh: Mesh) -> AbstractMesh:
    """The mesh of Explicit axes that the arguments are typed with, or one like `mesh`."""
    shardings = (sharding_of(leaf) for leaf in leaves)
    for found in (ambient, *(s.mesh.abstract_mesh for s in shardings if is_explicit(s))):
        if _fits(found, mesh, AxisType.Explicit):
            return found
    kinds = (AxisType.Explicit,) * len(mesh.axes)
    return AbstractMesh(*_sizes_and_names(mesh), axis_types=kinds)


def _typed(plain: jax.ShapeDtypeStruct, leaf: Any, mesh: AbstractMesh) -> jax.ShapeDtypeStruct:
    sharding = sharding_of(leaf)
    if not is_explicit(sharding) or dict(sharding.mesh.shape) != dict(mesh.shape):
        return plain
    return plain.update(sharding=NamedSharding(mesh, sharding.spec))


@contextlib.contextmanager
def _mesh_context(mesh: AbstractMesh) -> Generator[None]:
    # JAX refuses to go from a mesh straight to one of another size.
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((), ())),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        yield


def _about_meshes(error: Exception) -> bool:
    if not isinstance(error, (ValueError, RuntimeError)):
        return False
    text = str(error).lower()
    return any(word in text for word in ("mesh", "axis", "axes", "sharding"))


_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (
        jax.errors.TracerBoolConversionError,
        "use jax.lax.cond or jnp.where, or name the argument in static_argnums",
    ),
    (jax.errors.TracerArrayConversionError, "use jax.numpy in place of numpy"),
    (jax.errors.TracerIntegerConversionError, "name the argument in static_argnums"),
    (
        jax.errors.NonConcreteBooleanIndexError,
        "the result's shape would depend on data; use jnp.where(mask, x, 0)",
    ),
    (jax.errors.ConcretizationTypeError, "name the argument in static_argnums"),
    (jax.errors.UnexpectedTracerError, "return the value in place of storing it outside"),
)


def _trace_error(fn: Callable[..., Any], error: Exception, sources: Sources) -> TraceError:
    source = sources.of_traceback(error.__traceback__)
    where = f" at {source}" if source else ""
    said = _first_sentence(str(error).strip())
    if (
        not isinstance(error, (TypeError, ValueError, IndexError)) or not said
    ):  # its class is half the message
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), "")
    if not advice and "static_argnums" in str(error):  # JAX says so below its first line
        advice = "name the argument in static_argnums"
    advice = f"; {advice}" if advice else ""
    return TraceError(f"{function_name(fn)} does not trace{where}: {said}{advice}.")


def _first_sentence(text: str) -> str:
    """The first line of a message of JAX's; after a colon, with what it announces, in one line."""
    said, _, rest = text.partition("\n")
    if not said.endswith(":"):
        return said.rstrip(".")
    below = (" ".join(part.split()) for part in rest.split("\n\n"))
    facts = next((part for part in below if part and not part.startswith("The mesh given")), "")
    return f"{said} {facts}".rstrip(" :.")


def with_one_predicate(eqn: Any) -> tuple[dict[str, Any], list[int]]:
    """The params of a `while` whose condition gives one boolean, and its operands by position.

    Under `vmap` a loop may have a predicate for each of its elements: it runs while any of them
    holds, and the elements that are done keep their state.
    """
    params = dict(eqn.params)
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    n, m = params["cond_nconsts"], params["body_nconsts"]
    if not test.out_avals[0].shape:
        return params, list(range(len(eqn.invars)))

    def any_holds(*operands: Any) -> Any:
        return jnp.any(jaxpr_as_fun(test)(*operands)[0])

    def unless_done(*operands: Any) -> list[Any]:
        carry = operands[n + m :]
        (goes_on,) = jaxpr_as_fun(test)(*operands[:n], *carry)
        found = jaxpr_as_fun(body)(*operands[n:])
        return [
            lax.select(lax.broadcast_in_dim(goes_on, x.shape, tuple(range(goes_on.ndim))), x, old)
            for x, old in zip(found, carry, strict=True)
        ]

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    params["cond_jaxpr"] = jax.make_jaxpr(any_holds)(*avals[:n], *avals[n + m :])
    params["body_jaxpr"] = jax.make_jaxpr(unless_done)(*avals)
    params["body_nconsts"] = n + m
    return params, [*range(n), *range(len(avals))]  # the body tests, so it needs those consts too


def reshaping(fn: Callable[[Any], Any], shape: Sequence[int], dtype: Any) -> Any:
    """The closed jaxpr of `fn` on an array, whatever mesh the caller is in."""
    with _mesh_context(AbstractMesh((), ())):
        return jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(tuple(shape), dtype))


def sharding_of(leaf: Any) -> Any:
    """Where an argument lies; None if it lies nowhere in particular."""
    if is_tracer(leaf):  # it has no place, but in explicit mode its type has
        return jax.typeof(leaf).sharding if is_explicit(jax.typeof(leaf).sharding) else None
    return getattr(leaf, "sharding", None)


def is_explicit(sharding: Any) -> bool:
    """Whether a mesh axis of `sharding` is Explicit: then it is part of a type."""
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
