"""The reference models by name, and the training step of each as something to plan.

`step("glam", "64B_64E", mesh, batch_size=1024)` allocates nothing: what it returns are a function,
shapes, and the options of `gspmd.plan`.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

from gspmd.errors import GspmdError, nearest
from gspmd.models import strategies, training

MODELS = ("transformer", "glam", "vmoe", "nest", "nest_gan")


class CatalogError(GspmdError, ValueError):
    """There is no such model, configuration or optimizer."""


def _adafactor(schedule: training.TrainConfig) -> optax.GradientTransformation:
    """A row and a column of second moments for each matrix, and no first moment."""
    return optax.adafactor(schedule.learning_rate, multiply_by_parameter_scale=False)


OPTIMIZERS: Mapping[str, Callable[[training.TrainConfig], optax.GradientTransformation]] = {
    "adamw": training.make_optimizer,
    "adafactor": _adafactor,
    "sgd": lambda schedule: optax.sgd(schedule.learning_rate),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step to plan: `gspmd.plan(step.fn, *step.args, mesh=..., **step.options)`."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    options: Mapping[str, Any]


def model(name: str) -> ModuleType:
    """The module of the model called `name`.

    Raises:
      CatalogError: there is none.
    """
    return importlib.import_module(f"gspmd.models.{_known('a model', name, MODELS)}")


def config(name: str, size: str) -> Any:
    """The configuration `size` of the model called `name`.

    Raises:
      CatalogError: there is no such model or configuration.
    """
    configs = model(name).CONFIGS
    return configs[_known(f"a configuration of {name}", size, configs)]


def step(
    name: str,
    size: str | Any,
    mesh_axes: Sequence[str] | Mapping[str, int],
    *,
    batch_size: int,
    strategy: str = "2d",
    optimizer: str = "adafactor",
    microbatches: int | None = None,
) -> Step:
    """One training step of a model on `batch_size` examples, split by `strategy`.

    Args:
      name: one of MODELS.
      size: one of the model's CONFIGS by name, or a configuration.
      mesh_axes: the names of the mesh's axes, outermost first; with their sizes where the layers
        are a pipeline, whose stages an axis "stage" splits.
      batch_size: examples of a step, on all devices together.
      strategy: one of the model's RULES.
      optimizer: one of OPTIMIZERS; the papers used Adafactor, whose state is small.
      microbatches: that a batch is cut into for a pipeline: see `strategies.pipelined`.

    Raises:
      CatalogError: there is no such model, configuration or optimizer.
    """
    module = model(name)
    sizes = config(name, size) if isinstance(size, str) else size
    update = OPTIMIZERS[_known("an optimizer", optimizer, OPTIMIZERS)](training.TrainConfig())
    rules = module.rules_for(strategy, tuple(mesh_axes))
    if rules.get("stage"):
        if not isinstance(mesh_axes, Mapping):
            raise CatalogError(
                f"the layers of {name} are a pipeline on the mesh axis {rules['stage']!r}, whose "
                "size says how many stages it has: give a mesh's axes with their sizes."
            )
        sizes = strategies.pipelined(sizes, rules, mesh_axes, batch_size, microbatches)
    init = functools.partial(module.init, sizes)
    state = jax.eval_shape(functools.partial(training.init_state, init, update, 0))
    fn = training.make_step(functools.partial(module.loss, sizes), update, 0)
    options = {
        "in_specs": (None, P("outer_batch" if "outer_batch" in rules else "batch")),
        "rules": rules,
        "donate_argnums": 0,
    }
    return Step(fn, (state, module.batch_shapes(sizes, batch_size)), options)


def _known(what: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    if name not in known:
        raise CatalogError(
            f"{name!r} is not {what}{nearest(name, known)} There is {', '.join(known)}."
        )
    return name
