"""Samples of primitives, and the cases that they make: one op on known operands."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspmd._compat import bind
from gspmd.ir import Literal, Op, Value
from gspmd.local import is_key
from gspmd.rules import factor_rule
from gspmd.rules.factor import FactorRule

IMPLEMENTATIONS = {
    "key<fry>": "threefry2x32",
    "key<fry4>": "threefry4x32",
    "key<phx2>": "philox2x32",
    "key<phx4>": "philox4x32",
    "key<rbg>": "rbg",
    "key<urbg>": "unsafe_rbg",
}
Words = np.ndarray  # an array; of PRNG keys their words, in a trailing dim


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One use of a primitive: `fn(*args)` binds it, directly or under way."""

    primitive: str
    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """An op on known operands: `words` are those of its operands that are values."""

    op: Op
    words: tuple[Words, ...]

    @property
    def primitive(self) -> str:
        return self.op.name

    @property
    def rule(self) -> FactorRule:
        return factor_rule(self.op)

    def run(self, words: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
        """The results, as words, if the op's values are `words`."""
        assert self.op.call is not None
        return self.run_as(self.op.call, words, self.op.params if params is None else params)

    def run_as(
        self, call: Callable[..., Any], words: Sequence[Any], params: Mapping[str, Any]
    ) -> list[Any]:
        """The results, as words, of `call` instead of the op's own."""
        rest = iter(words)
        operands = [
            to_array(x.value if isinstance(x, Literal) else next(rest), x.dtype)
            for x in self.op.ins
        ]
        out = call(*operands, **params)
        return [to_words(x) for x in (out if isinstance(out, list | tuple) else [out])]


def to_words(x: Any) -> Any:
    return jax.random.key_data(x) if is_key(x.dtype) else x


def to_array(words: Words, dtype: Any) -> Any:
    if not is_key(dtype):
        return jnp.asarray(words, dtype)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=IMPLEMENTATIONS[str(dtype)])


def case_of(sample: Sample) -> Case:
    """The sample's op, and the operands that it gets when the sample runs."""
    closed = jax.make_jaxpr(sample.fn)(*sample.args)
    found = _find(closed.jaxpr, [*closed.consts, *sample.args], sample.primitive)
    assert found is not None, f"the sample of {sample.primitive} never binds it"
    eqn, values = found
    ids = itertools.count()

    def value(var: Any) -> Value:
        return Value(next(ids), tuple(var.aval.shape), var.aval.dtype)

    ins = tuple(
        Literal(v.val, v.aval.dtype) if hasattr(v, "val") and not v.aval.shape else value(v)
        for v in eqn.invars
    )
    outs = tuple(value(v) for v in eqn.outvars)
    op = Op(eqn.primitive.name, ins, outs, dict(eqn.params), call=bind(eqn.primitive))
    words = tuple(
        np.asarray(to_words(x)) for x, y in zip(values, ins, strict=True) if isinstance(y, Value)
    )
    return Case(op, words)


def _find(jaxpr: Any, args: Sequence[Any], name: str) -> tuple[Any, list[Any]] | None:
    """The first equation of primitive `name` in `jaxpr` or the calls it makes, and its operands."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if hasattr(v, "val") else env[v] for v in eqn.invars]
        values = [jnp.asarray(x) if isinstance(x, bool | int | float) else x for x in values]
        if eqn.primitive.name == name:
            return eqn, values
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None:
            found = _find(inner.jaxpr, [*inner.consts, *values], name)
            if found is not None:
                return found
        out = bind(eqn.primitive)(*values, **eqn.params)
        env |= zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True)
    return None
