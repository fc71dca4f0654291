"""A training job: a reference model, a text, a mesh, and the loop that joins them."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gspmd.errors import GspmdError, nearest
from gspmd.models import strategies, text, training, transformer
from gspmd.plan import Plan
from gspmd.planner import plan
from gspmd.sharding import Mesh
from gspmd.specs import read_mesh

MODELS: Mapping[str, ModuleType] = MappingProxyType({"transformer": transformer})

MOST_DEVICES = 1024  # CPU devices start in a second, four times as many in seven
# What Linux shows of a TPU or a GPU.
_ACCELERATORS = ("accel0", "vfio/0", "nvidiactl", "nvidia0", "kfd", "dxg")


class JobError(GspmdError, ValueError):
    """A training job asks for something that there is not."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, and on which devices. The same job gives the same losses, on any mesh."""

    config: transformer.Config
    schedule: training.TrainConfig
    batch_size: int
    rules: Mapping[str, str | tuple[str, ...] | None]
    devices: jax.sharding.Mesh

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of one training step on the mesh."""
        optimizer = training.make_optimizer(self.schedule)
        fresh = functools.partial(training.init_state, self._init, optimizer, self.schedule.seed)
        return plan(
            training.make_step(self._loss, optimizer, self.schedule.seed),
            jax.eval_shape(fresh),
            self._batch(0),
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
            self._init,
            self._loss,
            self._batch,
            on_step=on_step,
            resume=resume,
            **how,
        )

    def sample(self, state: training.State, prompt: str, length: int) -> str:
        """`prompt` and `length` bytes that the trained model puts after it."""
        tokens = transformer.generate(
            self.config,
            training.to_host(state["params"]),
            text.encode(prompt),
            length,
            jax.random.key(self.schedule.seed),
            temperature=0.7,
        )
        return text.decode(tokens)

    def _check_alike(self) -> None:
        """Raises if processes would not run the same program on the same text: they would hang."""
        if jax.process_count() == 1:
            return
        found = hashlib.sha256(f"{self.plan}".encode())
        found.update(self._text.train.tobytes())
        mine = np.frombuffer(found.digest(), np.uint32)
        for number, other in enumerate(multihost_utils.process_allgather(mine)):
            if not np.array_equal(mine, other):
                raise JobError(
                    f"process {jax.process_index()} has another plan, or another text, than "
                    f"process {number}; give all the same Python, jax, gspmd and command."
                )

    @property
    def _init(self) -> Callable[[jax.Array], transformer.Params]:
        return functools.partial(transformer.init, self.config)

    @property
    def _loss(self) -> training.Loss:
        return functools.partial(transformer.loss, self.config)

    @functools.cached_property
    def _text(self) -> text.Text:
        return text.standard_library()

    def _batch(self, step: int) -> Mapping[str, Any]:
        return text.batch(
            self._text.train,
            seed=self.schedule.seed,
            step=step,
            batch_size=self.batch_size,
            seq=self.config.seq,
        )


def make_job(
    model: str,
    *,
    config: str,
    mesh: str,
    strategy: str,
    batch_size: int,
    seq: int | None = None,
    dropout: float | None = None,
    microbatches: int | None = None,
    **schedule: Any,
) -> Job:
    """The job of training `model` in size `config`, its dims split as `strategy` says.

    `schedule` are fields of `TrainConfig`. Sets up jax's devices: see `devices_for`.

    Raises:
      JobError: no such model or configuration, or too few devices.
      GspmdError: a malformed mesh, an unknown strategy.
    """
    if model not in MODELS:
        raise JobError(f"{model!r} is not a model{nearest(model, MODELS)} {_choice(MODELS)}")
    known = MODELS[model].CONFIGS
    if config not in known:
        raise JobError(
            f"{config!r} is not a configuration of {model}{nearest(config, known)} {_choice(known)}"
        )
    changes = {"seq": seq, "dropout": dropout}
    sizes = dataclasses.replace(
        known[config], **{key: value for key, value in changes.items() if value is not None}
    )
    logical, _ = read_mesh(mesh)
    rules = MODELS[model].rules_for(strategy, logical.names)
    return Job(
        strategies.pipelined(sizes, rules, dict(logical.axes), batch_size, microbatches),
        training.TrainConfig(**schedule),
        batch_size,
        rules,
        devices_for(logical),
    )


def _choice(known: Mapping[str, Any]) -> str:
    return f"There is {', '.join(known)}."


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
