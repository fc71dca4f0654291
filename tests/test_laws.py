"""The law: whatever is drawn, the plan computes what the function computes, on every device."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from drawn import Drawn, programs

import gspmd
from gspmd import run


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


def same(got: Any, want: Any, exact: bool) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if exact:
        np.testing.assert_array_equal(got, want)
    else:
        scale = 1 + float(np.max(np.abs(want), initial=0))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * scale)


@hypothesis.given(programs())
@hypothesis.settings(max_examples=40)
def test_plan_computes_what_the_function_computes(program: Drawn) -> None:
    agrees(program)


def gradient(program: Drawn) -> Drawn:
    """The gradient of a sum over the outputs, weighted so that no two entries are alike."""
    import dataclasses

    def loss(*args: Any) -> Any:
        total = jnp.float32(0)
        for out in program(*args):
            if jnp.issubdtype(out.dtype, jnp.floating):
                weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
                total += jnp.sum(out * weights)
        return total

    class Gradient(Drawn):
        def __call__(self, *args: Any) -> tuple[Any, ...]:
            return jax.grad(loss, argnums=tuple(range(len(args))))(*args)

    fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    count = len(program.args)
    return Gradient(
        **{**fields, "exact": (False,) * count, "out_specs": (None,) * count}
    )


@hypothesis.given(programs(smooth=True, steps=6))
@hypothesis.settings(max_examples=25)
def test_plan_computes_the_gradient(program: Drawn) -> None:
    agrees(gradient(program))
