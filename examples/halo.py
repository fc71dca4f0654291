"""A network of convolutions, its images cut into strips of rows: what do neighbors send each other?

Each window that reaches over the edge of a strip needs a few rows of the next one: these move, and
no image is ever whole on a device. The gradient does the same, and sums those of the weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import gspmd
from gspmd import P

IMAGES, SIZE, CHANNELS = 4, 128, 16
MESH = {"data": 2, "rows": 4}

conv = functools.partial(
    lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)


def network(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(images, params["stem"], (1, 1)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    x += jax.nn.relu(conv(x, params["wide"], (1, 1), rhs_dilation=(4, 4)))
    return conv(x, params["head"], (2, 2))


def loss(params: dict[str, jax.Array], images: jax.Array, heights: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(network(params, images) - heights))


def compare(name: str, fn: Callable[..., Any], *args: Any) -> None:
    """Prints what the partitioned `fn` sends, and how far its results are from the plain one's."""
    in_specs = (None, *(P("data", "rows") for _ in args[1:]))
    partitioned = gspmd.partition(fn, MESH, in_specs=in_specs)
    print(f"{name}, what each device sends:")
    for collective in partitioned.plan(*args).collectives:
        print(" ", collective)
    found, expected = jax.tree.leaves(partitioned(*args)), jax.tree.leaves(jax.jit(fn)(*args))
    off = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)]
    print(f"largest difference: {max(off):.1e} of the largest entry")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    draw = functools.partial(np.random.default_rng(0).normal, scale=0.2)
    params = {
        "stem": draw(size=(5, 5, 3, CHANNELS)).astype(np.float32),
        "wide": draw(size=(3, 3, CHANNELS, CHANNELS)).astype(np.float32),
        "head": draw(size=(3, 3, CHANNELS, 1)).astype(np.float32),
    }
    images = draw(size=(IMAGES, SIZE, SIZE, 3)).astype(np.float32)
    heights = draw(size=(IMAGES, SIZE // 4, SIZE // 4, 1)).astype(np.float32)
    compare("the network", network, params, images)
    compare("its gradient", jax.grad(loss), params, images, heights)
