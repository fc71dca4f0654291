"""The Transformer: the papers' sizes, equal variants, decoding, annotations, tables, plans."""

import collections
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gspmd
from gspmd import P
from gspmd.errors import GspmdError, SpecError
from gspmd.models import blocks, layers, text, transformer
from gspmd.models.routing import Top2
from gspmd.models.training import TrainConfig, init_state, make_optimizer, make_step
from gspmd.models.transformer import CONFIGS, ROLES, RULES, Config, rules_for
from gspmd.testing import assert_equivalent

MINI = dataclasses.replace(CONFIGS["tiny"], model_dim=16, hidden_dim=32, heads=2, head_dim=8, seq=8)
BERT = dataclasses.replace(
    MINI,
    causal=False,
    multi_query=True,
    positions="learned",
    activation="silu",
    label_smoothing=0.1,
)
BOTH = dataclasses.replace(MINI, encoder_layers=2, encoder_experts=4)  # encoder and decoder

# Here compiling is the work, not running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch(config: Config, size: int = 2) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (size, config.seq + 1), 0, config.vocab)
    source = {"source": tokens[::-1, 1:]} if config.encoder_layers else {}
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **source}


@functools.cache
def params(config: Config = MINI) -> transformer.Params:
    """Fresh parameters of MINI; of others, which are only to be different, drawn by numpy."""
    if config == MINI:
        return jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    draw = np.random.default_rng(0).normal
    fresh = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * draw(size=x.shape), x.dtype), fresh)


# ------------------------------------------------------------------------------- sizes and shapes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("64b", 68_982_284_288),
        ("128b", 137_702_416_384),  # Lingvo's DenseLm128B8x8
        ("137b", 137_702_416_384),
        ("1t", 1_100_041_175_040),  # Lingvo's DenseLm1T16x16
        ("175b", 174_366_928_896),  # Lingvo's DenseLm175B32x32
        ("bert_480b", 481_815_347_200),  # Lingvo's MLPerfBertDense500B2K
    ],
)
def test_parameters_of_the_published_models_are_counted_exactly(name: str, count: int):
    assert transformer.parameter_count(CONFIGS[name]) == count
    assert transformer.active_count(CONFIGS[name]) == count


def test_the_experts_of_gshard_have_the_parameters_of_its_paper():
    config = CONFIGS["gshard_600b"]
    experts = 18 * 2048 * 2 * 1024 * 8192
    assert experts == 618_475_290_624
    idle = transformer.parameter_count(config) - transformer.active_count(config)
    assert idle == experts * 2046 // 2048  # a token meets 2 of 2048


def test_parameters_have_readable_paths_and_stacked_layers():
    leaves, _ = jax.tree.flatten_with_path({"params": params()})
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }
    assert shapes == {
        "params/embedding": (256, 16),
        "params/final_norm/scale": (16,),
        "params/layers/attention/bias": (2, 2, 32),
        "params/layers/attention/wk": (2, 16, 2, 8),
        "params/layers/attention/wo": (2, 2, 8, 16),
        "params/layers/attention/wq": (2, 16, 2, 8),
        "params/layers/attention/wv": (2, 16, 2, 8),
        "params/layers/attention_norm/scale": (2, 16),
        "params/layers/mlp/wi": (2, 16, 32),
        "params/layers/mlp/wi_gate": (2, 16, 32),
        "params/layers/mlp/wo": (2, 32, 16),
        "params/layers/mlp_norm/scale": (2, 16),
    }


def test_layers_start_different_and_at_the_scale_of_the_paper():
    M, N, D = MINI.model_dim, MINI.heads, MINI.head_dim
    attention = jax.tree.map(np.asarray, params()["layers"]["attention"])
    assert not np.array_equal(attention["wq"][0], attention["wq"][1])
    stds = {name: attention[name].std() for name in ("wq", "wk", "wv", "wo")}
    expected = {"wq": (M * D) ** -0.5, "wk": M**-0.5, "wv": M**-0.5, "wo": (N * D) ** -0.5}
    assert stds == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_logits_are_float32_and_have_one_score_per_token_of_the_vocabulary(gated, dtype):
    config = dataclasses.replace(MINI, gated=gated, dtype=dtype)
    fresh = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    tokens_BS = jax.ShapeDtypeStruct((3, config.seq), jnp.int32)
    logits = jax.eval_shape(functools.partial(transformer.apply, config), fresh, tokens_BS)
    assert (logits.shape, logits.dtype) == ((3, config.seq, config.vocab), jnp.float32)


def test_position_buckets_are_those_of_t5():
    back = np.asarray(blocks.causal_view(128, 128).bucket)[-1, ::-1]  # of the last, by distance
    expected = {0: 0, 1: 1, 15: 15, 16: 16, 18: 16, 19: 17, 32: 21, 64: 26, 112: 30, 113: 31}
    assert {distance: int(back[distance]) for distance in expected} == expected


def test_an_encoder_has_half_of_the_buckets_for_each_direction():
    bucket = np.asarray(blocks.full_view(256).bucket)
    expected = {0: 0, 7: 7, 8: 8, 16: 10, 64: 14, 127: 15, -1: 17, -8: 24, -127: 31}
    assert {back: int(bucket[128, 128 - back]) for back in expected} == expected


# ---------------------------------------------------------------------------------------- meaning


def test_a_loop_with_rematerialization_equals_unrolled_layers_without():
    config = dataclasses.replace(MINI, dropout=0.1)

    def value_and_gradients(**variant: bool):
        loss = functools.partial(transformer.loss, dataclasses.replace(config, **variant))
        return jit(jax.value_and_grad(loss))(params(), batch(config), jax.random.key(2))

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        value_and_gradients(scan=True, remat=True),
        value_and_gradients(scan=False, remat=False),
    )


def test_a_position_sees_nothing_that_comes_after_it():
    apply = jit(functools.partial(transformer.apply, MINI))
    tokens_BS = batch(MINI)["inputs"]
    before = apply(params(), tokens_BS)
    after = apply(params(), tokens_BS.at[:, 5].add(1))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


def test_loss_of_equal_scores_is_the_log_of_the_vocabulary():
    zeros = jax.tree.map(jnp.zeros_like, params())
    value = jit(functools.partial(transformer.loss, MINI))(zeros, batch(MINI))
    np.testing.assert_allclose(value, math.log(MINI.vocab), rtol=1e-6)


def test_dropout_follows_its_key_and_needs_one():
    config = dataclasses.replace(MINI, dropout=0.5)
    loss = jit(functools.partial(transformer.loss, config))
    args = params(), batch(config)
    assert loss(*args, jax.random.key(0)) == loss(*args, jax.random.key(0))
    assert loss(*args, jax.random.key(0)) != loss(*args, jax.random.key(1))
    without = jit(functools.partial(transformer.loss, MINI))
    np.testing.assert_allclose(loss(*args), without(*args), rtol=1e-6)


def test_loss_falls_within_twenty_steps_on_real_text():
    train = text.standard_library().train
    draw = functools.partial(text.batch, train, seed=0, batch_size=8, seq=MINI.seq)
    optimizer = make_optimizer(TrainConfig(warmup=1, learning_rate=0.02))
    step = jit(make_step(functools.partial(transformer.loss, MINI), optimizer, seed=0))
    state = {"params": params(), "opt": optimizer.init(params()), "step": 0}
    losses = []
    for i in range(20):
        state, metrics = step(state, draw(step=i))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_an_encoder_sees_what_comes_after():
    apply = jit(functools.partial(transformer.apply, BERT))
    tokens_BS = batch(BERT)["inputs"]
    before = apply(params(BERT), tokens_BS)
    after = apply(params(BERT), tokens_BS.at[:, 5].add(1))
    assert float(jnp.abs(before - after)[:, :5].min(axis=-1).max()) > 0


def test_a_decoder_reads_its_source():
    config = DECODED["experts and an encoder"]
    apply = jit(functools.partial(transformer.apply, config))
    now = batch(config)
    before = apply(params(config), now["inputs"], now["source"])
    after = apply(params(config), now["inputs"], now["source"].at[:, 7].add(1))
    assert float(jnp.abs(before - after).max(axis=-1).min()) > 0


def test_targets_count_by_their_weights():
    loss = jit(functools.partial(transformer.loss, BERT))
    now = batch(BERT)
    weights_BS = jnp.zeros((2, BERT.seq)).at[0, 3].set(1.0).at[1, 2].set(0.5)
    weighted = loss(params(BERT), now | {"weights": weights_BS})
    logits_BSV = jit(functools.partial(transformer.apply, BERT))(params(BERT), now["inputs"])
    spread = 0.1 / BERT.vocab + 0.9 * jax.nn.one_hot(now["targets"], BERT.vocab)
    loss_BS = -jnp.sum(jax.nn.log_softmax(logits_BSV) * spread, axis=-1)
    np.testing.assert_allclose(weighted, (loss_BS[0, 3] + loss_BS[1, 2] / 2) / 1.5, rtol=1e-5)


def test_the_loss_is_made_of_what_evaluation_tells_apart():
    config = DECODED["experts and an encoder"]
    parts = jit(functools.partial(transformer.evaluate, config))(params(config), batch(config))
    total = jit(functools.partial(transformer.loss, config))(params(config), batch(config))
    np.testing.assert_allclose(total, parts["cross_entropy"] + 2 * parts["routers"], rtol=1e-5)
    assert 0.005 < float(parts["routers"]) < 0.04  # 0.01 where even, times the experts at most


# --------------------------------------------------------------------------------------- decoding

DECODED = {
    "relative": MINI,
    "multi-query, capped": dataclasses.replace(MINI, multi_query=True, logit_cap=5.0),
    "learned": dataclasses.replace(MINI, positions="learned", seq=16),
    "experts and an encoder": dataclasses.replace(
        BOTH,
        experts=4,
        router=Top2(capacity_factor=4.0),  # places for all: no token competes
    ),
}


@pytest.mark.parametrize("name", DECODED)
def test_decoding_token_by_token_gives_the_scores_of_the_whole(name: str):
    """Also past `seq` tokens, where the cache drops the oldest; rows are of different lengths."""
    config, B, total = DECODED[name], 2, 16
    tokens_BS = jax.random.randint(jax.random.key(2), (B, total), 0, config.vocab)
    source = {"source_BT": tokens_BS[:, :8]} if config.encoder_layers else {}
    # Each position sees `seq` tokens at most, as a cache holds no more.
    wanted = jit(functools.partial(transformer.apply, config))(
        params(config), tokens_BS, *source.values()
    )
    length_B = np.array([6, 3])
    prompt_BS = jnp.zeros((B, min(8, config.seq)), int).at[:, :6].set(tokens_BS[:, :6])
    scores_BV, cache = jit(functools.partial(transformer.prefill, config))(
        params(config), prompt_BS, jnp.asarray(length_B), **source
    )
    decode = jit(functools.partial(transformer.decode, config))
    rows = np.arange(B)
    for at in range(total - length_B.max() + 1):
        expected = np.asarray(wanted)[rows, length_B - 1 + at]
        np.testing.assert_allclose(scores_BV, expected, rtol=1e-4, atol=1e-4)
        if at + length_B.max() < total:
            scores_BV, cache = decode(
                params(config), cache, np.asarray(tokens_BS)[rows, length_B + at]
            )


def test_generate_at_temperature_zero_takes_the_likeliest_token():
    prompt = np.arange(MINI.seq - 2)
    got = transformer.generate(MINI, params(), prompt, 5, jax.random.key(0), temperature=0.0)
    assert got[: prompt.size].tolist() == prompt.tolist()
    scores_SV = jit(functools.partial(transformer.apply, MINI))(params(), got[None])[0]
    likeliest = jnp.argmax(scores_SV, axis=-1)
    assert got[prompt.size :].tolist() == likeliest[prompt.size - 1 : -1].tolist()


def test_generate_repeats_itself_for_the_same_key_only():
    draw = functools.partial(transformer.generate, MINI, params(), np.arange(3), 12)
    first, again, other = (draw(jax.random.key(seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: transformer.parameter_count(dataclasses.replace(MINI, layers=3, experts=4)),
            r"layers=3 with 4 experts: .* layers come in pairs; make them 4",
        ),
        (
            lambda: transformer.apply(BOTH, params(BOTH), batch(BOTH)["inputs"]),
            r"this model has an encoder: give source",
        ),
        (
            lambda: transformer.apply(MINI, params(), jnp.zeros((1, 8), int), jnp.zeros((1, 8))),
            r"this model has no encoder: drop source",
        ),
        (
            lambda: transformer.apply(BERT, params(BERT), jnp.zeros((1, 9), int)),
            r"9 tokens, but seq=8 positions were learned; shorten them",
        ),
        (
            lambda: transformer.prefill(BERT, params(BERT), jnp.zeros((1, 8), int), jnp.ones(1)),
            r"an encoder has no next token to decode: causal=False",
        ),
        (
            lambda: transformer.prefill(MINI, params(), jnp.zeros((1, 9), int), jnp.ones(1)),
            r"a prompt of 9 tokens, but the cache has room for seq=8; give its end",
        ),
        (
            lambda: transformer.generate(
                dataclasses.replace(BERT, causal=True), {}, range(6), 3, jax.random.key(0)
            ),
            r"6 tokens and 3 more, but seq=8 positions were learned; ask for 2 at most",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(call, message: str):
    with pytest.raises(GspmdError, match=message):
        call()


# ------------------------------------------------------------------------ annotations and tables


def annotations(jaxpr: Any) -> Iterator[tuple[Any, ...]]:
    """The spec of each annotation in a jaxpr, those of loops and calls included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "gspmd_annotate":
            yield tuple(eqn.params["spec"])
        for param in eqn.params.values():
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from annotations(inner)


@functools.cache
def annotated() -> tuple[tuple[str | None, ...], ...]:
    """The specs in a model that has every kind of block, in a pipeline; None for an open dim."""
    config = dataclasses.replace(BOTH, experts=4, stages=2)
    fresh = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    loss = functools.partial(transformer.loss, config)
    jaxpr = jax.make_jaxpr(loss)(fresh, transformer.batch_shapes(config, 2)).jaxpr

    def flat(entry: Any) -> str | None:
        entry = entry[0] if isinstance(entry, tuple) else entry
        return None if entry is P.UNCONSTRAINED else entry

    return tuple(dict.fromkeys(tuple(map(flat, spec)) for spec in annotations(jaxpr)))


def test_the_model_is_annotated_in_fewer_than_ten_places():
    sources = "".join(map(inspect.getsource, (blocks, layers, transformer)))
    assert len(re.findall(r"\bannotate\(", sources)) == 9


def test_every_table_maps_exactly_the_roles_that_the_model_uses():
    roles = {role for spec in annotated() for role in spec if role is not None}
    assert roles == set(ROLES)
    assert {strategy: set(table) for strategy, table in RULES.items()} == dict.fromkeys(
        RULES, roles
    )


@pytest.mark.parametrize("strategy", RULES)
def test_no_annotation_uses_a_mesh_axis_twice(strategy: str):
    for axes in (
        ("data", "model"),
        ("data", "fsdp", "model"),
        ("pod", "data", "model"),
        ("data", "expert", "model"),
        ("stage", "data", "model"),
    ):
        table = rules_for(strategy, axes)
        for spec in annotated():
            entries = [table[name] for name in spec if name is not None]
            used = [a for e in entries if e for a in ((e,) if isinstance(e, str) else e)]
            assert len(used) == len(set(used)), (strategy, axes, spec)


@pytest.mark.parametrize(
    ("strategy", "axes", "expected"),
    [
        ("2d", ("data", "model"), {"batch": ("data",), "embed": "data", "act_model": "model"}),
        ("2d", ("model",), {"batch": None, "embed": None, "mlp": "model"}),
        ("2d", ("data",), {"batch": ("data",), "embed": "data", "mlp": None}),
        ("fsdp", ("data", "fsdp", "model"), {"batch": ("data", "fsdp"), "embed": "fsdp"}),
        ("tensor", ("data", "model", "extra"), {"batch": ("data", "extra"), "heads": "model"}),
        ("data", ("data", "fsdp"), {"batch": ("data", "fsdp"), "embed": None}),
        ("2d_attempt2", ("data", "model"), {"batch": None, "act_model": "data"}),
        ("tensor", ("data", "model"), {"encoder_mlp": "model", "expert_mlp": "model"}),
        ("expert", ("data", "model"), {"expert": "data", "expert_batch": None}),
        (
            "expert",
            ("data", "expert"),
            {"batch": ("data", "expert"), "expert": "expert", "expert_batch": ("data",)},
        ),
        (
            "nested",
            ("data", "model"),
            {
                "encoder_batch": ("data", "model"),
                "expert": "model",
                "expert_batch": ("data",),
                "encoder_mlp": None,
                "mlp": "model",
                "vocab": "model",
                "batch": ("data",),
            },
        ),
        ("fsdp", ("data", "expert"), {"embed": ("data", "expert")}),
        (
            "2d",
            ("stage", "data", "model"),
            {"stage": "stage", "batch": ("data",), "outer_batch": ("data", "stage")},
        ),
        ("2d", ("data", "model"), {"stage": None, "outer_batch": ("data",)}),
        (
            "nested_pipeline",
            ("data", "model"),
            {"stage": "data", "batch": None, "outer_batch": ("data",), "expert": "model"},
        ),
    ],
)
def test_rules_for_fits_a_table_to_a_mesh(strategy, axes, expected):
    table = rules_for(strategy, axes)
    assert {name: table[name] for name in expected} == expected


def test_an_unknown_strategy_is_refused_with_the_choices():
    with pytest.raises(SpecError, match="no strategy 'zero': choose one of data, fsdp, tensor, 2d"):
        rules_for("zero", ("data",))


@pytest.mark.parametrize(("axis", "near"), [("stages", "stage"), ("modle", "model")])
def test_an_axis_that_is_almost_one_of_the_tables_is_refused(axis: str, near: str) -> None:
    """It would split the batch, as an axis of any other name does."""
    with pytest.raises(SpecError, match=rf"^mesh axis '{axis}' is none .*; call it '{near}' if"):
        rules_for("2d", (axis, "data"))
    assert rules_for("2d", ("pod", "data"))["batch"] == ("pod", "data")
    assert rules_for("2d", ("data", "data2"))["batch"] == ("data", "data2")


def test_a_table_of_an_unknown_role_is_refused():
    from gspmd.models.strategies import table

    with pytest.raises(SpecError, match="no role 'hidden'"):
        table(ROLES, hidden="model")


# ------------------------------------------------------------------------------------------- plans

CACHE = P(None, "data", None, "model", None)


def counts(plan: gspmd.Plan) -> dict[tuple[str, tuple[str, ...]], int]:
    """Collectives by kind and axes, as often as a call runs them."""
    found: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    for c in plan.collectives:
        found[c.kind, c.axes] += c.trips
    return dict(found)


def test_a_partitioned_decoding_step_leaves_weights_and_cache_where_they_are():
    """Under Megatron's table a layer sums attention and MLP over model, the embedding once."""
    config, mesh = CONFIGS["137b"], {"data": 8, "model": 16}
    fresh = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    token_B = jax.ShapeDtypeStruct((128,), jnp.int32)
    prompt_BS = jax.ShapeDtypeStruct((128, config.seq), jnp.int32)
    _, cache = jax.eval_shape(
        functools.partial(transformer.prefill, config), fresh, prompt_BS, token_B
    )
    plan = gspmd.plan(
        functools.partial(transformer.decode, config), fresh, cache, token_B,
        mesh=mesh, rules=rules_for("tensor", tuple(mesh)), donate_argnums=1,
    )  # fmt: skip
    assert counts(plan) == {("all_reduce", ("model",)): 2 * 64 + 1}
    assert {c.bytes for c in plan.collectives} == {16 * 8192 * 2}  # the vectors of 16 tokens
    _, kept, _ = plan.in_specs
    assert kept.layers["self"] == (CACHE, CACHE) == plan.out_specs[1].layers["self"]
    assert not plan.findings


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("multi-query, capped", "2d"),
        pytest.param("experts and an encoder", "nested", marks=pytest.mark.exhaustive),
        pytest.param("learned", "2d_attempt2", marks=pytest.mark.exhaustive),
    ],
)
def test_prefill_and_decoding_partitioned_are_those_of_one_device(name: str, strategy: str):
    config = DECODED[name]
    how = {"mesh": "data=3,model=2", "rules": rules_for(strategy, ("data", "model"))}
    tokens_BS = batch(config, 4)["inputs"]
    length_B = jnp.array([8, 5, 1, 2])
    source = (tokens_BS,) if config.encoder_layers else ()

    def two_tokens(params, tokens_BS, length_B):
        scores_BV, cache = transformer.prefill(config, params, tokens_BS, length_B, *source)
        more_BV, cache = transformer.decode(config, params, cache, tokens_BS[:, 0])
        return scores_BV, more_BV, cache

    assert_equivalent(two_tokens, params(config), tokens_BS, length_B, grad=False, **how)


def test_nested_parallelism_splits_each_part_its_own_way():
    """The figure of GSPMD's announcement on a 4 x 4 mesh, X = data, Y = model, unpipelined."""
    config, mesh = CONFIGS["tiny_nested"], {"data": 4, "model": 4}
    fresh = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    plan = gspmd.plan(
        functools.partial(transformer.loss, config), fresh, transformer.batch_shapes(config, 32),
        mesh=mesh, rules=rules_for("nested", tuple(mesh)),
    )  # fmt: skip
    specs, _ = plan.in_specs
    assert specs["embedding"] == P("model", None)
    assert specs["layers"]["attention"]["wq"] == P(None, None, "model", None)
    assert specs["layers"]["cross"]["wo"] == P(None, "model", None, None)
    assert specs["layers"]["mlp"]["wi"] == P(None, None, "model")
    assert specs["encoder"]["sparse"]["mixture"]["experts"]["wi"] == P(None, "model", None, None)
    assert specs["encoder"]["dense"]["mlp"]["wi"] == P(None, None, None)
    # Y carries tokens to their experts and back: 2 of 4 experts' places for 32 x 64 tokens.
    exchanges = [
        c for c in plan.collectives if c.kind == "all_to_all" and c.source.count("routing")
    ]
    assert [(c.axes, c.bytes) for c in exchanges] == [(("model",), 2 * 32 * 64 * 64 * 4 / 16)] * 2
    assert not plan.findings


VARIANTS = {
    "decoder": MINI,
    "encoder": BERT,
    "un-gated, capped": dataclasses.replace(MINI, gated=False, logit_cap=5.0, remat=True),
    "encoder and decoder": BOTH,
}
SPLIT = {
    "decoder": [name for name in RULES if name not in ("expert", "nested")],
    "encoder": ["2d", "2d_attempt2", "sequence"],
    "un-gated, capped": ["2d"],
    "encoder and decoder": ["nested", "expert", "2d"],
}
MESHES = ("data=2,model=2", "data=3,model=2", "data=1,model=4")
FAST = (("encoder", "2d", "data=3,model=2"),)
CASES = [(variant, s, mesh) for variant in VARIANTS for s in SPLIT[variant] for mesh in MESHES]


@functools.cache
def whole_step(variant: str):
    """A step from a state and a batch to the loss, the gradients and the next state."""
    config = VARIANTS[variant]
    optimizer = make_optimizer(TrainConfig(warmup=1))
    loss = functools.partial(transformer.loss, config)

    def step(state: Any, now: Any):
        value, gradients = jax.value_and_grad(loss)(state["params"], now)
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        moved = jax.tree.map(jnp.add, state["params"], updates)
        return value, gradients, {"params": moved, "opt": opt}

    state = init_state(lambda key: params(config), optimizer, 0)
    return step, {"params": state["params"], "opt": state["opt"]}, batch(config, 4)


def equals(variant: str, strategy: str, mesh: str, on: Any = "simulated") -> None:
    step, state, now = whole_step(variant)
    rules = rules_for(strategy, ("data", "model"))
    how = {"mesh": mesh, "rules": rules, "in_specs": (None, P("batch")), "on": on}
    assert_equivalent(step, state, now, grad=False, **how)


@pytest.mark.parametrize(
    ("variant", "strategy", "mesh"),
    [pytest.param(*c, marks=() if c in FAST else pytest.mark.exhaustive) for c in CASES],
)
def test_a_partitioned_step_is_that_of_one_device(variant: str, strategy: str, mesh: str):
    equals(variant, strategy, mesh)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["data=2,model=4", "data=3,model=2", "data=4,model=1"])
@pytest.mark.parametrize(
    ("variant", "strategy"), [(variant, s) for variant in VARIANTS for s in SPLIT[variant]]
)
def test_a_step_on_devices_is_that_of_one(variant: str, strategy: str, mesh: str):
    equals(variant, strategy, mesh, on="devices")
