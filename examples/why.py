"""Who asked for that all_reduce? The largest collectives of a Megatron MLP's training step.

Two annotations and the specs of the inputs decide everything; `plan.why` leads back to them. No
device is needed: the arguments are shapes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gspmd
from gspmd import P

BATCH, MODEL, HIDDEN, LAYERS = 4096, 1024, 4096, 4
OPTIMIZER = optax.adamw(1e-3)


def mlp(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    x = gspmd.annotate(x, P("batch", None))
    hidden = gspmd.annotate(jax.nn.gelu(x @ layer["up"]), P("batch", "hidden"))
    return x + hidden @ layer["down"], None


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jax.lax.scan(mlp, x, params)[0] - y))


def train_step(params: dict[str, jax.Array], moments: optax.OptState, x: jax.Array, y: jax.Array):
    value, gradient = jax.value_and_grad(loss)(params, x, y)
    updates, moments = OPTIMIZER.update(gradient, moments, params)
    return value, optax.apply_updates(params, updates), moments


def megatron() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What to plan: the step, its arguments, and options. `gspmd plan examples/why.py:megatron`."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"up": shape((LAYERS, MODEL, HIDDEN)), "down": shape((LAYERS, HIDDEN, MODEL))}
    moments = jax.eval_shape(OPTIMIZER.init, params)
    x = shape((BATCH, MODEL))
    return (
        train_step,
        (params, moments, x, x),
        {
            "mesh": "data=8,model=4",
            "in_specs": (None, None, P("batch"), P("batch")),
            "rules": {"batch": "data", "hidden": "model"},
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    fn, args, options = megatron()
    plan = gspmd.plan(fn, *args, **options)
    sent = [c.wire_bytes * c.trips for c in plan.collectives]
    print(f"{len(sent)} collectives send {sum(sent) / 1e6:.1f} MB a device and step. The largest:")
    for c in sorted(plan.collectives, key=lambda c: -c.wire_bytes * c.trips)[:4]:
        print(f"\n{c.wire_bytes * c.trips / sum(sent):.0%}: {plan.why(c.number)}")
    print(f"\nAnd a parameter:\n{plan.why('params/up')}")
