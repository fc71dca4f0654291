"""The models that `against_xla.py` runs: what GSPMD (arXiv 2105.04663) and its users split.

Each case is a function of whole arrays with `gspmd.annotate` in it, the specs of its arguments and
results, and a table that gives the names in them mesh axes. Sizes are `small`, for CPU devices, or
`paper`, for a TPU pod that the compiler is told of. A name's suffix spells its dims, as in
`models/transformer.py`; G are groups of tokens, E experts, C an expert's places for each group.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import tree_util
from jax.sharding import PartitionSpec as P

from gspmd.annotate import annotate
from gspmd.models import training, transformer

Rules = Mapping[str, str | tuple[str, ...] | None]
Sizes = str  # "small" or "paper"

POD = {"data": 16, "model": 64}
LAPTOP = {"data": 2, "model": 4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, the shapes it is called with, and how they are split.

    `in_specs` and `out_specs` are pytrees of PartitionSpec like the arguments and the results, with
    None where either side may choose. `bytes` is what is asked of it: at most so many of XLA's.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    mesh: Mapping[str, int]
    rules: Rules
    in_specs: Any
    out_specs: Any = None
    donate: tuple[int, ...] = ()
    bytes: float = 1.0
    peak: float = 1.05


def cases(sizes: Sizes) -> Iterator[Case]:
    """All cases, of the given sizes."""
    yield from dense(sizes)
    yield from experts(sizes)
    yield query_sequence(sizes)
    yield spatial(sizes)
    yield accumulated(sizes)
    yield vocabulary(sizes)
    yield from updates(sizes)


# ---------------------------------------------------------------------------- dense Transformers

_DENSE_SPECS = {
    "embedding": P("vocab_table", "embed_table"),
    "attention/wq": P(None, "embed", "heads", None),
    "attention/wk": P(None, "embed", "heads", None),
    "attention/wv": P(None, "embed", "heads", None),
    "attention/wo": P(None, "heads", None, "embed"),
    "attention/bias": P(None, "heads", None),
    "mlp/wi": P(None, "embed", "mlp"),
    "mlp/wi_gate": P(None, "embed", "mlp"),
    "mlp/wo": P(None, "mlp", "embed"),
}


def spec_of(path: Any, leaf: Any) -> P:
    """The spec of a parameter, or of what an optimizer keeps of it; the rest is whole."""
    name = tree_util.keystr(path, simple=True, separator="/")
    return next((spec for end, spec in _DENSE_SPECS.items() if name.endswith(end)), P())


# What fits into 16 GB a core: by strategy, the configuration, its layers and the batch. What the
# layers send is per layer, so that fewer of them say as much.
_WIDE, _NARROW = {}, {"model_dim": 4096, "hidden_dim": 16_384, "heads": 32}
_PAPER = {
    "data": ({**_NARROW, "layers": 2}, {"data": 1024}, 1024),
    "fsdp": ({**_WIDE, "layers": 64}, {"data": 1024}, 1024),
    "tensor": ({**_WIDE, "layers": 8}, POD, 256),
    "sequence": ({**_WIDE, "layers": 8}, POD, 256),
    "2d_attempt1": ({**_WIDE, "layers": 8}, POD, 256),
    "2d_attempt2": ({**_WIDE, "layers": 8}, POD, 64),
    "2d": ({**_WIDE, "layers": 64}, POD, 256),
}


def small_transformer(**changes: Any) -> transformer.Config:
    """A Transformer for CPU devices; in float32, as XLA sums bfloat16 in float32 there."""
    small = {
        "vocab": 512, "layers": 2, "model_dim": 128, "hidden_dim": 512, "heads": 8,
        "head_dim": 16, "seq": 64, "dtype": jnp.float32,
    }  # fmt: skip
    return dataclasses.replace(transformer.CONFIGS["137b"], **{**small, **changes})


def dense(sizes: Sizes) -> Iterator[Case]:
    """The paper's dense family, forward and training, under each of the tables of the model."""
    for strategy, (changes, pod, batch) in _PAPER.items():
        if sizes == "paper":
            config, mesh = dataclasses.replace(transformer.CONFIGS["137b"], **changes), pod
        else:
            mesh = {"data": 8} if len(pod) == 1 else LAPTOP
            config, batch = small_transformer(), 16
        yield _dense_case("forward", strategy, config, mesh, batch)
        yield _dense_case("train", strategy, config, mesh, batch)


def _dense_case(
    what: str, strategy: str, config: transformer.Config, mesh: Mapping[str, int], batch: int
) -> Case:
    rules = transformer.rules_for(strategy, tuple(mesh))
    tokens = jax.ShapeDtypeStruct((batch, config.seq), jnp.int32)
    data = {"inputs": tokens, "targets": tokens}
    name = f"dense {what}, {strategy}"
    if what == "forward":
        params = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
        specs = (tree_util.tree_map_with_path(spec_of, params), P("batch"))
        fn = functools.partial(transformer.loss, config)
        return Case(name, fn, (params, data), mesh, rules, specs, P())
    loss = lambda params, batch, key: transformer.loss(config, params, batch)  # noqa: E731
    init = functools.partial(transformer.init, config)
    wanted = (0.6, 1.1) if strategy == "2d" and config.layers == 64 else (1.0, 1.05)
    return _training(name, loss, init, data, mesh, rules, spec_of, *wanted)


def _training(
    name: str,
    loss: training.Loss,
    init: Callable[[jax.Array], Any],
    data: Any,
    mesh: Mapping[str, int],
    rules: Rules,
    spec: Callable[[Any, Any], P | None],
    bytes: float = 1.0,
    peak: float = 1.05,
) -> Case:
    """An AdamW step of `loss`; parameters and optimizer lie as `spec` says, before and after."""
    optimizer = training.make_optimizer(training.TrainConfig())
    state = jax.eval_shape(functools.partial(training.init_state, init, optimizer, 0))
    specs = tree_util.tree_map_with_path(spec, state)
    fn = training.make_step(loss, optimizer, 0)
    outs = (specs, {"loss": P()})
    return Case(name, fn, (state, data), mesh, rules, (specs, P("batch")), outs, (0,), bytes, peak)


def accumulated(sizes: Sizes) -> Case:
    """FSDP with the gradients of several microbatches added up in a loop."""
    micro = 4
    if sizes == "paper":
        config = dataclasses.replace(transformer.CONFIGS["137b"], layers=4)
        mesh, batch = {"data": 1024}, 1024
    else:
        config, mesh, batch = small_transformer(), {"data": 8}, 8
    rules = transformer.rules_for("fsdp", tuple(mesh))
    optimizer = training.make_optimizer(training.TrainConfig())
    init = functools.partial(transformer.init, config)
    state = jax.eval_shape(functools.partial(training.init_state, init, optimizer, 0))
    specs = tree_util.tree_map_with_path(spec_of, state)
    tokens = jax.ShapeDtypeStruct((micro, batch, config.seq), jnp.int32)

    def step(state: Any, batches: Any) -> tuple[Any, Any]:
        def add(total: Any, batch: Any) -> tuple[Any, jax.Array]:
            value, gradients = jax.value_and_grad(functools.partial(transformer.loss, config))(
                state["params"], batch
            )
            return jax.tree.map(jnp.add, total, gradients), value

        zeros = jax.tree.map(jnp.zeros_like, state["params"])
        total, values = jax.lax.scan(add, zeros, batches)
        gradients = jax.tree.map(lambda x: x / micro, total)
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "step": state["step"] + 1}, jnp.mean(values)

    data = {"inputs": tokens, "targets": tokens}
    given = (specs, P(None, "batch"))
    name = f"fsdp, {micro} microbatches"
    return Case(name, step, (state, data), mesh, rules, given, (specs, P()), (0,))


# ------------------------------------------------------------------------------ mixture of experts


def experts(sizes: Sizes) -> Iterator[Case]:
    """A layer of GShard's mixture of experts, trained: experts on one axis, or features on another.

    Groups of tokens and experts share an axis: what goes from the ones to the others is all_to_all.
    """
    if sizes == "paper":
        G, S, M, H, E, C = 1024, 1024, 1024, 8192, 1024, 4
        wide = (256, 1024, 8192, 32_768, 16, 128)
        meshes = {"data": 1024}, POD
    else:
        G, S, M, H, E, C = 8, 64, 64, 128, 8, 16
        wide = (16, 32, 128, 256, 4, 16)
        meshes = {"data": 8}, {"data": 4, "model": 2}
    alone = {"group": "data", "expert": "data", "feature": None, "hidden": None}
    yield _experts("experts alone", (G, S, M, H, E, C), meshes[0], alone)
    both = {"group": "data", "expert": "data", "feature": "model", "hidden": "model"}
    yield _experts("2D experts", wide, meshes[1], both)


def _experts(name: str, sizes: tuple[int, ...], mesh: Mapping[str, int], rules: Rules) -> Case:
    G, S, M, H, E, C = sizes
    shape = jax.ShapeDtypeStruct
    w = {
        "gate": shape((M, E), jnp.float32),
        "up": shape((E, M, H), jnp.float32),
        "down": shape((E, H, M), jnp.float32),
    }
    specs = {"gate": P(), "up": P("expert", None, "hidden"), "down": P("expert", "hidden", None)}

    def loss(w: Any, x_GSM: jax.Array) -> jax.Array:
        y_GSM = mixture(C, w, x_GSM)
        return jnp.mean(jnp.square(x_GSM + y_GSM))

    x = shape((G, S, M), jnp.float32)
    given = (specs, P("group", None, "feature"))
    fn = jax.value_and_grad(loss, argnums=(0, 1))
    return Case(name, fn, (w, x), mesh, rules, given, (P(), given))


def mixture(places: int, w: Mapping[str, jax.Array], x_GSM: jax.Array) -> jax.Array:
    """GShard's layer (arXiv 2006.16668, algorithm 1): each token goes to its two likeliest experts,
    and not at all where they have no place left."""
    x_GSM = annotate(x_GSM, P("group", None, "feature"))
    gate_GSE = jax.nn.softmax(jnp.einsum("GSM,ME->GSE", x_GSM, w["gate"]), axis=-1)
    combine_GSEC = annotate(_combine(gate_GSE, places), P("group", None, None, None))
    dispatch_GSEC = (combine_GSEC > 0).astype(x_GSM.dtype)
    sent_EGCM = jnp.einsum("GSEC,GSM->EGCM", dispatch_GSEC, x_GSM)
    sent_EGCM = annotate(sent_EGCM, P("expert", None, None, "feature"))
    h_EGCH = jax.nn.relu(jnp.einsum("EGCM,EMH->EGCH", sent_EGCM, w["up"]))
    h_EGCH = annotate(h_EGCH, P("expert", None, None, "hidden"))
    out_EGCM = jnp.einsum("EGCH,EHM->EGCM", h_EGCH, w["down"])
    out_EGCM = annotate(out_EGCM, P("expert", None, None, "feature"))
    y_GSM = jnp.einsum("GSEC,EGCM->GSM", combine_GSEC, out_EGCM)
    return annotate(y_GSM, P("group", None, "feature"))


def _combine(gate_GSE: jax.Array, places: int) -> jax.Array:
    """The weight of each token at each place of each expert."""
    experts = gate_GSE.shape[-1]
    first_GSE = jax.nn.one_hot(jnp.argmax(gate_GSE, axis=-1), experts)
    rest_GSE = gate_GSE * (1 - first_GSE)
    second_GSE = jax.nn.one_hot(jnp.argmax(rest_GSE, axis=-1), experts)
    place1_GSE = (jnp.cumsum(first_GSE, axis=1) - 1) * first_GSE
    taken_G1E = jnp.sum(first_GSE, axis=1, keepdims=True)
    place2_GSE = (jnp.cumsum(second_GSE, axis=1) - 1 + taken_G1E) * second_GSE

    def weights(chosen_GSE: jax.Array, place_GSE: jax.Array) -> jax.Array:
        fits_GSE = chosen_GSE * (place_GSE < places)
        at_GSEC = jax.nn.one_hot(place_GSE.astype(jnp.int32), places)
        return (gate_GSE * fits_GSE)[..., None] * at_GSEC

    return weights(first_GSE, place1_GSE) + weights(second_GSE, place2_GSE)


# ------------------------------------------------------------------------------------ other layers


def query_sequence(sizes: Sizes) -> Case:
    """Self-attention, trained: each device has some of the queries, and sees all of the keys."""
    B, S, M, N, D = (16, 8192, 4096, 32, 128) if sizes == "paper" else (4, 128, 64, 4, 16)
    mesh = POD if sizes == "paper" else LAPTOP
    rules = {"batch": "data", "seq": "model"}
    shape = jax.ShapeDtypeStruct
    w = {name: shape((M, N, D), jnp.float32) for name in ("q", "k", "v")}
    w["o"] = shape((N, D, M), jnp.float32)

    def loss(w: Any, x_BSM: jax.Array) -> jax.Array:
        x_BSM = annotate(x_BSM, P("batch", "seq", None))
        q_BSND = annotate(jnp.einsum("BSM,MND->BSND", x_BSM, w["q"]), P("batch", "seq", None, None))
        k_BTND = jnp.einsum("BTM,MND->BTND", x_BSM, w["k"])
        v_BTND = jnp.einsum("BTM,MND->BTND", x_BSM, w["v"])
        score_BNST = jnp.einsum("BSND,BTND->BNST", q_BSND, k_BTND) * D**-0.5
        score_BNST = jnp.where(jnp.tri(S, dtype=bool), score_BNST, -1e30)
        weight_BNST = jax.nn.softmax(score_BNST, axis=-1)
        y_BSND = jnp.einsum("BNST,BTND->BSND", weight_BNST, v_BTND)
        y_BSND = annotate(y_BSND, P("batch", "seq", None, None))
        y_BSM = x_BSM + jnp.einsum("BSND,NDM->BSM", y_BSND, w["o"])
        return jnp.mean(jnp.square(annotate(y_BSM, P("batch", "seq", None))))

    x = shape((B, S, M), jnp.float32)
    given = (P(), P("batch", "seq", None))
    fn = jax.value_and_grad(loss, argnums=(0, 1))
    return Case("query sequence", fn, (w, x), mesh, rules, given, (P(), given))


_CONV = ("NHWC", "HWIO", "NHWC")


def spatial(sizes: Sizes) -> Case:
    """A small U-Net, trained: images in stripes, of which each convolution needs the neighbours."""
    B, S, F = (64, 2048, 32) if sizes == "paper" else (2, 64, 8)
    mesh = {"data": 64, "rows": 16} if sizes == "paper" else {"data": 2, "rows": 4}
    rules = {"batch": "data", "rows": "rows"}
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    w = {
        "in": shape(3, 3, 4, F),
        "down": shape(3, 3, F, 2 * F),
        "deep": shape(3, 3, 2 * F, 2 * F),
        "up": shape(2, 2, 2 * F, F),
        "out": shape(3, 3, 2 * F, 1),
    }

    def conv(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
        y = jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=_CONV)
        return annotate(y, P("batch", "rows", None, None))

    def loss(w: Any, x: jax.Array) -> jax.Array:
        wide = jax.nn.relu(conv(x, w["in"]))
        deep = jax.nn.relu(conv(wide, w["down"], stride=2))
        deep = jax.nn.relu(conv(deep, w["deep"]))
        up = jax.lax.conv_transpose(deep, w["up"], (2, 2), "SAME", dimension_numbers=_CONV)
        up = annotate(up, P("batch", "rows", None, None))
        y = conv(jnp.concatenate([wide, up], axis=-1), w["out"])
        return jnp.mean(jnp.square(y))

    x = shape(B, S, S, 4)
    given = (P(), P("batch", "rows"))
    fn = jax.value_and_grad(loss)
    return Case("spatial U-Net", fn, (w, x), mesh, rules, given, (P(), P()))


def vocabulary(sizes: Sizes) -> Case:
    """Embedding and softmax, trained, with the vocabulary split."""
    B, S, M, V = (256, 1024, 8192, 32_000) if sizes == "paper" else (16, 64, 128, 1024)
    mesh = POD if sizes == "paper" else LAPTOP
    rules = {"batch": "data", "vocab": "model"}
    shape = jax.ShapeDtypeStruct
    w = {"table": shape((V, M), jnp.float32), "scale": shape((M,), jnp.float32)}
    specs = {"table": P("vocab", None), "scale": P()}

    def loss(w: Any, batch: Any) -> jax.Array:
        x_BSM = annotate(w["table"][batch["inputs"]], P("batch", None, None))
        x_BSM = jnp.tanh(x_BSM * w["scale"])
        logits_BSV = jnp.einsum("BSM,VM->BSV", x_BSM, w["table"])
        logits_BSV = annotate(logits_BSV, P("batch", None, "vocab"))
        label_BS = batch["targets"]
        picked_BS = jnp.take_along_axis(logits_BSV, label_BS[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits_BSV, axis=-1) - picked_BS)

    tokens = shape((B, S), jnp.int32)
    data = {"inputs": tokens, "targets": tokens}
    fn = jax.value_and_grad(loss)
    return Case("vocabulary", fn, (w, data), mesh, rules, (specs, P("batch")), (P(), specs))


def updates(sizes: Sizes) -> Iterator[Case]:
    """An MLP trained with AdamW on split data; the optimizer's state whole, or split as well."""
    B, M, H = (8192, 4096, 16_384) if sizes == "paper" else (64, 256, 512)
    mesh = {"data": 1024 if sizes == "paper" else 8}

    def init(key: jax.Array) -> Any:
        up, down = jax.random.split(key)
        w = {"up": jax.random.normal(up, (M, H)), "down": jax.random.normal(down, (H, M))}
        return jax.tree.map(lambda x: x * M**-0.5, w)

    def loss(w: Any, batch: Any, key: jax.Array) -> jax.Array:
        x = annotate(batch["x"], P("batch", None))
        y = jnp.tanh(x @ w["up"]) @ w["down"]
        return jnp.mean(jnp.square(y - batch["y"]))

    shape = jax.ShapeDtypeStruct((B, M), jnp.float32)
    data, rules = {"x": shape, "y": shape}, {"batch": "data"}

    def split(path: Any, leaf: Any) -> P:
        moment = "/mu/" in tree_util.keystr(path, simple=True, separator="/") or "/nu/" in (
            tree_util.keystr(path, simple=True, separator="/")
        )
        return P("batch") if moment else P()

    whole = lambda path, leaf: P()  # noqa: E731
    yield _training("AdamW, state whole", loss, init, data, mesh, rules, whole)
    yield _training("AdamW, state split", loss, init, data, mesh, rules, split)
