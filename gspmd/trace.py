"""trace(fn, args): a JAX function and its arguments become a global Program.

Nested calls are inlined, control flow and remat stay ops with bodies. Whatever JAX offers for
saying how a tensor is split becomes a `constraint` op, or a constraint on an input or output.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jax import tree_util
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as JaxLiteral
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd._compat import Sources, bind, control_params, is_tracer
from gspmd.arguments import flatten_arguments, path_names, positions
from gspmd.errors import TraceError
from gspmd.ir import NO_PARAMS, Literal, Op, Operand, Program, Source, Value
from gspmd.jaxpr import is_explicit, make_jaxpr, sharding_of, with_one_predicate
from gspmd.sharding import Axes, Constraint, Mesh
from gspmd.specs import Rules, check_rules, entries_of, resolve, same_mesh, show_spec


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
    rules: Rules | None = None,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
) -> Traced:
    """The program that `fn(*args, **kwargs)` runs, for arrays or ShapeDtypeStructs.

    Raises:
      TraceError: JAX cannot trace `fn` on these arguments.
      SpecError: an annotation in `fn` does not fit its tensor, the mesh or `rules`.
    """
    axes = check_rules(rules, mesh)
    arguments = flatten_arguments(fn, args, kwargs, static_argnums)
    sources = Sources()
    closed, out_shape = make_jaxpr(fn, arguments, mesh, sources)
    boundary = _Boundary.of(closed.jaxpr)
    program = _Converter(mesh, axes, sources, boundary.eqn).program(closed, None, arguments.names)
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


# ---- from a jaxpr to a program ----

# Primitives that only wrap a jaxpr, with the param that holds it.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
# Control flow: our name, the params that hold the bodies, the params that are kept.
_CONTROL = {
    "scan": ("scan", ("jaxpr",), ("num_consts", "num_carry", "length", "reverse", "unroll")),
    "while": ("while", ("cond_jaxpr", "body_jaxpr"), ("cond_nconsts", "body_nconsts")),
    "cond": ("cond", ("branches",), ()),
    "remat2": ("remat", ("jaxpr",), ("prevent_cse", "policy", "differentiated")),
    "checkpoint": ("remat", ("jaxpr",), ("prevent_cse", "policy", "differentiated")),
}
# What the sharding of a value may be called in the params of a primitive.
_REQUESTS = ("out_sharding", "sharding")


def _identity(x: Any, **params: Any) -> Any:
    return x


@dataclasses.dataclass(slots=True)
class _Scope:
    """The program under construction."""

    ops: list[Op] = dataclasses.field(default_factory=list[Op])
    consts: list[tuple[Value, Any]] = dataclasses.field(default_factory=list[tuple[Value, Any]])


class _Converter:
    """Turns the jaxprs of one trace into programs whose values have ids unique among them all."""

    def __init__(
        self, mesh: Mesh, rules: Mapping[str, Axes], sources: Sources, boundary: Any
    ) -> None:
        self._mesh = mesh
        self._rules = rules
        self._sources = sources
        self._boundary = boundary
        self._ids = itertools.count()
        self._calls: dict[Any, Callable[..., Any]] = {}

    def program(
        self, closed: ClosedJaxpr | Jaxpr, outer: Source | None, names: Sequence[str] = ()
    ) -> Program:
        """The program of a jaxpr which the op at `outer` holds."""
        jaxpr, consts = _open(closed)
        scope = _Scope()
        names = names or ("",) * len(jaxpr.invars)
        ins = tuple(self._value(v.aval, name) for v, name in zip(jaxpr.invars, names, strict=True))
        outs = self._inline(jaxpr, consts, ins, scope, outer)
        return Program(ins, tuple(scope.ops), outs, tuple(scope.consts))

    def _inline(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        ins: Sequence[Operand],
        scope: _Scope,
        outer: Source | None,
    ) -> tuple[Operand, ...]:
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, ins, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._const(var.aval, const, scope)
        for eqn in jaxpr.eqns:
            operands = tuple(self._read(atom, env, scope) for atom in eqn.invars)
            results = self._eqn(eqn, operands, scope, self._sources.of(eqn, outer))
            env.update(zip(eqn.outvars, results, strict=True))
        return tuple(self._read(atom, env, scope) for atom in jaxpr.outvars)

    def _eqn(
        self, eqn: Any, ins: tuple[Operand, ...], scope: _Scope, source: Source | None
    ) -> Sequence[Operand]:
        """Adds the ops of one equation to `scope`; returns its results."""
        name = eqn.primitive.name
        if name in _INLINED:
            return self._call(eqn, ins, scope, source)
        if name in _CONTROL:
            return self._control(eqn, ins, scope, source)
        if name == "shard_map":
            raise TraceError(
                f"the shard_map{f' at {source}' if source else ''} is written for one device's "
                "shards, as a function made by gspmd.partition is inside, and cannot be planned "
                "yet; call it outside of the planned function, or write it on whole arrays."
            )
        if name == "gspmd_annotate":
            return [self._constrain(ins[0], eqn.params["spec"], "annotate", scope, source)]
        if name == "sharding_constraint":
            return [self._sharding_constraint(eqn, ins[0], scope, source)]
        if name in ("reshard", "mesh_cast"):
            return [self._reshard(name, eqn.params["dst_sharding"], ins[0], scope, source)]
        if name == "device_put" and not any(map(_is_memory, eqn.params["devices"])):
            return [
                self._constrain(x, device, "device_put", scope, source)
                for x, device in zip(ins, eqn.params["devices"], strict=True)
            ]
        return self._plain(eqn, ins, scope, source)

    def _plain(
        self, eqn: Any, ins: tuple[Operand, ...], scope: _Scope, source: Source | None
    ) -> Sequence[Operand]:
        primitive, params = eqn.primitive, dict(eqn.params)
        given = {k: params[k] for k in _REQUESTS if isinstance(params.get(k), NamedSharding)}
        params.update(dict.fromkeys(given))  # ops run where no mesh axis is Explicit
        if primitive not in self._calls:
            self._calls[primitive] = bind(primitive)
        outs = tuple(self._value(v.aval) for v in eqn.outvars)
        scope.ops.append(
            Op(
                primitive.name,
                ins,
                outs,
                MappingProxyType(params),
                source=source,
                call=self._calls[primitive],
                effects=bool(eqn.effects),
            )
        )
        for key, sharding in given.items():
            # Without an Explicit axis it is JAX that filled it in, not the user.
            if is_explicit(sharding) and any(entry is not None for entry in sharding.spec):
                return [self._constrain(outs[0], sharding, key, scope, source)]
        return outs

    def _control(
        self, eqn: Any, ins: tuple[Operand, ...], scope: _Scope, source: Source | None
    ) -> Sequence[Operand]:
        name, holders, kept = _CONTROL[eqn.primitive.name]
        given: Mapping[str, Any] = control_params(eqn.params)
        if name == "while":
            given, order = with_one_predicate(eqn)
            ins = tuple(ins[i] for i in order)
        held = (given[key] for key in holders)
        jaxprs = itertools.chain.from_iterable(x if isinstance(x, tuple) else (x,) for x in held)
        bodies = tuple(self.program(jaxpr, source) for jaxpr in jaxprs)
        outs = tuple(self._value(v.aval) for v in eqn.outvars)
        params = MappingProxyType({key: given[key] for key in kept}) if kept else NO_PARAMS
        effects = bool(eqn.effects)
        scope.ops.append(Op(name, ins, outs, params, bodies, source, effects=effects))
        return outs

    def _call(
        self, eqn: Any, ins: tuple[Operand, ...], scope: _Scope, source: Source | None
    ) -> Sequence[Operand]:
        jaxpr, consts = _open(eqn.params[_INLINED[eqn.primitive.name]])
        if eqn is self._boundary or eqn.primitive.name not in ("jit", "pjit"):
            return self._inline(jaxpr, consts, ins, scope, source)
        ins = self._constrain_all(eqn, ins, "in_shardings", scope, source)
        outs = self._inline(jaxpr, consts, ins, scope, source)
        return self._constrain_all(eqn, outs, "out_shardings", scope, source)

    def _constrain_all(
        self,
        eqn: Any,
        operands: tuple[Operand, ...],
        key: str,
        scope: _Scope,
        source: Source | None,
    ) -> tuple[Operand, ...]:
        pairs = zip(operands, eqn.params[key], strict=True)
        return tuple(self._constrain(x, s, key, scope, source) for x, s in pairs)

    def _sharding_constraint(
        self, eqn: Any, x: Operand, scope: _Scope, source: Source | None
    ) -> Operand:
        sharding = eqn.params["sharding"]
        loose = eqn.params.get("unconstrained_dims") or ()
        if isinstance(sharding, NamedSharding) and loose:
            entries = [*sharding.spec, *(None,) * (len(x.shape) - len(sharding.spec))]
            for dim in loose:
                entries[dim] = P.UNCONSTRAINED
            sharding = NamedSharding(sharding.mesh, P(*entries))
        return self._constrain(x, sharding, "with_sharding_constraint", scope, source)

    def _reshard(
        self, name: str, sharding: Any, x: Operand, scope: _Scope, source: Source | None
    ) -> Operand:
        # Unless all axes are Explicit, it is JAX's own doing and moves nothing.
        if name == "mesh_cast" or set(sharding.mesh.axis_types) != {AxisType.Explicit}:
            return x
        return self._constrain(x, sharding, "reshard", scope, source)

    def _constrain(
        self, x: Operand, spec: Any, label: str, scope: _Scope, source: Source | None
    ) -> Operand:
        """`x` under a `constraint` op; `x` itself where `spec` says nothing about our mesh."""
        if not isinstance(spec, (P, NamedSharding)) or isinstance(x, Literal):
            return x
        if entries_of(spec).unreduced:
            return x  # a sum may stay owed there, so the dims cannot be closed
        where = f"{label} at {source}" if source else label
        dims = resolve(spec, len(x.shape), self._mesh, self._rules, where)
        out = Value(next(self._ids), x.shape, x.dtype)
        written = show_spec(entries_of(spec))
        params = MappingProxyType({"dims": dims, "label": label, "spec": written})
        scope.ops.append(Op("constraint", (x,), (out,), params, (), source, _identity))
        return out

    def _read(self, atom: Any, env: Mapping[Any, Operand], scope: _Scope) -> Operand:
        if not isinstance(atom, JaxLiteral):
            return env[atom]
        aval: Any = atom.aval
        if aval.shape:
            return self._const(aval, atom.val, scope)
        dtype = aval.dtype
        # As a numpy scalar it keeps its dtype wherever it goes.
        return Literal(np.asarray(atom.val).astype(dtype)[()], dtype)

    def _const(self, aval: Any, const: Any, scope: _Scope) -> Value:
        value = self._value(aval)
        scope.consts.append((value, const))
        return value

    def _value(self, aval: Any, name: str = "") -> Value:
        # Tokens of effects have neither shape nor dtype.
        shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
        return Value(next(self._ids), shape, dtype, name)


def _open(closed: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    if isinstance(closed, ClosedJaxpr):
        return closed.jaxpr, closed.consts
    return closed, ()


def _is_memory(device: Any) -> bool:
    """Whether a `device_put` there is more than a wish where a tensor be split."""
    return device is not None and not isinstance(device, NamedSharding)
