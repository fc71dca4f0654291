"""What one device does in a fusion, and the seconds that takes: work, memory traffic, roofline."""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

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
            compute += product_seconds(product, product_dtype(op), chip)
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
    """The dtype in which a product is multiplied: the wider of its operands'."""
    return max((x.dtype for x in op.ins[:2]), key=lambda dtype: dtype.itemsize)


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


def products(program: Program) -> Iterator[tuple[Op, Product, int]]:
    """Every matrix product of a program, with how often it runs (-1: in an unbounded loop)."""
    for op, trips in program.walk():
        if (product := product_of(op)) is not None:
            yield op, product, trips


def main_dtype(ops: Iterable[tuple[Op, Product, int]]) -> Any | None:
    """The dtype that most of the work is done in; None where there are no products."""
    work: dict[Any, float] = {}
    for op, product, trips in ops:
        dtype = product_dtype(op)
        work[dtype] = work.get(dtype, 0.0) + product.flops * abs(trips)
    return max(work, key=lambda dtype: work[dtype], default=None)
