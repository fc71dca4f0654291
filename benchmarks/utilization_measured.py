"""Measured beside predicted: how much of a chip's peak a partitioned training step reaches.

The subject is a Transformer's AdamW step on the accelerators that JAX finds; where there is none, a
smaller one on CPU devices, one a core, whose chip is measured first. On one device it runs
partitioned and, in turn, as plain `jax.jit`: partitioning must cost nothing there. On all devices
it runs partitioned alone. Utilization is model FLOPs (MFU), predicted by `plan.report`.

Steps are wall seconds. On a CPU, the two programs are compared in CPU seconds, which do not depend
on what else the machine does.

    python benchmarks/utilization_measured.py [--chip h100] [--rounds 15] [--quick]
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from table import Table, show

import gspmd
from gspmd import meshes
from gspmd.models import training, transformer

# How JAX names the devices of each chip.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "TPU v2": "tpu-v2", "TPU v3": "tpu-v3", "TPU v4": "tpu-v4", "TPU v5 lite": "tpu-v5e",
        "TPU v5e": "tpu-v5e", "TPU v5": "tpu-v5p", "TPU v5p": "tpu-v5p", "TPU v6 lite": "tpu-v6e",
        "TPU v6e": "tpu-v6e", "TPU7x": "tpu-v7",
        "Tesla V100-SXM2-32GB": "v100", "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200", "NVIDIA B200": "b200", "NVIDIA GB200": "gb200", "cpu": "cpu",
    }
)  # fmt: skip
MOST = 1.02  # times plain jax.jit: what partitioning for one device may take

# 334 M parameters: 4 GB of state, and as much again for plain jax.jit.
ACCELERATOR = transformer.Config(
    vocab=32_000, layers=4, model_dim=2048, hidden_dim=8192, heads=16, head_dim=128, seq=1024,
    remat=False,
)  # fmt: skip
CPU = dataclasses.replace(
    transformer.CONFIGS["small"], model_dim=256, hidden_dim=1024, heads=4, head_dim=64
)
BATCH = 8  # sequences a device


class Subject(NamedTuple):
    """A training step on random tokens, and how its dims are split over a mesh."""

    config: transformer.Config
    batch: int

    @property
    def step(self) -> training.TrainStep:
        loss = functools.partial(transformer.loss, self.config)
        return training.make_step(loss, training.make_optimizer(training.TrainConfig()), 0)

    @property
    def tokens(self) -> Mapping[str, np.ndarray]:
        shape = (self.batch, self.config.seq + 1)
        drawn = np.random.default_rng(0).integers(self.config.vocab, size=shape, dtype=np.int32)
        return {"inputs": drawn[:, :-1], "targets": drawn[:, 1:]}

    def state(self) -> training.State:
        init = functools.partial(transformer.init, self.config)
        optimizer = training.make_optimizer(training.TrainConfig())
        return jax.jit(functools.partial(training.init_state, init, optimizer, 0))()

    def partitioned(self, mesh: Mesh) -> gspmd.Partitioned:
        return gspmd.partition(
            self.step,
            mesh,
            in_specs=(None, P("batch")),
            rules=transformer.rules_for("data", mesh.axis_names),
            donate_argnums=0,
        )


class Running:
    """A step that is called again and again, each time on the state that it left behind."""

    def __init__(self, step: Callable[..., Any], subject: Subject) -> None:
        self.step, self.tokens, self.state = step, subject.tokens, subject.state()
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def once(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, _ = jax.block_until_ready(self.step(self.state, self.tokens))
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    @property
    def seconds(self) -> float:
        """What a step takes, the median."""
        return statistics.median(self.wall)

    def over(self, other: "Running", platform: str) -> float:
        """How much longer a step takes than one of `other`; on a CPU, in CPU seconds."""
        if platform == "cpu":
            return statistics.median(self.cpu) / statistics.median(other.cpu)
        return self.seconds / other.seconds


def in_turn(runs: Sequence[Running], rounds: int) -> None:
    """Times all, so that a busy moment of the machine hits all alike; the first two are not kept.

    Which goes first changes from round to round.
    """
    for i in range(rounds + 2):
        for run in runs[:: -1 if i % 2 else 1]:
            run.once()
        if i < 2:  # they compile, and move the state to where it stays
            for run in runs:
                run.wall.clear()
                run.cpu.clear()


def mesh_of(devices: Sequence[Any]) -> Mesh:
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def one_device(chip: meshes.Chip) -> meshes.Topology:
    """What a single JAX device computes with: its share of a chip, or all cores of a CPU."""
    share = chip.links.largest[0] if chip.platform == "cpu" else 1 / chip.devices
    alone = dataclasses.replace(
        chip,
        devices=1,
        peak={dtype: share * flops for dtype, flops in chip.peak.items()},
        memory=share * chip.memory,
        bandwidth=share * chip.bandwidth,
    )
    return meshes.Topology(f"a device of {chip.name}", alone, ())


def row(
    name: str, run: Running, plan: gspmd.Plan, topology: meshes.Topology, beside: str = ""
) -> list[str]:
    report = plan.report(topology.chip, topology)
    measured = report.mfu * report.seconds.step / run.seconds
    return [
        name,
        f"{1e3 * run.seconds:.1f}",
        f"{1e3 * report.seconds.step:.1f}",
        f"{100 * measured:.1f}",
        f"{100 * report.mfu:.1f}",
        f"{measured / report.mfu:.2f}",
        beside,
    ]


def measure(config: transformer.Config, chip: meshes.Chip, rounds: int) -> Table:
    devices = jax.devices()
    alone = Subject(config, BATCH)
    one = alone.partitioned(mesh_of(devices[:1]))
    ours, plain = Running(one, alone), Running(jax.jit(alone.step, donate_argnums=0), alone)
    in_turn([ours, plain], rounds)
    ratio = ours.over(plain, chip.platform)
    met = "met" if ratio <= MOST else "MISSED"
    single = one_device(chip)
    plan = one.plan(ours.state, alone.tokens)
    told = f"{ratio:.3f} x jax.jit, <= {MOST} {met}"
    rows = [
        row("1 device", ours, plan, single, told),
        row("1 device, jax.jit", plain, plan, single),
    ]
    if len(devices) > 1:
        del ours, plain
        together = Subject(config, BATCH * len(devices))
        many = together.partitioned(mesh_of(devices))
        all_of_them = Running(many, together)
        in_turn([all_of_them], rounds)
        plan = many.plan(all_of_them.state, together.tokens)
        place = meshes.smallest(chip, len(devices))
        rows.append(row(f"{len(devices)} devices", all_of_them, plan, place))
    title = (
        f"{config.layers} layers of {config.model_dim} x {config.hidden_dim}, {BATCH} sequences of "
        f"{config.seq} a device, on {chip.name}: medians of {rounds} steps, in turn"
    )
    columns = (
        "", "step ms", "predicted", "utilization %", "predicted", "measured / predicted", "",
    )  # fmt: skip
    return Table(title, columns, rows)


def chip_of(device: Any) -> meshes.Chip:
    """The chip whose devices JAX shows as `device`."""
    if device.device_kind not in KINDS:
        raise SystemExit(
            f"no chip is known for {device.device_kind!r}; say which one it is with --chip: "
            f"{', '.join(meshes.CHIPS)}."
        )
    return meshes.chip(KINDS[device.device_kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chip", help="the chip to predict for, where JAX's name is not known")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    jax.config.update("jax_num_cpu_devices", cores)
    chip = meshes.chip(given.chip) if given.chip else chip_of(jax.devices()[0])
    config = CPU if chip.platform == "cpu" else ACCELERATOR
    if given.quick:
        config = dataclasses.replace(
            config, layers=2, vocab=256, model_dim=64, hidden_dim=256, heads=4, head_dim=16, seq=32
        )
    show(measure(config, chip, 3 if given.quick else given.rounds))


if __name__ == "__main__":
    main()
