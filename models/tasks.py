"""What the reference models learn on a small machine: from which data, for how long, how well.

A recipe is all that is known about training a model by name: `RECIPES["vmoe"]`. Its task, made for
one configuration, is what a training loop needs and no more, whatever the model. Text is the
standard library's source code, images are scikit-learn's digits: see `text` and `images`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gspmd.errors import GspmdError
from gspmd.models import catalog, images, text, training
from gspmd.models.routing import Top2

Params = Any

PROMPT = "def "
HELD_OUT = 1 << 15  # bytes of held-out text that a model is judged by
FACES = 4  # images that stand beside each other, in a terminal of 80 columns


class TaskError(GspmdError, ValueError):
    """A configuration cannot learn from the data at hand."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
      unit: what the loss is a mean over: "byte" or "image".
      init: parameters from a key.
      loss: of parameters, a batch and a key.
      batch: the batch of a step, from the number of steps before it.
      judge: scores of parameters on what is held out, by name.
      show: parameters and a count -> so many bytes that the model writes, or images it reads or
        makes, as text.
      shown: how many are shown unless told otherwise.
      data: what is trained on; processes that train together have the same.
    """

    unit: str
    init: Callable[[jax.Array], Params]
    loss: training.Loss
    batch: Callable[[int], training.Batch]
    judge: Callable[[Params], Mapping[str, float]]
    show: Callable[[Params, int], str]
    shown: int
    data: npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model's task, and the choices that suit a mesh of eight CPU devices.

    Args:
      make: a task of (model's name, configuration, seed, batch size).
      falls: the share of the steps, the last ones, over which the learning rate falls to 0.
      b1: see `TrainConfig`.
    """

    make: Callable[[str, Any, int, int], Task]
    config: str
    mesh: str
    strategy: str
    batch_size: int
    steps: int
    learning_rate: float
    falls: float = 0.0
    b1: float = 0.9


# ------------------------------------------------------------------------------------------ text


def text_task(model: str, config: Any, seed: int, batch_size: int) -> Task:
    """Byte after byte of the standard library's source code, for a decoder."""
    if config.encoder_layers or not config.causal:
        what = "has an encoder, for another text" if config.encoder_layers else "sees what follows"
        raise TaskError(f"this configuration {what}: what is trained here are decoders of text.")
    module = catalog.model(model)
    library = text.standard_library()
    size = {"batch_size": batch_size, "seq": config.seq}

    def judge(params: Params) -> dict[str, float]:
        evaluate = jax.jit(functools.partial(module.evaluate, config, params))
        count = -(-HELD_OUT // (batch_size * config.seq))
        each = [
            evaluate(text.batch(library.held_out, seed=0, step=step, **size))
            for step in range(count)
        ]
        score = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
        found = {"loss": score["cross_entropy"]}
        if "routers" in score and isinstance(config.router, Top2):
            found["balance"] = score["routers"] / config.router.balance  # 1: an even load
        return found

    def show(params: Params, count: int) -> str:
        key = jax.random.key(seed)
        prompt = text.encode(PROMPT)
        return text.decode(module.generate(config, params, prompt, count, key, temperature=0.7))

    return Task(
        "byte",
        functools.partial(module.init, config),
        functools.partial(module.loss, config),
        lambda step: text.batch(library.train, seed=seed, step=step, **size),
        judge,
        show,
        200,
        library.train,
    )


# ---------------------------------------------------------------------------------------- images


def image_task(model: str, config: Any, seed: int, batch_size: int) -> Task:
    """Digits and their classes."""
    module = catalog.model(model)
    data = _digits(config)

    def judge(params: Params) -> dict[str, float]:
        apply = jax.jit(functools.partial(module.apply, config, params))
        right = images.accuracy(apply, data.held_out, data.held_out_labels, images.HELD_OUT)
        return {"accuracy": right}

    def show(params: Params, count: int) -> str:
        apply = jax.jit(functools.partial(module.apply, config, params))
        read_B = np.asarray(apply(data.held_out)).argmax(-1)
        chosen = zip(data.held_out[:count], data.held_out_labels, read_B, strict=False)
        faces = [(image, f"{label}, read as {read}") for image, label, read in chosen]
        return images.drawn(faces, FACES)

    return Task(
        "image",
        functools.partial(module.init, config),
        functools.partial(module.loss, config),
        lambda step: images.batch(data, seed=seed, step=step, batch_size=batch_size),
        judge,
        show,
        FACES,
        data.train,
    )


def gan_task(model: str, config: Any, seed: int, batch_size: int) -> Task:
    """Digits, to be made."""
    module = catalog.model(model)
    data = _digits(config.discriminator)

    def make(params: Params, count: int) -> npt.NDArray[np.float32]:
        random_BZ = jax.random.normal(jax.random.key(seed), (count, config.latent))
        return np.asarray(jax.jit(functools.partial(module.generate, config))(params, random_BZ))

    def judge(params: Params) -> dict[str, float]:
        believe = jax.jit(functools.partial(module.believe, config, params))
        made = make(params, images.HELD_OUT)
        return {
            "real taken for real": float(jnp.mean(believe(data.held_out))),
            "made taken for real": float(jnp.mean(believe(made))),
        }

    def show(params: Params, count: int) -> str:
        return images.drawn([(image, "") for image in make(params, count)], FACES)

    return Task(
        "image",
        functools.partial(module.init, config),
        functools.partial(module.loss, config),
        lambda step: images.batch(data, seed=seed, step=step, batch_size=batch_size, shift=0.0),
        judge,
        show,
        2 * FACES,
        data.train,
    )


def _digits(config: Any) -> images.Images:
    if config.channels != 1:
        raise TaskError(
            f"this configuration reads images of {config.channels} channels, the digits have 1: "
            "train the configuration 'digits', or one of your own with channels=1."
        )
    return images.digits(config.image)


# --------------------------------------------------------------------------------------- recipes

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "transformer": Recipe(
            text_task, "tiny", "data=2,model=4", "2d", batch_size=16, steps=200,
            learning_rate=1e-3,
        ),
        "glam": Recipe(
            text_task, "tiny", "data=4,model=2", "expert_2d", batch_size=16, steps=2000,
            learning_rate=4e-3, falls=0.3,
        ),
        "vmoe": Recipe(
            image_task, "digits", "data=8", "expert", batch_size=128, steps=600,
            learning_rate=2e-3, falls=0.95,
        ),
        "nest": Recipe(
            image_task, "digits", "data=8", "data", batch_size=64, steps=400,
            learning_rate=2e-3, falls=0.95,
        ),
        "nest_gan": Recipe(
            gan_task, "digits", "data=8", "data", batch_size=64, steps=1000,
            learning_rate=1e-3, b1=0.0, falls=0.5,
        ),
    }
)  # fmt: skip


def recipe(model: str) -> Recipe:
    """How the model called `model` is trained.

    Raises:
      CatalogError: there is no such model.
    """
    catalog.model(model)
    return RECIPES[model]
