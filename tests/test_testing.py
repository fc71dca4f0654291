"""`gspmd.testing`: a partitioned function that differs from the function is noticed, and where."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.vendor.pretty import pretty
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from processes import ROOT, run

import gspmd
from gspmd import P
from gspmd.ir import Op
from gspmd.rules.factor import RULES, FactorRule, OpRule
from gspmd.sharding import Mesh
from gspmd.testing import (
    DrawnProgram,
    assert_equivalent,
    assert_equivalent_shrunk,
    meshes,
    programs,
    specs,
)
from gspmd.testing.compare import Tolerance, difference
from gspmd.testing.examples import Examples
from gspmd.testing.program import Step
from gspmd.testing.shrunk import shrunken_sizes

MESH = "x=2,y=2"


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def line_of(text: str) -> str:
    """`test_testing.py:12`, the line of this file that holds `text` for the first time."""
    lines = Path(__file__).read_text().splitlines()
    return f"test_testing.py:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def two_layers(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    h = gspmd.annotate(jnp.tanh(x @ params["wi"]), P("x", "y"))
    y = h @ params["wo"]
    return {"y": y, "best": jnp.argmax(y, axis=1), "norm": jnp.sqrt(jnp.sum(y * y))}


# --- assert_equivalent


@pytest.mark.parametrize("on", ["simulated", "devices"])
def test_equal_functions_pass_with_gradients_integers_and_uneven_dims(on: Any) -> None:
    params = {"wi": array(5, 7), "wo": array(7, 3)}
    assert_equivalent(two_layers, params, array(9, 5), mesh=MESH, in_specs=(None, P("x")), on=on)


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> Primitive:
    """Divides by the number of rows, so that rows cannot be split, whatever its rule says."""

    def divide(x: jax.Array) -> jax.Array:
        return x / x.shape[0]

    primitive = Primitive("shared_out")
    primitive.def_impl(divide)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(divide, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda xs, dims: (jax.vmap(divide, dims)(*xs), 0)
    monkeypatch.setitem(RULES, "shared_out", OpRule(pointwise))
    return primitive


def pointwise(op: Op) -> FactorRule:
    dims = "a b c d"[: 2 * len(op.outs[0].shape) - 1]
    text = f"{dims} -> {dims}"
    return FactorRule.parse(text, [x.shape for x in op.ins], [x.shape for x in op.outs])


@pytest.mark.parametrize("on", ["simulated", "devices"])
def test_a_rule_that_lies_is_caught_and_named(shared_out: Primitive, on: Any) -> None:
    def fn(x: jax.Array, w: jax.Array) -> dict[str, jax.Array]:
        h = jnp.tanh(x) @ w
        divided = shared_out.bind(h)  # the lie
        return {"right": h, "wrong": jnp.cos(divided + 1)}

    options: dict[str, Any] = {"mesh": MESH, "in_specs": (P("x", "y"), None), "grad": False}
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(fn, array(8, 4), array(4, 3), **options, on=on)
    first, second = str(caught.value).splitlines()
    assert first.startswith("result/wrong of fn on x=2, y=2 differs by 0.")
    assert "its largest entry is" in first
    assert "rtol=0.0001" in first
    assert second.startswith("The first value to differ is the result of shared_out at ")
    assert f"{line_of('# the lie')} (rule a b -> a b): f32[8@x,3] differs by 0." in second


def test_a_wrong_gradient_is_caught_where_the_value_is_right(shared_out: Primitive) -> None:
    @jax.custom_vjp
    def scaled(x: jax.Array) -> jax.Array:
        return x * 2

    scaled.defvjp(lambda x: (x * 2, None), lambda _, g: (shared_out.bind(g),))
    assert_equivalent(scaled, array(8, 3), mesh=MESH, in_specs=P("x"), grad=False)
    with pytest.raises(AssertionError, match=r"(?s)^gradient/x of scaled .*of shared_out \(rule"):
        assert_equivalent(scaled, array(8, 3), mesh=MESH, in_specs=P("x"))


def test_a_loop_is_named_for_what_is_wrong_in_it(shared_out: Primitive) -> None:
    def fn(xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, x: (c + shared_out.bind(x), None), jnp.zeros((8, 3)), xs)[0]

    with pytest.raises(AssertionError, match=r"result of scan at .*values inside .* not looked at"):
        assert_equivalent(fn, array(2, 8, 3), mesh=MESH, in_specs=P(None, "x"))


def test_a_sum_owed_is_paid_before_it_is_compared(shared_out: Primitive) -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(shared_out.bind(x @ w))

    specs = P("x", "y"), P("y")
    with pytest.raises(AssertionError, match=r"first value to differ is the result of shared_out"):
        assert_equivalent(fn, array(9, 6), array(6, 3), mesh=MESH, in_specs=specs)


def test_gradients_reach_each_float_leaf_and_no_other() -> None:
    def fn(state: dict[str, Any], key: jax.Array, rate: float) -> jax.Array:
        return state["w"] * rate + state["step"] + jax.random.normal(key, (6,))

    state = {"w": array(6), "step": jnp.int32(3)}
    in_specs = ({"w": P("x"), "step": None}, None, None)
    assert_equivalent(fn, state, jax.random.key(0), 0.5, mesh=MESH, in_specs=in_specs)


@pytest.mark.parametrize(
    ("copies", "want", "says"),
    [
        (np.float32([[1, 2]]), np.float32([1, 2]), None),
        (
            np.float32([[1, 2.1]]),
            np.float32([1, 2]),
            "by 0.1, where its largest entry is 2",
        ),
        (np.float32([[1, 2], [1, 3]]), np.float32([1, 2]), "differs by 1"),  # one device's copy
        (np.float32([[np.nan, 2]]), np.float32([np.nan, 2]), None),
        (
            np.float32([[1, np.inf]]),
            np.float32([1, np.nan]),
            "where it is infinite or",
        ),
        (np.float32([[np.nan, 2]]), np.float32([1, 2]), "differs by nan"),
        (np.int32([[1, 2]]), np.int32([1, 3]), "differs in 1 of 2 entries"),
        (np.int32([[1, 2]]), np.float32([1, 2]), "is i32[2] partitioned, f32[2] whole"),
        (np.float32([[1, 2]]), np.float32([1]), "is f32[2] partitioned, f32[1] whole"),
        (jnp.bfloat16([[1, 1.008]]), jnp.bfloat16([1, 1]), None),
        (jnp.bfloat16([[1, 1.1]]), jnp.bfloat16([1, 1]), "differs by 0.1"),
        (np.complex64([[1j]]), np.complex64([-1j]), "differs by 2"),
    ],
)
def test_what_counts_as_a_difference(copies: Any, want: Any, says: str | None) -> None:
    found = difference(copies, want, Tolerance())
    assert (found is None) == (says is None)
    assert says is None or says in str(found)


def test_where_to_run_is_one_of_two() -> None:
    with pytest.raises(gspmd.GspmdError, match=r'on=.tpu.: it is "simulated" or "devices"'):
        assert_equivalent(jnp.tanh, array(4), mesh=MESH, on="tpu")  # pyright: ignore


# --- strategies


@hypothesis.given(meshes(max_devices=12, max_axes=3))
def test_meshes_keep_to_their_limits(mesh: dict[str, int]) -> None:
    assert 1 <= len(mesh) <= 3
    assert all(1 <= size <= 4 for size in mesh.values())
    assert np.prod(list(mesh.values())) <= 12


@hypothesis.given(st.data(), meshes(), st.lists(st.integers(1, 9), max_size=4))
@hypothesis.settings(max_examples=50)
def test_specs_can_be_planned(data: st.DataObject, mesh: dict[str, int], shape: list[int]) -> None:
    spec = data.draw(specs(tuple(shape), mesh))
    assert len(spec) == len(shape)
    plan = gspmd.plan(jnp.negative, floats(*shape), mesh=mesh, in_specs=spec)
    for entry, planned in zip(spec, (*plan.in_specs[0], *[None] * len(shape)), strict=False):
        names = entry if isinstance(entry, tuple) else (entry,)
        split = tuple(x for x in names if isinstance(x, str))
        assert entry is P.UNCONSTRAINED or (planned or ()) in (split, *split, ())


def test_axes_share_a_dim_and_dims_are_uneven() -> None:
    mesh = {"x": 2, "y": 3}
    shrunk = hypothesis.find(specs((5, 4), mesh), lambda spec: ("x", "y") in spec)
    assert shrunk == P(("x", "y"), None)


def test_limits_of_a_mesh_must_make_sense() -> None:
    with pytest.raises(gspmd.GspmdError, match=r"max_axes=5\): a mesh has 1 to 4 axes"):
        meshes(max_axes=5)


def test_a_program_shrinks_to_a_few_lines() -> None:
    found = hypothesis.find(programs(steps=4), lambda p: "lax.cumsum(" in p.source)
    assert len(found.steps) == 1
    assert len(found.mesh) == 1
    assert str(found) == (
        "# mesh {'x': 2}\n"
        "v0 = np.random.default_rng(0).integers(-3, 4, (1,)).astype(np.float32)  # P('x')\n"
        "def program(v0):\n"
        "    v1 = jnp.clip(lax.cumsum(v0, axis=0, reverse=False), -9, 9)\n"
        "    return (v1,)  # None"
    )
    assert pretty(found) == f"\n{found}\n"  # what hypothesis prints


def cumulative() -> DrawnProgram:
    argument = Step("v0", "np.random.default_rng(0).integers(-3, 4, (6, 2)).astype(np.float32)")
    steps = Step("v1", "v1 = v0 + 1", ("v0",)), Step("v2", "v2 = lax.cumsum(v1)", ("v1",))
    return DrawnProgram((argument,), steps, ("v2",), {"x": 2, "y": 1}, (P("x"),), (None,))


def test_a_script_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(cumulative().script(grad=True, on="devices"))
    run(path)


def test_a_wrong_rule_is_found_and_its_script_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "cumsum", OpRule(pointwise))
    check = Examples(lambda: tmp_path / "examples")
    with pytest.raises(AssertionError, match=r"result of cumsum at drawn-\w+.py:3 \(") as caught:
        check(cumulative())
    name = "test_a_wrong_rule_is_found_and_its_script_shows_it"
    (path,) = (tmp_path / "examples").iterdir()
    assert path.name == f"test_testing_py_{name}.py"
    assert caught.value.__notes__ == [f"As a script that runs by itself: {path}"]
    with pytest.raises(AssertionError, match=r"result of cumsum at .*_shows_it.py:\d+ \(rule"):
        runpy.run_path(str(path))
    monkeypatch.undo()
    runpy.run_path(str(path))


def test_without_hypothesis_the_rest_works_and_the_extra_is_named() -> None:
    text = """if True:
        import sys
        sys.modules["hypothesis"] = None
        import gspmd.testing, jax.numpy as jnp, numpy as np
        gspmd.testing.assert_equivalent(jnp.tanh, np.ones(4, np.float32), mesh="x=2")
        for ask in (gspmd.testing.meshes, gspmd.testing.programs):
            try:
                ask()
            except gspmd.GspmdError as error:
                assert "pip install 'gspmd[test]'" in str(error), error
                assert f"gspmd.testing.{ask.__name__}" in str(error), error
            else:
                raise SystemExit("no error")
    """
    subprocess.run([sys.executable, "-W", "error", "-c", text], check=True, cwd=ROOT)


# --- the pytest plugin


def test_the_plugin_starts_without_jax() -> None:
    text = "import sys, pytest_gspmd; sys.exit('jax' in sys.modules or 'gspmd' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", text], check=True, cwd=ROOT)


@pytest.mark.parametrize("given", [True, False])
def test_the_fixture_writes_what_fails(tmp_path: Path, given: bool) -> None:
    (tmp_path / "test_mine.py").write_text("""if True:
        import jax.numpy as jnp, numpy as np, pytest
        from gspmd.testing import DrawnProgram
        from gspmd.testing.program import Step

        def test_functions(assert_partitioned):
            assert_partitioned(jnp.tanh, np.ones(4, np.float32), mesh="x=2")

        def test_programs(assert_partitioned):
            argument = Step("v0", "np.ones(4, np.float32)")
            step = Step("v1", "v1 = no_such_thing(v0)")
            program = DrawnProgram((argument,), (step,), ("v1",), {"x": 2}, (None,), (None,))
            assert_partitioned(program)
    """)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_gspmd", "-q", "--basetemp=temporary"]
    command += ["--gspmd-examples=mine"] if given else []
    environment = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    folder = "mine" if given else "temporary/gspmd-examples0"
    path = tmp_path / folder / "test_mine_py_test_programs.py"
    assert f"As a script that runs by itself: {path}" in done.stdout
    assert "v1 = no_such_thing(v0)" in path.read_text()


# --- shrunken


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    h = gspmd.annotate(jax.nn.relu(x @ params["wi"]), P("data", "model"))
    return jnp.mean((h @ params["wo"] - x) ** 2)


BIG: dict[str, Any] = {"mesh": "data=256,model=8", "in_specs": (None, P("data"))}
PARAMS = {"wi": floats(512, 2048), "wo": floats(2048, 512)}


def test_a_plan_for_2048_devices_is_checked_on_4() -> None:
    found = assert_equivalent_shrunk(jax.grad(loss), PARAMS, floats(4096, 512), **BIG)
    assert found.complete
    kinds = [(x.kind, x.axes, x.op) for x in found.exercised_collectives]
    assert kinds == [
        ("all_reduce", ("model",), "dot_general"),
        ("all_reduce", ("data",), "dot_general"),
    ]
    splits = [x.split for x in found.exercised_rules if x.primitive == "dot_general"]
    assert "[*@data,*@model], [*@model,*] -> [*@data,*]+model" in splits
    lines = str(found).splitlines()
    assert lines[0] == (
        "loss on data=256, model=8, shrunk to data=2, model=2; dims 512 -> 5, 2048 -> 10, "
        "4096 -> 20"
    )
    count = len(found.exercised_rules)
    assert lines[1:] == [
        f"rules: {count} of {count} exercised", "collectives: 2 of 2 exercised",
    ]  # fmt: skip


def test_what_a_shrunken_run_misses_is_listed() -> None:
    one_axis = assert_equivalent_shrunk(
        jax.grad(loss), PARAMS, floats(4096, 512), **BIG, small_mesh="data=2,model=1"
    )
    assert not one_axis.complete
    (missed,) = one_axis.missed_collectives
    assert str(missed) == "all_reduce[model] for dot_general"
    text = str(one_axis)
    assert "collectives: 1 of 2 exercised\n  not exercised: all_reduce[model]" in text
    assert "not exercised: dot_general (a c, c b -> a b  (c: sum)) [*@data,*]" in text


def test_uneven_stays_uneven_where_the_sizes_allow() -> None:
    found = assert_equivalent_shrunk(
        lambda x: jnp.sum(x, axis=0), floats(4097, 96), mesh="data=256", in_specs=P("data")
    )
    assert found.complete
    assert any(rule.uneven for rule in found.exercised_rules)
    assert found.sizes == {96: 5, 4097: 7}


def test_a_wrong_rule_is_caught_on_the_shrunken_mesh(shared_out: Primitive) -> None:
    with pytest.raises(AssertionError, match=r"first value to differ is the result of shared_out"):
        assert_equivalent_shrunk(
            shared_out.bind, floats(4096, 96), mesh="data=256", in_specs=P("data")
        )


def heads(count: int) -> Any:
    def split(x: jax.Array) -> jax.Array:
        return jnp.sum(x.reshape(x.shape[0], count, 64), axis=1)

    return split


def test_a_function_with_sizes_of_its_own_needs_a_small_one() -> None:
    x = floats(4096, 32 * 64)
    options: dict[str, Any] = {"mesh": "data=256,model=8", "in_specs": P("data", "model")}
    with pytest.raises(
        gspmd.GspmdError, match=r"split cannot be planned with .* f32\[12,6\] on .*give small_fn"
    ):
        assert_equivalent_shrunk(heads(32), x, **options)
    found = assert_equivalent_shrunk(
        heads(32), x, **options, small_fn=heads(2), small_args=[array(8, 128)]
    )
    assert found.complete


def test_numbers_that_say_nothing_are_refused() -> None:
    with pytest.raises(
        gspmd.GspmdError, match=r"result of .* is nowhere finite .* give small_args"
    ):
        assert_equivalent_shrunk(lambda x: jnp.log(x - 2), floats(64), mesh="x=16", in_specs=P("x"))


def test_axes_of_the_small_mesh_are_those_of_the_mesh() -> None:
    with pytest.raises(gspmd.GspmdError, match="small_mesh has axes a, the mesh x; give the same"):
        assert_equivalent_shrunk(jnp.tanh, floats(64), mesh="x=16", small_mesh="a=2")


def test_every_kind_of_argument_is_made_up() -> None:
    def fn(w: jax.Array, i: jax.Array, mask: jax.Array, key: jax.Array, rate: float) -> jax.Array:
        noise = jax.random.normal(key[0], w.shape)
        return jnp.where(mask, w[i], 0) * rate + noise[0].astype(w.dtype)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="rbg"), 16))
    args = (
        jax.ShapeDtypeStruct((1024, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((512,), jnp.int32),
        jax.ShapeDtypeStruct((512, 1), np.bool_),
        keys,
    )
    found = assert_equivalent_shrunk(
        fn, *args, 0.5, mesh="x=64", in_specs=(None, P("x"), *[None] * 3)
    )
    assert found.sizes == {1: 1, 16: 5, 64: 10, 512: 20, 1024: 40}


def test_shrunken_sizes_keep_order_divisors_and_how_axes_split() -> None:
    shapes = (48, 96), (96, 100), (6, 2), (2048, 48)
    in_specs = (P("x"), P(None, "y"), P(), P(("x", "y")))
    args = [floats(*shape) for shape in shapes]
    plan = gspmd.plan(lambda *xs: xs, *args, mesh="x=16,y=8", in_specs=in_specs)
    sizes = shrunken_sizes(plan, Mesh((("x", 2), ("y", 3))))
    assert list(sizes.values()) == sorted(set(sizes.values()))
    assert sizes == {2: 2, 6: 6, 48: 12, 96: 24, 100: 26, 2048: 30}
