"""Six heads over four devices, ten sequences over four, seven steps: nothing has to divide.

Each device holds ceil(n / k) of a dim, and the split outlives the call: what comes back is still in
pieces, goes into the next call as it is, and acts as an array of its logical shape.
"""

import jax
import jax.numpy as jnp
import numpy as np

import gspmd
from gspmd import P

BATCH, SEQ, MODEL, HEADS, HEAD = 10, 7, 32, 6, 8
RULES = {"batch": "data", "heads": "model"}


def attention(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    q, k, v = jnp.einsum("bsm,cmnd->cbsnd", x, params["qkv"])
    q = gspmd.annotate(q, P("batch", None, "heads", None))
    weight = jax.nn.softmax(jnp.einsum("bsnd,btnd->bnst", q, k) / HEAD**0.5)
    return x + jnp.einsum("bnst,btnd,ndm->bsm", weight, v, params["out"])


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(attention(params, x)))


def step(params: dict[str, jax.Array], x: jax.Array):
    """One step of gradient descent; the head dim of the parameters stays split."""
    value, gradient = jax.value_and_grad(loss)(params, x)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 16)
    draw = np.random.default_rng(0).normal
    params = {
        "qkv": draw(size=(3, MODEL, HEADS, HEAD), scale=0.2).astype(np.float32),
        "out": draw(size=(HEADS, HEAD, MODEL), scale=0.2).astype(np.float32),
    }
    x = draw(size=(BATCH, SEQ, MODEL)).astype(np.float32)

    train = gspmd.partition(step, "data=4,model=4", rules=RULES, in_specs=(None, P("batch")))
    plan = train.plan(params, x)
    print("what each device sends in a step:")
    for collective in plan.collectives:
        print(" ", collective)
    gathers = [c for c in plan.collectives if c.phase == "boundary" and c.kind == "all_gather"]
    print(f"gathered at the boundary: {len(gathers)}")

    ours, alone = params, params
    for i in range(3):
        value, ours = train(ours, x)
        expected, alone = jax.jit(step)(alone, x)
        print(f"step {i}: loss {float(value):.6f}, on one device {float(expected):.6f}")
    held = [shard.data.shape for shard in ours["out"].addressable_shards[:4]]
    print(f"out is {ours['out']!r}; the first four devices hold {held}")
    print(f"np.asarray(out) has shape {np.asarray(ours['out']).shape}")
