"""Programs run alike when interpreted, on a simulated mesh and on eight devices."""

import contextlib
import functools
import importlib.util
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gspmd
from gspmd import local, meshes
from gspmd.collectives import is_collective
from gspmd.devices import devices_mesh, topology_mesh
from gspmd.errors import ArgumentError, MeshError
from gspmd.evaluate import evaluate
from gspmd.ir import Layout, Literal, Op, Program, Value, verify
from gspmd.run import compile_program, replicas, simulate
from gspmd.sharding import Axes, Mesh, Sharding
from gspmd.trace import trace
from gspmd.uneven import Uneven

F32 = np.dtype("float32")
KINDS = [AxisType.Auto, AxisType.Explicit, AxisType.Manual]
LOCAL = {"shard": local.shard, "mask": local.mask, "owner": local.owner}


class Writer:
    """Writes a local program by hand."""

    def __init__(self, **axes: int) -> None:
        self.mesh = Mesh(tuple(axes.items()))
        self.ids = itertools.count()
        self.ins: list[Value] = []
        self.ops: list[Op] = []

    def value(self, shape: tuple[int, ...], dims: tuple[Axes, ...], **given: Any) -> Value:
        """A value of global `shape`."""
        at = Sharding(dims)
        dtype = given.pop("dtype", F32)
        held = at.local_shape(shape, self.mesh)
        return Value(next(self.ids), held, dtype, layout=Layout(shape, at), **given)

    def input(self, name: str, shape: tuple[int, ...], *dims: Axes, dtype: Any = F32) -> Value:
        self.ins.append(self.value(shape, dims, dtype=dtype, name=name))
        return self.ins[-1]

    def op(self, op: Any, *ins: Any, out: Value | tuple[int, ...], **params: Any) -> Value:
        """One more op, a jax primitive or the name of one of ours; `out` may be a local shape."""
        value = out if isinstance(out, Value) else Value(next(self.ids), out, ins[0].dtype)
        if isinstance(op, str):
            call = None if is_collective(op) else LOCAL[op]
        else:
            call, op = op.bind, op.name
        self.ops.append(Op(op, ins, (value,), params, call=call))
        return value

    def program(self, *outs: Value | Literal) -> Program:
        return verify(Program(tuple(self.ins), tuple(self.ops), outs), self.mesh)


def two_layers(rows: int = 5, cols: int = 7, **axes: int) -> tuple[Program, Mesh]:
    """`h = a @ w + 1` and its row sums and column sums: rows split over x, columns over y."""
    write = Writer(**(axes or {"x": 2, "y": 3}))
    a = write.input("a", (rows, 4), ("x",), ())
    w = write.input("w", (4, cols), (), ("y",))
    h = write.value((rows, cols), (("x",), ("y",)))
    dims = (((1,), (0,)), ((), ()))
    product = write.op(
        lax.dot_general_p, a, w, out=h.shape, dimension_numbers=dims,
        precision=None, preferred_element_type=F32, out_sharding=None,
    )  # fmt: skip
    write.op(lax.add_p, product, Literal(1.0, F32), out=h)

    def total(axis: str, dim: int, size: int, kept: Axes) -> Value:
        group = {"axes": (axis,), "reduction": "sum"}
        masked = write.op("mask", h, out=h.shape, dim=dim, size=size, **group)
        shape = h.shape[1 - dim]
        mine = write.op(lax.reduce_sum_p, masked, out=(shape,), axes=(dim,), out_sharding=None)
        out = write.value(((rows, cols)[1 - dim],), (kept,))
        return write.op("all_reduce", mine, out=out, **group)

    sums = total("y", 1, cols, ("x",)), total("x", 0, rows, ("y",))
    program = write.program(h, *sums, Literal(7, np.dtype("int32")))
    return program, write.mesh


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F32)


def expected(a: Any, w: Any) -> list[Any]:
    h = a @ w + 1
    return [h, h.sum(1), h.sum(0), np.int32(7)]


def check(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.shape == np.shape(y)
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x), y, rtol=1e-4, atol=1e-5)


def mesh_of(kind: AxisType = AxisType.Auto, **axes: int) -> jax.sharding.Mesh:
    sizes = tuple(axes.values())
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(kind,) * len(sizes))


SIZES = [(6, 6), (5, 7), (1, 2)]  # even, uneven, and fewer entries than devices


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_a_program_simulates_and_runs(rows: int, cols: int) -> None:
    program, mesh = two_layers(rows, cols)
    a, w = numbers(rows, 4), numbers(4, cols, seed=1)
    check(simulate(program, mesh, [a, w]), expected(a, w))
    run = compile_program(program, mesh_of(x=2, y=3), mesh)
    check(run(a, w), expected(a, w))


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_all_replicas_agree_and_padding_does_not_show(rows: int, cols: int) -> None:
    program, mesh = two_layers(rows, cols)
    a, w = numbers(rows, 4), numbers(4, cols, seed=1)
    got = replicas(program, mesh, [a, w], poison=True)
    assert [len(copies) for copies in got] == [1, 3, 2, 6]
    for copies, want in zip(got, expected(a, w), strict=True):
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])
            np.testing.assert_allclose(copy, want, rtol=1e-4, atol=1e-5)


def test_a_mesh_of_64_devices_simulates_on_one() -> None:
    program, mesh = two_layers(20, 13, x=16, y=4)
    a, w = numbers(20, 4), numbers(4, 13, seed=1)
    got = simulate(program, mesh, [a, w])
    check(got, expected(a, w))
    assert all(x.sharding.num_devices == 1 for x in got)


def test_products_of_attention_simulate_on_a_mesh_of_four_axes() -> None:
    """A dim for each axis makes eight, more than some kernels of XLA on CPU take."""
    scores = lambda q, k: jnp.einsum("abmd,abnd->abmn", q, k)  # noqa: E731
    draw = np.random.default_rng(0).normal
    q, k = draw(size=(8, 8, 16, 16)).astype(F32), draw(size=(8, 8, 2, 16)).astype(F32)
    spec = P(("a", "b"), ("c", "d"))
    plan = gspmd.plan(scores, q, k, mesh="a=2,b=2,c=2,d=2", in_specs=(spec, spec))
    assert not plan.collectives
    np.testing.assert_allclose(plan.simulate(q, k), scores(q, k), rtol=1e-5, atol=1e-5)


def test_a_simulation_is_part_of_what_is_traced() -> None:
    x = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(F32)
    fn = lambda x: jnp.sum(jnp.tanh(x @ x.T))  # noqa: E731
    simulated = gspmd.plan(fn, x[0], mesh="x=2", in_specs=P("x")).simulate
    for transform in (jax.jit, jax.grad, lambda f: jax.jit(lambda _: f(x[0]))):
        np.testing.assert_allclose(transform(simulated)(x[0]), transform(fn)(x[0]), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(simulated)(x), jax.vmap(fn)(x), rtol=1e-5)


def test_what_lies_on_many_devices_simulates_on_one() -> None:
    program, mesh = two_layers()
    devices = mesh_of(x=2, y=3)
    a, w = numbers(5, 4), numbers(4, 7, seed=1)
    (uneven, *_) = compile_program(program, devices, mesh)(a, w)
    assert isinstance(uneven, Uneven)
    spread = jax.device_put(w, NamedSharding(devices, P("x")))
    check(simulate(program, mesh, [np.asarray(uneven)[:, :4], spread]),
          expected(np.asarray(uneven)[:, :4], w))  # fmt: skip


def test_random_keys_and_consts_cross_the_boundary() -> None:
    write = Writer(x=4)
    keys = jax.random.split(jax.random.key(0), 6)
    k = write.input("keys", (6,), ("x",), dtype=keys.dtype)
    const = Value(next(write.ids), (3,), np.dtype("int32"))
    whole = write.op("all_gather", k, out=(8,), axes=("x",), dim=0)
    cut = write.op(
        lax.slice_p, whole, out=(6,), start_indices=(0,), limit_indices=(6,), strides=None
    )
    base = write.program(k, cut)
    program = Program(base.ins, base.ops, (*base.outs, const), ((const, np.arange(3, dtype="i4")),))
    want = jax.random.key_data(keys)
    for split, gathered, three in (
        simulate(program, write.mesh, [keys]),
        compile_program(program, mesh_of(x=4), write.mesh)(keys),
    ):
        np.testing.assert_array_equal(jax.random.key_data(jnp.asarray(split)), want)
        np.testing.assert_array_equal(jax.random.key_data(gathered), want)
        np.testing.assert_array_equal(three, np.arange(3))


# --- control flow -----------------------------------------------------------------------------


def looped(x: jax.Array, n: jax.Array) -> Any:
    def step(carry: Any, row: jax.Array) -> Any:
        total, count = carry
        return (total + row, count + 1), (row * count, total)

    carry, ys = lax.scan(step, (jnp.zeros(3), 0), x, reverse=True, unroll=2)
    power = lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * 1.5), (0, x))
    return carry, ys, power


def branched(x: jax.Array, n: jax.Array) -> Any:
    twice = lax.cond(n > 2, lambda x: x * 2, lambda x: x - 1, x)
    return lax.switch(n, [jnp.sin, jnp.cos, lambda x: x**2], x), twice


def rematerialized(x: jax.Array, n: jax.Array) -> Any:
    keep = jax.checkpoint_policies.dots_saveable
    layer = jax.checkpoint(lambda x: jnp.sin(x @ x.T) @ x, policy=keep)
    return jax.value_and_grad(lambda x: layer(layer(x)).sum() * n)(x)


@pytest.mark.parametrize("fn", [looped, branched, rematerialized])
@pytest.mark.parametrize("n", [0, 3])
def test_the_interpreter_is_the_function(fn: Callable[..., Any], n: int) -> None:
    args = jnp.asarray(numbers(4, 3)), jnp.int32(n)
    program = trace(fn, args, mesh=Mesh(())).program
    got = jax.jit(lambda *args: evaluate(program, args, "simulated"))(*args)
    for x, y in zip(got, jax.tree.leaves(fn(*args)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_what_is_rematerialized_stays_so() -> None:
    """The second run of a remat body stands behind a barrier, which XLA does not merge across."""
    write = Writer(x=1)
    x = write.input("x", (3,), ())
    inner = Value(next(write.ids), (3,), F32), Value(next(write.ids), (3,), F32)
    sine = Op("sin", (inner[0],), (inner[1],), {"accuracy": None}, call=lax.sin_p.bind)
    body = Program((inner[0],), (sine,), (inner[1],))
    out = write.value((3,), ((),))
    for differentiated in (False, True):
        params = {"prevent_cse": True, "policy": None, "differentiated": differentiated}
        remat = Op("remat", (x,), (out,), params, (body,))
        program = Program((x,), (remat,), (out,))
        text = str(jax.make_jaxpr(lambda x, p=program: evaluate(p, [x], "cpu"))(jnp.ones(3)))
        assert ("optimization_barrier" in text) == differentiated
        assert "checkpoint" in text or "remat" in text


# --- meshes, transformations ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "entered"),
    [
        (kind, entered)
        for kind in KINDS
        for entered in (False, True)
        if not (entered and kind == AxisType.Manual)  # jax.set_mesh refuses manual axes
    ],
)
@pytest.mark.parametrize(("rows", "cols"), SIZES[:2])
def test_every_kind_of_mesh_and_every_transformation(
    rows: int, cols: int, kind: AxisType, entered: bool
) -> None:
    program, mesh = two_layers(rows, cols)
    devices = mesh_of(kind, x=2, y=3)
    run = compile_program(program, devices, mesh)
    a, w = numbers(rows, 4), numbers(4, cols, seed=1)
    want = expected(a, w)
    with jax.set_mesh(devices) if entered else contextlib.nullcontext():
        outs = run(a, w)
        check(outs, want)
        user = devices if kind != AxisType.Manual else mesh_of(x=2, y=3)
        assert all(x.sharding.mesh == user for x in outs)
        assert [x.sharding.spec for x in outs] == [P("x", "y"), P("x"), P("y"), P()]
        on = jax.device_put(a, NamedSharding(user, P())), jnp.asarray(w)
        check(run(*on), want)
        check(jax.jit(run)(*on), want)
        check(jax.jit(lambda: run(a, w))(), want)
        one = jax.jit(jax.vmap(run, (0, None)))(on[0][None], w)
        check([x[0] for x in one], want)
        loss = lambda a, w: (run(a, w)[0] ** 2).sum()  # noqa: E731
        slope = jax.jit(jax.grad(loss))(*on)
        np.testing.assert_allclose(np.asarray(slope), 2 * want[0] @ w.T, rtol=1e-4)
        assert [x.shape for x in jax.eval_shape(run, *on)] == [np.shape(y) for y in want]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_program_on_sub_axes_returns_on_the_users_mesh(kind: AxisType) -> None:
    write = Writer(x=2, **{"y:0": 2, "y:1": 2})
    x = write.input("x", (4, 8), ("x",), ("y:0", "y:1"))
    half = write.op("all_gather", x, out=(2, 4), axes=("y:1",), dim=1)
    swapped = write.op("collective_permute", x, out=(2, 2), src=("y:0", "y:1"), dst=("y:1", "y:0"))
    whole = write.value((4, 8), (("x",), ()))
    write.op("all_gather", half, out=whole, axes=("y:0",), dim=1)
    other = write.value((4, 8), (("x",), ("y:0", "y:1")))
    write.op(lax.add_p, swapped, x, out=other)
    program = write.program(whole, other)
    data = numbers(4, 8)
    blocks = data.reshape(4, 2, 2, 2).swapaxes(1, 2).reshape(4, 8)
    want = [data, data + blocks]
    check(simulate(program, write.mesh, [data]), want)
    devices = mesh_of(kind, x=2, y=4)
    run = compile_program(program, devices, write.mesh)
    outs = run(data)
    check(outs, want)
    user = devices if kind != AxisType.Manual else mesh_of(x=2, y=4)
    assert [x.sharding for x in outs] == [
        NamedSharding(user, P("x", None)), NamedSharding(user, P("x", "y")),
    ]  # fmt: skip
    again = jax.device_put(data, NamedSharding(user, P("x", "y")))
    check(run(again), want)
    for context in (contextlib.nullcontext(), jax.set_mesh(user)):
        with context:
            check(jax.jit(run)(again), want)


# --- placement --------------------------------------------------------------------------------


def doubling(rows: int, **axes: int) -> tuple[Program, Mesh]:
    write = Writer(**axes)
    x = write.input("params/w", (rows, 2), tuple(axes), ())
    out = write.value((rows, 2), (tuple(axes), ()))
    write.op(lax.add_p, x, x, out=out)
    return write.program(out), write.mesh


def test_right_arrays_are_taken_as_they_are_and_compiled_for_once() -> None:
    program, mesh = doubling(8, x=2, y=4)
    run = compile_program(program, mesh_of(x=2, y=4), mesh)
    (once,) = run(numbers(8, 2))
    assert run._placed([once])[0] is once
    shorter = jax.device_put(once, NamedSharding(mesh_of(x=2, y=4), P(("x", "y"))))
    assert shorter.sharding != once.sharding
    assert run._placed([shorter])[0] is shorter
    (twice,) = run(once)
    assert twice.sharding == once.sharding
    assert run.compile() is run.compile()
    assert run.in_shardings == run.out_shardings == (once.sharding,)
    assert "all-gather" not in run.compile().as_text()
    assert "stablehlo.add" in run.lower().as_text()


@pytest.mark.parametrize(
    "place",
    [
        np.asarray,
        jnp.asarray,
        lambda x: jax.device_put(x, jax.devices()[3]),
        lambda x: jax.device_put(x, NamedSharding(mesh_of(x=2, y=4), P(None, "x"))),
        lambda x: jax.device_put(x, NamedSharding(mesh_of(AxisType.Explicit, z=2), P("z"))),
    ],
    ids=["numpy", "uncommitted", "one device", "another spec", "another mesh"],
)
@pytest.mark.parametrize("rows", [8, 6])
def test_arrays_come_from_anywhere_on_the_devices(rows: int, place: Callable[..., Any]) -> None:
    program, mesh = doubling(rows, x=2, y=4)
    data = numbers(rows, 2)
    check(compile_program(program, mesh_of(x=2, y=4), mesh)(place(data)), [data * 2])


def test_python_scalars_are_arguments() -> None:
    write = Writer(x=2)
    s = write.input("s", ())
    out = write.value((), ())
    write.op(lax.add_p, s, s, out=out)
    run = compile_program(write.program(out), mesh_of(x=2), write.mesh)
    check(run(3), [np.float32(6)])
    check(run(1.5), [np.float32(3)])
    check(simulate(run.program, write.mesh, [3]), [np.float32(6)])


@pytest.mark.parametrize("rows", [8, 6], ids=["even", "uneven"])
def test_donated_memory_is_given_away(rows: int) -> None:
    program, mesh = doubling(rows, x=2, y=4)
    run = compile_program(program, mesh_of(x=2, y=4), mesh, donate=[True])
    (x,) = run(numbers(rows, 2))
    before = {s.data.unsafe_buffer_pointer() for s in getattr(x, "padded", x).addressable_shards}
    (y,) = run(x)
    assert x.is_deleted()
    after = {s.data.unsafe_buffer_pointer() for s in getattr(y, "padded", y).addressable_shards}
    assert before == after
    kept = compile_program(program, mesh_of(x=2, y=4), mesh)
    kept(y)
    assert not y.is_deleted()


# --- uneven arrays ----------------------------------------------------------------------------


@functools.cache
def an_uneven(kind: AxisType = AxisType.Auto) -> tuple[Uneven, np.ndarray]:
    program, mesh = doubling(6, x=2, y=2)
    data = numbers(6, 2)
    (x,) = compile_program(program, mesh_of(kind, x=2, y=2), mesh)(data)
    assert isinstance(x, Uneven)
    return x, data * 2


def test_an_uneven_array_stays_split_between_calls() -> None:
    program, mesh = doubling(6, x=2, y=2)
    run = compile_program(program, mesh_of(x=2, y=2), mesh)
    (x,) = run(numbers(6, 2))
    assert isinstance(x, Uneven)
    assert run._placed([x])[0] is x.padded
    assert {shard.data.shape for shard in x.padded.addressable_shards} == {(2, 2)}
    check(run(x), [numbers(6, 2) * 4])
    assert not any(op in run.compile().as_text() for op in ("all-gather", "collective-permute"))
    other = compile_program(program, mesh_of(AxisType.Explicit, x=2, y=2), mesh)
    check(other(x), [numbers(6, 2) * 4])
    check(jax.jit(lambda y: run(y + x))(numbers(6, 2)), [numbers(6, 2) * 6])


@pytest.mark.parametrize("entered", [False, True], ids=["", "set_mesh"])
@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_an_uneven_array_acts_as_an_array(kind: AxisType, entered: bool) -> None:
    x, data = an_uneven(kind)
    with jax.set_mesh(x.mesh) if entered else contextlib.nullcontext():
        assert (x.shape, x.dtype, x.ndim, x.size, x.nbytes) == ((6, 2), F32, 2, 12, 48)
        assert (len(x), x.spec) == (6, P(("x", "y"), None))
        assert repr(x) == "Uneven(f32[6@(x,y),2])"
        assert str(x) == str(data)
        for got, want in (
            (np.asarray(x), data),
            (np.asarray(x, "float64"), data.astype("float64")),
            (jnp.asarray(x), data),
            (jnp.sin(jnp.asarray(x)), np.sin(data)),
            (x + 1, data + 1),
            (1 - x, 1 - data),
            (x * x, data * data),
            (-x, -data),
            (x > 0, data > 0),
            (x @ np.ones((2, 3), F32), data @ np.ones((2, 3), F32)),
            (np.ones((6, 2), F32) / x, 1 / data),
            (jnp.ones(2) + x, 1 + data),
            (np.exp(x), np.exp(data)),
            (x[1], data[1]),
            (x[2:, ::-1], data[2:, ::-1]),
            (x.sum(axis=0), data.sum(0)),
            (x.T, data.T),
            (x.astype("int32"), data.astype("int32")),
            (jnp.stack(list(x)), data),
        ):
            np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6)
        assert jax.block_until_ready(x) is x
        np.testing.assert_array_equal(jax.device_get(x), data)
        y = x
        y += 1
        assert isinstance(y, jax.Array)
        assert jax.tree.leaves({"w": x})[0] is x


def test_an_uneven_array_knows_its_shards() -> None:
    x, data = an_uneven()
    held = [(shard.device.id, shard.index[0], shard.data.shape) for shard in x.addressable_shards]
    ids = [device.id for device in jax.devices()[:4]]
    starts = [slice(0, 2, 1), slice(2, 4, 1), slice(4, 6, 1), slice(6, 6, 1)]
    assert held == list(zip(ids, starts, [(2, 2), (2, 2), (2, 2), (0, 2)], strict=True))
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, data[shard.index])


def test_an_uneven_array_is_saved_as_numpy() -> None:
    x, data = an_uneven()
    copy = pickle.loads(pickle.dumps(x))
    assert isinstance(copy, np.ndarray)
    np.testing.assert_array_equal(copy, data)


def test_dims_that_divide_stay_split_when_others_are_gathered() -> None:
    program, mesh = two_layers(6, 7)
    (h, *_) = compile_program(program, mesh_of(x=2, y=3), mesh)(numbers(6, 4), numbers(4, 7))
    assert isinstance(h, Uneven)
    assert h.spec == P("x", "y")
    assert jnp.asarray(h).sharding.spec == P("x", None)


# --- errors -----------------------------------------------------------------------------------


def test_arrays_on_other_devices_are_refused() -> None:
    program, mesh = doubling(8, x=2, y=2)
    run = compile_program(program, mesh_of(x=2, y=2), mesh)
    message = (
        r"argument params/w lies on cpu:7, but mesh x=2,y=2 is made of "
        r"cpu:0, cpu:1, cpu:2, cpu:3; move it there with jax.device_put, or pass a numpy array\."
    )
    with pytest.raises(MeshError, match=message):
        run(jax.device_put(numbers(8, 2), jax.devices()[7]))
    everywhere = NamedSharding(mesh_of(z=8), P("z"))
    with pytest.raises(MeshError, match="lies on 8 devices from cpu:0 on, but"):
        run(jax.device_put(numbers(8, 2), everywhere))


def test_another_type_is_refused() -> None:
    program, mesh = doubling(8, x=2, y=2)
    run = compile_program(program, mesh_of(x=2, y=2), mesh)
    message = r"argument params/w was planned as f32\[8,2\], and is given as i32\[8,2\];"
    with pytest.raises(ArgumentError, match=message):
        run(np.ones((8, 2), "int32"))
    program, mesh = doubling(6, x=2, y=2)
    uneven = compile_program(program, mesh_of(x=2, y=2), mesh)
    with pytest.raises(ArgumentError, match=r"planned as f32\[6,2\], and is given as f32\[8,2\]"):
        uneven(np.ones((8, 2), F32))  # the shape with its padding


def test_too_few_devices() -> None:
    message = (
        "mesh data=4,model=4 needs 16 devices, this process has 8; use plan.simulate, or set "
        "XLA_FLAGS=--xla_force_host_platform_device_count=16 before jax starts."
    )
    with pytest.raises(MeshError, match=message):
        devices_mesh(Mesh((("data", 4), ("model", 4))))


def test_meshes_from_devices_and_topologies() -> None:
    four = devices_mesh(Mesh((("data", 2), ("model", 2))))
    assert dict(four.shape) == {"data": 2, "model": 2}
    assert topology_mesh(Mesh((("data", 2), ("model", 2))), four) is four
    with pytest.raises(
        MeshError, match="is for mesh data=4, and is to be compiled for mesh data=2"
    ):
        topology_mesh(Mesh((("data", 4),)), four)
    Topology = type("Topology", (), {"devices": jax.devices()})
    assert dict(topology_mesh(Mesh((("x", 8),)), Topology()).shape) == {"x": 8}
    with pytest.raises(MeshError, match="has 4 devices, the topology has 8; take one"):
        topology_mesh(Mesh((("x", 4),)), Topology())


def test_a_topology_that_nobody_knows() -> None:
    pytest.importorskip("libtpu")
    with pytest.raises(
        MeshError, match=r"topology='tpu-v9:2x2': the TPU compiler does not know it .*tpu-v3:16x32"
    ):
        topology_mesh(Mesh((("x", 8),)), "tpu-v9:2x2")


def test_a_named_topology_has_the_cores_of_its_chips() -> None:
    pytest.importorskip("libtpu")
    # v3 has two cores a chip, the two of v4 run as one; the compiler calls v7 otherwise.
    for name in (
        "tpu-v3:2x2",
        "tpu-v4:2x2x2",
        "tpu-v5p:2x2x2",
        "tpu-v7:2x2x1",
        "tpu-v5e:2x2 x2 slices",
    ):
        assert meshes.topology(name).devices == 8
        assert dict(topology_mesh(Mesh((("x", 8),)), name).shape) == {"x": 8}
    with pytest.raises(MeshError, match="has 64 devices, the topology has 8"):
        topology_mesh(Mesh((("x", 64),)), "tpu-v3:2x2")


def test_the_tpu_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeshError, match=r"topology='tpu-v3:2x2': .* pip install 'gspmd\[tpu\]'"):
        topology_mesh(Mesh((("x", 8),)), "tpu-v3:2x2")


def test_a_call_inside_shard_map_is_refused() -> None:
    program, mesh = doubling(8, x=2, y=4)
    devices = mesh_of(x=2, y=4)
    run = compile_program(program, devices, mesh)
    inside = jax.shard_map(lambda x: run(x)[0], mesh=devices, in_specs=P(), out_specs=P())
    with pytest.raises(MeshError, match=r"is called inside shard_map over \['x', 'y'\]"):
        jax.jit(inside)(numbers(8, 2))
