"""`gspmd.testing`: a partitioned function that differs from the function is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

import gspmd
from gspmd import P
from gspmd.testing import assert_equivalent

MESH = "x=2,y=2"


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def two_layers(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    h = gspmd.annotate(jnp.tanh(x @ params["wi"]), P("x", "y"))
    y = h @ params["wo"]
    return {"y": y, "best": jnp.argmax(y, axis=1), "norm": jnp.sqrt(jnp.sum(y * y))}


def test_equal_functions_pass_with_gradients_integers_and_uneven_dims() -> None:
    params = {"wi": array(5, 7), "wo": array(7, 3)}
    assert_equivalent(two_layers, params, array(9, 5), mesh=MESH, in_specs=(None, P("x")))


def shared_out() -> Primitive:
    """Divides by the number of rows, so that rows cannot be split, whatever its rule says."""

    def divide(x: jax.Array) -> jax.Array:
        return x / x.shape[0]

    primitive = Primitive("shared_out")
    primitive.def_impl(divide)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(divide, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda xs, dims: (jax.vmap(divide, dims)(*xs), 0)
    return primitive


def test_a_rule_that_lies_is_caught() -> None:
    primitive = shared_out()
    gspmd.register_rule(primitive, "i j -> i j")
    x = array(8, 3)
    with pytest.raises(AssertionError, match=r"result differs by .*rtol=0.0001"):
        assert_equivalent(primitive.bind, x, mesh=MESH, in_specs=P("x"))
