"""Rules of the elementwise primitives: all dims pass, and sums where the op is linear."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from gspmd.ir import Literal, Op
from gspmd.rules.factor import RULES, Dims, FactorRule, Factors, Split, rule

Groups = tuple[tuple[int, ...], ...]


def pointwise(op: Op, linear: Groups = ()) -> FactorRule:
    """The rule of an op whose operands all have its results' shape, or broadcast to it.

    A scalar has no factors, nor has a dim of size 1 that is stretched.
    """
    f = Factors()
    shape = op.outs[0].shape
    factors = f.dims(shape)

    def operand(dims: tuple[int, ...]) -> Dims:
        if not dims:
            return ()
        return tuple(
            factor if n == m else () for n, m, factor in zip(dims, shape, factors, strict=True)
        )

    return f.rule([operand(x.shape) for x in op.ins], [factors] * len(op.outs), linear=linear)


@rule("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt")
@rule("ceil", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor")
@rule("integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic", "round", "rsqrt", "sign")
@rule("sin", "sinh", "sqrt", "square", "tan", "tanh", "reduce_precision")
@rule("clz", "not", "population_count")
@rule("log2", "one_minus_square")  # primitives since JAX 0.12
def unary(op: Op) -> FactorRule:
    return pointwise(op)


@rule("and", "atan2", "eq", "ge", "gt", "le", "lt", "max", "min", "mulhi", "ne", "nextafter", "or")
@rule("eq_to", "le_to", "lt_to", "pow", "rem", "shift_left", "shift_right_arithmetic", "xor")
@rule("shift_right_logical", "igamma", "igamma_grad_a", "igammac", "polygamma", "zeta")
@rule("regularized_incomplete_beta", "clamp")
@rule("polynomial")  # a primitive since JAX 0.12
def nary(op: Op) -> FactorRule:
    return pointwise(op)


@rule("conj", "copy", "imag", "name", "neg", "real", "stop_gradient", "layout_constraint")
def linear_unary(op: Op) -> FactorRule:
    return pointwise(op, linear=((0,),))


@rule("add", "add_any", "complex", "sub")
def jointly_linear(op: Op) -> FactorRule:
    return pointwise(op, linear=((0, 1),))


@rule("mul")
def bilinear(op: Op) -> FactorRule:
    return pointwise(op, linear=((0,), (1,)))


@rule("div")
def div(op: Op) -> FactorRule:
    # Integer division rounds, so a quotient of a sum is not the sum of the quotients. Neither is it
    # where the divisor is zero: summands of both signs would give inf - inf.
    exact = jnp.issubdtype(op.outs[0].dtype, jnp.inexact) and isinstance(op.ins[1], Literal)
    return pointwise(op, linear=((0,),) if exact else ())


@rule("select_n")
def select_n(op: Op) -> FactorRule:
    return pointwise(op, linear=(tuple(range(1, len(op.ins))),))


@rule("convert_element_type")
def convert_element_type(op: Op) -> FactorRule:
    exact = holds(op.outs[0].dtype, op.ins[0].dtype)
    return pointwise(op, linear=((0,),) if exact else ())


ENTRY_BY_ENTRY = (
    unary, nary, linear_unary, jointly_linear, bilinear, div, select_n, convert_element_type
)  # fmt: skip


def is_pointwise(primitive: str) -> bool:
    """Whether an entry of its result takes one operation on entries at the same place."""
    return primitive in RULES and RULES[primitive].factors in ENTRY_BY_ENTRY


def holds(wide: Any, narrow: Any) -> bool:
    """Whether `wide` is a floating type with every value of the floating type `narrow`."""
    if not (jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating)):
        return False
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp


@rule("bitcast_convert_type")
def bitcast_convert_type(op: Op) -> FactorRule:
    """Dims pass; the minor dim that types of different width gain or lose is whole."""
    (x,), (y,) = op.ins, op.outs
    f = Factors()
    shared = f.dims(x.shape[: len(y.shape)] if len(x.shape) > len(y.shape) else x.shape)
    rank = len(shared)
    return f.rule(
        [(*shared, *f.dims(x.shape[rank:], "whole"))], [(*shared, *f.dims(y.shape[rank:], "whole"))]
    )


@rule("constraint")
def constraint(op: Op) -> FactorRule:
    """All dims pass; not linear, because what a constraint asks for is the value, its sums paid."""
    return pointwise(op)


@rule("optimization_barrier", "device_put")
def barrier(op: Op) -> FactorRule:
    """Operand i is result i; each has factors of its own."""
    f = Factors()
    dims = [f.dims(x.shape) for x in op.ins]
    return f.rule(dims, dims, linear=((0,),) if len(dims) == 1 else ())


def _both(_op: Op, _split: Split) -> Callable[..., Any]:
    return lambda x, y: (x, y)


@rule("shard_alike", call=_both)
def shard_alike(op: Op) -> FactorRule:
    """The two operands are split alike, which is all that the op asks for."""
    return pointwise(op)


@rule("threefry2x32", "threefry4x32", "philox2x32", "philox4x32", "random_seed", "random_clone")
def keys(op: Op) -> FactorRule:
    return pointwise(op)
