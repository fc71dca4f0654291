"""What one device does in a fusion, and the seconds that takes: work, memory traffic, roofline."""

import bisect
import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.fusion import IN_PLACE, PICKS, Fusion
from gspmd.ir import Op, Program, bytes_of, values_of
from gspmd.meshes.chips import Chip
from gspmd.rules import product_of
from gspmd.rules.factor import Product

Bound = Literal["compute", "memory", "launch"]
"""What an op waits for: the arithmetic units, the memory, or its own start."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """One execution of a fusion on one device.

    `flops` are those of its products, two for a multiplication and its addition; `bytes` what it
    reads and writes. `seconds` is the longest of the three that `bound` can name.
    """

    flops: float
    bytes: float
    seconds: float
    bound: Bound


def cost(fusion: Fusion, chip: Chip) -> Cost:
    """What `fusion` costs a device of `chip`: the roofline of its products and its traffic.

    Raises:
      MeshError: the chip has no peak for the dtype of a product.
    """
    flops = compute = 0.0
    for op in fusion.ops:
        if (product := product_of(op)) is not None:
            flops += product.flops
            compute += slower(op, chip) * product_seconds(product, product_dtype(op), chip)
    moved = traffic(fusion)
    memory = moved / (chip.device_bandwidth * chip.memory_efficiency)
    seconds, bound = max(
        (compute, "compute"), (memory, "memory"), (chip.launch if moved else 0.0, "launch")
    )
    return Cost(flops, moved, seconds, bound)


def traffic(fusion: Fusion) -> float:
    """Bytes between a device's memory and its units: each operand once, each stored result once.

    An op that picks entries reads those that it returns; one that writes into an operand reads and
    writes the part that it changes, as the operand's memory becomes the result's.
    """
    op = fusion.root
    if op.name in IN_PLACE:
        # operand, update, start... or operand, indices, updates
        changed = op.ins[2:3] if op.name.startswith("scatter") else op.ins[1:2]
        return 2 * bytes_of(changed)
    picked = {x for op in fusion.ops if op.name in PICKS for x in values_of(op.ins[:1])}
    read = bytes_of(x for x in fusion.reads if x not in picked)
    read += sum(bytes_of(op.outs) for op in fusion.ops if op.name in PICKS)
    return read + bytes_of(fusion.writes)


def product_dtype(op: Op) -> Any:
    """The dtype in which a product is multiplied: its algorithm's, or its wider operand's."""
    if (words := _algorithm(op)) and words[0] in _ROUNDS:
        return np.dtype(_ROUNDS[words[0]])
    return max((x.dtype for x in op.ins[:2]), key=lambda dtype: dtype.itemsize)


_ROUNDS: Mapping[str, Any] = MappingProxyType(
    {"BF16": jnp.bfloat16, "F16": np.float16, "TF32": np.float32, "F32": np.float32}
)
"""What an algorithm rounds operands to, by its first word."""

_EXACT = 6
_PASSES: Mapping[Any, int] = MappingProxyType(
    {lax.Precision.HIGH: 3, lax.Precision.HIGHEST: _EXACT}
)
"""Products of bfloat16 in one of float32, as a TPU makes it; its compiler estimates 3.1 and 5.9."""


def _algorithm(op: Op) -> Sequence[str]:
    """The words of the algorithm that a product names: `["BF16", "BF16", "F32", "X3"]`."""
    asked = op.params.get("precision")
    return asked.name.split("_") if isinstance(asked, lax.DotAlgorithmPreset) else ()


def slower(op: Op, chip: Chip) -> float:
    """How many times what it takes by default a product takes at the precision that it asks for.

    A GPU leaves its matrix units at the highest, where they would round.
    """
    words = _algorithm(op)
    if words and words[-1].startswith("X"):
        return float(words[-1][1:])
    if product_dtype(op) != np.float32:
        return 1.0
    asked = op.params.get("precision")
    both = cast("tuple[Any, ...]", asked if isinstance(asked, tuple) else ())
    passes = max((_PASSES.get(one, 1) for one in both), default=1)
    if words and words[0] == "F32":
        passes = _EXACT
    if chip.platform == "tpu":
        return float(passes)
    return chip.peak_flops("float32") / chip.exact if chip.exact and passes == _EXACT else 1.0


def product_seconds(product: Product, dtype: Any, chip: Chip) -> float:
    """What a product takes by arithmetic alone.

    Two of its three dims fill the matrix unit and are padded to its side; the third streams past,
    in rows of 8. The share of the peak is that of a cubic product of as much work.
    """
    m, n, k = product.m, product.n, product.k
    tile = chip.tile
    up = lambda size, to: math.ceil(size / to) * to  # noqa: E731
    rows = min(tile, 8)
    nest = min(
        up(m, rows) * up(n, tile) * up(k, tile),
        up(m, tile) * up(n, rows) * up(k, tile),
        up(m, tile) * up(n, tile) * up(k, rows),
    )
    padded = 2.0 * product.batch * nest
    side = (product.batch * nest) ** (1 / 3)
    return padded / (chip.peak_flops(dtype) * reached(chip, side))


def reached(chip: Chip, side: float) -> float:
    """The share of a chip's peak that a cubic product of `side` reaches, between measurements.

    Below the smallest one the time stays what that took; above the largest the share stays.
    """
    sides = [s for s, _ in chip.efficiency]
    i = bisect.bisect(sides, side)
    if i == 0:
        first, share = chip.efficiency[0]
        return share * (side / first) ** 3 if side < first else share
    if i == len(sides):
        return chip.efficiency[-1][1]
    (a, low), (b, high) = chip.efficiency[i - 1 : i + 1]
    place = math.log(side / a) / math.log(b / a)
    return math.exp(math.log(low) + place * math.log(high / low))


Run = tuple[Op, Product, int]
"""A product, and how often it runs."""


def products(program: Program, times: Callable[[Op], int], runs: int = 1) -> Iterator[Run]:
    """Every product of a program that runs `runs` times; of branches, of the one with most work.

    `times(op)` is how often the bodies of `op` run.
    """
    for op in program.ops:
        if (product := product_of(op)) is not None:
            yield op, product, runs
        bodies = [list(products(body, times, runs * times(op))) for body in op.bodies]
        if op.name == "cond":
            bodies = [max(bodies, key=flops_of)]
        for body in bodies:
            yield from body


def flops_of(runs: Iterable[Run]) -> float:
    """FLOPs of all runs of products."""
    return sum(product.flops * runs for _, product, runs in runs)


def main_dtype(runs: Iterable[Run]) -> Any | None:
    """The dtype that most of the work is done in; None where there are no products."""
    done: dict[Any, float] = collections.defaultdict(float)
    for op, product, times in runs:
        done[product_dtype(op)] += product.flops * times
    return max(done, key=lambda dtype: done[dtype], default=None)
