"""Pipelines whose stages are split over other axes, and hand-written regions in them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from pipelines import (
    SCHEDULES,
    array,
    close,
    crossing,
    layers,
    loss_of,
    mlp,
    model,
    run_in_sequence,
)

import gspmd
from gspmd import P, annotate
from gspmd.testing import assert_equivalent


def attention(w: Any, x: jax.Array) -> jax.Array:
    """An attention block and an MLP, as in a Transformer."""
    x = annotate(x, P("batch", None, "embed_act"))
    w_qkv = annotate(w["qkv"], P(None, "embed", "heads", None))
    q, k, v = annotate(
        jnp.einsum("bsm,cmnd->cbsnd", x, w_qkv), P(None, "batch", None, "heads", None)
    )
    weight = jax.nn.softmax(jnp.einsum("bsnd,btnd->bnst", q, k))
    y = jnp.einsum("bnst,btnd->bsnd", weight, v)
    y = jnp.einsum("bsnd,ndm->bsm", y, annotate(w["o"], P("heads", None, "embed")))
    x = x + annotate(y, P("batch", None, "embed_act"))
    h = jax.nn.gelu(jnp.einsum("bsm,mh->bsh", x, annotate(w["up"], P("embed", "hidden"))))
    y = annotate(h, P("batch", None, "hidden")) @ annotate(w["down"], P("hidden", "embed"))
    return x + annotate(y, P("batch", None, "embed_act"))


def experts(w: Any, x: jax.Array) -> jax.Array:
    """A mixture of experts: each group sends its tokens, all to all, and gets them back."""
    x = annotate(x, P("batch", None, None))
    share = jax.nn.softmax(jnp.einsum("gsm,me->gse", x, w["gate"]))
    sent = annotate(jnp.einsum("gse,gsm->egsm", share, x), P(None, "batch", None, None))
    sent = annotate(sent, P("expert", None, None, None))
    h = jax.nn.relu(jnp.einsum("egsm,emh->egsh", sent, w["up"]))
    back = jnp.einsum("egsh,ehm->egsm", h, w["down"])
    back = annotate(annotate(back, P("expert", None, None, None)), P(None, "batch", None, None))
    return x + jnp.sum(back, axis=0)


def images(w: Any, x: jax.Array) -> jax.Array:
    """A convolution over rows of images, which are cut into strips."""
    x = annotate(x, P("batch", "rows", None))
    y = lax.conv_general_dilated(
        x, w["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return annotate(x + jnp.tanh(y), P("batch", "rows", None))


def nested(layer: Callable[..., Any]) -> tuple[Any, jax.Array]:
    """Four layers and a batch for `layer`."""
    L, B, S, M, H, N, D, E = 4, 16, 8, 8, 16, 4, 4, 4
    weights: dict[Any, Any] = {
        mlp: layers(L),
        attention: {  # small, or scores are so large that a rounding changes what is attended to
            name: w / 4 for name, w in {
                "qkv": array(L, 3, M, N, D), "o": array(L, N, D, M, seed=1), **layers(L, M, H),
            }.items()
        },
        experts: {
            "gate": array(L, M, E), "up": array(L, E, M, H), "down": array(L, E, H, M, seed=1),
        },
        images: {"kernel": array(L, 3, M, M)},
    }  # fmt: skip
    return weights[layer], array(B, M, seed=2) if layer is mlp else array(B, S, M, seed=2)


NAMES = ("batch", "hidden", "heads", "embed", "embed_act", "expert", "rows")
TABLES: dict[str, dict[str, str]] = {
    "data": {"batch": "data"},
    "fsdp": {"batch": "data", "embed": "data"},
    "tensor": {"batch": "data", "hidden": "model", "heads": "model"},
    "2d": {
        "batch": "data", "hidden": "model", "heads": "model", "embed": "data",
        "embed_act": "model",
    },
    "expert": {"batch": "data", "expert": "data"},
    "spatial": {"batch": "data", "rows": "model"},
}  # fmt: skip
MESHES = ("stage=2,data=2,model=2", "stage=4,data=2,model=1", "stage=2,data=1,model=4")
NESTED = [
    (mlp, "tensor"), (mlp, "data"), (attention, "fsdp"), (attention, "tensor"), (attention, "2d"),
    (experts, "expert"), (images, "spatial"),
]  # fmt: skip
FAST = ((mlp, "tensor", 2), (attention, "fsdp", 1))


def rules_of(table: str, stage: str | None = "stage") -> dict[str, str | None]:
    return {**dict.fromkeys(NAMES), **TABLES[table], "stage": stage}


def cases(fast: Callable[[Any], bool]) -> Iterator[Any]:
    for layer, table in NESTED:
        for repeats in (1, 2):
            case = layer, table, repeats
            yield pytest.param(*case, marks=() if fast(case) else pytest.mark.exhaustive)


def nest(layer: Callable[..., Any], repeats: int) -> tuple[Callable[..., Any], Any, jax.Array]:
    """The loss and gradients of four layers in two stages, their weights dealt out, a batch."""
    w, x = nested(layer)

    def piped(stacked: Any, x: jax.Array) -> jax.Array:
        made = gspmd.pipeline(
            gspmd.run_layers(layer), stacked, gspmd.to_microbatches(x, 4), stages=2,
            schedule=SCHEDULES[repeats], repeats=repeats,
        )  # fmt: skip
        return gspmd.from_microbatches(made, x.shape[0])

    return loss_of(piped), gspmd.stack_stages(w, 2, repeats), x


@pytest.mark.parametrize(
    ("layer", "table", "repeats"), list(cases(lambda case: case[2] == 1 or case in FAST))
)
def test_nested_within_a_stage_nothing_is_sent_that_is_not_without_one(
    layer: Callable[..., Any], table: str, repeats: int
) -> None:
    """Over "stage" go activations alone; over the other axes what the strategy sends anyway."""
    fn, stacked, x = nest(layer, repeats)
    plan = gspmd.plan(
        fn, stacked, x, mesh=MESHES[0], in_specs=(P("stage"), P("batch")), rules=rules_of(table)
    )
    ticks, ways = repeats * 4 + 1, [c for c in plan.collectives if "stage" in c.axes]
    split = 4 if table in ("2d", "spatial") else 2
    one = x.size * 4 // split // 4
    assert [(c.kind, c.trips, c.bytes) for c in ways] == [
        ("collective_permute", ticks, one), ("all_reduce", 1, 4 * one),
    ] * 2  # fmt: skip
    assert not plan.findings
    in_loops = {c.kind for c in plan.collectives if c.trips > 1 and c.axes == ("data",)}
    assert in_loops == {"fsdp": {"all_gather"}, "2d": {"all_gather"}, "expert": {"all_to_all"}}.get(
        table, set()
    )  # gradients of weights are summed over "data" once, after the loop


@pytest.mark.parametrize(("layer", "table", "repeats"), list(cases(lambda case: case in FAST)))
def test_nested_within_a_stage_as_without_one(
    layer: Callable[..., Any], table: str, repeats: int
) -> None:
    """A table turns the pipeline off, with the same values: a stage's devices then take batch."""
    fn, stacked, x = nest(layer, repeats)
    how: dict[str, Any] = {"mesh": MESHES[0], "in_specs": (P("stage"), P("batch"))}
    plan = gspmd.plan(fn, stacked, x, rules=rules_of(table), **how)
    rules = {**rules_of(table, None), "batch": ("data", "stage")}
    off = gspmd.plan(fn, stacked, x, rules=rules, **how)
    assert not [c for c in crossing(off) if c[0] == "collective_permute"]
    plain = jax.jit(loss_of(functools.partial(run_in_sequence, layer)))(nested(layer)[0], x)
    for made in (plan, off):
        value, (gradient, by_x) = made.simulate(stacked, x)
        close((value, by_x), (plain[0], plain[1][1]))
        close(gradient[0], gspmd.stack_stages(plain[1][0], 2, repeats)[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("on", ["simulated", "devices"])
@pytest.mark.parametrize(
    ("mesh", "repeats"),  # four layers are too few for four stages twice
    [(mesh, n) for n in (1, 2) for mesh in MESHES if n == 1 or "stage=4" not in mesh],
)
@pytest.mark.parametrize(("layer", "table"), NESTED)
def test_nested_on_every_mesh(
    layer: Callable[..., Any], table: str, repeats: int, mesh: str, on: Any
) -> None:
    w, x = nested(layer)
    p = 4 if "stage=4" in mesh else 2
    fn = loss_of(model(p, 3, repeats, layer, remat=True))
    specs = (P("stage") if repeats == 1 else None, P("batch"))
    how: dict[str, Any] = {"mesh": mesh, "rules": rules_of(table), "in_specs": specs, "on": on}
    assert_equivalent(fn, w, x, grad=False, rtol=1e-3, **how)


@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_on_devices_it_is_what_it_is_in_sequence(repeats: int) -> None:
    w, x = nested(mlp)
    mesh = jax.make_mesh((2, 2, 2), ("stage", "data", "model"), (AxisType.Auto,) * 3)
    fn = gspmd.partition(
        loss_of(model(2, 3, repeats)), mesh, in_specs=(None, P("batch")), rules=rules_of("tensor")
    )
    close(fn(w, x), loss_of(functools.partial(run_in_sequence, mlp))(w, x))


@pytest.mark.parametrize("stages", [3, 6])
def test_stages_that_the_axis_does_not_divide(stages: int) -> None:
    w, x = layers(stages), array(4, 8, seed=2)
    fn = loss_of(model(stages, 2))
    assert_equivalent(fn, w, x, mesh="stage=4", in_specs=(None, None), grad=False,
                      rules={"batch": None, "hidden": None})  # fmt: skip


def test_a_stage_with_a_loop_and_sides_that_are_learned() -> None:
    """The encoder's output reaches all stages; its gradient is summed over them once."""
    p, m, rows, dim = 2, 4, 8, 8

    def loss(w: Any, x: jax.Array, memory: jax.Array) -> jax.Array:
        stage = gspmd.run_layers(lambda w, x, memory: mlp(w, x + jnp.tanh(memory)))
        made = gspmd.pipeline(stage, w, x, stages=p, sides=memory, remat=True)
        return jnp.sum(jnp.sin(made))

    w = gspmd.stack_stages(layers(4), p)
    args = w, array(m, rows, dim), array(m, rows, dim, seed=3)
    specs = (P("stage"), P(None, "batch"), P(None, "batch"))
    gradient = jax.grad(loss, (0, 1, 2), allow_int=True)
    plan = gspmd.plan(
        gradient, *args, mesh="stage=2,data=2", in_specs=specs, rules=rules_of("data")
    )
    one = rows // 2 * dim * 4
    permute = ("collective_permute", m + p - 1, one)
    # Outward, those of the results; back, in one, those of the gradients by x and by the sides.
    sums = ("all_reduce", 1, m * one), ("all_reduce", 1, 2 * m * one)
    assert sorted(crossing(plan)) == sorted([permute, permute, *sums])
    close(plan.simulate(*args), gradient(*args))


# --------------------------------------------------------------------------------- manual regions


def test_a_region_by_hand_in_a_stage_and_a_pipeline_in_a_region() -> None:
    """Manual over "seq", automatic over "stage" and "data"; and the other way round."""
    mesh = jax.make_mesh((2, 2, 2), ("stage", "data", "seq"), (AxisType.Auto,) * 3)
    dim, rows, m = 8, 4, 3
    split = P("data", P.UNCONSTRAINED, None)

    def neighbours(x: jax.Array) -> jax.Array:
        return x + lax.ppermute(x, "seq", [(0, 1), (1, 0)])

    def inside(w: jax.Array, x: jax.Array) -> jax.Array:
        by_hand = jax.shard_map(
            neighbours, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"),
            axis_names={"seq"},
        )  # fmt: skip
        stage = lambda w, x: jnp.tanh(by_hand(annotate(x, split)) @ w)  # noqa: E731
        return gspmd.pipeline(stage, w, x, stages=2)

    def around(w: jax.Array, x: jax.Array) -> jax.Array:
        stage = lambda w, x: jnp.tanh(neighbours(annotate(x, split)) @ w)  # noqa: E731
        by_hand = lambda w, x: gspmd.pipeline(stage, w, x, stages=2)  # noqa: E731
        spec = P(None, None, "seq")
        return jax.shard_map(
            by_hand, mesh=mesh, in_specs=(P(), spec), out_specs=spec, axis_names={"seq"}
        )(w, x)

    def plain(w: jax.Array, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = jnp.tanh((x + jnp.roll(x, x.shape[2] // 2, axis=2)) @ w[i])
        return x

    w, x = array(2, dim, dim), array(m, rows, 6, dim, seed=1)
    expected = loss_of(plain)(w, x)
    for fn in (inside, around):
        plan = gspmd.plan(
            loss_of(fn), w, x, mesh=mesh, in_specs=(P("stage"), P(None, "data", "seq"))
        )
        one = rows // 2 * 3 * dim * 4
        for axis in ("seq", "stage"):
            permutes = [x for x in crossing(plan, axis) if x[0] == "collective_permute"]
            assert permutes == [("collective_permute", m + 1, one)] * 2
        close(plan.simulate(w, x), expected)
