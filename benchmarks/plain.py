"""A function with `gspmd.annotate` in it, as the same program in plain JAX.

Each annotation becomes the `with_sharding_constraint` that a user of `jax.jit` would have written
in its place, in loops and rematerialized parts too. Nothing else of the program changes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import tree_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = Mapping[str, str | tuple[str, ...] | None]


def mesh_spec(spec: P, rules: Rules) -> P:
    """`spec` with the mesh axes that `rules` give to its logical names."""

    def axes(entry: Any) -> Any:
        if entry is None or entry is P.UNCONSTRAINED:
            return entry
        names = entry if isinstance(entry, tuple) else (entry,)
        given = [rules.get(name, name) for name in names]
        flat = [a for one in given if one for a in ((one,) if isinstance(one, str) else one)]
        return None if not flat else flat[0] if len(flat) == 1 else tuple(flat)

    return P(*map(axes, spec))


def shardings(specs: Any, mesh: Mesh, rules: Rules) -> Any:
    """`specs`, a pytree of PartitionSpec or None (open), as `jax.jit` wants them."""
    at = lambda spec: None if spec is None else NamedSharding(mesh, mesh_spec(spec, rules))  # noqa: E731
    return tree_util.tree_map(at, specs, is_leaf=lambda x: x is None or isinstance(x, P))


def in_plain_jax(
    fn: Callable[..., Any], args: tuple[Any, ...], mesh: Mesh, rules: Rules
) -> Callable[..., Any]:
    """`fn` for arguments like `args`, its annotations written as `with_sharding_constraint`."""
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    plain = _rewritten(closed.jaxpr, mesh, rules)
    out_tree = tree_util.tree_structure(out)

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        flat = tree_util.tree_leaves(args)
        return tree_util.tree_unflatten(out_tree, jax.core.eval_jaxpr(plain, closed.consts, *flat))

    return run


def _rewritten(jaxpr: Any, mesh: Mesh, rules: Rules) -> Any:
    return jaxpr.replace(eqns=[_equation(eqn, mesh, rules) for eqn in jaxpr.eqns])


def _equation(eqn: Any, mesh: Mesh, rules: Rules) -> Any:
    if eqn.primitive.name != "gspmd_annotate":
        bodies = {key: _param(x, mesh, rules) for key, x in eqn.params.items()}
        return eqn.replace(params=bodies)
    (x,) = eqn.invars
    sharding = NamedSharding(mesh, mesh_spec(eqn.params["spec"], rules))
    constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=sharding)
    (constraint,) = jax.make_jaxpr(constrain)(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)).eqns
    return constraint.replace(
        invars=eqn.invars, outvars=eqn.outvars, source_info=eqn.source_info, ctx=eqn.ctx
    )


def _param(param: Any, mesh: Mesh, rules: Rules) -> Any:
    """`param` with the bodies in it rewritten; most params are none."""
    if type(param) is tuple:  # one with named fields holds numbers
        return tuple(_param(x, mesh, rules) for x in param)
    if hasattr(param, "eqns") and hasattr(param, "consts"):
        return param.replace(jaxpr=_rewritten(param.jaxpr, mesh, rules))
    if hasattr(param, "eqns"):
        return _rewritten(param, mesh, rules)
    return param
