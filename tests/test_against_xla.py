"""benchmarks/against_xla.py: its cases, what XLA is given, and what it says of the numbers."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from processes import run
from test_benchmarks import BENCHMARKS, scripts

import gspmd

__all__ = ["scripts"]

CASES = (
    "dense forward, data", "dense train, data", "dense forward, fsdp", "dense train, fsdp",
    "dense forward, tensor", "dense train, tensor", "dense forward, sequence",
    "dense train, sequence", "dense forward, 2d_attempt1", "dense train, 2d_attempt1",
    "dense forward, 2d_attempt2", "dense train, 2d_attempt2", "dense forward, 2d",
    "dense train, 2d", "experts alone", "2D experts", "query sequence", "spatial U-Net",
    "fsdp, 4 microbatches", "vocabulary", "AdamW, state whole", "AdamW, state split",
)  # fmt: skip


def test_it_prints_its_table() -> None:
    printed = run(BENCHMARKS / "against_xla.py", "--cpu", "--only", "vocabulary", "--quick")
    assert re.search(r"^vocabulary +gspmd +\d", printed, re.MULTILINE)
    assert re.search(r"^ +Shardy +\d", printed, re.MULTILINE)
    assert re.search(r"^ +GSPMD +\d", printed, re.MULTILINE)
    assert "met: wire bytes within the limit in 1 of 1 cases" in printed
    assert "met: failed or wrong, ours: 0" in printed
    assert "failed, XLA's: 0" in printed


# -------------------------------------------------------------------------------------- the cases


@pytest.mark.parametrize("sizes", ["small", "paper"])
def test_the_cases_are_those_of_the_issue(scripts: Any, sizes: str) -> None:
    assert tuple(case.name for case in scripts.cases.cases(sizes)) == CASES


@pytest.mark.parametrize("sizes", ["small", "paper"])
def test_every_dim_is_divided_by_the_axes_that_split_it(scripts: Any, sizes: str) -> None:
    """`jax.jit` refuses others at its boundary."""
    devices = {"small": 8, "paper": 1024}[sizes]
    for case in scripts.cases.cases(sizes):
        assert math.prod(case.mesh.values()) == devices, case.name
        mesh = AbstractMesh(tuple(case.mesh.values()), tuple(case.mesh))
        outs = jax.eval_shape(case.fn, *case.args)
        for specs, values in ((case.in_specs, case.args), (case.out_specs, outs)):
            given = scripts.plain.shardings(specs, mesh, case.rules)
            flat = tree_util.tree_leaves(jax.tree.broadcast(given, values))
            assert flat, case.name
            for at, value in zip(flat, tree_util.tree_leaves(values), strict=True):
                at.shard_shape(value.shape)  # raises where it does not divide


def test_every_case_splits_something(scripts: Any) -> None:
    for case in scripts.cases.cases("small"):
        axes = [scripts.plain.mesh_spec(spec, case.rules) for spec in _specs(case.in_specs)]
        assert any(entry is not None for spec in axes for entry in spec), case.name


def _specs(tree: Any) -> list[P]:
    return tree_util.tree_leaves(tree, is_leaf=lambda x: isinstance(x, P))


def test_the_mixture_sends_each_token_to_its_two_likeliest_experts(scripts: Any) -> None:
    """Against a loop over tokens, with as many places as there are tokens."""
    random = np.random.default_rng(0)
    G, S, M, H, E = 2, 6, 4, 5, 3
    w = {"gate": (M, E), "up": (E, M, H), "down": (E, H, M)}
    w = {name: random.normal(size=shape).astype(np.float32) for name, shape in w.items()}
    x = random.normal(size=(G, S, M)).astype(np.float32)
    got = scripts.cases.mixture(S, w, jnp.asarray(x))
    for g in range(G):
        for s in range(S):
            scores = np.exp(x[g, s] @ w["gate"])
            scores /= scores.sum()
            chosen = np.argsort(scores)[-2:]
            expected = sum(
                scores[e] * (np.maximum(x[g, s] @ w["up"][e], 0) @ w["down"][e]) for e in chosen
            )
            np.testing.assert_allclose(got[g, s], expected, rtol=1e-4, atol=1e-5)


def test_an_expert_takes_no_more_tokens_than_it_has_places(scripts: Any) -> None:
    """All tokens alike want the same two experts: the first of a group find places there."""
    random = np.random.default_rng(0)
    M, H, E = 4, 5, 3
    w = {"gate": (M, E), "up": (E, M, H), "down": (E, H, M)}
    w = {name: random.normal(size=shape).astype(np.float32) for name, shape in w.items()}
    x = jnp.broadcast_to(random.normal(size=M).astype(np.float32), (1, 6, M))
    got = np.asarray(scripts.cases.mixture(2, w, x))
    assert np.abs(got[0, :2]).max() > 0
    np.testing.assert_array_equal(got[0, 2:], 0)


# ------------------------------------------------------------------------------ what XLA is given


def test_annotations_become_constraints_also_in_loops(scripts: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    rules = {"batch": ("data",), "hidden": "model", "none": None}

    def fn(x: jax.Array, ws: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return gspmd.annotate(jnp.tanh(x @ w), P("batch", "hidden")), None

        return jnp.sum(jax.lax.scan(layer, gspmd.annotate(x, P("batch", "none")), ws)[0])

    args = (jnp.ones((4, 8)), jnp.full((3, 8, 8), 0.1))
    grad = jax.value_and_grad(fn)
    plain = scripts.plain.in_plain_jax(grad, args, mesh, rules)
    before, after = (str(jax.make_jaxpr(f)(*args)) for f in (grad, plain))
    assert before.count("gspmd_annotate[") == after.count("sharding_constraint[") > 3
    assert "gspmd_annotate" not in after
    assert "remat2" in after or "checkpoint" in after
    assert "PartitionSpec('data', 'model')" in after or "P('data', 'model')" in after
    for x, y in zip(jax.jit(plain)(*args), grad(*args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_a_spec_in_mesh_axes(scripts: Any) -> None:
    rules = {"batch": ("pod", "data"), "mlp": "model", "seq": None, "rows": ("model",)}
    spec = P("batch", ("mlp", "seq"), "seq", "x", P.UNCONSTRAINED, "rows")
    expected = P(("pod", "data"), "model", None, "x", P.UNCONSTRAINED, "model")
    assert scripts.plain.mesh_spec(spec, rules) == expected


# ------------------------------------------------------------------------------------- what it says


@pytest.fixture
def measured(scripts: Any) -> Any:
    against = scripts.against_xla

    def case(name: str) -> Any:
        return scripts.cases.Case(name, jnp.sin, (), {"x": 8}, {}, P())

    def side(sent: float, peak: float, seconds: float | None) -> Any:
        return against.Side(
            {"all-reduce": sent},
            1,
            0.9 * peak,
            peak,
            1e6,
            1.0,
            seconds,
            ["9 B by 1 x all-reduce over 8 to f32[2]"],
        )

    def row(*sides: tuple[float, float, float | None], **fields: Any) -> Any:
        named = {name: side(*one) for name, one in zip(against.SIDES, sides, strict=False)}
        return against.Row(planned=1.0, plan_seconds=0.1, sides=named, **fields)

    return [
        (case("half"), row((5e6, 8e6, 0.1), (12e6, 8e6, 0.2), (10e6, 9e6, 0.4))),
        (case("more"), row((9e6, 9e6, 0.5), (8e6, 8e6, 0.4), (9e6, 9e6, 0.5))),
        (case("nothing"), row((0.0, 8e6, 0.1), (0.0, 8e6, 0.1), (0.0, 8e6, 0.1))),
        (case("wrong"), row((1e6, 8e6, 0.1), wrong=["off by 1"], notes=["Shardy: dies"])),
    ]


def test_the_better_of_xlas_propagations_counts(scripts: Any, measured: Any) -> None:
    half, more, nothing, wrong = (row for _, row in measured)
    assert (half.ratio("bytes"), half.ratio("live"), half.ratio("seconds")) == (0.5, 1.0, 0.5)
    assert more.ratio("seconds") == 1.25
    assert nothing.ratio("bytes") == 1.0
    assert wrong.ratio("bytes") is None
    nothing.sides["gspmd"].sent["all-gather"] = 1.0
    assert nothing.ratio("bytes") == math.inf


def test_the_verdict_names_what_speaks_against_us(scripts: Any, measured: Any) -> None:
    failed = [
        "MISSED: failed or wrong, ours: 1\n  wrong",
        "failed, XLA's: 2\n  wrong (Shardy)\n  wrong (GSPMD)",
    ]
    sent = [
        "MISSED: wire bytes within the limit in 2 of 3 cases\n  more: 1.12, at most 1.00",
        "MISSED: wire bytes, geometric mean: 0.83 of XLA's, at most 0.75",
    ]
    assert scripts.against_xla.verdict("cpu", measured) == [
        *sent,
        "MISSED: step time within the limit in 2 of 3 cases\n  more: 1.25, at most 1.03",
        "met: step time, geometric mean: 0.85 of XLA's, at most 0.87",
        *failed,
    ]
    assert scripts.against_xla.verdict("tpu", measured) == [
        *sent,
        *(
            f"MISSED: peak memory, {what}, within the limit in 2 of 3 cases\n"
            "  more: 1.12, at most 1.05"
            for what in ("live", "reported")
        ),
        *failed,
    ]


def test_the_table_says_which_collective_costs_a_missed_number(scripts: Any, measured: Any) -> None:
    rows = scripts.against_xla.table("cpu", measured).rows
    notes = {row[0]: row[-1] for row in rows if row[0]}
    assert notes == {
        "half": "",
        "more": "above in bytes, seconds: 9 B by 1 x all-reduce over 8 to f32[2]",
        "nothing": "",
        "wrong": "WRONG: off by 1; Shardy: dies",
    }
    assert [row[2] for row in rows[-3:]] == ["1", "failed", "failed"]


def test_unknown_cases_are_refused_with_the_names() -> None:
    with pytest.raises(
        AssertionError, match=r"no case \['nosuch'\]; there are dense forward, data"
    ):
        run(BENCHMARKS / "against_xla.py", "--cpu", "--only", "nosuch")
