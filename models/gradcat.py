"""What a NesT looks at: class attention, and GradCAT's walk down the tree of blocks.

The levels of a NesT are a tree: a block has four children, which aggregation made it of. GradCAT
(arXiv 2105.12723, section 3.4) starts at the one block of the last level and steps to the child
whose features, times the gradient of a class score, are largest, down to the first level.

Its published listing takes the negative gradient; no code of the authors is out, and a public
re-implementation takes the positive one. The last level settles which is meant: there, features
times gradient are what each position adds to the score (`class_attention`), so that the positive
sign leads to what speaks for the class and the negative one to what speaks against it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from gspmd.models import nest
from gspmd.models.vision import ImageError

Map = npt.NDArray[np.float32]


class Square(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    side: int


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """A way from the whole image to one block of the first level.

    Args:
      path: for each step the child that was taken: 0 to 3, in the order of rows.
      squares: what each block on the way sees, from the whole image on: one more than steps.
      maps: the map of each block from which a step was taken, summed over features.
    """

    path: tuple[int, ...]
    squares: tuple[Square, ...]
    maps: tuple[Map, ...]


def walk(
    config: nest.Config,
    params: nest.Params,
    image_YXC: ArrayLike,
    label: int,
    *,
    sign: int = -1,
) -> Walk:
    """GradCAT's walk for class `label`.

    Args:
      sign: of the gradient that features are multiplied with; see the module.

    Raises:
      ImageError: another sign, no such class, or an image of the wrong size.
    """
    if sign not in (-1, 1):
        raise ImageError(f"sign={sign}: it is 1, or -1 for the negative gradient.")
    if not 0 <= label < config.classes:
        raise ImageError(f"label={label}: there are {config.classes} classes, from 0 on.")
    image_1YXC = jnp.asarray(image_YXC)[None]
    relevance = [np.asarray(sign * x[0]) for x in relevances(config, params, image_1YXC, label)]
    row = column = 0
    path, maps = list[int](), list[Map]()
    squares = [Square(0, 0, config.image)]
    for level in reversed(range(1, len(config.dims))):
        side = config.block
        block = relevance[level][row * side : (row + 1) * side, column * side : (column + 1) * side]
        child = int(np.argmax(quarters(block)))
        row, column = 2 * row + child // 2, 2 * column + child % 2
        side = config.image // config.blocks(level - 1)
        path.append(child)
        squares.append(Square(row * side, column * side, side))
        maps.append(block)
    return Walk(tuple(path), tuple(squares), tuple(maps))


@functools.partial(jax.jit, static_argnums=0)
def relevances(
    config: nest.Config, params: nest.Params, images_BYXC: jax.Array, label: ArrayLike
) -> list[jax.Array]:
    """For each level, BYX: what its features times their gradient of the class score add up to.

    Features of the last level are those behind the final norm: before it, the gradient is
    orthogonal to them, since the norm does not see their scale.
    """
    model = nest.merge(config, params)
    x_BYXM = model.check(images_BYXC)
    features, backs = list[jax.Array](), list[Callable[[jax.Array], Any]]()
    for step in (*model.levels, model.norm):
        x_BYXM, back = jax.vjp(step, x_BYXM)
        features.append(x_BYXM)
        backs.append(back)
    features.pop(-2)
    scores_BC, back = jax.vjp(model.classify, x_BYXM)
    (gradient_BYXM,) = back(jnp.zeros_like(scores_BC).at[:, label].set(1))
    found = [_product(features.pop(), gradient_BYXM)]
    (gradient_BYXM,) = backs.pop()(gradient_BYXM)
    while features:
        (gradient_BYXM,) = backs.pop()(gradient_BYXM)
        found.append(_product(features.pop(), gradient_BYXM))
    return found[::-1]


def _product(x_BYXM: jax.Array, gradient_BYXM: jax.Array) -> jax.Array:
    return jnp.sum(x_BYXM.astype(jnp.float32) * gradient_BYXM.astype(jnp.float32), axis=-1)


def quarters(map_YX: Map) -> Map:
    """The mean of each quarter of a square, 2 x 2; a middle row counts in both halves."""
    side = len(map_YX)
    halves = slice(0, (side + 1) // 2), slice(side // 2, side)
    return np.array([[map_YX[y, x].mean() for x in halves] for y in halves], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def class_attention(config: nest.Config, params: nest.Params, images_BYXC: jax.Array) -> jax.Array:
    """BYXC: what each position of the last level adds to the score of each class.

    The class attention map of a network that ends in a mean and a linear layer: the mean over the
    positions, plus the head's bias, is the score that `nest.apply` returns.
    """
    model = nest.merge(config, params)
    plane_BYXM = model.check(images_BYXC)
    for level in model.levels:
        plane_BYXM = level(plane_BYXM)
    return model.head(model.norm(plane_BYXM).astype(jnp.float32)) - model.head.bias[...]
