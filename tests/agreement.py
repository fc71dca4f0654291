"""What most tests ask of a plan: does it compute the function, and with which collectives?"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import gspmd
from gspmd import run


def agrees(
    plan: gspmd.Plan, fn: Callable[..., Any], *args: Any, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Every device's every output is that of `fn`; padding, full of NaN, shows nowhere."""
    expected = jax.tree.leaves(jax.jit(fn)(*args))
    found = run.replicas(plan.program, plan.mesh, jax.tree.leaves(args), poison=True)
    for want, copies in zip(expected, found, strict=True):
        want = np.broadcast_to(np.asarray(want), copies.shape)
        np.testing.assert_allclose(copies, want, rtol=rtol, atol=atol)


def kinds(plan: gspmd.Plan) -> dict[str, int]:
    """How many collectives of each kind the plan has."""
    return dict(Counter(c.kind for c in plan.collectives))
