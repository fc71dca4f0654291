"""The reference Transformer: the papers' sizes, equal variants, causality, annotations, tables."""

import ast
import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspmd.errors import SpecError
from gspmd.models import text, transformer
from gspmd.models.training import TrainConfig, make_optimizer, make_step
from gspmd.models.transformer import CONFIGS, RULES, Config, rules_for

MINI = dataclasses.replace(CONFIGS["tiny"], model_dim=16, hidden_dim=32, heads=2, head_dim=8, seq=8)

# Here compiling is the work, not running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch(config: Config, size: int = 2) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (size, config.seq + 1), 0, config.vocab)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@functools.cache
def params(config: Config = MINI) -> transformer.Params:
    return jit(transformer.init, static_argnums=0)(config, jax.random.key(0))


# ------------------------------------------------------------------------------- sizes and shapes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("64b", 68_982_284_288),
        ("128b", 137_702_416_384),  # Lingvo's DenseLm128B8x8
        ("137b", 137_702_416_384),
        ("1t", 1_100_041_175_040),  # Lingvo's DenseLm1T16x16
    ],
)
def test_parameters_of_the_dense_family_are_counted_exactly(name: str, count: int):
    leaves = jax.tree.leaves(
        jax.eval_shape(functools.partial(transformer.init, CONFIGS[name]), jax.random.key(0))
    )
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count


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
    back = np.asarray(transformer.position_buckets(128))[-1, ::-1]  # of the last query, by distance
    expected = {0: 0, 1: 1, 15: 15, 16: 16, 18: 16, 19: 17, 32: 21, 64: 26, 112: 30, 113: 31}
    assert {distance: int(back[distance]) for distance in expected} == expected


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


def test_generate_at_temperature_zero_takes_the_likeliest_token_of_a_sliding_window():
    prompt = np.arange(MINI.seq - 2)
    apply = jit(functools.partial(transformer.apply, MINI))
    expected = list(prompt)
    for _ in range(5):
        window = expected[-MINI.seq :]
        padded = np.zeros((1, MINI.seq), np.int32)
        padded[0, : len(window)] = window
        expected.append(int(jnp.argmax(apply(params(), padded)[0, len(window) - 1])))
    got = transformer.generate(MINI, params(), prompt, 5, jax.random.key(0), temperature=0.0)
    assert got.tolist() == expected


def test_generate_repeats_itself_for_the_same_key_only():
    draw = functools.partial(transformer.generate, MINI, params(), np.arange(3), 12)
    first, again, other = (draw(jax.random.key(seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other


# ------------------------------------------------------------------------ annotations and tables


def annotated() -> list[tuple[str | None, ...]]:
    """The spec of each call of `annotate` in the source."""
    return [
        tuple(ast.literal_eval(entry) for entry in node.args[1].args)
        for node in ast.walk(ast.parse(inspect.getsource(transformer)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "annotate" and isinstance(node.args[1], ast.Call)
    ]


def test_the_model_is_annotated_in_fewer_than_ten_places():
    assert inspect.getsource(transformer).count("annotate(") == len(annotated()) == 9


def test_every_table_maps_exactly_the_names_that_the_model_uses():
    names = {name for spec in annotated() for name in spec if name is not None}
    assert {strategy: set(table) for strategy, table in RULES.items()} == dict.fromkeys(
        RULES, names
    )


@pytest.mark.parametrize("strategy", RULES)
def test_no_annotation_uses_a_mesh_axis_twice(strategy: str):
    for axes in (("data", "model"), ("data", "fsdp", "model"), ("pod", "data", "model")):
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
    ],
)
def test_rules_for_drops_axes_that_the_mesh_lacks(strategy, axes, expected):
    table = rules_for(strategy, axes)
    assert {name: table[name] for name in expected} == expected


def test_an_unknown_strategy_is_refused_with_the_choices():
    with pytest.raises(SpecError, match="no strategy 'zero': choose one of data, fsdp, tensor, 2d"):
        rules_for("zero", ("data",))
