"""The table of factor rules: what each primitive *is*, from which all passes know what to do."""

from gspmd.ir import Op
from gspmd.rules import (
    contract,
    dynamic,
    fft,
    gather,
    linalg,
    manual,
    order,
    pointwise,
    random,
    reduce,
    scatter,
    shape,
    stretch,
    window,
)
from gspmd.rules.factor import RULES, FactorRule, OpRule, Product, gathered

FAMILIES = (
    pointwise, contract, reduce, shape, stretch, window, gather, scatter, dynamic, random, order,
    linalg, fft, manual,
)  # fmt: skip


def op_rule(op: Op) -> OpRule | None:
    """What the table holds for `op`, or None if nobody has told it."""
    return RULES.get(op.name)


def factor_rule(op: Op) -> FactorRule:
    """How the dims of `op` correspond; all whole if the table holds nothing for it."""
    known = RULES.get(op.name)
    return gathered(op) if known is None else known.factors(op)


def product_of(op: Op) -> Product | None:
    """The matrix product that `op` is, in its own shapes; None if it is none."""
    known = RULES.get(op.name)
    return None if known is None or known.product is None else known.product(op)
