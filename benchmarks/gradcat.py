"""Where does a NesT see a digit? It learns for some seconds, then shows what it looks at.

Each row of the picture, if one is asked for, is an image, the attention map of its class, and
GradCAT's walk down the tree of blocks, from the whole image to one block of the first level.

    python benchmarks/gradcat.py [picture.png]
"""

import functools
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from gspmd.models import gradcat, images, nest
from gspmd.models.training import TrainConfig, train

CONFIG = nest.Config(
    image=16, channels=1, patch=1, block=4, dims=(16, 32, 64), layers=(1, 1, 1), heads=(1, 2, 4),
    hidden=2, classes=10, drop_path=0.0, dtype=jnp.float32,
)  # fmt: skip
STEPS, ERASED, ROWS = 100, 120, 4


def learn(data: images.Images) -> nest.Params:
    return train(
        TrainConfig(steps=STEPS, learning_rate=3e-3),
        functools.partial(nest.init, CONFIG),
        functools.partial(nest.loss, CONFIG),
        lambda step: images.batch(data, seed=0, step=step, batch_size=64),
        # Here compiling is the work, not running.
        compile_step=functools.partial(
            jax.jit, donate_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
        ),
    )["params"]


def erased(image_YXC: np.ndarray, square: gradcat.Square) -> np.ndarray:
    top, left, side = square
    rest = image_YXC.copy()
    rest[top : top + side, left : left + side] = -1
    return rest


def draw(path: str, params: nest.Params, pixels: np.ndarray, labels: np.ndarray) -> None:
    maps_BYXC = gradcat.class_attention(CONFIG, params, pixels)
    figure, rows = plt.subplots(len(pixels), 3, figsize=(6, 2 * len(pixels)), layout="tight")
    for row, image, maps_YXC, label in zip(rows, pixels, maps_BYXC, labels, strict=True):
        for axes in row:
            axes.imshow(image[..., 0], cmap="gray_r", extent=(0, 16, 16, 0))
            axes.axis("off")
        row[0].set_title(f"a {label}")
        map_YX, top = maps_YXC[..., label], np.abs(maps_YXC[..., label]).max()
        look = {"cmap": "coolwarm", "vmin": -top, "vmax": top, "extent": (0, 16, 16, 0)}
        row[1].imshow(map_YX, alpha=0.6, interpolation="bicubic", **look)
        row[1].set_title(f"what says {label}")
        walk = gradcat.walk(CONFIG, params, image, int(label))
        for y, x, side in walk.squares[1:]:
            row[2].add_patch(plt.Rectangle((x, y), side, side, fill=False, color="C3", lw=2))
        row[2].set_title("GradCAT " + " > ".join(map(str, walk.path)))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    data = images.digits(CONFIG.image)
    params = learn(data)
    apply = jax.jit(functools.partial(nest.apply, CONFIG, params))
    right = images.accuracy(apply, data.held_out, data.held_out_labels, ERASED)
    print(f"after {STEPS} steps, {right:.1%} of 360 digits are read right")

    pixels, labels = data.held_out[:ERASED], data.held_out_labels[:ERASED]
    score = np.asarray(apply(pixels))[np.arange(ERASED), labels]
    for sign in (1, -1):
        walks = [
            gradcat.walk(CONFIG, params, image, int(label), sign=sign)
            for image, label in zip(pixels, labels, strict=True)
        ]
        rest = [erased(x, walk.squares[1]) for x, walk in zip(pixels, walks, strict=True)]
        loss = score - np.asarray(apply(np.stack(rest)))[np.arange(ERASED), labels]
        print(
            f"without the quarter that sign {sign:+d} leads to, the score falls by "
            f"{loss.mean():.2f}"
        )
    if len(sys.argv) > 1:
        draw(sys.argv[1], params, pixels[:ROWS], labels[:ROWS])
