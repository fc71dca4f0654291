"""A training job: a reference model, a text, a mesh, and the loop that joins them."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import jax

from gspmd.errors import GspmdError
from gspmd.models import text, training, transformer
from gspmd.plan import Plan, plan
from gspmd.sharding import Mesh
from gspmd.specs import nearest

MODELS: Mapping[str, ModuleType] = MappingProxyType({"transformer": transformer})

# What Linux shows of a TPU or a GPU.
_ACCELERATORS = ("accel0", "vfio/0", "nvidiactl", "nvidia0", "kfd", "dxg")


class JobError(GspmdError, ValueError):
    """A training job asks for something that there is not."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, and on which devices. The same job gives the same losses, on any mesh."""

    config: transformer.Config
    training: training.TrainConfig
    batch_size: int
    rules: Mapping[str, str | tuple[str, ...] | None]
    devices: jax.sharding.Mesh

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of one training step on the mesh."""
        optimizer = training.make_optimizer(self.training)
        fresh = functools.partial(
            training.init_state, self._init, optimizer, self.training.seed
        )
        return plan(
            training.make_step(self._loss, optimizer, self.training.seed),
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
        return self._train(on_step, resume, compile_step=lambda step: self.plan.run)

    def train_alone(self, on_step: Callable[[training.Record], None]) -> training.State:
        """The same on one device, by `jax.jit`, without this library."""
        alone = dataclasses.replace(self.training, checkpoints=None)
        return dataclasses.replace(self, training=alone)._train(on_step)

    def _train(
        self, on_step: Callable[[training.Record], None], resume: bool = False, **how: Any
    ) -> training.State:
        return training.train(
            self.training,
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
            jax.random.key(self.training.seed),
            temperature=0.7,
        )
        return text.decode(tokens)

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
            seed=self.training.seed,
            step=step,
            batch_size=self.batch_size,
            seq=self.config.seq,
        )


def find_config(model: str, name: str, **changes: Any) -> transformer.Config:
    """The configuration `name` of `model`, with those `changes` that are not None.

    Raises:
      JobError: no such model or configuration.
    """
    if model not in MODELS:
        raise JobError(f"{model!r} is not a model{nearest(model, MODELS)} {_choice(MODELS)}")
    configs = MODELS[model].CONFIGS
    if name not in configs:
        near = nearest(name, configs)
        raise JobError(f"{name!r} is not a configuration of {model}{near} {_choice(configs)}")
    given = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(configs[name], **given)


def _choice(known: Mapping[str, Any]) -> str:
    return f"There is {', '.join(known)}."


def devices_for(mesh: Mesh) -> jax.sharding.Mesh:
    """`mesh` on this machine's accelerators, or on as many CPU devices where those are too few.

    For programs, before their first use of jax: the number of CPU devices is fixed then.

    Raises:
      JobError: jax runs already, with fewer devices.
    """
    if jax.config.jax_num_cpu_devices != mesh.devices:
        try:
            jax.config.update("jax_num_cpu_devices", mesh.devices)
        except RuntimeError:  # jax runs already, with the devices that it has
            pass
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
    sizes = tuple(size for _, size in mesh.axes)
    return jax.make_mesh(sizes, mesh.names, devices=devices[: mesh.devices])


def _only_compiles_for_tpu() -> bool:
    """Whether libtpu is there without any accelerator: jax would report at length that it fails."""
    present = any((Path("/dev") / name).exists() for name in _ACCELERATORS)
    chosen = jax.config.jax_platforms
    return not chosen and not present and importlib.util.find_spec("libtpu") is not None
