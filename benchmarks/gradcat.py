"""Where does a NesT see a digit? It learns for a minute or two, then shows what it looks at.

Prints by how much the score of the right class falls when a part of the image is erased: where
GradCAT's walk ends, with either sign, and the mean over all such parts. Each row of the picture, if
one is asked for, is an image, the attention map of its class, and the walk down the tree of blocks,
from the whole image to one block of the first level.

    python benchmarks/gradcat.py [picture.png]
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from learning import learn
from matplotlib.patches import Rectangle

from gspmd.models import gradcat, images, nest
from gspmd.models.tasks import image_task
from gspmd.models.training import TrainConfig

CONFIG = nest.Config(
    image=16, channels=1, patch=1, block=4, dims=(16, 32, 64), layers=(1, 1, 1), heads=(1, 2, 4),
    hidden=2, classes=10, drop_path=0.0, dtype=jnp.float32,
)  # fmt: skip
SCHEDULE = TrainConfig(steps=300, learning_rate=2e-3, decay=280)
ROWS = 5


def erased(image_YXC: np.ndarray, square: gradcat.Square) -> np.ndarray:
    top, left, side = square
    rest = image_YXC.copy()
    rest[top : top + side, left : left + side] = -1
    return rest


def draw(path: str, params: nest.Params, pixels: np.ndarray, labels: np.ndarray) -> None:
    maps_BYXC = gradcat.class_attention(CONFIG, params, pixels)
    figure, rows = plt.subplots(len(pixels), 3, figsize=(6, 2 * len(pixels)), layout="tight")
    whole = (0, CONFIG.image, CONFIG.image, 0)
    for row, image_YXC, maps_YXC, label in zip(rows, pixels, maps_BYXC, labels, strict=True):
        for axes in row:
            axes.axis("off")
        for axes in (row[0], row[2]):
            axes.imshow(image_YXC[..., 0], cmap="gray_r", extent=whole)
        row[0].set_title(f"a {label}")
        row[1].imshow(maps_YXC[..., label], interpolation="bicubic", extent=whole)
        middles = np.arange(CONFIG.image) + 0.5
        row[1].contour(middles, middles, image_YXC[..., 0], levels=[0], colors="white")
        row[1].set_title(f"what says {label}")
        walk = gradcat.walk(CONFIG, params, image_YXC, int(label), sign=1)
        for y, x, side in walk.squares[1:]:
            row[2].add_patch(Rectangle((x, y), side, side, fill=False, color="C3", lw=2))
        row[2].set_title("GradCAT " + " > ".join(map(str, walk.path)))
    figure.savefig(path, dpi=120)


def main(*path: str) -> None:
    data = images.digits(CONFIG.image)
    params = learn(image_task("nest", CONFIG, seed=0, batch_size=64), SCHEDULE)
    apply = jax.jit(functools.partial(nest.apply, CONFIG, params))
    pixels, labels = data.held_out, data.held_out_labels
    right = images.accuracy(apply, pixels, labels, len(pixels))
    print(f"after {SCHEDULE.steps} steps, {right:.1%} of {len(pixels)} digits are read right")

    def score(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(apply(pixels))[np.arange(len(labels)), labels]

    def fall(squares: list[gradcat.Square]) -> float:
        rest = [erased(*pair) for pair in zip(pixels, squares, strict=True)]
        return float(np.mean(score(pixels) - score(np.stack(rest))))

    print("the score of the right class falls when a square is erased:")
    side = CONFIG.patch * CONFIG.block
    grid = itertools.product(range(0, CONFIG.image, side), repeat=2)
    each = [fall([gradcat.Square(top, left, side)] * len(pixels)) for top, left in grid]
    print(f"  any of {side} x {side} pixels, by {np.mean(each):.2f} in the mean")
    for sign in (1, -1):
        walk = functools.partial(gradcat.walk, CONFIG, params, sign=sign)
        walks = [walk(image, int(label)) for image, label in zip(pixels, labels, strict=True)]
        found = fall([walk.squares[-1] for walk in walks])
        print(f"  the one where a walk with sign {sign:+d} ends, by {found:.2f}")
    if path:
        draw(path[0], params, pixels[:ROWS], labels[:ROWS])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
