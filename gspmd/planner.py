"""plan(fn, *args, mesh=...): the passes in order, from a function to its Plan."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import tree_util

from gspmd.arguments import function_name, positions
from gspmd.errors import SpecError
from gspmd.findings import about_pipelines, unbounded, unchecked
from gspmd.ir import Op, Program, Value, next_id, verify
from gspmd.optimize import optimize, passes
from gspmd.optimize.drop_unused import drop_unused
from gspmd.options import Options, options_of
from gspmd.partition import refuse_gathers
from gspmd.plan import Plan
from gspmd.propagate import Propagated, propagate
from gspmd.search import search
from gspmd.shard_update import shard_update
from gspmd.sharding import Axes, Constraint, Mesh, Sharding, root_axis
from gspmd.specs import AnyMesh, Rules, check_rules, read_mesh, resolve, spec_tree
from gspmd.splice import splice
from gspmd.trace import Traced, trace


def plan(
    fn: Callable[..., Any],
    *args: Any,
    mesh: AnyMesh,
    in_specs: Any = None,
    out_specs: Any = None,
    rules: Rules | None = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    strict: bool = False,
    effort: int = 1,
    options: Options | None = None,
    **kwargs: Any,
) -> Plan:
    """The plan of `fn(*args)` on `mesh`.

    Args:
      fn: any function that `jax.jit` takes; it may be jitted already.
      args, kwargs: arrays or `jax.ShapeDtypeStruct`s, in pytrees.
      mesh: `jax.sharding.Mesh`, `AbstractMesh`, `{"data": 4}` or `"data=4,model=2"`; the last three
        need no devices.
      in_specs: pytree prefix, like `args`, of PartitionSpec, NamedSharding or None (open: the plan
        chooses).
      out_specs: the same for the results.
      rules: mesh axes for logical axis names: `{"batch": "data", "mlp": ("x", "y"), "seq": None}`.
      donate_argnums: arguments whose memory the results may take.
      static_argnums: arguments that are constants of the plan.
      strict: refuse ops that can only run on gathered operands.
      effort: how long to look for a cheaper plan. 0 splits each op as GSPMD's propagation did its
        result; 1 takes for each op what costs least, and tries some whole plans; 2 tries on until
        nothing helps. Counted in ops, not in seconds: every host arrives at the same plan.
      options: the hardware to plan for, and what is left to taste: see `gspmd.Options`.

    Raises:
      SpecError: a spec, annotation or rule does not fit.
      TraceError: `fn` cannot be traced.
      StrictError: see `strict`.
    """
    if effort not in (0, 1, 2):
        raise SpecError(f"effort={effort!r}: it is 0, 1 or 2.")
    options = options_of(options)
    clock = _Clock()
    logical, devices = read_mesh(mesh)
    check_rules(rules, logical)
    traced = trace(
        fn,
        args,
        kwargs,
        mesh=logical,
        devices=devices,
        rules=rules,
        static_argnums=static_argnums,
        donate_argnums=donate_argnums,
    )
    clock.lap("trace")
    fixed = _input_constraints(traced, in_specs, logical, rules)
    model = splice(_with_outputs(traced, out_specs, logical, rules))
    on_trust = unchecked(model)
    refined, done = _propagate(model, logical, fixed)
    if options.shard_update and (state := shard_update(model, fixed, done.shardings, refined)):
        refined, done = _propagate(model, logical, {**fixed, **state})
    clock.lap("propagate")
    shardings = dict(done.shardings)
    for value in (*model.ins, *(v for v in model.outs if isinstance(v, Value))):
        shardings[value] = _at_boundary(shardings[value], refined)
    done = dataclasses.replace(done, shardings=shardings)
    target = options.on(devices.devices.flat[0].platform if devices is not None else None)
    # What nobody reads has told where its neighbours should be; it has no say in what that costs.
    live = drop_unused(model, refined)
    parted = search(live, shardings, refined, target, effort, options.loop_room)
    if strict:
        refuse_gathers(parted.findings)
    clock.lap("partition")
    program = optimize(verify(parted.program, refined), refined, passes(options, target))
    clock.lap("optimize")
    static = positions(static_argnums, len(args), "static_argnums", fn)
    piped = about_pipelines(model, logical, program, refined)
    findings = on_trust + piped + parted.findings + unbounded(program)
    return Plan(
        program=program,
        model=model,
        mesh=refined,
        user_mesh=logical,
        devices=devices,
        propagated=done,
        findings=findings,
        traced=traced,
        name=function_name(fn),
        statics=tuple((i, args[i]) for i in static),
        seconds=clock.seconds,
    )


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _propagate(
    model: Program, mesh: Mesh, fixed: Mapping[Value, Constraint]
) -> tuple[Mesh, Propagated]:
    """Propagates, refining the mesh until no reshape asks for a part of an axis any more."""
    while True:
        done = propagate(model, mesh, fixed)
        if not done.refinements:
            return mesh, done
        axis, major = done.refinements[0]
        mesh = mesh.refine(axis, major)


def _input_constraints(
    traced: Traced, in_specs: Any, mesh: Mesh, rules: Rules | None
) -> dict[Value, Constraint]:
    """What is fixed of the inputs: the caller's specs, else what the arguments themselves say."""
    args, kwargs = tree_util.tree_unflatten(traced.in_tree, traced.program.ins)
    specs = spec_tree(in_specs, args, "in_specs", traced.parameters)
    specs += [None] * len(tree_util.tree_leaves(kwargs))
    fixed: dict[Value, Constraint] = {}
    for value, spec, own in zip(traced.program.ins, specs, traced.in_constraints, strict=True):
        given = resolve(spec, len(value.shape), mesh, rules, f"in_specs for {value.name}")
        constraint = given if given is not None else own
        if constraint is not None:
            fixed[value] = constraint
    return fixed


def _with_outputs(traced: Traced, out_specs: Any, mesh: Mesh, rules: Rules | None) -> Program:
    """The program with a `constraint` op for each output, open where nobody fixed it."""
    program = traced.program
    specs = spec_tree(out_specs, traced.out_tree, "out_specs")
    first = next_id(program)
    ops: list[Op] = []
    outs: list[Value] = []
    rows = zip(program.outs, specs, traced.out_constraints, traced.out_names, strict=True)
    for i, (x, spec, own, name) in enumerate(rows):
        rank = len(x.shape)
        given = resolve(spec, rank, mesh, rules, f"out_specs for {name}")
        dims = given if given is not None else own if own is not None else (None,) * rank
        out = Value(first + i, x.shape, x.dtype, name)
        params = {"dims": dims, "label": f"the spec of output {name}", "spec": ""}
        ops.append(Op("constraint", (x,), (out,), params, call=_identity))
        outs.append(out)
    return dataclasses.replace(program, ops=(*program.ops, *ops), outs=tuple(outs))


def _identity(x: Any, **_: Any) -> Any:
    return x


def _at_boundary(sharding: Sharding, mesh: Mesh) -> Sharding:
    """`sharding` without the sub-axes that a PartitionSpec cannot name: parts of a user's axis."""
    dims: list[Axes] = []
    for axes in sharding.dims:
        kept: list[str] = []
        i = 0
        while i < len(axes):
            group = mesh.sub_axes(root_axis(axes[i]))
            if axes[i : i + len(group)] != group:
                break
            kept += group
            i += len(group)
        dims.append(tuple(kept))
    return Sharding(tuple(dims))
