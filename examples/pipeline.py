"""Four stages are a leading dim of four, and a table says whether an axis of the mesh splits it.

The model is the same in all rows: eight layers, split over "model" as in Megatron. Where "stage" is
an axis of the mesh, activations go from stage to stage, and nothing else crosses that axis but what
comes in and goes out; in a circular pipeline twice as often, for a smaller bubble.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import gspmd
from gspmd import P

LAYERS, BATCH, MODEL, HIDDEN, STAGES, MICRO = 8, 64, 64, 256, 4, 8
MESH = {"stage": 4, "model": 2}
PIPELINED = {"stage": "stage", "hidden": "model", "batch": None, "rows": "stage"}
TABLES = {
    "pipelined": (PIPELINED, 1),
    "circular": (PIPELINED, 2),
    "not pipelined": ({**PIPELINED, "stage": None, "batch": "stage"}, 1),
}


def layer(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    hidden = gspmd.annotate(jax.nn.gelu(x @ params["up"]), P("batch", "hidden"))
    return x + gspmd.annotate(hidden @ params["down"], P("batch", None))


def loss(stages: tuple, x: jax.Array, y: jax.Array, repeats: int = 1) -> jax.Array:
    made = gspmd.pipeline(
        gspmd.run_layers(layer), stages, gspmd.to_microbatches(x, MICRO),
        stages=STAGES, schedule="circular" if repeats > 1 else "gpipe", repeats=repeats,
    )  # fmt: skip
    made = gspmd.annotate(gspmd.from_microbatches(made, BATCH), P("rows", None))
    return jnp.mean(jnp.square(made - y))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    draw = functools.partial(np.random.default_rng(0).normal, scale=0.1)
    params = {"up": draw(size=(LAYERS, MODEL, HIDDEN)), "down": draw(size=(LAYERS, HIDDEN, MODEL))}
    params = jax.tree.map(jnp.float32, params)
    x, y = jnp.float32(draw(size=(2, BATCH, MODEL)))
    for name, (rules, repeats) in TABLES.items():
        stages = gspmd.stack_stages(params, STAGES, repeats)
        step = gspmd.partition(
            jax.value_and_grad(functools.partial(loss, repeats=repeats)), MESH, rules=rules,
            in_specs=(P("stage"), P("rows"), P("rows")),
        )  # fmt: skip
        plan = step.plan(stages, x, y)
        value, gradient = step(stages, x, y)
        print(f"{name}: loss {value:.6f}, {plan.wire_bytes / 1e6:.2f} MB sent; over stages:")
        for one in plan.collectives:
            if "stage" in one.axes:
                print(" ", one)
