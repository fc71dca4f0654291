"""Converter: a jaxpr becomes a Program.

Nested calls are inlined; control flow, remat and manual regions stay ops with bodies.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as JaxLiteral
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd._compat import Sources, bind, control_params
from gspmd.collectives import is_collective, result_shape
from gspmd.errors import SpecError
from gspmd.ir import NO_PARAMS, Literal, Op, Operand, Program, Source, Value
from gspmd.jaxpr import is_explicit, reshaping, with_one_predicate
from gspmd.regions import Spelled, is_manual, region_of, spell
from gspmd.sharding import Axes, Constraint, Mesh
from gspmd.specs import entries_of, resolve, show_spec

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
    "custom_vmap_call": "call",
    "linear_call": "callee",
    "remat_opt": "fwd_jaxpr",
    "xla_metadata_call": "jaxpr",
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


class Converter:
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
        self._manual: Axes = ()  # the manual axes of the regions around what is converted now

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
        if name == "custom_linear_solve":
            return self._linear_solve(eqn, ins, scope, source)
        if name == "shard_map":
            return self._shard_map(eqn, ins, scope, source)
        if is_manual(name):
            return self._manual_collective(eqn, ins, scope, source)
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

    def _linear_solve(
        self, eqn: Any, ins: tuple[Operand, ...], scope: _Scope, source: Source | None
    ) -> Sequence[Operand]:
        """What a solve computes is what its `solve` says; the rest is for its derivatives."""
        lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
        before, consts = lengths.matvec + lengths.vecmat, lengths.solve
        operands = (*ins[before : before + consts], *ins[sum(lengths) :])
        return self._inline(*_open(jaxprs.solve), operands, scope, source)

    def _shard_map(
        self, eqn: Any, ins: tuple[Operand, ...], scope: _Scope, source: Source | None
    ) -> Sequence[Operand]:
        region = region_of(eqn, self._mesh, source)
        # Each operand once more, for the sharding that it has here; all its dims are open.
        placed = [
            self._constraint(x, (None,) * len(x.shape), "shard_map", f"in_specs {i}", scope, source)
            for i, x in enumerate(ins)
        ]
        outside, self._manual = self._manual, (*self._manual, *region.axes)
        body = self.program(eqn.params["jaxpr"], source)
        self._manual = outside
        outs = tuple(self._value(v.aval) for v in eqn.outvars)
        params = {"manual": region.axes, "in_dims": region.ins, "out_dims": region.outs}
        scope.ops.append(
            Op("shard_map", tuple(placed), outs, MappingProxyType(params), (body,), source)
        )
        return outs

    def _manual_collective(
        self, eqn: Any, ins: tuple[Operand, ...], scope: _Scope, source: Source | None
    ) -> Sequence[Operand]:
        """A collective of a manual region, once for each of its operands."""
        steps = spell(eqn, self._mesh, source)
        if not ins:
            return [self._steps(steps, None, eqn.outvars[0].aval, scope, source)]
        return [
            self._steps(steps, x, v.aval, scope, source)
            for x, v in zip(ins, eqn.outvars, strict=True)
        ]

    def _steps(
        self,
        steps: Sequence[Spelled],
        x: Operand | None,
        aval: Any,
        scope: _Scope,
        source: Source | None,
    ) -> Operand:
        for step in steps:
            x = self._apply(step.before, x, scope, source)
            shape, dtype = (aval.shape, aval.dtype) if x is None else (x.shape, x.dtype)
            if is_collective(step.name):
                size = self._mesh.size(step.params["axes"])
                shape = result_shape(step.name, shape, size, step.params)
            out = Value(next(self._ids), tuple(shape), dtype)
            operands = () if x is None else (x,)
            params = MappingProxyType(step.params)
            scope.ops.append(Op(step.name, operands, (out,), params, (), source, step.call))
            x = self._apply(step.after, out, scope, source)
        assert x is not None
        return x

    def _apply(
        self,
        fn: Callable[[Any], Any] | None,
        x: Operand | None,
        scope: _Scope,
        source: Source | None,
    ) -> Operand | None:
        """`fn(x)` as ops at `source`."""
        if fn is None or x is None:
            return x
        jaxpr = reshaping(fn, x.shape, x.dtype).jaxpr
        env: dict[Any, Operand] = {jaxpr.invars[0]: x}
        for eqn in jaxpr.eqns:
            operands = tuple(self._read(atom, env, scope) for atom in eqn.invars)
            env.update(zip(eqn.outvars, self._eqn(eqn, operands, scope, source), strict=True))
        return self._read(jaxpr.outvars[0], env, scope)

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
        assert dims is not None
        for axis in (axis for axes in dims for axis in axes or () if axis in self._manual):
            raise SpecError(
                f"{where}: axis {axis!r} is manual in the shard_map around it, where arrays are "
                "shards along it already; name other axes of the mesh."
            )
        return self._constraint(x, dims, label, show_spec(entries_of(spec)), scope, source)

    def _constraint(
        self,
        x: Operand,
        dims: Constraint,
        label: str,
        spec: str,
        scope: _Scope,
        source: Source | None,
    ) -> Operand:
        if isinstance(x, Literal):
            return x
        out = Value(next(self._ids), x.shape, x.dtype)
        params = MappingProxyType({"dims": dims, "label": label, "spec": spec})
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
