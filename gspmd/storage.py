"""Storage: how the compiler of a platform keeps tensors in a device's memory."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

from gspmd.collectives import FORMS, Forms
from gspmd.sharding import itemsize

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """The two minor dims of a tensor in memory are padded to tiles of `rows` x `lanes` entries.

    A tensor of one dim is padded to a whole tile. One of few rows has a flatter tile, of a power of
    two of them, at least 2. (XLA's tiled layouts, openxla.org/xla/tiled_layout.)
    """

    rows: int
    lanes: int

    def bytes(self, shape: Shape, dtype: Any) -> float:
        """What a tensor takes with its last dims minor."""
        return _padded(self, shape) * itemsize(dtype)

    def least(self, shape: Shape, dtype: Any) -> float:
        """What it takes where the compiler picks the minor dims, as it does mostly."""
        return _least(self, shape) * itemsize(dtype)


@functools.lru_cache(maxsize=4096)
def _least(tiling: Tiling, shape: Shape) -> int:
    if len(shape) < 3:
        return min(_padded(tiling, shape), _padded(tiling, shape[::-1]))
    pairs = itertools.permutations(range(len(shape)), 2)
    rest = math.prod(shape)
    if not rest:
        return 0
    return min(
        rest // (shape[i] * shape[j]) * _padded(tiling, (shape[i], shape[j])) for i, j in pairs
    )


def _padded(tiling: Tiling, shape: Shape) -> int:
    """Entries, those of the padding included."""
    if len(shape) < 2:
        return _up(math.prod(shape), tiling.rows * tiling.lanes) if shape else 1
    rows = min(tiling.rows, max(2, 1 << (shape[-2] - 1).bit_length())) if tiling.rows > 1 else 1
    return math.prod(shape[:-2]) * _up(shape[-2], rows) * _up(shape[-1], tiling.lanes)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """What the memory of a program depends on beside the program.

    `forms` are those in which the collectives are run. With `narrow_products`, float32 values that
    only matrix products read are kept in bfloat16, which is what those multiply. `granule` is what
    buffers are multiples of where they are placed one after the other, in the order of the
    schedule, each into the smallest hole; 0 where they are packed knowing all of them, which leaves
    next to no holes.
    """

    tiling: Tiling
    forms: Forms
    narrow_products: bool = False
    granule: int = 0


STORAGE: Mapping[str, Storage] = {
    # The vector registers of a TPU are 8 x 128 (cloud.google.com/tpu/docs/performance-guide), and
    # so are the tiles of tensors in HBM, whatever their dtype: T(8,128), or T(8,128)(2,1) for
    # bfloat16. A float32 product is one of bfloat16 unless its precision says otherwise
    # (jax.lax.Precision). Those, and the granule, as libtpu 0.0.42 writes them where it is asked
    # to (xla_dump_to): offsets in its buffer assignment are what first come, best fit gives.
    "tpu": Storage(Tiling(8, 128), FORMS["tpu"], narrow_products=True, granule=1 << 14),
    # XLA's own heap: global decreasing size, best fit.
    "gpu": Storage(Tiling(1, 1), FORMS["gpu"]),
    "cpu": Storage(Tiling(1, 1), FORMS["cpu"]),
}
"""By platform."""
