"""trace(fn, args): a JAX function and its arguments become a global Program.

Whatever JAX offers for saying how a tensor is split becomes a `constraint` op, or a constraint on
an input or output.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import tree_util
from jax.extend.core import Jaxpr
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding

from gspmd._compat import Sources, is_tracer
from gspmd.arguments import flatten_arguments, path_names, positions
from gspmd.convert import Converter
from gspmd.ir import Program
from gspmd.jaxpr import make_jaxpr, sharding_of
from gspmd.sharding import Constraint, Mesh
from gspmd.specs import Rules, check_rules, resolve, same_mesh


@dataclasses.dataclass(frozen=True, slots=True)
class Traced:
    """A global program and what is known of its boundary, leaf by leaf.

    `in_tree` is the structure of `(args, kwargs)` without the static arguments, whose names are
    `parameters`. A constraint of None leaves the tensor open.
    """

    program: Program
    in_tree: Any
    out_tree: Any
    parameters: tuple[str, ...]
    in_names: tuple[str, ...]
    out_names: tuple[str, ...]
    in_constraints: tuple[Constraint | None, ...]
    out_constraints: tuple[Constraint | None, ...]
    donated: tuple[bool, ...]


def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh,
    devices: DeviceMesh | None = None,
    rules: Rules | None = None,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
) -> Traced:
    """The program that `fn(*args, **kwargs)` runs, for arrays or ShapeDtypeStructs.

    `devices` is the mesh that JAX knows `mesh` by, where there is one.

    Raises:
      TraceError: JAX cannot trace `fn` on these arguments.
      SpecError: an annotation in `fn` does not fit its tensor, the mesh or `rules`.
    """
    axes = check_rules(rules, mesh)
    arguments = flatten_arguments(fn, args, kwargs, static_argnums)
    sources = Sources()
    closed, out_shape = make_jaxpr(fn, arguments, mesh, sources, devices)
    boundary = _Boundary.of(closed.jaxpr)
    program = Converter(mesh, axes, sources, boundary.eqn).program(closed, None, arguments.names)
    out_paths, out_tree = tree_util.tree_flatten_with_path(out_shape)
    out_names = tuple("/".join(("out", *path_names(path))) for path, _ in out_paths)
    donating = positions(donate_argnums, len(args), "donate_argnums", fn)
    is_jit = hasattr(fn, "lower")  # else the donation is some inner call's, which jit ignores too
    return Traced(
        program=program,
        in_tree=arguments.tree,
        out_tree=out_tree,
        parameters=arguments.parameters,
        in_names=arguments.names,
        out_names=out_names,
        in_constraints=tuple(
            _constraint(given, len(value.shape), mesh, f"in_shardings for {name!r}")
            or _placed(leaf, len(value.shape), mesh)
            for given, leaf, value, name in zip(
                boundary.ins, arguments.leaves, program.ins, arguments.names, strict=True
            )
        ),
        out_constraints=tuple(
            _constraint(given, len(value.shape), mesh, f"out_shardings for {name!r}")
            for given, value, name in zip(boundary.outs, program.outs, out_names, strict=True)
        ),
        donated=tuple(
            owner in donating or (given and is_jit)
            for owner, given in zip(arguments.owners, boundary.donated, strict=True)
        ),
    )


def _constraint(sharding: Any, rank: int, mesh: Mesh, where: str) -> Constraint | None:
    given = sharding if isinstance(sharding, NamedSharding) else None
    return resolve(given, rank, mesh, None, where)


def _placed(leaf: Any, rank: int, mesh: Mesh) -> Constraint | None:
    """Where an argument lies already, if somebody put it there on a mesh like ours."""
    sharding = sharding_of(leaf)
    if not same_mesh(sharding, mesh):
        return None
    if not is_tracer(leaf) and not getattr(leaf, "committed", True):
        return None
    return resolve(sharding, rank, mesh)


# ---- the shardings of a jit around the whole program ----


@dataclasses.dataclass(frozen=True, slots=True)
class _Boundary:
    """What one jit around the whole program says of its inputs and outputs."""

    ins: tuple[Any, ...]
    outs: tuple[Any, ...]
    donated: tuple[bool, ...]
    eqn: Any = None

    @classmethod
    def of(cls, jaxpr: Jaxpr) -> "_Boundary":
        ins, outs = len(jaxpr.invars), len(jaxpr.outvars)
        eqn = jaxpr.eqns[0] if len(jaxpr.eqns) == 1 else None
        if eqn is None or eqn.primitive.name not in ("jit", "pjit"):
            return cls((None,) * ins, (None,) * outs, (False,) * ins)

        def lookup(variables: Sequence[Any], given: Sequence[Any], wanted: Sequence[Any]) -> Any:
            said = {id(v): x for v, x in zip(variables, given, strict=True)}
            return tuple(said.get(id(v)) for v in wanted)

        params = eqn.params
        donated = lookup(eqn.invars, params["donated_invars"], jaxpr.invars)
        return cls(
            lookup(eqn.invars, params["in_shardings"], jaxpr.invars),
            lookup(eqn.outvars, params["out_shardings"], jaxpr.outvars),
            tuple(bool(x) for x in donated),
            eqn,
        )
