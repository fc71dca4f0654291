"""Whole plans compared: what is found costs no more, means the same, and is found again."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import pytest

import gspmd
from gspmd import P
from gspmd.models import transformer
from gspmd.options import TARGETS
from gspmd.partition import partition
from gspmd.printing import show
from gspmd.search import cost, search
from gspmd.testing import DrawnProgram, assert_equivalent, programs

TPU = TARGETS["tpu"]


def plan(program: DrawnProgram, effort: int) -> gspmd.Plan:
    return gspmd.plan(
        program,
        *program.args,
        mesh=program.mesh,
        in_specs=program.in_specs,
        out_specs=program.out_specs,
        effort=effort,
    )


@pytest.mark.parametrize("effort", [0, 2])  # 1 is what all other tests plan with
@hypothesis.given(program=programs())
@hypothesis.settings(max_examples=8)
def test_values_are_those_of_the_whole_program(effort: int, program: DrawnProgram) -> None:
    assert_equivalent(
        program,
        *program.args,
        mesh=program.mesh,
        in_specs=program.in_specs,
        out_specs=program.out_specs,
        effort=effort,
        grad=False,
        atol=2e-5,
    )


@hypothesis.given(programs())
@hypothesis.settings(max_examples=15)
def test_more_effort_never_costs_more(program: DrawnProgram) -> None:
    made = plan(program, 0)
    given = (made.model, made.propagated.shardings, made.mesh, TPU)
    alone = cost(partition(*given), made.mesh)
    some, more = (cost(search(*given, effort), made.mesh) for effort in (1, 2))
    assert more <= some <= alone


@hypothesis.given(programs(steps=5))
@hypothesis.settings(max_examples=5)
def test_the_same_plan_is_found_again(program: DrawnProgram) -> None:
    assert show(plan(program, 2).program) == show(plan(program, 2).program)


def test_it_finds_what_single_ops_do_not() -> None:
    """A dearer split of attention's last product: its sum is scattered, an all_to_all is saved."""
    small = {"vocab": 512, "layers": 2, "model_dim": 128, "hidden_dim": 512, "seq": 64}
    config = dataclasses.replace(
        transformer.CONFIGS["137b"], **small, heads=8, head_dim=16, dtype=jnp.float32
    )
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
    made = gspmd.plan(
        functools.partial(transformer.loss, config),
        jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0)),
        {"inputs": tokens, "targets": tokens},
        mesh={"data": 2, "model": 4},
        in_specs=(None, P("batch")),
        rules=transformer.rules_for("sequence", ("data", "model")),
    )
    given = (made.model, made.propagated.shardings, made.mesh, TPU)
    alone, found = partition(*given), search(*given, 1)
    sent = [cost(one, made.mesh) - one.work for one in (alone, found)]
    assert sent[0] - sent[1] == pytest.approx(2 * 3 / 4 * 8 * 64 * 128 / 4 * 4 * 2)  # two layers


def test_what_nobody_reads_is_not_reckoned_with() -> None:
    """A roll is traced as slices that are joined, of which only the joint is left."""
    x = jax.ShapeDtypeStruct((2048, 512), jnp.float32)
    sent = [
        gspmd.plan(
            lambda x: jnp.roll(x, 700, 0),
            x,
            mesh="x=8",
            in_specs=P("x"),
            out_specs=P("x"),
            effort=effort,
        ).wire_bytes
        for effort in (0, 1, 2)
    ]
    assert sent == [2048 // 8 * 512 * 4] * 3
