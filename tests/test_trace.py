"""A traced program computes what its function does, and knows where everything came from."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd._compat import Sources
from gspmd.annotate import annotate
from gspmd.errors import SpecError, TraceError
from gspmd.ir import Literal, Op, Program, Value, verify
from gspmd.sharding import Mesh
from gspmd.trace import Traced, trace

MESH = Mesh((("x", 2), ("y", 4)))
TYPES = {"Auto": (AxisType.Auto,) * 2, "Explicit": (AxisType.Explicit,) * 2}
FILE = Sources().relative(__file__)  # as messages show it
F32 = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def device_mesh(kind: str = "Auto") -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=TYPES[kind])


def evaluate(program: Program, args: Sequence[Any]) -> list[Any]:
    """The program op by op, its bodies under JAX's own control flow."""
    env: dict[Value, Any] = dict(zip(program.ins, args, strict=True)) | dict(program.consts)

    def read(operand: Value | Literal) -> Any:
        return operand.value if isinstance(operand, Literal) else env[operand]

    for op in program.ops:
        outs = run(op, [read(x) for x in op.ins])
        assert len(outs) == len(op.outs)
        for value, out in zip(op.outs, outs, strict=True):
            assert (value.shape, value.dtype) == (out.shape, out.dtype), op.name
        env.update(zip(op.outs, outs, strict=True))
    return [read(x) for x in program.outs]


def run(op: Op, ins: list[Any]) -> Sequence[Any]:
    p = op.params
    bodies = [functools.partial(evaluate, body) for body in op.bodies]
    if op.name == "scan":
        a, b = p["num_consts"], p["num_consts"] + p["num_carry"]

        def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            out = bodies[0]([*ins[:a], *carry, *xs])
            return out[: b - a], out[b - a :]

        options = {key: p[key] for key in ("length", "reverse", "unroll")}
        carry, ys = lax.scan(step, ins[a:b], ins[b:], **options)
        return [*carry, *ys]
    if op.name == "while":
        a, b = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        return lax.while_loop(
            lambda carry: bodies[0]([*ins[:a], *carry])[0],
            lambda carry: bodies[1]([*ins[a:b], *carry]),
            ins[b:],
        )
    if op.name == "cond":
        return lax.switch(ins[0], [lambda *xs, f=f: f(xs) for f in bodies], *ins[1:])
    if op.name == "remat":
        return jax.checkpoint(bodies[0], prevent_cse=p["prevent_cse"], policy=p["policy"])(ins)
    assert op.call is not None
    assert not op.bodies
    out = op.call(*ins, **p)
    return out if isinstance(out, (list, tuple)) else [out]


# ---- the law: same values as the function ----


@jax.jit
def nested(x: Any) -> Any:
    return jax.jit(lambda y: jnp.sin(y) * 2)(x) + jax.nn.silu(x)


@jax.custom_jvp
def custom_j(x: Any) -> Any:
    return x**3


@custom_j.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return custom_j(*primals), 7.0 * tangents[0]


@jax.custom_vjp
def custom_v(x: Any) -> Any:
    return jnp.exp(x)


custom_v.defvjp(lambda x: (custom_v(x), x), lambda x, g: (5.0 * g * x,))


def remat(x: Any) -> Any:
    policy = jax.checkpoint_policies.dots_saveable
    f = jax.checkpoint(lambda x: jnp.tanh(x @ x.T) @ jnp.sin(x), policy=policy)
    return f(f(x))


def scan(x: Any) -> Any:
    w = jnp.cos(x.T @ x)

    def body(carry: Any, row: Any) -> Any:
        carry = jax.checkpoint(lambda c: jnp.tanh(c @ w) + row)(carry)
        return carry, carry[0]

    return lax.scan(body, x, x, reverse=True, unroll=2)


def while_(x: Any) -> Any:
    limit = x.max() + 5
    return lax.while_loop(lambda s: s[0] < limit, lambda s: (s[0] * 2, s[1] + x), (1.0, x))


def fori(x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, c: c * x[i % 4], x)


def cond(x: Any) -> Any:
    y = lax.cond(x.sum() > 0, lambda a: a + 1, lambda a: a * a, x)
    return lax.switch(2, [jnp.sin, jnp.cos, lambda a: a - 3], y)


TABLE = np.arange(32, dtype=np.float32).reshape(4, 8)


def closed_over(x: Any) -> Any:
    return lax.map(lambda row: row * TABLE[1] + 1, x) + TABLE, 3.0, jnp.array(TABLE[0])


def library(x: Any) -> Any:
    y = jnp.where(x > 0, x, 0.0).reshape(2, 2, 8).var(axis=1)
    return jax.nn.softmax(y), jax.nn.gelu(x), jnp.einsum("ij,kj->ik", x, x).sort(), x[1:3, ::2]


def annotated(x: Any) -> Any:
    x = annotate(x * 2, P("x", P.UNCONSTRAINED))
    return lax.with_sharding_constraint(jax.vmap(lambda r: annotate(r, P("y")))(x), P("x")) ** 2


def random(x: Any) -> Any:
    key = jax.random.fold_in(jax.random.key(0), 1)
    a, b = jax.random.split(key)
    return jax.random.normal(a, (3,)) + x[0, 0], jax.random.bernoulli(b, 0.3, x.shape) * x


SAMPLES = [nested, custom_j, custom_v, remat, scan, while_, fori, cond, closed_over, library]
SAMPLES += [annotated, random]
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def grad_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    def loss(x: Any) -> Any:
        return sum(jnp.sum(jnp.asarray(y) ** 2) for y in jax.tree.leaves(fn(x)))

    loss.__name__ = f"grad_{fn.__name__}"
    return jax.value_and_grad(loss)


def check(fn: Callable[..., Any], *args: Any, **options: Any) -> Traced:
    traced = trace(fn, args, mesh=MESH, **options)
    verify(traced.program)
    leaves = jax.tree.leaves(args)
    outs = jax.jit(functools.partial(evaluate, traced.program))(leaves)
    with jax.set_mesh(device_mesh()):
        expected = jax.jit(fn)(*args)
    assert traced.in_tree == jax.tree.structure((args, {}))
    assert traced.out_tree == jax.tree.structure(expected)
    for got, want in zip(outs, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    return traced


@pytest.mark.parametrize("fn", SAMPLES, ids=lambda fn: fn.__name__)
def test_same_values(fn: Callable[..., Any]) -> None:
    check(fn, X)


@pytest.mark.parametrize("fn", [f for f in SAMPLES if f is not while_], ids=lambda fn: fn.__name__)
def test_same_values_of_the_gradient(fn: Callable[..., Any]) -> None:
    check(grad_of(fn), X)


def adamw_step(params: Any, state: Any, key: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
        def block(x: Any, w: Any) -> Any:
            return jax.nn.relu(x @ w) + x, None

        x, _ = lax.scan(jax.checkpoint(block), batch, params["layers"])
        keep = jax.random.bernoulli(key, 0.9, x.shape)
        return jnp.mean((jnp.where(keep, x, 0) @ params["out"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optax.adamw(1e-3).update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def adamw_args() -> tuple[Any, ...]:
    params = {"layers": jnp.ones((3, 8, 8)) * 0.1, "out": jnp.ones((8, 2))}
    return params, optax.adamw(1e-3).init(params), jax.random.key(1), X


def test_a_training_step() -> None:
    traced = check(adamw_step, *adamw_args(), donate_argnums=(0, 1))
    assert traced.parameters == ("params", "state", "key", "batch")
    assert traced.in_names[:4] == (
        "params/layers",
        "params/out",
        "state/0/count",
        "state/0/mu/layers",
    )
    assert traced.in_names[-2:] == ("key", "batch")
    assert traced.out_names[0] == "out/0/layers"
    assert traced.out_names[-1] == "out/2"
    assert traced.donated == (True,) * (len(traced.donated) - 2) + (False, False)
    assert [v.name for v in traced.program.ins] == list(traced.in_names)


def test_bodies_and_params() -> None:
    traced = check(grad_of(scan), X)
    ops = {op.name: op for op, _ in traced.program.walk()}
    assert {"scan", "remat"} <= set(ops)
    assert set(ops["scan"].params) == {"num_consts", "num_carry", "length", "reverse", "unroll"}
    assert set(ops["remat"].params) == {"prevent_cse", "policy", "differentiated"}
    assert not {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"} & set(ops)


# ---- arguments ----


def test_argument_kinds() -> None:
    def fn(array: Any, *rest: Any, scale: Any = 1, flag: Any) -> Any:
        return array * rest[0][0] * scale, rest[1], flag

    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    args = (np.ones((2, 3)), [2, None, 3.5], key)
    traced = trace(fn, args, {"flag": True, "scale": F32.update(shape=(3,))}, mesh=MESH)
    assert traced.in_names == ("array", "rest/0/0", "rest/0/2", "rest/1", "flag", "scale")
    types = [value.type for value in traced.program.ins]
    assert types == ["f32[2,3]", "i32[]", "f32[]", "key<fry>[]", "bool[]", "f32[3]"]
    assert traced.out_names == ("out/0", "out/1", "out/2")


def test_flax_names() -> None:
    model = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    traced = trace(lambda state, x: nnx.merge(graph, state)(x), (state, X), mesh=MESH)
    assert traced.in_names == ("state/bias", "state/kernel", "x")
    assert trace(lambda m, x: m(x), (model, X), mesh=MESH).in_names == ("m/bias", "m/kernel", "x")
    assert trace(nnx.jit(lambda m, x: m(x)), (model, X), mesh=MESH).out_names == ("out",)


def test_static_arguments() -> None:
    def fn(n: int, x: Any, mode: str) -> Any:
        return x * 2 if mode == "double" else [x] * n

    traced = trace(fn, (3, F32, "many"), mesh=MESH, static_argnums=(0, -1), donate_argnums=1)
    assert (traced.in_names, traced.parameters, traced.donated) == (("x",), ("x",), (True,))
    assert traced.out_names == ("out/0", "out/1", "out/2")


def test_under_an_outer_trace() -> None:
    inner: list[Program] = []

    @jax.jit
    def outer(x: Any) -> Any:
        inner.append(trace(lambda a: jnp.sin(a) + X, (x,), mesh=MESH).program)
        return evaluate(inner[0], [x])[0]

    np.testing.assert_allclose(outer(X), np.sin(X) + X, rtol=1e-6)


# ---- constraints ----


def constraints(traced: Traced) -> list[tuple[Any, str]]:
    ops = (op for op, _ in traced.program.walk() if op.name == "constraint")
    return [(op.params["dims"], op.params["label"]) for op in ops]


def test_annotations_under_transformations() -> None:
    def fn(x: Any) -> Any:
        x = jax.vmap(lambda r: annotate(jnp.sin(r), P("rows")), in_axes=1, out_axes=1)(x)
        x = jax.vmap(lambda r: annotate(r, P()), spmd_axis_name="y")(x)

        def body(carry: Any, _: Any) -> Any:
            return annotate(jax.checkpoint(jnp.tanh)(carry), P(None, P.UNCONSTRAINED)), None

        return lax.scan(body, x, None, length=2)[0].sum()

    forward = [((("x",), None), "annotate"), ((("y",), ()), "annotate"), (((), None), "annotate")]
    rules = {"rows": "x"}
    assert constraints(trace(fn, (F32,), mesh=MESH, rules=rules)) == forward
    traced = trace(jax.grad(fn), (F32,), mesh=MESH, rules=rules)
    assert constraints(traced) == [*forward, *reversed(forward)]


def test_annotate_is_the_identity() -> None:
    def fn(x: Any) -> Any:
        return annotate(jnp.sin(x), P("anything")).sum()

    np.testing.assert_allclose(annotate(X, P("x")), X)
    np.testing.assert_allclose(annotate(X, NamedSharding(device_mesh(), P("x"))), X)
    for wrapped in (jax.jit(fn), jax.checkpoint(fn), jax.vmap(fn), jax.vmap(fn, 1)):
        gradient = jax.grad(lambda x, wrapped=wrapped: wrapped(x).sum())(X)
        np.testing.assert_allclose(gradient, np.cos(X), rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(fn)(X[0]), -np.diag(np.sin(X[0])), rtol=1e-6)
    assert annotate(2.0, P()) == 2.0


@pytest.mark.parametrize("mesh", ["none", "Auto", "Explicit"])
def test_with_sharding_constraint(mesh: str) -> None:
    """Read in a mesh context of the user's, or without one."""

    def fn(x: Any) -> Any:
        x = lax.with_sharding_constraint(x * 2, P("x"))
        x = lax.with_sharding_constraint(x, NamedSharding(device_mesh(), P("y", P.UNCONSTRAINED)))
        rows = NamedSharding(device_mesh(), P("y"))
        return jax.vmap(lambda r: lax.with_sharding_constraint(r, rows))(x)

    with jax.set_mesh(None if mesh == "none" else device_mesh(mesh)):
        traced = trace(fn, (F32,), mesh=MESH)
    label = "with_sharding_constraint"
    expected = [(("x",), ()), (("y",), None), (None, ("y",))]
    assert constraints(traced) == [(dims, label) for dims in expected]


def test_another_mesh_in_context() -> None:
    other = jax.make_mesh((8,), ("z",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(other):
        small = Mesh((("x", 2),))
        traced = trace(lambda x: lax.with_sharding_constraint(x, P("x")), (F32,), mesh=small)
    assert constraints(traced) == [((("x",), ()), "with_sharding_constraint")]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_jit_shardings(kind: str) -> None:
    mesh = device_mesh(kind)
    s = NamedSharding(mesh, P(None, "x"))
    options = {"in_shardings": (s, None), "out_shardings": (None, s), "donate_argnums": 1}
    fn = jax.jit(lambda a, b: (a + b, b.T.reshape(4, 8)), **options)
    traced = trace(fn, (F32, F32), mesh=MESH)
    assert traced.in_constraints == (((), ("x",)), None)
    assert traced.out_constraints == (None, ((), ("x",)))
    assert traced.donated == (False, True)
    assert constraints(traced) == []

    traced = trace(lambda a, b: fn(a * 2, b), (F32, F32), mesh=MESH)
    assert traced.in_constraints == traced.out_constraints == (None, None)
    assert traced.donated == (False, False)
    ops = [op.name for op in traced.program.ops]
    assert ops == ["mul", "constraint", "add", "transpose", "reshape", "constraint"]
    given = (((), ("x",)), "in_shardings"), (((), ("x",)), "out_shardings")
    assert constraints(traced) == list(given)


def test_jit_with_bare_specs() -> None:
    fn = jax.jit(lambda a: a * 2, in_shardings=P("x"), out_shardings=P("y"))
    for context in (None, device_mesh("Auto"), device_mesh("Explicit")):
        with jax.set_mesh(context):
            traced = trace(fn, (F32,), mesh=MESH)
        assert traced.in_constraints == ((("x",), ()),)
        assert traced.out_constraints == ((("y",), ()),)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_committed_arguments(kind: str) -> None:
    mesh = device_mesh(kind)
    placed = jax.device_put(X, NamedSharding(mesh, P("x")))
    struct = F32.update(sharding=NamedSharding(mesh, P(None, "y")))
    other = jax.make_mesh((8,), ("z",), axis_types=(AxisType.Auto,))
    elsewhere = jax.device_put(np.ones(8), NamedSharding(other, P("z")))
    args = (placed, struct, jnp.ones(3), elsewhere)
    traced = trace(lambda a, b, c, d: (a @ b.T, c, d), args, mesh=MESH)
    assert traced.in_constraints == ((("x",), ()), ((), ("y",)), None, None)


def explicit_program(a: Any, b: Any) -> Any:
    c = jnp.einsum("ij,kj->ik", a, b, out_sharding=P("x", None))
    c = jax.sharding.reshard(jnp.where(c > 0, c, 0.0), P(None, "y"))
    return c.reshape(2, 2, 4) + jnp.zeros((2, 2, 4), out_sharding=P(None, None, "y"))


def test_explicit_mode() -> None:
    mesh = device_mesh("Explicit")
    sharded = F32.update(sharding=NamedSharding(mesh, P("x")))
    with jax.set_mesh(mesh):
        ambient = trace(explicit_program, (sharded, F32), mesh=MESH)
    for traced in (ambient, trace(explicit_program, (sharded, F32), mesh=MESH)):
        assert traced.in_constraints == ((("x",), ()), None)
        assert constraints(traced) == [
            ((("x",), ()), "out_sharding"),
            ((("x",), ()), "sharding"),  # of the zero in `where`
            (((), ("y",)), "reshard"),
            (((), (), ("y",)), "sharding"),
        ]
        asked = [
            op.params.get(k) for op in traced.program.ops for k in ("out_sharding", "sharding")
        ]
        assert not any(asked)
        (out,) = evaluate(traced.program, (X, X))
        c = np.maximum(X @ X.T, 0)
        np.testing.assert_allclose(out, c.reshape(2, 2, 4), rtol=1e-5)


def test_shard_map_is_a_body() -> None:
    fn = jax.shard_map(
        lambda a: lax.psum(a, "x"), mesh=device_mesh(), in_specs=P("x"), out_specs=P()
    )
    (given, op) = trace(fn, (F32,), mesh=MESH).program.ops
    assert (given.name, op.name) == ("constraint", "shard_map")
    assert op.params["in_dims"] == ((("x",), ()),)
    assert op.params["out_dims"] == (((), ()),)
    ((inner,),) = (body.ops for body in op.bodies)
    assert (inner.name, inner.params) == ("all_reduce", {"axes": ("x",), "reduction": "sum"})
    assert inner.ins == op.bodies[0].ins


def test_a_linear_solve_is_its_solution() -> None:
    def solved(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.custom_linear_solve(
            lambda x: a @ x, b, lambda _, y: jnp.linalg.inv(a) @ y, symmetric=True
        )

    a = np.eye(4, dtype=np.float32) * 3 + 1
    program = trace(solved, (a, X[:, 0]), mesh=MESH).program
    assert "custom_linear_solve" not in {op.name for op, _ in program.walk()}
    (out,) = evaluate(program, (a, X[:, 0]))
    np.testing.assert_allclose(out, np.linalg.solve(a, X[:, 0]), rtol=1e-4)


def test_device_put_is_a_constraint() -> None:
    s = NamedSharding(device_mesh(), P("x"))
    traced = trace(lambda a: jax.device_put(jax.device_put(a), s), (F32,), mesh=MESH)
    assert constraints(traced) == [((("x",), ()), "device_put")]
    assert len(traced.program.ops) == 1


# ---- sources and phases ----


def line_of(marker: str) -> int:
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {marker}"))


def test_sources_and_phases() -> None:
    def loss(w: Any, x: Any) -> Any:
        def block(c: Any, _: Any) -> Any:
            def f(c: Any) -> Any:
                return jnp.tanh(c @ w)  # dot

            return jax.checkpoint(f)(c), None

        x, _ = lax.scan(block, x, None, length=3)  # scan
        return jnp.where(x > 0, x, 0.0).sum()  # where

    traced = trace(jax.grad(loss), (F32.update(shape=(8, 8)), F32), mesh=MESH)
    places = [(op.name, op.source.line, op.source.phase) for op, _ in traced.program.walk()]
    dot, scan, where = map(line_of, ("dot", "scan", "where"))
    assert [p[1:] for p in places if p[0] == "dot_general"] == [
        (dot, "forward"),
        (dot, "rematerialized"),
        (dot, "backward"),
        (dot, "backward"),
    ]
    assert [p[1:] for p in places if p[0] == "scan"] == [(scan, "forward"), (scan, "backward")]
    assert [p[1:] for p in places if p[0] == "select_n"] == [
        (where, "forward"),
        (where, "backward"),
    ]
    sources = {op.source for op, _ in traced.program.walk()}
    assert {source.file for source in sources} == {FILE}
    assert "test_sources_and_phases.loss.block.f" in {source.function for source in sources}


def test_library_lines_are_skipped() -> None:
    traced = trace(adamw_step, adamw_args(), mesh=MESH)
    sources = {str(op.source) for op, _ in traced.program.walk() if op.source}
    assert {source.rpartition(":")[0] for source in sources} == {FILE}


def test_ids_are_unique_though_jaxprs_are_shared() -> None:
    inner = jax.jit(lambda x: lax.fori_loop(0, 2, lambda i, c: c + TABLE, x))
    verify(trace(lambda x: inner(inner(x)), (F32,), mesh=MESH).program)


# ---- errors ----


def message(error: type[Exception], fn: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        trace(fn, args, mesh=MESH, **options)
    return str(caught.value)


def branches(x: Any) -> Any:
    if x.sum() > 0:  # branch
        return x
    return -x


def in_numpy(x: Any) -> Any:
    return np.tanh(np.asarray(x))  # numpy


def masked(x: Any) -> Any:
    return x[x > 0]  # mask


def sized(n: Any) -> Any:
    return jnp.zeros(n)  # size


def mismatched(x: Any) -> Any:
    return jnp.dot(x, x)  # mismatch


def stringly(x: Any) -> Any:
    return x, "loss"


@pytest.mark.parametrize(
    ("fn", "marker", "text"),
    [
        (
            branches,
            "branch",
            "Attempted boolean conversion of traced array with shape bool[]; use jax.lax.cond or "
            "jnp.where, or name the argument in static_argnums.",
        ),
        (
            in_numpy,
            "numpy",
            "The numpy.ndarray conversion method __array__() was called on traced array with shape "
            "float32[4,8]; use jax.numpy in place of numpy.",
        ),
        (
            masked,
            "mask",
            "Array boolean indices must be concrete; got bool[4,8]; the result's shape would "
            "depend on data; use jnp.where(mask, x, 0).",
        ),
        (
            mismatched,
            "mismatch",
            "dot_general requires contracting dimensions to have the same shape, got (8,) and "
            "(4,).",
        ),
    ],
)
def test_a_function_that_does_not_trace(fn: Callable[..., Any], marker: str, text: str) -> None:
    where = f"{fn.__name__} does not trace at {FILE}:{line_of(marker)}: "
    with pytest.raises(TraceError) as caught:
        trace(fn, (F32,), mesh=MESH)
    assert str(caught.value) == where + text
    assert caught.value.__cause__ is not None


def test_a_size_that_is_traced() -> None:
    text = message(TraceError, sized, 3)
    assert text.startswith(f"sized does not trace at {FILE}:{line_of('size')}: Shapes")
    assert text.endswith("; name the argument in static_argnums.")


def test_an_output_that_is_no_array() -> None:
    assert message(TraceError, stringly, F32).startswith("stringly returns at out/1 something")


def test_wrong_arguments() -> None:
    def fn(params: Any, batch: Any) -> Any:
        return params + batch

    assert message(TraceError, fn, F32) == (
        "fn(params: Any, batch: Any) -> Any cannot be called with 1 positional arguments: missing "
        "a required argument: 'batch'."
    )
    assert message(TraceError, fn, {"a": F32, "mode": "train"}, F32) == (
        "'params/mode' is 'train' of type str, which is no array; name its argument in "
        "static_argnums, or close over it."
    )
    assert message(TraceError, fn, F32, F32, donate_argnums=2) == (
        "donate_argnums names argument 2 of fn, but it was given 2 positional arguments; use -2 "
        "to 1."
    )


def test_wrong_annotations() -> None:
    with pytest.raises(SpecError) as caught:
        annotate(X, P("x", None, "y"))  # too long
    assert str(caught.value) == (
        f"annotate at {FILE}:{line_of('too long')}: P('x', None, 'y') has 3 entries, "
        "but the array of shape (4, 8) has 2 dims; drop 1."
    )
    with pytest.raises(SpecError) as caught:
        annotate(X, "x")  # no spec
    assert str(caught.value) == (
        f"annotate at {FILE}:{line_of('no spec')} takes a PartitionSpec, got 'x' of "
        "type str; write P('batch', None)."
    )

    def fn(x: Any) -> Any:
        return annotate(x, P("batch", "x"))  # bad axis

    where = f"annotate at {FILE}:{line_of('bad axis')}"
    assert message(SpecError, fn, F32, rules={"batch": "x"}) == (
        f"{where}: P('batch', 'x') splits dim 0 (as 'batch') and dim 1 over the same mesh axis "
        "'x'; an axis can split one dim only, so drop it from one."
    )
    assert message(SpecError, fn, F32, rules={"batches": "y"}) == (
        f"{where}: dim 0 of P('batch', 'x') names 'batch', which is no mesh axis and no logical "
        "name: the mesh has x=2, y=4, the rules know batches; did you mean 'batches'?"
    )
    assert message(SpecError, fn, F32, rules={"batch": "z"}).startswith("rules['batch'] names")
    other = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=TYPES["Auto"][:1]), P("x"))
    text = message(SpecError, jax.jit(jnp.sin, in_shardings=other), X[:, 0].repeat(2))
    assert text.startswith("in_shardings for ")
    assert "on a mesh with x=8, but the program is planned for x=2, y=4;" in text


def test_an_error_of_the_users_own_is_the_cause() -> None:
    class Mine(Exception):
        pass

    def fn(x: Any) -> Any:
        raise Mine("too deep")

    with pytest.raises(TraceError, match=r"fn does not trace at .*: Mine: too deep\.$") as caught:
        trace(fn, (F32,), mesh=MESH)
    assert isinstance(caught.value.__cause__, Mine)


def test_large_programs_convert_quickly() -> None:
    """By counting: each equation becomes one op, each place in the code is looked up once."""

    def fn(x: Any) -> Any:
        for _ in range(500):
            x = jnp.tanh(x @ x.T) @ x  # repeated
        return x

    traced = trace(fn, (F32,), mesh=MESH)
    assert len(traced.program.ops) == 2000
    assert len({id(op.source) for op in traced.program.ops}) == 4
