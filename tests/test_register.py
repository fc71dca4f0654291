"""A user's rule is tried when it is registered, else when its first op is planned."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

import gspmd
from gspmd import P, RuleError
from gspmd.rules.factor import RULES
from tests.agreement import agrees, kinds

_NUMBERS = itertools.count()


def primitive_of(fn: Callable[..., Any], *, lowered: bool = True) -> Primitive:
    """A new primitive that computes `fn(*arrays, **params)`."""
    made = Primitive(f"tried_{next(_NUMBERS)}")

    def shape_of(*avals: Any, **params: Any) -> Any:
        found = jax.eval_shape(functools.partial(fn, **params), *avals)
        return jax.core.ShapedArray(found.shape, found.dtype)

    def batched(xs: Any, dims: Any, **params: Any) -> Any:
        return jax.vmap(functools.partial(fn, **params), dims)(*xs), 0

    made.def_abstract_eval(shape_of)
    batching.primitive_batchers[made] = batched
    if lowered:
        mlir.register_lowering(made, mlir.lower_fun(fn, multiple_results=False))
    return made


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


pytestmark = pytest.mark.usefixtures("rule_table")


RIGHT: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "contraction": (jnp.matmul, "i k, k j -> i j", {}),
    "linear": (jnp.matmul, "i k, k j -> i j", {"linear": ((0,), (1,))}),
    "maximum": (lambda x: x.max(1), "i k -> i", {"kinds": {"k": "max"}}),
    "product": (lambda x: x.prod(0), "k -> ", {"kinds": {"k": "prod"}}),
    "whole": (lambda x: x / x.shape[0], "_ j -> _ j", {}),
    "whole factor": (lambda x: x / x.sum(0), "i j -> i j", {"kinds": {"i": "whole"}}),
    "compound": (lambda x, y: (x[:, None] * y).ravel(), "a, b -> (a b)", {}),
    "square": (lambda x: x + x.T, "_ _ -> _ _", {}),
    "integers": (lambda x: x & 3, "i -> i", {}),
    "scalar": (lambda x, y: x * y, "i j,  -> i j", {}),
    "params": (lambda x, *, by: x * by, "i -> i", {"params": {"by": 3.0}}),
    "example": (
        lambda x, i: x[i],
        "_ j, k -> k j",
        {"example": (np.ones((5, 4), np.float32), np.arange(6))},
    ),
}


@pytest.mark.parametrize(("fn", "text", "options"), list(RIGHT.values()), ids=list(RIGHT))
def test_what_is_right_is_registered(
    fn: Callable[..., Any], text: str, options: dict[str, Any]
) -> None:
    primitive = primitive_of(fn)
    gspmd.register_rule(primitive, text, **options)
    check = RULES[primitive.name].check
    assert check is not None
    # It has run: the first plan asks nothing more, not even whether the op exists.
    assert check(None) == ""  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[..., Any], str, dict[str, Any], tuple[str, ...]]] = {
    "a mean": (
        lambda x: x.mean(0),
        "k i -> i",
        {},
        ("factor 'k' is reduced by sum", "split in 2", "result 0 is"),
    ),
    "rows counted": (
        lambda x: x / x.shape[0],
        "i j -> i j",
        {},
        ("factor 'i' passes", "its 6 entries split in 2: result 0 is ", "whole."),
    ),
    "another kind": (lambda x: x.max(1), "i k -> i", {}, ("factor 'k' is reduced by sum",)),
    "neighbours": (
        lambda x: x + jnp.roll(x, 1),
        "i -> i",
        {},
        ("factor 'i' passes", "result 0 is", " at [0] put together from its pieces, and "),
    ),
    "padding counts": (
        lambda x: jnp.exp(x).sum(0),
        "k i -> i",
        {},
        ("factor 'k'", "split in 4 with padding"),
    ),
    "exchanged": (jnp.matmul, "i k, k j -> j i", {}, ("(j) has size 18, but the dim has size 6",)),
    "one size only": (
        lambda x: x.reshape(6, -1).sum(0),
        "(k i) -> i",
        {"sizes": {"k": 6, "i": 6}},
        ("factor 'k'", "a piece of result 0 has shape (3,), by the rule (6,)"),
    ),
    "not linear": (
        lambda x: x * x,
        "i -> i",
        {"linear": ((0,),)},
        ("linear=(0,)", "added up from two summands", "on their sum"),
    ),
    "a result that differs": (
        lambda x: x.sum(0) * x.shape[0],
        "k -> ",
        {"kinds": {"k": "pass"}},
        ("factor 'k' passes", "differ from each other in a result that lacks the factor"),
    ),
}


@pytest.mark.parametrize(
    ("fn", "text", "options", "fragments"), list(WRONG.values()), ids=list(WRONG)
)
def test_what_is_wrong_is_refused(
    fn: Callable[..., Any], text: str, options: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    primitive = primitive_of(fn)
    with pytest.raises(RuleError) as caught:
        gspmd.register_rule(primitive, text, **options)
    for fragment in (primitive.name, *fragments):
        assert fragment in str(caught.value)
    assert str(caught.value).endswith(".")
    assert primitive.name not in RULES


def test_the_two_results_are_those_of_the_pieces_and_of_the_whole() -> None:
    primitive = primitive_of(lambda x: x.mean())
    x = np.asarray([1, 2, 3, 4, 5, 6], np.float32)
    message = r"result 0 is 7 at \[\] put together from its pieces, and 3.5 whole"
    with pytest.raises(RuleError, match=message):
        gspmd.register_rule(primitive, "k -> ", example=(x,))


def test_an_impl_alone_will_do() -> None:
    primitive = primitive_of(jnp.mean, lowered=False)
    primitive.def_impl(jnp.mean)
    with pytest.raises(RuleError, match="factor 'k' is reduced by sum"):
        gspmd.register_rule(primitive, "k -> ")


def test_an_example_that_does_not_run() -> None:
    primitive = primitive_of(lambda x: x.reshape(3, 5))
    with pytest.raises(
        RuleError, match=r"does not run on example=\(float32\[7\]\) with params=\{\}"
    ):
        gspmd.register_rule(primitive, "_ -> _ _", example=(array(7),))


@pytest.mark.parametrize("given", ["a name", "no params", "check=False"])
def test_what_cannot_run_yet_is_tried_when_planned(given: str) -> None:
    primitive = primitive_of(lambda x, *, by: x.mean(0) * by)
    if given == "a name":
        gspmd.register_rule(primitive.name, "k i -> i")
    elif given == "no params":
        gspmd.register_rule(primitive, "k i -> i")
    else:
        gspmd.register_rule(primitive, "k i -> i", params={"by": 2.0}, check=False)
    for rows in (4, 1 << 20):  # the second is tried at a smaller size
        with pytest.raises(RuleError, match="factor 'k' is reduced by sum"):
            gspmd.plan(
                lambda x: primitive.bind(x, by=2.0),
                jax.ShapeDtypeStruct((rows, 3), np.dtype("float32")),
                mesh="x=4",
                in_specs=P("x"),
            )


@pytest.mark.parametrize("rows", [8, 7])
def test_what_is_tried_when_planned_and_right_partitions(rows: int) -> None:
    def fn(x: Any, *, by: float) -> Any:
        return x.sum(0) * by

    primitive = primitive_of(fn)
    gspmd.register_rule(primitive, "k i -> i")
    x = array(rows, 3)
    plan = gspmd.plan(lambda x: primitive.bind(x, by=2.0), x, mesh="x=4", in_specs=P("x"))
    agrees(plan, lambda x: primitive.bind(x, by=2.0), x)
    assert kinds(plan) == {"all_reduce": 1}
    assert not plan.findings


def test_planned_under_a_trace() -> None:
    primitive = primitive_of(lambda x, *, by: x.sum(0) * by)
    gspmd.register_rule(primitive, "k i -> i")
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    fn = gspmd.partition(lambda x: primitive.bind(x, by=2.0), mesh=mesh, in_specs=P("x"))
    x = array(8, 3)
    np.testing.assert_allclose(jax.jit(fn)(x), 2 * x.sum(0), rtol=1e-5)


def test_params_that_name_a_shape_are_tried_at_that_shape() -> None:
    primitive = primitive_of(lambda x, *, shape: x.reshape(shape))
    gspmd.register_rule(primitive, "_ k -> _ k")
    x = np.zeros((1 << 9, 1 << 9), np.float32)
    fn = functools.partial(primitive.bind, shape=x.shape)
    with pytest.raises(RuleError, match="on a piece it does not run"):
        gspmd.plan(fn, x, mesh="x=4", in_specs=P(None, "x"))


def test_what_cannot_run_at_all_is_a_finding() -> None:
    primitive = primitive_of(jnp.matmul, lowered=False)
    gspmd.register_rule(primitive, "i k, k j -> i j")
    plan = gspmd.plan(
        lambda x, y: primitive.bind(x, y),
        array(8, 4),
        array(4, 8),
        mesh="x=4",
        in_specs=(P(None, "x"), P("x")),
    )
    (finding,) = plan.findings
    assert finding.code == "unchecked-rule"
    assert finding.source is not None
    assert finding.bytes == 0
    assert primitive.name in finding.message
    assert "NotImplementedError" in finding.message
