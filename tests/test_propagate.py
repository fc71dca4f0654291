"""Laws of propagation: a fixed point that keeps the user's word and knows who set each axis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gspmd
from gspmd import P
from gspmd.ir import Value
from gspmd.printing import show
from gspmd.propagate import Propagated, propagate
from gspmd.sharding import Constraint, Mesh, Sharding
from gspmd.testing import DrawnProgram, programs

DRAWN = hypothesis.settings(max_examples=25)


def plan_of(program: DrawnProgram, **changes: Any) -> gspmd.Plan:
    options = {"mesh": program.mesh, "in_specs": program.in_specs, "out_specs": program.out_specs}
    return gspmd.plan(program, *program.args, **(options | changes))


def word_of_the_user(plan: gspmd.Plan, in_specs: Any) -> dict[Value, Constraint]:
    """What annotations and specs fix, per value; None where open."""
    fixed = {
        op.outs[0]: op.params["dims"] for op, _ in plan.model.walk() if op.name == "constraint"
    }
    for value, spec in zip(plan.model.ins, in_specs, strict=True):
        if spec is not None:
            entries = [*spec, *(None,) * (len(value.shape) - len(spec))]
            fixed[value] = tuple(
                None if e is P.UNCONSTRAINED else () if e is None else e if isinstance(e, tuple)
                else (e,)
                for e in entries
            )  # fmt: skip
    return fixed


def split(axes: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    """The axes of a (maybe refined) mesh that `axes` are, without those that split nothing."""
    parts = (part for axis in axes for part in mesh.sub_axes(axis))
    return tuple(part for part in parts if mesh.size((part,)) > 1)


@hypothesis.given(programs())
@DRAWN
def test_what_the_user_fixed_never_changes(program: DrawnProgram) -> None:
    plan = plan_of(program)
    for value, constraint in word_of_the_user(plan, program.in_specs).items():
        sharding = plan.propagated.shardings[value]
        for axes, dim in zip(constraint, sharding.dims, strict=True):
            assert axes is None or dim == split(axes, plan.mesh)


@hypothesis.given(programs())
@DRAWN
def test_a_second_time_changes_nothing(program: DrawnProgram) -> None:
    plan = plan_of(program)
    user = word_of_the_user(plan, program.in_specs)
    found = propagate(plan.model, plan.mesh, user).shardings  # before the boundary is rounded
    hypothesis.assume(plan.mesh == plan.user_mesh)  # sub-axes cannot be asked for by name
    fixed: dict[Value, Constraint] = {}
    for value, sharding in found.items():
        word = user.get(value, (None,) * len(value.shape))
        fixed[value] = tuple(
            axes if axes or said is not None else None
            for axes, said in zip(sharding.dims, word, strict=True)
        )
    again = propagate(plan.model, plan.mesh, fixed).shardings
    assert again == found


@hypothesis.given(programs())
@DRAWN
def test_every_axis_comes_from_the_user(program: DrawnProgram) -> None:
    done = plan_of(program).propagated
    for value, sharding in done.shardings.items():
        for dim, axes in enumerate(sharding.dims):
            for axis in axes:
                place, steps = (value, dim, axis), 0
                while (origin := done.origins[place]).parent is not None:
                    place, steps = origin.parent, steps + 1
                    assert steps < 1000, "an axis that comes from itself"
                assert origin.kind in ("input", "annotation")


@hypothesis.given(programs())
@DRAWN
def test_no_axis_is_used_twice_and_no_piece_is_empty_but_by_request(program: DrawnProgram) -> None:
    plan = plan_of(program)
    user = word_of_the_user(plan, program.in_specs)
    for value, sharding in plan.propagated.shardings.items():
        assert len(set(sharding.axes)) == len(sharding.axes)
        for dim, (n, axes) in enumerate(zip(value.shape, sharding.dims, strict=True)):
            asked = value in user and user[value][dim] is not None
            assert asked or plan.mesh.size(axes) <= max(n, 1)


@hypothesis.given(programs(annotated=False))
@DRAWN
def test_nothing_split_nothing_sent(program: DrawnProgram) -> None:
    plan = plan_of(program, in_specs=P(), out_specs=P())
    assert plan.collectives == ()
    assert plan.wire_bytes == 0
    assert plan.findings == ()


@hypothesis.given(programs(), st.integers(0, 3), st.booleans())
@DRAWN
def test_an_axis_of_size_1_changes_nothing(program: DrawnProgram, at: int, used: bool) -> None:
    axes = list(program.mesh.items())
    mesh = dict([*axes[:at], ("one", 1), *axes[at:]])

    def named(spec: P | None) -> P | None:
        """`spec` with the new axis on its first dim that is split."""
        if spec is None or not used:
            return spec
        entries = list(spec)
        for dim, entry in enumerate(entries):
            if entry is not None and entry is not P.UNCONSTRAINED:
                entries[dim] = ("one", *entry) if isinstance(entry, tuple) else ("one", entry)
                break
        return P(*entries)

    before = plan_of(program)
    after = plan_of(program, mesh=mesh, in_specs=tuple(map(named, program.in_specs)))
    assert show(after.program) == show(before.program)


# --- what a reader of the GSPMD paper expects


def shardings(
    fn: Callable[..., Any], *shapes: tuple[int, ...], in_specs: Any, mesh: str = "x=2,y=4"
) -> Propagated:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return gspmd.plan(fn, *args, mesh=mesh, in_specs=in_specs).propagated


def result(done: Propagated, op: int = -1) -> Sharding:
    """The sharding of the last value, in program order."""
    return list(done.shardings.values())[op]


CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], Any, str]] = {
    "pointwise": (jnp.tanh, [(8, 8)], P("x", "y"), "[*@x,*@y]"),
    "dims merge": (jnp.add, [(8, 8), (8, 8)], (P("x", P.UNCONSTRAINED), P(P.UNCONSTRAINED, "y")),
                   "[*@x,*@y]"),
    "batch and free dims": (jnp.matmul, [(8, 4, 8), (8, 8, 8)], (P("x"), P("x", None, "y")),
                            "[*@x,*,*@y]"),
    "contracted dims vanish": (jnp.matmul, [(8, 8), (8, 8)], (P(None, "x"), P("x", "y")),
                               "[*,*@y]"),
    "transpose": (jnp.transpose, [(8, 4)], P("x", "y"), "[*@y,*@x]"),
    "reduction": (lambda x: x.sum(0), [(8, 8)], P("x", "y"), "[*@y]"),
    "broadcast": (lambda x: jnp.broadcast_to(x, (4, 8)), [(8,)], P("y"), "[*,*@y]"),
    "merge": (lambda x: x.reshape(32), [(4, 8)], P(("x",), None), "[*@x]"),
    "merge with a minor split": (lambda x: x.reshape(32), [(4, 8)], P(None, "x"), "[*]"),
    "split": (lambda x: x.reshape(2, 4), [(8,)], P(("x", "y")), "[*@x,*@y]"),
    "larger tensor wins": (lambda x, w: x + w[:1], [(8, 8), (1, 8)], (P("x"), P(None, "x")),
                           "[*@x,*]"),
    "scan": (lambda x: jax.lax.scan(lambda c, a: (c + a, a), x[0], x)[0], [(4, 8)], P(None, "y"),
             "[*@y]"),
    "too small to split": (lambda x: x.reshape(8, 1), [(8,)], P("x"), "[*@x,*]"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_result_of(case: Any) -> None:
    fn, shapes, specs, expected = case
    in_specs = (specs,) if isinstance(specs, P) else specs
    assert str(result(shardings(fn, *shapes, in_specs=in_specs))) == expected


def test_axes_travel_backward_to_open_inputs() -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return gspmd.annotate(jnp.tanh(x @ w), P("x", "y"))

    plan = gspmd.plan(fn, np.ones((8, 4), "f"), np.ones((4, 8), "f"), mesh="x=2,y=4")
    assert plan.in_specs == (P("x", None), P(None, "y"))
    assert plan.collectives == ()


def test_elementwise_ops_come_before_contractions() -> None:
    """The sum hears from its operand `z`, not from the product (GSPMD, section 3.5)."""

    def fn(x: jax.Array, w: jax.Array, z: jax.Array) -> jax.Array:
        return gspmd.annotate(x, P("x", None)) @ w + gspmd.annotate(z, P(None, "x"))

    args = [np.ones(shape, "f") for shape in ((8, 4), (4, 8), (8, 8))]
    plan = gspmd.plan(fn, *args, mesh="x=2")
    assert plan.out_specs == P(None, "x")


def test_a_closed_dim_of_an_annotation_stays_whole() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return gspmd.annotate(jnp.tanh(x), P(None, None)) * 2

    plan = gspmd.plan(fn, np.ones((8, 8), "f"), mesh="x=2", in_specs=(P("x"),))
    assert plan.out_specs == P(None, None)
    assert [c.kind for c in plan.collectives] == ["all_gather"]


def test_a_reshape_refines_the_mesh() -> None:
    plan = gspmd.plan(
        lambda x: jnp.tanh(x.reshape(4, 6)).reshape(24) * 2,
        np.ones(24, "f"),
        mesh="x=8",
        in_specs=(P("x"),),
        out_specs=P("x"),
    )
    assert plan.mesh.axes == (("x:0", 4), ("x:1", 2))
    assert plan.user_mesh.axes == (("x", 8),)
    assert plan.collectives == ()


def test_every_arrow_is_one_pure_function() -> None:
    """The same program and mesh give equal, frozen results."""
    plan = gspmd.plan(lambda x: x * 2, np.ones(8, "f"), mesh="x=2", in_specs=(P("x"),))
    fixed: dict[Value, Constraint] = {plan.model.ins[0]: (("x",),)}
    first, second = (propagate(plan.model, plan.mesh, fixed) for _ in range(2))
    assert first == second
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.shardings = {}  # pyright: ignore[reportAttributeAccessIssue]
