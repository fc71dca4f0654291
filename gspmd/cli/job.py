"""A training job: a reference model, what it learns, a mesh, and the loop that joins them."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gspmd.errors import GspmdError
from gspmd.models import catalog, strategies, tasks, training
from gspmd.models.strategies import Axis
from gspmd.models.tasks import Task
from gspmd.plan import Plan
from gspmd.planner import plan
from gspmd.sharding import Mesh
from gspmd.specs import read_mesh

MOST_DEVICES = 1024  # CPU devices start in a second, four times as many in seven
# What Linux shows of a TPU or a GPU.
_ACCELERATORS = ("accel0", "vfio/0", "nvidiactl", "nvidia0", "kfd", "dxg")


class JobError(GspmdError, ValueError):
    """A training job asks for something that there is not."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is learned, and on which devices. The same job gives the same losses, on any mesh."""

    task: Task
    schedule: training.TrainConfig
    rules: Mapping[str, Axis]
    devices: jax.sharding.Mesh

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of one training step on the mesh."""
        optimizer = training.make_optimizer(self.schedule)
        fresh = functools.partial(
            training.init_state, self.task.init, optimizer, self.schedule.seed
        )
        return plan(
            training.make_step(self.task.loss, optimizer, self.schedule.seed),
            jax.eval_shape(fresh),
            self.task.batch(0),
            mesh=self.devices,
            rules=self.rules,
            donate_argnums=0,
        )

    def train(
        self, on_step: Callable[[training.Record], None], resume: bool = False
    ) -> training.State:
        """The state after the last step, computed by the plan on the mesh's devices."""
        self._check_alike()
        return self._train(on_step, resume, compile_step=lambda step: self.plan.run)

    def train_alone(self, on_step: Callable[[training.Record], None], steps: int) -> training.State:
        """The state after `steps` steps on one device, by `jax.jit`, without this library."""
        schedule = dataclasses.replace(self.schedule, steps=steps, checkpoints=None)
        return dataclasses.replace(self, schedule=schedule)._train(on_step)

    def _train(
        self, on_step: Callable[[training.Record], None], resume: bool = False, **how: Any
    ) -> training.State:
        return training.train(
            self.schedule,
            self.task.init,
            self.task.loss,
            self.task.batch,
            on_step=on_step,
            resume=resume,
            **how,
        )

    def _check_alike(self) -> None:
        """Raises if processes would not run the same program on the same data: they would hang."""
        if jax.process_count() == 1:
            return
        found = hashlib.sha256(f"{self.plan}".encode())
        found.update(self.task.data.tobytes())
        mine = np.frombuffer(found.digest(), np.uint32)
        for number, other in enumerate(multihost_utils.process_allgather(mine)):
            if not np.array_equal(mine, other):
                raise JobError(
                    f"process {jax.process_index()} has another plan, or other data, than "
                    f"process {number}; give all the same Python, jax, gspmd and command."
                )


def make_job(
    model: str,
    *,
    config: str | None = None,
    mesh: str | None = None,
    strategy: str | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    microbatches: int | None = None,
    sizes: Mapping[str, Any] = MappingProxyType({}),
    **schedule: Any,
) -> Job:
    """The job of training `model` in size `config`, its dims split as `strategy` says.

    What is not given is the model's recipe's. `sizes` replace fields of the configuration,
    `schedule` are fields of `TrainConfig`. Sets up jax's devices: see `devices_for`.

    Raises:
      JobError: too few devices, or a size that the model does not have.
      GspmdError: no such model or configuration, a malformed mesh, an unknown strategy, or a
        configuration that cannot learn from the data at hand.
    """
    recipe = tasks.recipe(model)
    chosen = _resized(model, catalog.config(model, config or recipe.config), sizes)
    logical, _ = read_mesh(mesh or recipe.mesh)
    rules = catalog.model(model).rules_for(strategy or recipe.strategy, logical.names)
    size = batch_size or recipe.batch_size
    if rules.get("stage") is not None:
        chosen = strategies.pipelined(chosen, rules, dict(logical.axes), size, microbatches)
    elif microbatches is not None:
        raise JobError(
            f"--microbatches {microbatches} are for a pipeline, and nothing puts the layers of "
            f"{model} in stages on mesh {logical}; give the mesh an axis 'stage', or leave it out."
        )
    count = steps or recipe.steps
    # The devices are there before jax is first used: a task may do so.
    devices = devices_for(logical)
    return Job(
        recipe.make(model, chosen, seed, size),
        training.TrainConfig(
            steps=count,
            seed=seed,
            learning_rate=recipe.learning_rate,
            b1=recipe.b1,
            decay=round(recipe.falls * count),
            **schedule,
        ),
        rules,
        devices,
    )


def _resized(model: str, config: Any, sizes: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(config)]
    for name in sizes:
        if name not in known:
            raise JobError(f"--{name}: the configurations of {model} have no {name}; leave it out.")
    return dataclasses.replace(config, **sizes)


def devices_for(mesh: Mesh) -> jax.sharding.Mesh:
    """`mesh` on this machine's accelerators, or on as many CPU devices where those are too few.

    For programs, before their first use of jax: the number of CPU devices is fixed then. One
    process of several brings the devices that it has been given.

    Raises:
      JobError: jax runs already, with fewer devices; or the mesh is too large to stand in for, or
        not as large as the devices of several processes are many.
    """
    if jax.distributed.is_initialized():
        return _of_all_processes(mesh)
    if mesh.devices > MOST_DEVICES:
        raise JobError(
            f"mesh {mesh} has {mesh.devices} devices; to train here, {MOST_DEVICES} are the most. "
            "Planning has no such limit: gspmd plan."
        )
    with contextlib.suppress(RuntimeError):  # jax runs already, with the devices that it has
        jax.config.update("jax_num_cpu_devices", mesh.devices)
    if _only_compiles_for_tpu():
        jax.config.update("jax_platforms", "cpu")
    devices = jax.devices()
    if len(devices) < mesh.devices and devices[0].platform != "cpu":
        devices = jax.devices("cpu")
    if len(devices) < mesh.devices:
        raise JobError(
            f"mesh {mesh} needs {mesh.devices} devices and there are {len(devices)}; "
            "take a smaller mesh."
        )
    return _arranged(mesh, devices[: mesh.devices])


def _of_all_processes(mesh: Mesh) -> jax.sharding.Mesh:
    devices = jax.devices()
    if len(devices) != mesh.devices:
        raise JobError(
            f"mesh {mesh} has {mesh.devices} devices, and {jax.process_count()} processes x "
            f"{jax.local_device_count()} devices are {len(devices)}; make them as many."
        )
    return _arranged(mesh, devices)


def _arranged(mesh: Mesh, devices: Sequence[Any]) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(size for _, size in mesh.axes), mesh.names, devices=devices)


def _only_compiles_for_tpu() -> bool:
    """Whether libtpu is there without any accelerator: jax would report at length that it fails."""
    present = any((Path("/dev") / name).exists() for name in _ACCELERATORS)
    if present or jax.config.values["jax_platforms"]:
        return False
    return importlib.util.find_spec("libtpu") is not None
