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
from gspmd.specs import show_spec

annotate_p = Primitive("gspmd_annotate")


def annotate(x: jax.typing.ArrayLike, spec: P | NamedSharding) -> jax.Array:
    """`x` itself, with the request that its dims be split as `spec` says.

    `spec` names mesh axes, or logical axes that the `rules` of `gspmd.partition` map to mesh axes.
    None keeps a dim whole, `P.UNCONSTRAINED` leaves it to the partitioner; dims past the end of
    `spec` are kept whole. The gradient of `x` is annotated alike.

    Raises:
      SpecError: `spec` is no PartitionSpec, or has more entries than `x` has dims.
    """
    if isinstance(spec, NamedSharding):
        spec = spec.spec
    if not isinstance(spec, P):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(
            f"annotate{_at()} takes a PartitionSpec, got {spec!r} of type "
            f"{type(spec).__name__}; write P('batch', None)."
        )
    x = jnp.asarray(x)
    if len(spec) > x.ndim:
        raise SpecError(
            f"annotate{_at()}: {show_spec(spec)} has {len(spec)} entries, but the array of shape "
            f"{x.shape} has {x.ndim} dims; drop {len(spec) - x.ndim}."
        )
    padded = P(*spec, *(None,) * (x.ndim - len(spec)))
    return annotate_p.bind(x, spec=padded)


def _at() -> str:
    source = Sources().here()
    return f" at {source}" if source else ""


def _identity(x: Any, *, spec: P) -> Any:
    return x


def _transpose(cotangent: Any, x: Any, *, spec: P) -> list[Any]:
    return [annotate_p.bind(cotangent, spec=spec)]


def _lower(ctx: Any, x: Any, *, spec: P) -> list[Any]:
    return [x]


def _batch(
    axis: Any, values: Sequence[Any], dims: Sequence[int | None], *, spec: P
) -> tuple[Any, int | None]:
    (x,), (dim,) = values, dims
    if dim is None:
        return annotate_p.bind(x, spec=spec), None
    # Nothing is known of the new dim, unless vmap was told its mesh axes.
    entry = tuple(axis.spmd_name) if axis.spmd_name else P.UNCONSTRAINED
    return annotate_p.bind(x, spec=P(*spec[:dim], entry, *spec[dim:])), dim


annotate_p.def_impl(_identity)
annotate_p.def_abstract_eval(_identity)
ad.deflinear2(annotate_p, _transpose)
batching.fancy_primitive_batchers[annotate_p] = _batch
mlir.register_lowering(annotate_p, _lower)
