"""Real images without a download: the 1,797 handwritten digits that come with scikit-learn.

They are 8 x 8 pixels; larger ones are interpolated. What is drawn depends on nothing but the seed
and the step: a run that is resumed sees what it would have seen.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from gspmd.models.vision import ImageError

HELD_OUT = 360  # images kept from training
SHIFT = 1 / 8  # of the image's side, by which images are moved about at most: one original pixel

Pixels = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images, BYXC in -1..1, and their labels: to train on, and held out."""

    train: Pixels
    train_labels: Labels
    held_out: Pixels
    held_out_labels: Labels


@functools.cache
def digits(size: int) -> Images:
    """The digits 0 to 9 as `size` x `size` images of one channel, 1,437 to train on and 360 not.

    Raises ImageError without scikit-learn, or if `size` is less than the 8 that they have.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImageError(
            "the digits come with scikit-learn: pip install 'gspmd[models]'."
        ) from error
    if size < 8:
        raise ImageError(f"images of {size} x {size}: the digits have 8 x 8; take 8 or more.")
    ink, target = load_digits(return_X_y=True)  # ink 0 to 16
    stretch = _interpolation(size, 8)
    images = stretch @ (np.reshape(ink, (-1, 8, 8)) / 8 - 1) @ stretch.T
    pixels = images[..., None].astype(np.float32)
    labels = np.asarray(target, np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Images(pixels[rest], labels[rest], pixels[held_out], labels[held_out])


def _interpolation(to: int, of: int) -> npt.NDArray[np.float64]:
    """The matrix [to, of] that reads `of` samples at `to` places, linearly between centers."""
    at = (np.arange(to) + 0.5) * of / to - 0.5
    return np.stack([np.interp(at, np.arange(of), unit) for unit in np.eye(of)], axis=1)


def batch(
    images: Images, *, seed: int, step: int, batch_size: int, shift: float = SHIFT
) -> dict[str, npt.NDArray[Any]]:
    """Step `step`'s batch: `inputs` [batch_size, Y, X, C], moved about, and `targets` [batch_size].

    Every epoch visits every image once, in an order of its own. Raises ImageError for a batch of no
    images, or of more than there are.
    """
    count = len(images.train)
    if not 0 < batch_size <= count:
        raise ImageError(f"a batch of {batch_size} images: there are {count} to draw from.")
    epoch, index = divmod(step, count // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    chosen = order[index * batch_size : (index + 1) * batch_size]
    reach = round(shift * images.train.shape[1])
    moves = np.random.default_rng((seed, 1, step)).integers(-reach, reach + 1, (batch_size, 2))
    pairs = zip(images.train[chosen], moves, strict=True)
    return {
        "inputs": np.stack([moved(image, *move) for image, move in pairs]),
        "targets": images.train_labels[chosen],
    }


def moved(image_YXC: Pixels, down: int, right: int) -> Pixels:
    """The image moved, with background where nothing came from."""
    Y, X, _ = image_YXC.shape
    reach = max(abs(down), abs(right))
    padded = np.pad(image_YXC, ((reach, reach), (reach, reach), (0, 0)), constant_values=-1.0)
    return padded[reach - down : reach - down + Y, reach - right : reach - right + X]


def accuracy(
    apply: Callable[[npt.ArrayLike], jax.Array],
    images_BYXC: Pixels,
    labels_B: Labels,
    batch_size: int = 120,
) -> float:
    """The share of images whose highest score, by `apply`, is that of their label.

    Batches are of `batch_size`, so that `apply` is compiled once; what is left over at the end is
    filled up with copies of the first image, which are not counted.
    """
    right = 0
    for start in range(0, len(images_BYXC), batch_size):
        now = images_BYXC[start : start + batch_size]
        filler = np.repeat(images_BYXC[:1], batch_size - len(now), axis=0)
        scores_BC = np.asarray(apply(np.concatenate([now, filler])))[: len(now)]
        right += int(np.sum(scores_BC.argmax(-1) == labels_B[start : start + batch_size]))
    return right / len(images_BYXC)


_INK = " .:-=+*#%@"
_COLUMNS = 16


def drawn(images: Sequence[tuple[Pixels, str]], beside: int) -> str:
    """Images, YXC in -1..1, in characters, `beside` to a row, each over its caption."""
    rows = [images[i : i + beside] for i in range(0, len(images), beside)]
    return "\n\n".join(_row(row) for row in rows)


def _row(images: Sequence[tuple[Pixels, str]]) -> str:
    columns = [[*_lines(pixels), caption.center(_COLUMNS)] for pixels, caption in images]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True)).rstrip()


def _lines(image_YXC: Pixels) -> list[str]:
    """Characters are about twice as high as wide: half as many rows as columns."""
    down, across = (_interpolation(count, image_YXC.shape[0]) for count in (8, _COLUMNS))
    light = (np.clip(down @ image_YXC.mean(-1) @ across.T, -1, 1) + 1) / 2
    return ["".join(_INK[i] for i in row) for row in np.rint(light * (len(_INK) - 1)).astype(int)]
