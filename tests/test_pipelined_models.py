"""Models in pipelines: the same losses and gradients, one table to turn them on, full sizes."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gspmd
from gspmd import P
from gspmd.cli import estimate
from gspmd.cli.job import make_job
from gspmd.models import catalog, glam, strategies, transformer
from gspmd.specs import read_mesh
from gspmd.testing import assert_equivalent

SMALL: dict[str, Any] = {"vocab": 32, "model_dim": 16, "hidden_dim": 32, "heads": 4, "head_dim": 4,
                         "seq": 8}  # fmt: skip
MODELS = {
    "transformer": dataclasses.replace(transformer.CONFIGS["tiny"], layers=4, remat=True, **SMALL),
    "glam": dataclasses.replace(
        glam.CONFIGS["tiny"], layers=8, experts=4, group_size=None, **SMALL
    ),
    "both": dataclasses.replace(
        transformer.CONFIGS["tiny_nested"], layers=4, encoder_layers=8, **SMALL
    ),
}
MODULES = {"transformer": transformer, "glam": glam, "both": transformer}
ROWS = 16


@functools.cache
def given(name: str) -> tuple[Any, dict[str, jax.Array]]:
    """Parameters drawn by numpy, and a batch."""
    config, draw = MODELS[name], np.random.default_rng(0)
    fresh = jax.eval_shape(functools.partial(MODULES[name].init, config), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype), fresh)
    shapes = MODULES[name].batch_shapes(config, ROWS)
    return params, {
        k: jnp.asarray(draw.integers(0, 32, x.shape), x.dtype) for k, x in shapes.items()
    }


def loss(name: str, config: Any) -> Any:
    return jax.value_and_grad(functools.partial(MODULES[name].loss, config))


@functools.cache
def plain(name: str) -> Any:
    """The loss and the gradients without a pipeline, on one device."""
    return jax.jit(loss(name, MODELS[name]))(*given(name))


def close(found: Any, expected: Any) -> None:
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = float(jnp.max(jnp.abs(b))) or 1.0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale, err_msg=str(path))


def piped(name: str, strategy: str, mesh: str, repeats: int = 1) -> tuple[Any, dict[str, Any]]:
    """A model's configuration as a pipeline, and the rules of the strategy with its mesh."""
    axes = dict(read_mesh(mesh)[0].axes)
    rules = MODULES[name].rules_for(strategy, tuple(axes))
    config = strategies.pipelined(MODELS[name], rules, axes, ROWS)
    how = {"mesh": mesh, "rules": rules, "in_specs": (None, P("outer_batch"))}
    return dataclasses.replace(config, repeats=repeats), how


MESHES = ("stage=2,data=2,model=2", "stage=4,data=2", "stage=2,model=4")
CASES = [
    ("transformer", "2d"), ("transformer", "tensor"), ("glam", "expert_tensor"), ("glam", "expert"),
]  # fmt: skip
FAST = (("transformer", "2d", MESHES[0], 1, "devices"),)


def cases() -> Iterator[Any]:
    for name, strategy in CASES:
        for mesh in MESHES:
            for repeats in (1, 2):
                for on in ("simulated", "devices"):
                    if "stage=4" in mesh and repeats == 2:
                        continue  # four layers, or pairs of them, are not enough
                    case = name, strategy, mesh, repeats, on
                    yield pytest.param(*case, marks=() if case in FAST else pytest.mark.exhaustive)


@pytest.mark.parametrize(("name", "strategy", "mesh", "repeats", "on"), list(cases()))
def test_a_pipelined_model_has_the_losses_and_gradients_of_the_plain_one(
    name: str, strategy: str, mesh: str, repeats: int, on: Any
) -> None:
    config, how = piped(name, strategy, mesh, repeats)
    assert config.stages == int(mesh[6])
    fn = loss(name, config)
    assert_equivalent(fn, *given(name), grad=False, on=on, rtol=1e-3, **how)
    close(jax.jit(fn)(*given(name)), plain(name))


def test_routers_count_each_token_once() -> None:
    """Also where microbatches do not divide the batch, and some rows are there once more."""
    config = dataclasses.replace(MODELS["glam"], layers=4)
    params, batch = given("glam")
    params = {**params, "layers": jax.tree.map(lambda x: x[:2], params["layers"])}

    def found(**how: Any) -> Any:
        value, grads = jax.jit(loss("glam", dataclasses.replace(config, **how)))(params, batch)
        return value, grads["layers"]["sparse"]["mixture"]["router"]

    close(found(stages=2, microbatches=5), found())


def planned(config: Any, how: dict[str, Any]) -> gspmd.Plan:
    return gspmd.plan(loss("transformer", config), *given("transformer"), **how)


@pytest.mark.exhaustive
def test_a_table_turns_the_pipeline_off() -> None:
    """The program is the same; without stages their devices take a share of the batch."""
    config, how = piped("transformer", "tensor", MESHES[0])
    config = dataclasses.replace(config, microbatches=4)
    on = planned(config, how)
    off = planned(
        config, {**how, "rules": {**how["rules"], "stage": None, "batch": ("data", "stage")}}
    )
    permutes = [
        [c for c in plan.collectives if c.kind == "collective_permute" and c.trips > 1]
        for plan in (on, off)
    ]
    activation = ROWS // 4 * 8 * 16 * 4 // 2  # of a microbatch, half on each device
    assert [(c.axes, c.trips, c.bytes) for c in permutes[0]] == [(("stage",), 5, activation)] * 2
    assert not permutes[1]
    assert on.in_specs[0]["layers"]["mlp"]["wi"] == P("stage", None, "model")
    assert off.in_specs[0]["layers"]["mlp"]["wi"] == P(None, None, "model")
    assert not on.findings
    # What goes into each layer is kept for the backward pass: of a stage's two, in each tick.
    loop = next(op for op in on.program.ops if op.name == "scan" and op.params["length"] == 5)
    stacked = loop.outs[loop.params["num_carry"] :]
    kept = [x.shape for x in stacked if jnp.issubdtype(x.dtype, jnp.floating)]
    assert kept == [(5, 2, 1, ROWS // 4 // 2, 8, 16)]


@pytest.mark.exhaustive
def test_no_device_holds_all_layers_of_a_circular_pipeline() -> None:
    """What rests on a stage's devices goes to where its turn is, once outward and once back."""
    config, how = piped("transformer", "tensor", MESHES[0], repeats=2)
    plan = planned(config, how)
    assert plan.in_specs[0]["layers"]["mlp"]["wi"] == P("stage", None, "model")
    sent = [c for c in plan.collectives if "stage" in c.axes and c.trips == 1]
    weights = 4 * (4 * 16 * 16 + 3 * 16 * 32) * 4 // 2 // 2  # bytes of them on a device
    dealt = [c for c in sent if c.source.split("/")[-1].startswith("layers.py")]
    activations = 4 * ROWS * 8 * 16 * 4 // 2
    assert sum(c.wire_bytes for c in dealt) < 2 * weights + activations


@pytest.mark.exhaustive
def test_what_a_table_turned_off_has_the_same_values() -> None:
    config, how = piped("transformer", "tensor", MESHES[0])
    config = dataclasses.replace(config, microbatches=4)
    how["rules"] = {**how["rules"], "stage": None, "batch": ("data", "stage")}
    close(planned(config, how).simulate(*given("transformer")), plain("transformer"))


def test_weights_are_gathered_and_their_gradients_summed_as_a_loop_would() -> None:
    """Finalized 2D in two stages: within the ticks no sum of gradients over the batch."""
    config, how = piped("transformer", "2d", MESHES[0])
    plan = planned(config, how)
    in_loops = [c for c in plan.collectives if c.trips > 1]
    assert {(c.kind, c.axes) for c in in_loops if "data" in c.axes} <= {("all_gather", ("data",))}
    sums = [c for c in plan.collectives if c.kind == "reduce_scatter" and c.axes == ("data",)]
    assert len(sums) == 7  # wq, wk, wv, wo, and the three of the MLP
    assert {c.trips for c in sums} == {1}


@functools.cache
def announcement() -> gspmd.Plan:
    config, how = piped("both", "nested_pipeline", "data=4,model=4")
    return gspmd.plan(loss("both", config), *given("both"), **how)


def test_the_nested_encoder_and_decoder_of_the_announcement() -> None:
    """On 4 x 4, X is data in embedding and softmax and the stages of encoder and decoder."""
    plan = announcement()
    weights, batch = plan.in_specs
    assert weights["embedding"] == P("model", None)
    assert batch["inputs"][0] == "data"
    assert weights["layers"]["attention"]["wq"] == P("data", None, "model", None)
    assert weights["layers"]["cross"]["wo"] == P("data", "model", None, None)
    assert weights["layers"]["mlp"]["wi"] == P("data", None, "model")
    sparse = weights["encoder"]["sparse"]["mixture"]["experts"]["wi"]
    assert sparse == P("data", "model", None, None)
    assert weights["encoder"]["dense"]["mlp"]["wi"] == P("data", None, None)
    activation = ROWS // 4 * 8 * 16 * 4  # of a microbatch; in the encoder Y splits its rows
    permutes = [
        c for c in plan.collectives if c.axes == ("data",) and c.kind == "collective_permute"
    ]
    assert {(c.trips, c.bytes) for c in permutes} == {(7, activation / 4), (7, activation)}
    assert len(permutes) == 4  # encoder and decoder, forward and backward


@pytest.mark.exhaustive
def test_the_nested_encoder_and_decoder_have_the_values_of_the_plain_ones() -> None:
    close(announcement().simulate(*given("both")), plain("both"))


@pytest.mark.exhaustive
def test_it_trains_from_the_command_line_as_without_a_mesh() -> None:
    how: dict[str, Any] = {
        "config": "tiny", "batch_size": 8, "sizes": {"seq": 16}, "steps": 2, "strategy": "tensor",
    }  # fmt: skip
    job = make_job("transformer", mesh=MESHES[0], **how)
    assert any(c.axes == ("stage",) for c in job.plan.collectives)
    losses: list[float] = []
    job.train(lambda record: losses.append(record.loss))
    alone: list[float] = []
    make_job("transformer", mesh="data=1", **how).train_alone(
        lambda record: alone.append(record.loss), steps=2
    )
    np.testing.assert_allclose(losses, alone, rtol=1e-4)


# ------------------------------------------------------------------------------------ full sizes

# The narrow dense family of section 5.2 (64 layers, M = 4096, H = 16384): 16B parameters.
NARROW = dataclasses.replace(
    transformer.CONFIGS["64b"], layers=64, model_dim=4096, hidden_dim=16_384, heads=32
)


def report(config: Any, mesh: Mapping[str, int], topology: str, batch: int, micro: int) -> Any:
    step = catalog.step("transformer", config, mesh, batch_size=batch, microbatches=micro)
    plan = gspmd.plan(step.fn, *step.args, mesh=mesh, **step.options)
    return plan.report("tpu-v3", topology)


@pytest.mark.exhaustive
def test_the_papers_2_by_16_by_8_at_full_size() -> None:
    """Two stages and 16 microbatches: a seventeenth of the loops' time is bubble."""
    made = report(NARROW, {"stage": 2, "data": 16, "model": 8}, "tpu-v3:8x16", 512, 16)
    (row,) = made.pipelines
    assert (row.stages, row.microbatches, row.ticks, row.busy) == (2, 16, 17, 16)
    assert row.bubble == pytest.approx(row.seconds / 17)
    assert 0.9 * made.seconds.step < row.seconds < made.seconds.step
    assert f"2 stages, 16 microbatches, a bubble of 1 in 17 ticks: {row.bubble:.4g} s" in str(made)
    # What is useful: three passes of the layers and of the softmax, no bubble and no remat.
    tokens = 512 * 1024
    layers = 64 * (4 * 4096 * 4096 + 3 * 4096 * 16_384 + 2 * 1024 * 4096)
    assert made.flops.model == pytest.approx(6 * tokens * (layers + 32_000 * 4096), rel=0.01)
    executed = 6 * tokens * (layers * 17 / 16 + 32_000 * 4096)
    assert made.flops.counted * 256 == pytest.approx(executed, rel=0.01)
    assert made.fits
    forth, back = (
        c for c in made.collectives if c.axes == ("stage",) and c.kind == "collective_permute"
    )
    assert (forth.trips, forth.bytes) == (17, 512 // 16 // 16 * 1024 * (4096 // 8) * 2)
    assert forth.exposed == pytest.approx(forth.seconds)  # all that a tick does needs it
    assert back.trips == 17


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", [(2, 16, 8), (4, 8, 8), (8, 4, 8), (2, 8, 16), (4, 16, 4)])
def test_the_papers_pipelines_at_full_size(mesh: tuple[int, int, int]) -> None:
    stages = mesh[0]
    axes: dict[str, int] = dict(zip(("stage", "data", "model"), mesh, strict=True))
    made = report(NARROW, axes, "tpu-v3:8x16", 512, 16)
    (row,) = made.pipelines
    assert row.ticks - row.busy == stages - 1
    assert made.fits


@pytest.mark.exhaustive
def test_2d_sharding_is_a_quarter_ahead_of_the_best_pipeline_on_2048_cores() -> None:
    """The GSPMD paper: its best pipeline is 24 % slower, by the bubble and by what it repeats."""
    request = estimate.Request("models.transformer:64b", batch=0.5)
    shapes = "1x32x64,2x16x64,2x32x32,4x16x32,8x16x16"
    _, rows = estimate.sweep(request, ["tpu-v3:32x32"], ["stage", "data", "model"], shapes, 1)
    plain, *others = rows
    assert not any(row.failure for row in (plain, *others))
    assert plain.bubble == 0
    ahead = min(row.step for row in others) / plain.step
    assert 1.15 < ahead < 1.35
    two, again, four, eight = (row.bubble / row.step for row in others)
    assert max(two, again) < four < eight  # though there are four microbatches for each stage


# ------------------------------------------------------------------------------------- bad input


def test_the_catalog_wants_to_know_how_many_stages() -> None:
    with pytest.raises(
        catalog.CatalogError, match=r"^the layers of transformer are a pipeline on "
    ):
        catalog.step("transformer", "tiny", ("stage", "data"), batch_size=8)


def test_more_microbatches_than_rows_are_refused() -> None:
    config, _ = piped("transformer", "tensor", MESHES[0])
    config = dataclasses.replace(config, microbatches=17)
    with pytest.raises(gspmd.PipelineError, match=r"^a batch of 16 rows does not go into 17 micro"):
        jax.eval_shape(loss("transformer", config), *given("transformer"))
