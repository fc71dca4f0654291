"""Control flow, solvers, einsum and custom derivatives: the values, and what they send."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

import gspmd
from gspmd import P
from tests.agreement import agrees, kinds

MESH = "x=2,y=4"
Sent = dict[str, int]


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(fn: Callable[..., Any], *args: Any, in_specs: Any = None) -> gspmd.Plan:
    """The plan of `fn`, which computes what `fn` does."""
    plan = gspmd.plan(fn, *args, mesh=MESH, in_specs=in_specs)
    agrees(plan, fn, *args)
    return plan


def trips(plan: gspmd.Plan) -> set[int]:
    """How often collectives run."""
    return {c.trips for c in plan.collectives}


# --- loops


def decayed(x: jax.Array, *, reverse: bool = False) -> Any:
    """A state that decays while rows are added to it, and all its past."""

    def step(state: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(state) + row, state

    return lax.scan(step, jnp.zeros(x.shape[1:]), x, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [8, 7])
def test_a_scan_over_a_split_dim_gathers_once_before_it(rows: int, reverse: bool) -> None:
    x = array(rows, 6, 4)
    plan = check(functools.partial(decayed, reverse=reverse), x, in_specs=P("x"))
    assert kinds(plan) == {"all_gather": 1}
    assert trips(plan) == {1}
    (gather,) = plan.collectives
    assert gather.wire_bytes == -(-rows // 2) * 6 * 4 * 4


def test_the_gradient_of_a_scan_over_a_split_dim() -> None:
    plan = check(jax.grad(lambda x: decayed(x)[1].sum()), array(8, 6, 4), in_specs=P("y"))
    assert trips(plan) == {1}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_over_a_whole_dim_sends_nothing(reverse: bool) -> None:
    fn = functools.partial(decayed, reverse=reverse)
    plan = check(fn, array(8, 6, 4), in_specs=P(None, "x", "y"))
    assert not plan.collectives
    assert plan.out_specs == (P("x", "y"), P(None, "x", "y"))


def test_a_scan_whose_rows_are_split_twice() -> None:
    plan = check(decayed, array(8, 6, 4), in_specs=P("y", "x"))
    assert kinds(plan) == {"all_gather": 1}
    assert plan.collectives[0].axes == ("y",)


def test_a_recurrent_layer_keeps_its_state_split() -> None:
    def run(x: jax.Array, w: jax.Array) -> Any:
        return lax.scan(lambda h, row: (jnp.tanh(h @ w + row), h), jnp.zeros((8, 16)), x)

    plan = check(run, array(5, 8, 16), array(16, 16) / 4, in_specs=(P(None, "x"), None))
    assert not plan.collectives
    plan = check(run, array(5, 8, 16), array(16, 16) / 4, in_specs=(P(None, "x"), P(None, "y")))
    assert {(c.kind, c.trips) for c in plan.collectives} == {("all_gather", 5)}


def test_a_sum_over_rows_in_a_loop_is_paid_inside_the_loop() -> None:
    """The next step is not linear in it."""

    def run(x: jax.Array) -> Any:
        return lax.scan(lambda c, row: (jnp.sin(c + row.sum()), c), jnp.float32(0), x)

    plan = check(run, array(5, 8), in_specs=P(None, "x"))
    assert [(c.kind, c.trips, c.bytes) for c in plan.collectives] == [("all_reduce", 5, 4)]


def test_while_with_a_split_carry() -> None:
    def counted(x: jax.Array) -> Any:
        return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, jnp.cos(c[1])), (0, x))

    plan = check(counted, array(8, 6), in_specs=P("x", "y"))
    assert not plan.collectives
    assert plan.out_specs[1] == P("x", "y")

    def until_small(x: jax.Array) -> Any:
        return lax.while_loop(lambda c: jnp.abs(c).max() > 0.1, lambda c: c / 2, x)

    plan = check(until_small, array(8, 6), in_specs=P("x", "y"))
    assert plan.out_specs == P("x", "y")
    assert {(c.kind, c.bytes, c.trips) for c in plan.collectives} == {("all_reduce", 4, -1)}
    assert {finding.code for finding in plan.findings} == {"unbounded-loop"}


def test_while_with_a_product_in_it() -> None:
    def powers(x: jax.Array) -> Any:
        return lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (0, x)
        )

    check(powers, array(8, 8) / 4, in_specs=P("x", "y"))


def test_fori_loop_over_rows() -> None:
    def added(x: jax.Array) -> Any:
        rows = functools.partial(lax.dynamic_index_in_dim, x, keepdims=False)
        return lax.fori_loop(0, 3, lambda i, c: c + rows(i), jnp.zeros(x.shape[1:]))

    assert not check(added, array(8, 6), in_specs=P(None, "x")).collectives
    plan = check(added, array(8, 6), in_specs=P("x"))
    # One row, not all of them, in each of the three steps.
    assert plan.wire_bytes <= 3 * 2 * 6 * 4 / 2


# --- branches


@pytest.mark.parametrize("pick", [True, False])
def test_branches_that_want_different_splits(pick: bool) -> None:
    def either(pick: jax.Array, a: jax.Array, b: jax.Array) -> Any:
        return lax.cond(
            pick,
            lambda a, b: gspmd.annotate(jnp.sin(a), P("x")),
            lambda a, b: gspmd.annotate(jnp.cos(b), P(None, "x")),
            a,
            b,
        )

    plan = check(either, np.bool_(pick), array(8, 6), array(8, 6, seed=1))
    assert kinds(plan) == {"all_to_all": 1}


@pytest.mark.parametrize("index", [0, 1, 2, 7])
def test_switch(index: int) -> None:
    def one_of(index: jax.Array, a: jax.Array) -> Any:
        return lax.switch(index, [jnp.sin, jnp.transpose, lambda a: a @ a], a)

    check(one_of, np.int32(index), array(8, 8), in_specs=(None, P("x", "y")))


def test_a_gradient_through_branches() -> None:
    def loss(a: jax.Array, w: jax.Array) -> Any:
        return lax.cond(a.sum() > 0, lambda a: (a @ w).sum(), lambda a: jnp.sin(a).sum(), a)

    check(jax.grad(loss, argnums=(0, 1)), array(8, 6), array(6, 4), in_specs=(P("x", "y"), None))


def test_vmap_of_branches_and_loops() -> None:
    def each(n: jax.Array, row: jax.Array) -> jax.Array:
        row = lax.cond(n > 2, jnp.sin, jnp.cos, row)
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] * 2), (0, row))[1]

    check(jax.vmap(each), np.arange(8, dtype=np.int32) % 5, array(8, 6), in_specs=(P("x"), None))


# --- associative scans


@pytest.mark.parametrize("rows", [16, 13])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scan(rows: int, axis: int, reverse: bool) -> None:
    """The recurrence `h = a h + b`; along other dims it is free."""

    def compose(f: Any, g: Any) -> Any:
        return f[0] * g[0], g[0] * f[1] + g[1]

    def run(a: jax.Array, b: jax.Array) -> Any:
        return lax.associative_scan(compose, (a, b), reverse=reverse, axis=axis)

    a, b = array(rows, 12), array(rows, 12, seed=1)
    check(run, a, b, in_specs=P("x", "y"))
    free = P(None, "y") if axis == 0 else P("x")
    assert not check(run, a, b, in_specs=free).collectives


def test_associative_scan_of_matrices() -> None:
    fn = functools.partial(lax.associative_scan, jnp.matmul)
    check(fn, array(8, 3, 3) / 2, in_specs=P("y"))


# --- einsum

EINSUMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "ij,jk->ik": ((8, 12), (12, 4)),
    "ij,jk": ((8, 12), (12, 4)),
    "ij,jk->ki": ((8, 12), (12, 4)),
    "ij,kj->ik": ((8, 12), (4, 12)),
    "ij,ij->": ((8, 12), (8, 12)),
    "ij,ij->ij": ((8, 12), (8, 12)),
    "ij,ij->j": ((8, 12), (8, 12)),
    "i,j->ij": ((8,), (12,)),
    "i,i": ((8,), (8,)),
    "ij->ji": ((8, 12),),
    "ij->": ((8, 12),),
    "ii->i": ((8, 8),),
    "ii": ((8, 8),),
    "iij->j": ((8, 8, 4),),
    "bij,bjk->bik": ((4, 8, 12), (4, 12, 4)),
    "bij,jk->bik": ((4, 8, 12), (12, 4)),
    "...ij,...jk->...ik": ((4, 8, 12), (4, 12, 4)),
    "...ij,jk->...ik": ((2, 4, 8, 12), (12, 4)),
    "bqhd,bkhd->bhqk": ((4, 8, 2, 4), (4, 6, 2, 4)),
    "bhqk,bkhd->bqhd": ((4, 2, 8, 6), (4, 6, 2, 4)),
    "ij,jk,kl->il": ((8, 12), (12, 4), (4, 6)),
    "ij,ik,il->jkl": ((8, 12), (8, 4), (8, 6)),
    "ijk,ilm,njm,nlk,abc->": ((4, 3, 2), (4, 5, 6), (7, 3, 6), (7, 5, 2), (2, 3, 2)),
    "ab,cd->abcd": ((4, 3), (2, 4)),
    "a,a,a->a": ((8,), (8,), (8,)),
    "ba,c->b": ((8, 6), (4,)),
}


@pytest.mark.parametrize("text", EINSUMS)
def test_einsum(text: str) -> None:
    args = [array(*shape, seed=i) for i, shape in enumerate(EINSUMS[text])]
    specs = [P("x", *("y" for _ in x.shape[1:2])) for x in args]
    fn = functools.partial(jnp.einsum, text)
    check(fn, *args, in_specs=tuple(specs))
    check(fn, *args, in_specs=(P(*(None for _ in args[0].shape[1:]), "y"), *specs[1:]))


def test_einsum_sends_no_more_than_it_must() -> None:
    """Queries of a device against the keys of its own heads."""
    fn = functools.partial(jnp.einsum, "bqhd,bkhd->bhqk")
    plan = check(fn, array(4, 8, 4, 2), array(4, 6, 4, 2), in_specs=P("x", None, "y"))
    assert not plan.collectives
    assert plan.out_specs == P("x", "y", None, None)


# --- custom derivatives and remat


@jax.custom_jvp
def safe_log(x: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(x, 1e-3))


@safe_log.defjvp
def _safe_log_jvp(primals: Any, tangents: Any) -> Any:
    return safe_log(*primals), 3 * tangents[0] / jnp.maximum(primals[0], 1e-3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clipped(x: jax.Array, most: float) -> jax.Array:
    return x


clipped.defvjp(lambda x, most: (x, None), lambda most, _, g: (jnp.clip(g, -most, most),))


def test_custom_derivatives() -> None:
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(safe_log(jnp.abs(clipped(x @ w, 0.5))))

    specs = (P("x", "y"), P("y"))
    x, w = array(8, 12), array(12, 4)
    check(loss, x, w, in_specs=specs)
    plan = check(jax.grad(loss, argnums=(0, 1)), x, w, in_specs=specs)
    check(lambda x: jax.jvp(lambda x: safe_log(x).sum(), (x,), (x,)), x, in_specs=P("x", "y"))
    gradient = gspmd.plan(jax.grad(lambda x: jnp.sum(clipped(x, 0.5) * 9)), x, mesh=MESH)
    np.testing.assert_array_equal(gradient.simulate(x), np.full_like(x, 0.5))
    assert {c.kind for c in plan.collectives} <= {"all_reduce", "reduce_scatter"}


def test_derivatives_that_are_not_kept_apart() -> None:
    """`custom_vjp` whose forward pass is optimized for remat, and a linear call."""

    @jax.custom_vjp
    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,), optimize_remat=True)
    check(jax.grad(lambda x: (sine(x) ** 2).sum()), array(8, 6), in_specs=P("x"))

    def shifted(x: jax.Array) -> jax.Array:
        return jax.custom_derivatives.linear_call(
            lambda r, x: r * x, lambda r, g: r * g, jnp.float32(3), x
        )

    check(shifted, array(8, 6), in_specs=P("x"))

    @jax.custom_batching.custom_vmap
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    doubled.def_vmap(lambda size, batched, x: (2 * x, batched[0]))
    check(lambda x: doubled(x), array(8, 6), in_specs=P("x"))


POLICIES: dict[str, Any] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("hidden"),
    "no batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


@pytest.mark.parametrize("name", POLICIES)
def test_checkpoint_policies(name: str) -> None:
    @functools.partial(jax.checkpoint, policy=POLICIES[name])
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        hidden = checkpoint_name(jnp.tanh(x @ w), "hidden")
        return jnp.sin(hidden @ w.T)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(layer(layer(x, w), w) ** 2)

    plan = check(
        jax.grad(loss, argnums=(0, 1)), array(8, 4), array(4, 12), in_specs=(P("x"), P(None, "y"))
    )
    again = {c.phase for c in plan.collectives} & {"rematerialized"}
    assert bool(again) == (name in ("nothing", "none", "names"))


# --- solvers and linear algebra


def positive(*batch: int, n: int = 8) -> np.ndarray:
    """Matrices with eigenvalues around 1."""
    a = array(*batch, n, n)
    return (a @ np.swapaxes(a, -1, -2) / (4 * n) + np.eye(n)).astype(np.float32)


SOLVERS: dict[str, Callable[[Any, Any], Any]] = {
    "jnp.linalg.solve": jnp.linalg.solve,
    "cg": lambda a, b: jsp.sparse.linalg.cg(lambda x: a @ x, b, maxiter=6)[0],
    "gmres": lambda a, b: jsp.sparse.linalg.gmres(lambda x: a @ x, b, maxiter=2, restart=4)[0],
    "bicgstab": lambda a, b: jsp.sparse.linalg.bicgstab(lambda x: a @ x, b, maxiter=4)[0],
    "custom_linear_solve": lambda a, b: lax.custom_linear_solve(
        lambda x: a @ x, b, lambda _, y: jnp.linalg.inv(a) @ y, symmetric=True
    ),
    "cho_solve": lambda a, b: jsp.linalg.cho_solve(jsp.linalg.cho_factor(a), b),
    "lu_solve": lambda a, b: jsp.linalg.lu_solve(jsp.linalg.lu_factor(a), b),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("specs", [(P("x", "y"), None), (P("y"), P("x"))])
def test_solvers_and_their_gradients(name: str, specs: Any) -> None:
    solve = SOLVERS[name]
    a, b = positive(), array(8)
    check(solve, a, b, in_specs=specs)
    check(jax.grad(lambda a, b: (solve(a, b) ** 2).sum(), argnums=(0, 1)), a, b, in_specs=specs)


def test_the_right_hand_sides_of_a_solve_are_free() -> None:
    plan = check(jnp.linalg.solve, positive(), array(8, 8), in_specs=(None, P(None, ("x", "y"))))
    assert not plan.collectives


BATCHED: dict[str, Callable[[Any], Any]] = {
    "cholesky": jnp.linalg.cholesky,
    "gradient of cholesky": jax.grad(lambda a: jnp.linalg.cholesky(a).sum()),
    "inv": jnp.linalg.inv,
    "det": jnp.linalg.det,
    "slogdet": jnp.linalg.slogdet,
    "eigvalsh": jnp.linalg.eigvalsh,
    "eigvals": lambda a: jnp.sort(jnp.abs(jnp.linalg.eigvals(a)), -1),
    "svd": lambda a: jnp.linalg.svd(a, compute_uv=False),
    "qr": lambda a: jnp.abs(jnp.linalg.qr(a).R),
    "pivoted qr": lambda a: jnp.abs(jsp.linalg.qr(a[0], pivoting=True)[1]),
    "pinv": jnp.linalg.pinv,
    "norm": lambda a: jnp.linalg.norm(a, axis=(1, 2)),
    "matrix_norm": lambda a: jnp.linalg.matrix_norm(a, ord=2),
    "matrix_power": lambda a: jnp.linalg.matrix_power(a, 3),
    "matrix_rank": jnp.linalg.matrix_rank,
    "cond": jnp.linalg.cond,
    "expm": jsp.linalg.expm,
    "solve": lambda a: jnp.linalg.solve(a, a[:, :, :3]),
    "outer": lambda a: jnp.linalg.outer(a[0, 0], a[1, 0]),
    "multi_dot": lambda a: jnp.linalg.multi_dot([a[0], a[1], a[2]]),
    "lstsq": lambda a: jnp.linalg.lstsq(a[0], a[1])[0],
    "tensorsolve": lambda a: jnp.linalg.tensorsolve(a[0], a[1, 0]),
    "cross": lambda a: jnp.linalg.cross(a[:, :3], a[:, 1:], axis=1),
    "trace": jnp.linalg.trace,
    "vecdot": lambda a: jnp.linalg.vecdot(a, a + 1),
}
ACROSS = {"pivoted qr", "outer", "multi_dot", "lstsq", "tensorsolve"}  # they take single matrices


@pytest.mark.parametrize("name", BATCHED)
def test_linear_algebra_on_stacks_sends_nothing(name: str) -> None:
    plan = check(BATCHED[name], positive(16, n=4), in_specs=P(("x", "y")))
    assert bool(plan.collectives) == (name in ACROSS)
    assert not plan.findings


@pytest.mark.parametrize("name", ["cholesky", "inv", "det", "svd", "qr", "expm"])
def test_linear_algebra_on_split_matrices(name: str) -> None:
    check(BATCHED[name], positive(2), in_specs=P(None, "x", "y"))


def test_a_layout_constraint_is_pointwise() -> None:
    layout = Layout(major_to_minor=(1, 0))
    plan = check(lambda x: with_layout_constraint(x, layout) + 1, array(8, 6), in_specs=P("x"))
    assert not plan.findings
    assert not plan.collectives
