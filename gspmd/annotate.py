"""annotate(x, spec): the user's word on how a tensor is split, wherever it occurs in a program.

Nothing happens when the program runs unpartitioned. `gspmd.trace` reads the annotation as a
`constraint` op.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd._compat import Sources
from gspmd.errors import SpecError
from gspmd.specs import entries_of, show_spec

annotate_p = Primitive("gspmd_annotate")


def annotate(x: jax.typing.ArrayLike, spec: P | NamedSharding) -> jax.Array:
    """`x` itself, with the request that its dims be split as `spec` says.

    `spec` names mesh axes, or logical axes that the `rules` of `gspmd.partition` map to mesh axes.
    None keeps a dim whole, `P.UNCONSTRAINED` leaves it to the partitioner; dims past the end of
    `spec` are kept whole. The gradient of `x` is annotated alike.

    Raises:
      SpecError: `spec` is no PartitionSpec, or has more entries than `x` has dims.
    """
    if not isinstance(spec, (P, NamedSharding)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(
            f"annotate{_at()} takes a PartitionSpec, got {spec!r} of type "
            f"{type(spec).__name__}; write P('batch', None)."
        )
    entries = entries_of(spec)
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"annotate{_at()} takes one array, got something of type {type(x).__name__}; annotate "
            "the arrays in it, one by one."
        ) from error
    if entries.unreduced or entries.reduced:
        raise SpecError(
            f"annotate{_at()}: {show_spec(entries)} speaks of sums that are owed, but a spec says "
            "how dims are split and no more; drop unreduced and reduced."
        )
    if len(entries) > x.ndim:
        raise SpecError(
            f"annotate{_at()}: {show_spec(entries)} has {len(entries)} entries, but the array of "
            f"shape {x.shape} has {x.ndim} dims; drop {len(entries) - x.ndim}."
        )
    padded = P(*entries, *(None,) * (x.ndim - len(entries)))
    return annotate_p.bind(x, spec=_like(spec, padded))


def _like(spec: P | NamedSharding, entries: P) -> P | NamedSharding:
    """`entries` on the mesh of `spec`, if it has one."""
    return NamedSharding(spec.mesh, entries) if isinstance(spec, NamedSharding) else entries


def _at() -> str:
    source = Sources().here()
    return f" at {source}" if source else ""


def _identity(x: Any, *, spec: P | NamedSharding) -> Any:
    return x


def _transpose(cotangent: Any, x: Any, *, spec: P | NamedSharding) -> list[Any]:
    return [annotate_p.bind(cotangent, spec=spec)]


def _lower(ctx: Any, x: Any, *, spec: P | NamedSharding) -> list[Any]:
    return [x]


def _batch(
    axis: Any, values: Sequence[Any], dims: Sequence[int | None], *, spec: P | NamedSharding
) -> tuple[Any, int | None]:
    (x,), (dim,) = values, dims
    if dim is None:
        return annotate_p.bind(x, spec=spec), None
    # Nothing is known of the new dim, unless vmap was told its mesh axes.
    entry = tuple(axis.spmd_name) if axis.spmd_name else P.UNCONSTRAINED
    entries = entries_of(spec)
    return annotate_p.bind(x, spec=_like(spec, P(*entries[:dim], entry, *entries[dim:]))), dim


annotate_p.def_impl(_identity)
annotate_p.def_abstract_eval(_identity)
ad.deflinear2(annotate_p, _transpose)
batching.fancy_primitive_batchers[annotate_p] = _batch
mlir.register_lowering(annotate_p, _lower)
