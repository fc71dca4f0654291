"""Seconds that a product takes on a target: what a loop is weighed by against what it hides."""

import math

from gspmd.ir import Op
from gspmd.optimize.ring import Ring
from gspmd.options import Target
from gspmd.rules import factor_rule
from gspmd.sharding import itemsize

PRODUCT = "dot_general"


def product_seconds(op: Op, target: Target, factor: int | None = None, size: int = 0) -> float:
    """What a matrix product takes, with another `size` of one `factor` of its rule.

    The longer of the work, in whole tiles of rows, columns and summands, and of the memory traffic.
    """
    rule = factor_rule(op)
    sizes = [size if f == factor else n for f, n in enumerate(rule.sizes)]
    left, right, out = ({f for dim in x for f in dim} for x in (*rule.ins, *rule.outs))
    batch = left & right & out
    work = 2.0 * math.prod(sizes[f] for f in batch)
    for nest in (left & out, right & out, left & right):
        n = math.prod(sizes[f] for f in nest - batch)
        work *= math.ceil(n / target.tile) * target.tile
    tensors = zip((*op.ins, *op.outs), (left, right, out), strict=True)
    moved = sum(math.prod(sizes[f] for f in dims) * itemsize(x.dtype) for x, dims in tensors)
    return max(work / target.flops, moved / target.memory)


def saved(whole: float, piece: float, block: float, ring: Ring, target: Target) -> float:
    """Seconds by which a ring is ahead of a collective with the product before or after it.

    `whole` and `piece` are the seconds of the product, and of that with one block; `block` the
    bytes of a block.
    """
    if not target.directions:
        return -math.inf  # who computes cannot send at the same time
    apart = whole + (ring.size - 1) * block / (target.link * target.directions)
    sending = target.hop + block / target.link
    return apart - piece - ring.steps * max(sending, len(ring.lanes) * piece)
