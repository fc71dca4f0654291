"""partition(fn, mesh): a callable like that of `jax.jit`, planned once per argument types."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd._compat import is_tracer
from gspmd.arguments import abstract, flatten_arguments, function_name
from gspmd.errors import TraceError
from gspmd.options import Options, options_of
from gspmd.plan import Plan
from gspmd.planner import plan
from gspmd.specs import AnyMesh, Rules, check_rules, read_mesh
from gspmd.uneven import Uneven


class Partitioned:
    """A function that runs partitioned; made by `gspmd.partition`.

    Calls with arguments of known shapes and dtypes neither plan nor compile again. It composes with
    `jax.jit`, `jax.vmap` and `jax.grad`; its gradient is planned too, as a program of its own.
    """

    def __init__(self, fn: Callable[..., Any], mesh: AnyMesh, keywords: dict[str, Any]) -> None:
        functools.update_wrapper(self, fn)
        self.mesh = mesh
        self._fn = fn
        self.keywords = keywords
        self._plans: dict[Hashable, Plan] = {}
        self._alike: dict[Hashable, Plan] = {}  # by `_arrays`, which is quicker to make
        self._differentiable: dict[Plan, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_util.tree_flatten((args, kwargs))
        if any(is_tracer(x) for x in leaves):
            return self._traced(self.plan(*args, **kwargs), args, kwargs)
        types = _arrays(leaves)
        key = None if types is None or self.keywords["static_argnums"] != () else (tree, types)
        known = None if key is None else self._alike.get(key)
        if known is not None:  # called with its like before, and found right
            return tree_util.tree_unflatten(known.traced.out_tree, known.executable(*leaves))
        made = self.plan(*args, **kwargs)
        outs = made.run(*args, **kwargs)
        if key is not None:
            self._alike[key] = made
        return outs

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments (arrays or `jax.ShapeDtypeStruct`s)."""
        static: int | Sequence[int] = self.keywords["static_argnums"]
        flat = flatten_arguments(self._fn, args, kwargs, static)
        avals = tuple(abstract(x, name) for x, name in zip(flat.leaves, flat.names, strict=True))
        types = tuple((x.shape, x.dtype, x.weak_type) for x in avals)
        key = (flat.tree, types, flat.statics)
        try:
            known = self._plans.get(key)
        except TypeError as error:
            raise TraceError(
                f"a static argument of {function_name(self._fn)} cannot be hashed: {error}. "
                "Make it a tuple or a frozen dataclass, or pass it as an array."
            ) from error
        if known is None:
            known = self._plans[key] = plan(
                self._fn, *args, mesh=self.mesh, **self.keywords, **kwargs
            )
        return known

    def __repr__(self) -> str:
        return f"<gspmd.partition of {function_name(self._fn)} on {read_mesh(self.mesh)[0]}>"

    def _traced(self, made: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call under a transformation: the flat program, with a partitioned gradient."""
        call = self._differentiable.get(made)
        if call is None:
            call = self._differentiable[made] = _differentiable(made, self)
        flat = map(_ordinary, made.flatten(args, kwargs))
        specs = made.flat_specs[0]
        try:
            outs = call(*(_as_planned(x, spec) for x, spec in zip(flat, specs, strict=True)))
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TraceError(
                f"a function made by gspmd.partition has no forward-mode derivative yet: "
                f"differentiate first, as in gspmd.partition(jax.jacfwd({made.name}), mesh)."
            ) from error
        return tree_util.tree_unflatten(made.traced.out_tree, outs)

    def unpartitioned(self, made: Plan) -> Callable[..., list[Any]]:
        """The function itself, from flat arguments to flat results."""
        statics = made.statics

        def flat(*leaves: Any) -> list[Any]:
            args, kwargs = tree_util.tree_unflatten(made.traced.in_tree, leaves)
            args = list(args)
            for i, value in statics:
                args.insert(i, value)
            return tree_util.tree_leaves(self._fn(*args, **kwargs))

        return flat


def _differentiable(made: Plan, owner: Partitioned) -> Callable[..., Any]:
    """The flat program of `made`, whose reverse-mode derivative is partitioned as well.

    Differentiating the local program would be right but blind: it would transpose each collective
    where it stands. Instead the global function is differentiated, and both halves are planned.
    """
    fn = owner.unpartitioned(made)
    inputs, outputs = made.program.ins, made.program.outs
    smooth_in = [jnp.issubdtype(x.dtype, jnp.inexact) for x in inputs]
    smooth_out = [jnp.issubdtype(x.dtype, jnp.inexact) for x in outputs]
    in_specs, out_specs = made.flat_shardings
    diff_specs = tuple(s for s, smooth in zip(in_specs, smooth_in, strict=True) if smooth)

    def forward(*flat: Any) -> tuple[Any, Any]:
        fixed = [None if smooth else x for x, smooth in zip(flat, smooth_in, strict=True)]

        def of_smooth(*xs: Any) -> tuple[list[Any], list[Any]]:
            it = iter(xs)
            pairs = zip(fixed, smooth_in, strict=True)
            outs = fn(*(next(it) if smooth else x for x, smooth in pairs))
            first = [x for x, smooth in zip(outs, smooth_out, strict=True) if smooth]
            return first, outs

        xs = [x for x, smooth in zip(flat, smooth_in, strict=True) if smooth]
        _, pullback, outs = jax.vjp(of_smooth, *xs, has_aux=True)
        return tuple(outs), pullback

    def backward(pullback: Any, *cotangents: Any) -> Any:
        return pullback(list(cotangents))

    keywords = {name: owner.keywords[name] for name in ("rules", "strict", "effort", "options")}
    run_forward = partition(
        forward, owner.mesh, in_specs=in_specs, out_specs=(out_specs, None), **keywords
    )
    cotangent_specs = tuple(s for s, smooth in zip(out_specs, smooth_out, strict=True) if smooth)
    run_backward = partition(
        backward,
        owner.mesh,
        in_specs=(None, *cotangent_specs),
        out_specs=diff_specs,
        **keywords,
    )

    @jax.custom_vjp
    def call(*flat: Any) -> tuple[Any, ...]:
        return tuple(map(_ordinary, made.executable(*flat)))

    def call_forward(*flat: Any) -> tuple[Any, Any]:
        return tree_util.tree_map(_ordinary, run_forward(*flat))

    def call_backward(pullback: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        given = [ct for ct, smooth in zip(cotangents, smooth_out, strict=True) if smooth]
        found = map(_ordinary, run_backward(pullback, *given))
        return tuple(next(found) if smooth else None for smooth in smooth_in)

    call.defvjp(call_forward, call_backward)
    return call


def _arrays(leaves: Sequence[Any]) -> Hashable | None:
    """The types of arguments that are arrays at hand; None where one is something else."""
    for x in leaves:
        if type(x) is not np.ndarray and (not isinstance(x, jax.Array) or x.is_deleted()):
            return None
    # NumPy's arrays and typed PRNG keys have no weak_type.
    return tuple((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves)


def _ordinary(x: Any) -> Any:
    """`x`, a `jax.Array` where it is uneven: JAX's transformations take nothing else."""
    return jnp.asarray(x) if isinstance(x, Uneven) else x


def _as_planned(x: Any, spec: P) -> Any:
    """`x`, of the planned type where shardings are part of types: a cotangent must match them."""
    typed = jax.typeof(x).sharding
    if not any(kind == AxisType.Explicit for kind in typed.mesh.axis_types) or typed.spec == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(typed.mesh, spec))


def partition(
    fn: Callable[..., Any],
    mesh: AnyMesh,
    *,
    in_specs: Any = None,
    out_specs: Any = None,
    rules: Rules | None = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    strict: bool = False,
    effort: int = 1,
    options: Options | None = None,
) -> Partitioned:
    """`fn` as a callable that runs on the devices of `mesh`; `.plan(*args)` shows how.

    The arguments are those of `gspmd.plan`. Planning happens at the first call with arguments of
    new shapes or dtypes. Results are `jax.Array`s, sharded as `plan.out_specs` says; a result with
    a dim that its axes do not divide comes back as a `gspmd.Uneven`.

    Raises:
      SpecError, MeshError: the mesh or the rules are wrong; all else is found at the first call.
    """
    if not callable(fn):
        raise TraceError(
            f"gspmd.partition takes a function, got {fn!r} of type {type(fn).__name__}."
        )
    logical, _ = read_mesh(mesh)
    check_rules(rules, logical)
    keywords = {
        "in_specs": in_specs,
        "out_specs": out_specs,
        "rules": rules,
        "donate_argnums": donate_argnums,
        "static_argnums": static_argnums,
        "strict": strict,
        "effort": effort,
        "options": options_of(options),
    }
    return Partitioned(fn, mesh, keywords)
