"""Random numbers: every device draws the very bits that one device would have drawn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

import gspmd
from gspmd import P
from tests.agreement import kinds

MESH = "x=2,y=4"
IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
SHAPE = (12, 8)


def whole(x: Any) -> np.ndarray:
    """`x`, and the words of a key."""
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(random.key_data(x) if key else x)


def check(
    fn: Callable[..., Any], *args: Any, in_specs: Any = None, exactly: bool = True
) -> gspmd.Plan:
    """The plan of `fn`, whose draws are those of `fn`."""
    plan = gspmd.plan(fn, *args, mesh=MESH, in_specs=in_specs)
    found, expected = plan.simulate(*args), jax.jit(fn)(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if exactly or not jnp.issubdtype(b.dtype, jnp.floating):
            np.testing.assert_array_equal(whole(a), whole(b))
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    return plan


def split(x: jax.Array) -> jax.Array:
    return gspmd.annotate(x, P("x", "y"))


ALPHA = np.abs(np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32) + 0.3
LOGITS = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)

BITS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bits": lambda k: random.bits(k, SHAPE),
    "bits of 8": lambda k: random.bits(k, SHAPE, jnp.uint8),
    "bits of 16": lambda k: random.bits(k, SHAPE, jnp.uint16),
    "uneven": lambda k: random.bits(k, (7, 5)),
    "uniform": lambda k: random.uniform(k, SHAPE),
    "uniform in bf16": lambda k: random.uniform(k, SHAPE, jnp.bfloat16),
    "randint": lambda k: random.randint(k, SHAPE, -3, 9),
    "bernoulli": lambda k: random.bernoulli(k, 0.3, SHAPE),
    "rademacher": lambda k: random.rademacher(k, SHAPE),
    "categorical": lambda k: random.categorical(k, LOGITS, shape=SHAPE[:1])[:, None],
    "permutation": lambda k: random.permutation(k, ALPHA),
    "choice": lambda k: random.choice(k, ALPHA, (4,), replace=False),
    "binomial": lambda k: random.binomial(k, 9.0, 0.4, SHAPE),
    "poisson": lambda k: random.poisson(k, 3.0, SHAPE),
    "geometric": lambda k: random.geometric(k, 0.3, SHAPE),
}
FLOATS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "normal": lambda k: random.normal(k, SHAPE),
    "complex normal": lambda k: jnp.abs(random.normal(k, SHAPE, jnp.complex64)),
    "truncated_normal": lambda k: random.truncated_normal(k, -1.0, 2.0, SHAPE),
    "gumbel": lambda k: random.gumbel(k, SHAPE),
    "exponential": lambda k: random.exponential(k, SHAPE),
    "laplace": lambda k: random.laplace(k, SHAPE),
    "logistic": lambda k: random.logistic(k, SHAPE),
    "cauchy": lambda k: random.cauchy(k, SHAPE),
    "gamma": lambda k: random.gamma(k, ALPHA),
    "loggamma": lambda k: random.loggamma(k, ALPHA),
    "beta": lambda k: random.beta(k, ALPHA, ALPHA),
    "dirichlet": lambda k: random.dirichlet(k, ALPHA[0], (12,)),
    "t": lambda k: random.t(k, 3.0, SHAPE),
    "chisquare": lambda k: random.chisquare(k, 3.0, shape=SHAPE),
    "weibull_min": lambda k: random.weibull_min(k, 1.0, 2.0, SHAPE),
    "maxwell": lambda k: random.maxwell(k, SHAPE),
    "multivariate_normal": lambda k: random.multivariate_normal(
        k, ALPHA[0], np.eye(8, dtype=np.float32), (12,)
    ),
    "ball": lambda k: random.ball(k, 8, shape=(12,)),
}


SAMPLERS = [("threefry2x32", name) for name in (*BITS, *FLOATS)] + [
    (implementation, name)
    for implementation in ("rbg", "unsafe_rbg")
    for name in ("bits", "uneven", "randint", "permutation", "categorical", "normal", "gamma")
]


@pytest.mark.parametrize(("implementation", "name"), SAMPLERS)
def test_samplers(implementation: str, name: str) -> None:
    """The bits exactly; what functions of them are, up to rounding."""
    sampler = {**BITS, **FLOATS}[name]
    key = random.key(7, impl=implementation)
    check(lambda k: split(jnp.atleast_2d(sampler(k))), key, exactly=name in BITS)


ALONE = ("bits", "uneven", "randint", "bernoulli", "normal", "gamma", "exponential")


@pytest.mark.parametrize("name", ALONE)
def test_a_counter_is_split_and_nothing_is_sent(name: str) -> None:
    sampler = {**BITS, **FLOATS}[name]
    plan = gspmd.plan(lambda k: split(sampler(k)), random.key(7), mesh=MESH)
    assert not plan.findings
    assert not plan.collectives
    made = {"random_bits", "random_gamma"}
    (drawn,) = {
        op.outs[0].layout.sharding.dims
        for op, _ in plan.program.walk()
        if op.name in made and op.outs[0].layout is not None and len(op.outs[0].shape) == 2
    }
    assert drawn == (("x",), ("y",))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_what_cannot_be_split_is_drawn_whole(implementation: str) -> None:
    key = random.key(7, impl=implementation)
    plan = check(lambda k: split(random.bits(k, SHAPE)), key)
    assert not plan.collectives
    (finding,) = plan.findings
    assert (finding.code, finding.bytes) == ("generated-whole", 0)
    assert finding.source is not None
    assert finding.message == (
        f"random_bits at {finding.source} draws with {implementation}, whose numbers come in one "
        "piece: over (x,y) each device draws 384 bytes, 336 beyond its shard, and sends none"
    )


def test_a_generator_of_xla_is_drawn_whole() -> None:
    def drawn(state: jax.Array) -> Any:
        state, bits = lax.rng_bit_generator(state, SHAPE)
        return state, split(bits)

    plan = check(drawn, np.arange(4, dtype=np.uint32))
    (finding,) = plan.findings
    assert finding.code == "generated-whole"
    assert "rng_bit_generator" in finding.message
    assert "XLA's own generator" in finding.message


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("in_specs", [P("x"), P(("x", "y"))])
def test_a_stack_of_keys(implementation: str, in_specs: Any) -> None:
    keys = random.split(random.key(3, impl=implementation), 16)
    fns: tuple[Callable[..., Any], ...] = (
        jax.vmap(lambda k: random.bits(k, (6,))),
        jax.vmap(lambda k: random.split(k, 3)),
        lambda k: jax.vmap(random.fold_in)(k, np.arange(16)),
        lambda k: lax.map(lambda k: random.bits(k, (6,)), k),
        lambda k: random.key_data(k) + 1,
    )
    for fn in fns:
        plan = check(fn, keys, in_specs=in_specs)
        if implementation == "threefry2x32" and fn is not fns[3]:
            assert not plan.collectives
            assert not plan.findings


def test_a_stack_of_keys_that_draws_from_one_says_so() -> None:
    """Under `vmap`, rbg draws for all keys from the first one."""
    keys = random.split(random.key(3, impl="rbg"), 16)
    plan = check(jax.vmap(lambda k: random.bits(k, (6,))), keys, in_specs=P("x"))
    assert {finding.code for finding in plan.findings} == {"gathered", "generated-whole"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(16,), (6, 4), (7,)])
def test_new_keys(implementation: str, shape: tuple[int, ...]) -> None:
    def new(key: jax.Array) -> jax.Array:
        return gspmd.annotate(random.split(key, shape), P("x", *("y" for _ in shape[1:])))

    plan = check(new, random.key(3, impl=implementation))
    assert not plan.collectives
    codes = {finding.code for finding in plan.findings}
    assert codes == (set() if implementation == "threefry2x32" else {"generated-whole"})


def test_new_keys_are_drawn_from_where_they_are() -> None:
    """A key for each row: made where the row is."""

    def rows(key: jax.Array) -> jax.Array:
        keys = gspmd.annotate(random.split(key, 16), P(("x", "y")))
        return jax.vmap(lambda k: random.normal(k, (6,)))(keys)

    plan = check(rows, random.key(3), exactly=False)
    assert not plan.collectives
    assert plan.out_specs == P(("x", "y"), None)


def test_before_threefry_was_partitionable() -> None:
    with jax.threefry_partitionable(False):
        fns = (
            lambda k: split(random.bits(k, SHAPE)),
            lambda k: gspmd.annotate(random.split(k, 16), P("x")),
            lambda k: split(random.gamma(k, ALPHA)),
        )
        for fn in fns:
            plan = check(fn, random.key(3), exactly=False)
            assert "generated-whole" in {finding.code for finding in plan.findings}


def test_dropout_in_a_gradient() -> None:
    def loss(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ w)
        return jnp.sum(jnp.where(random.bernoulli(key, 0.5, h.shape), h, 0) ** 2)

    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(s).astype(np.float32) for s in ((12, 8), (16, 12)))
    plan = check(
        jax.grad(loss), w, x, random.key(1), in_specs=(P(None, "y"), P("x"), None), exactly=False
    )
    assert kinds(plan) == {"all_reduce": 1}
    assert not plan.findings


def test_a_gamma_gradient() -> None:
    gradient = jax.grad(lambda a, k: random.gamma(k, a).sum())
    check(gradient, ALPHA, random.key(1), in_specs=(P("x", "y"), None), exactly=False)


def test_keys_of_the_old_kind() -> None:
    plan = check(lambda k: split(random.normal(k, SHAPE)), random.PRNGKey(5), exactly=False)
    assert not plan.findings
