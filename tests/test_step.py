"""Whole training steps of a mixture of experts: routing, dispatch, gradients and the optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import agrees
from jax import lax

import gspmd
from gspmd import P

GROUPS, SEQ, MODEL, EXPERTS, CAPACITY, HIDDEN, VOCAB = 4, 6, 8, 4, 4, 12, 10
Params = dict[str, jax.Array]


def top2_dispatch(gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GShard's top-2 gating: each token's weight in each expert's buffer, and the balance loss."""
    first = jax.nn.one_hot(jnp.argmax(gates, axis=-1), EXPERTS)
    second = jax.nn.one_hot(jnp.argmax(jnp.where(first > 0, -1.0, gates), axis=-1), EXPERTS)
    balance = jnp.mean(jnp.mean(gates, axis=1) * jnp.mean(first, axis=1)) * EXPERTS**2
    at_first = (jnp.cumsum(first, axis=1) - 1) * first
    filled = jnp.sum(first, axis=1, keepdims=True)
    at_second = (jnp.cumsum(second, axis=1) - 1 + filled) * second
    combine = jnp.zeros((*gates.shape, CAPACITY))
    for chosen, at in ((first, at_first), (second, at_second)):
        kept = chosen * (at < CAPACITY)
        place = jax.nn.one_hot(jnp.sum(at, axis=-1).astype(jnp.int32), CAPACITY)
        combine += jnp.einsum("gse,gsc->gsec", gates * kept, place)
    return combine / (jnp.sum(combine, axis=(2, 3), keepdims=True) + 1e-6), balance


def top_k_dispatch(gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same with `lax.top_k`."""
    weights, experts = lax.top_k(gates, 2)
    chosen = jax.nn.one_hot(experts, EXPERTS)
    flat = chosen.transpose(0, 2, 1, 3).reshape(GROUPS, 2 * SEQ, EXPERTS)
    at = ((jnp.cumsum(flat, axis=1) - 1) * flat).reshape(GROUPS, 2, SEQ, EXPERTS)
    at = jnp.sum(at.transpose(0, 2, 1, 3), axis=-1).astype(jnp.int32)
    place = jax.nn.one_hot(at, CAPACITY)  # nothing where the buffer is full
    combine = jnp.einsum("gsk,gske,gskc->gsec", weights, chosen, place)
    return combine, jnp.mean(jnp.square(gates))


Router = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def loss(router: Router, params: Params, tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens]
    x = gspmd.annotate(x, P("group"))
    gates = jax.nn.softmax(jnp.einsum("gsm,me->gse", x, params["router"]))
    combine, balance = router(gates)
    dispatch = gspmd.annotate((combine > 0).astype(x.dtype), P("group"))
    sent = gspmd.annotate(jnp.einsum("gsec,gsm->egcm", dispatch, x), P("expert"))
    h = jax.nn.gelu(jnp.einsum("egcm,emh->egch", sent, params["wi"]))
    h = gspmd.annotate(h, P("expert", None, None, "mlp"))
    back = jnp.einsum("egch,ehm->egcm", h, params["wo"])
    x = x + gspmd.annotate(jnp.einsum("gsec,egcm->gsm", combine, back), P("group"))
    logits = jax.nn.log_softmax(jnp.einsum("gsm,vm->gsv", x, params["embed"]))
    nll = -jnp.take_along_axis(logits, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)
    return jnp.mean(nll) + 0.01 * balance


def make_step(router: Router, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Params, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda p: loss(router, p, tokens))(params)
        updates, state = optimizer.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    return step


def params_and_tokens(model: int = MODEL) -> tuple[Params, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCAB, model),
        "router": (model, EXPERTS),
        "wi": (EXPERTS, model, HIDDEN),
        "wo": (EXPERTS, HIDDEN, model),
    }
    params = {k: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32) for k, s in shapes.items()}
    return params, jnp.asarray(rng.integers(0, VOCAB, (GROUPS, SEQ)), jnp.int32)


ROUTERS: dict[str, Router] = {"top2": top2_dispatch, "top_k": top_k_dispatch}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
}
SHARDINGS: dict[str, tuple[str, Any]] = {
    "experts": ("x=4", {"group": "x", "expert": "x", "mlp": None, "vocab": None}),
    "experts x model": (
        "x=2,y=2", {"group": "x", "expert": "x", "mlp": "y", "vocab": "y"},
    ),
    "uneven": ("x=3,y=2", {"group": "x", "expert": "x", "mlp": "y", "vocab": ("x", "y")}),
    "experts over both": (
        "x=2,y=2", {"group": ("y", "x"), "expert": ("x", "y"), "mlp": None, "vocab": "x"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_mixture_of_experts(sharding: str, router: str, optimizer: str) -> None:
    tx = OPTIMIZERS[optimizer]()
    params, tokens = params_and_tokens()
    step = make_step(ROUTERS[router], tx)
    args = params, tx.init(params), tokens
    mesh, rules = SHARDINGS[sharding]
    specs = {
        "embed": P("vocab"),
        "router": P(),
        "wi": P("expert", None, "mlp"),
        "wo": P("expert", "mlp"),
    }
    plan = gspmd.plan(step, *args, mesh=mesh, rules=rules, in_specs=(specs, None, P("group")))
    agrees(plan, step, *args, rtol=2e-3, atol=2e-5)


def test_tokens_travel_to_their_experts_and_back() -> None:
    """Groups and experts over one axis: dispatch and combine are one `all_to_all` each."""
    model = 64  # fewer bytes in the experts' buffers than in the tokens
    params, tokens = params_and_tokens(model)
    mesh, rules = SHARDINGS["experts"]
    specs = {"embed": P(), "router": P(), "wi": P("expert"), "wo": P("expert")}
    plan = gspmd.plan(
        lambda p, t: loss(top2_dispatch, p, t), params, tokens,
        mesh=mesh, rules=rules, in_specs=(specs, P("group")),
    )  # fmt: skip
    exchanges = [c for c in plan.collectives if c.kind == "all_to_all"]
    assert len(exchanges) == 2
    buffer = EXPERTS * GROUPS * CAPACITY * model // 4 * 4
    assert [c.bytes for c in exchanges] == [buffer, buffer]
    scalars = [c for c in plan.collectives if c not in exchanges]
    # The losses are added up before the sum over the devices is paid.
    assert [(c.kind, c.bytes) for c in scalars] == [("all_reduce", 4)]
