"""The paper's 137B training step on 1024 devices, planned on this machine without any of them.

What every device would send in one step, by kind and axes, and how long it took to find out.
"""

import collections
import math

import jax
import jax.numpy as jnp

import gspmd
from gspmd import P
from gspmd.models import training, transformer

MESH = {"data": 16, "model": 64}


def plan() -> gspmd.Plan:
    """AdamW, remat, 64 scanned layers, bfloat16 products: GSPMD's finalized 2D sharding."""
    config = transformer.CONFIGS["137b"]
    optimizer = training.make_optimizer(training.TrainConfig())
    step = training.make_step(
        lambda params, batch, key: transformer.loss(config, params, batch), optimizer, seed=0
    )
    state = jax.eval_shape(
        lambda: training.init_state(lambda key: transformer.init(config, key), optimizer, seed=0)
    )
    tokens = jax.ShapeDtypeStruct((256, config.seq), jnp.int32)
    return gspmd.plan(
        step, state, {"inputs": tokens, "targets": tokens},
        mesh=MESH,
        in_specs=(None, P("batch")),
        rules=transformer.rules_for("2d", tuple(MESH)),
        donate_argnums=0,
    )  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    made = plan()
    weights = [v for v in made.program.ins if v.name.startswith("state/params")]
    count = sum(math.prod(v.layout.shape) for v in weights)
    here = sum(math.prod(v.shape) for v in weights)
    ops = sum(1 for _ in made.model.walk())
    print(f"{count:,} parameters, {here:,} on each device; {ops} ops, each layer's counted once\n")

    sent: collections.Counter[tuple[str, str]] = collections.Counter()
    times: collections.Counter[tuple[str, str]] = collections.Counter()
    for c in made.collectives:
        sent[c.kind, ",".join(c.axes)] += c.wire_bytes * c.trips
        times[c.kind, ",".join(c.axes)] += c.trips
    print(f"{'collective':<16}{'axes':<8}{'times':>7}{'GB sent':>10}   a device and step")
    for (kind, axes), total in sent.most_common():
        print(f"{kind:<16}{axes:<8}{times[kind, axes]:>7}{total / 1e9:>10.2f}")
    print(f"{'together':<24}{times.total():>7}{made.wire_bytes / 1e9:>10.2f}\n")

    passes = ", ".join(f"{name} {seconds:.2f}" for name, seconds in made.seconds.items())
    print(f"planned in {sum(made.seconds.values()):.2f} s: {passes}")
