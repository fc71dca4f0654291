"""A program that runs alone or as several processes: it trains, and passes arguments of all kinds.

    python distributed_program.py FOLDER [arguments] [dies | resumes | fails]

Its mesh is 2 x 4. One dim of 7 is split 4 ways, so that what is saved and resumed is uneven, too.
"""

import functools
import os
import pathlib
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import gspmd
from gspmd.distributed import joined
from gspmd.models import training
from gspmd.models.training import Record, TrainConfig

STEPS, SAVE_EVERY, DIES_AFTER = 6, 2, 5
SPLIT = {"w": P("model"), "b": P("data", "model")}


def init(key: jax.Array) -> dict[str, jax.Array]:
    return {"w": jnp.linspace(-1.0, 1.0, 7), "b": jnp.zeros((8, 7))}


def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    x = batch["inputs"] * jax.random.bernoulli(key, 0.8, batch["inputs"].shape)
    return jnp.mean((x @ (params["w"] + params["b"].sum(0)) - batch["targets"]) ** 2)


def batch(step: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(step).normal(size=(8, 7)).astype(np.float32)
    return {"inputs": x, "targets": x.sum(axis=1)}


def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), devices=jax.devices()[:8])


def train(folder: pathlib.Path, dies: bool = False, resume: bool = False) -> list[float]:
    """The losses; of several processes, the second one may die."""
    losses: list[float] = []

    def on_step(record: Record) -> None:
        losses.append(record.loss)
        if jax.process_index() == 0:
            say(record.loss)
        elif dies and record.step == DIES_AFTER:
            say("these are its last words")
            os.kill(os.getpid(), signal.SIGKILL)

    state = ({"params": SPLIT, "opt": None, "step": P()}, P("data"))
    training.train(
        TrainConfig(steps=STEPS, warmup=2, save_every=SAVE_EVERY, checkpoints=folder),
        init,
        loss,
        batch,
        compile_step=functools.partial(
            gspmd.partition, mesh=mesh(), in_specs=state, donate_argnums=0
        ),
        on_step=on_step,
        resume=resume,
    )
    return losses


def arguments() -> None:
    """Numbers, NumPy arrays, local arrays, PRNG keys, and results that lie elsewhere than asked."""
    devices = mesh()
    keys = jax.random.split(jax.random.key(3), 8)
    rows = np.arange(56, dtype=np.float64).reshape(8, 7)

    def fn(x: jax.Array, key: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = jax.vmap(lambda k: jax.random.normal(k, (7,)))(key)
        return x * scale + drawn, key

    call = gspmd.partition(
        fn,
        devices,
        in_specs=(P("data", "model"), P(("data", "model")), P()),
        out_specs=(P("model"), P("data")),
    )
    first, moved = call(rows, keys, 2.0)  # float64 becomes float32; 7 is split 4 ways
    second, _ = call(first, moved, jnp.float32(0.5))  # on the mesh, but split otherwise
    expected, _ = fn(jnp.asarray(rows, jnp.float32), keys, jnp.float32(2.0))
    expected, _ = fn(expected, keys, jnp.float32(0.5))
    np.testing.assert_allclose(training.to_host(second), expected, rtol=1e-6)
    assert all(shard.data.shape == (2, 7) for shard in second.addressable_shards)
    if jax.process_index() == 0:
        say("all arguments arrive")


def fails() -> None:
    """The second process fails where the first waits for it."""
    total = gspmd.partition(lambda x: x.sum(), mesh(), in_specs=P("data"))
    total(np.ones(8))
    if jax.process_index() == 1:
        raise ValueError("this process is out of luck")
    for _ in range(10_000):
        total(np.ones(8)).block_until_ready()


def say(what: Any) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def main() -> None:
    folder, *rest = sys.argv[1:]
    do = {
        "arguments": arguments,
        "dies": functools.partial(train, pathlib.Path(folder), dies=True),
        "resumes": functools.partial(train, pathlib.Path(folder), resume=True),
        "fails": fails,
    }
    with joined():
        for what in rest:
            do[what]()


if __name__ == "__main__":
    main()
