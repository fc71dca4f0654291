"""The law: whatever is drawn, the plan computes what the function computes, on every device."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import Drawn, programs

import gspmd
from gspmd import run


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile() -> Iterator[None]:
    """Hundreds of small programs, each run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def agrees(program: Drawn) -> None:
    """Every device's every output is that of the function; padding, full of NaN, shows nowhere."""
    plan = gspmd.plan(
        program,
        *program.args,
        mesh=program.mesh,
        in_specs=program.in_specs,
        out_specs=program.out_specs,
    )
    expected = jax.jit(program)(*program.args)
    found = run.replicas(plan.program, plan.mesh, program.args, poison=True)
    for want, copies, exact in zip(expected, found, program.exact, strict=True):
        for got in np.asarray(copies):
            same(got, np.asarray(want), exact)


def same(got: np.ndarray, want: np.ndarray, exact: bool) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if exact:
        np.testing.assert_array_equal(got, want)
    else:
        scale = 1 + float(np.max(np.abs(want), initial=0))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * scale)


class Gradient(Drawn):
    """The gradient of a sum over a program's outputs, weighted so that no two entries are alike."""

    @classmethod
    def of(cls, program: Drawn) -> "Gradient":
        fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
        count = len(program.args)
        return cls(**fields | {"exact": (False,) * count, "out_specs": (None,) * count})

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return jax.grad(self.loss, argnums=tuple(range(len(args))))(*args)

    def loss(self, *args: Any) -> Any:
        total = jnp.float32(0)
        for out in Drawn.__call__(self, *args):
            if jnp.issubdtype(out.dtype, jnp.floating):
                weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
                total += jnp.sum(out * weights)
        return total


@hypothesis.given(programs())
@hypothesis.settings(max_examples=40)
def test_the_plan_computes_what_the_function_computes(program: Drawn) -> None:
    agrees(program)


@hypothesis.given(programs(smooth=True, steps=6))
@hypothesis.settings(max_examples=30)
def test_the_plan_computes_the_gradient(program: Drawn) -> None:
    agrees(Gradient.of(program))


@pytest.mark.exhaustive
@hypothesis.given(programs(steps=14))
@hypothesis.settings(max_examples=400)
def test_large_programs(program: Drawn) -> None:
    agrees(program)


@pytest.mark.exhaustive
@hypothesis.given(programs(smooth=True, steps=10))
@hypothesis.settings(max_examples=400)
def test_large_gradients(program: Drawn) -> None:
    agrees(Gradient.of(program))
