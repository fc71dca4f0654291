"""Plans as a user reads them: which collectives, why, whose specs, what is refused."""

import os
import pathlib
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from agreement import agrees, kinds
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import gspmd
from gspmd import ArgumentError, GspmdError, P, SpecError, StrictError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
AT = re.compile(r"\btest_plan\.py:\d+")
MESH = "data=2,model=4"
Params = dict[str, jax.Array]


def mlp(params: Params, x: jax.Array) -> jax.Array:
    h = jnp.sin(jnp.einsum("bm,mh->bh", x, params["wi"]))
    return jnp.einsum("bh,hm->bm", h, params["wo"])


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(mlp(params, x) - x))


def train_step(params: Params, x: jax.Array) -> tuple[jax.Array, Params]:
    value, grads = jax.value_and_grad(loss)(params, x)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def inputs(batch: int = 16, model: int = 8, hidden: int = 32) -> tuple[Params, jax.Array]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    return {"wi": draw(model, hidden), "wo": draw(hidden, model)}, draw(batch, model)


STRATEGIES: dict[str, tuple[dict[str, P], P]] = {
    "data": ({"wi": P(), "wo": P()}, P(("data", "model"))),
    "fsdp": (
        {"wi": P(("data", "model")), "wo": P(None, ("data", "model"))}, P(("data", "model")),
    ),
    "megatron": ({"wi": P(None, "model"), "wo": P("model")}, P("data")),
    "2d": ({"wi": P("data", "model"), "wo": P("model", "data")}, P("data", "model")),
}  # fmt: skip


# --- the canonical strategies


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_step(name: str) -> None:
    """The whole printed program; `GSPMD_UPDATE_GOLDENS=1 pytest` writes it anew."""
    args, specs = inputs(), STRATEGIES[name]
    plan = gspmd.plan(train_step, *args, mesh=MESH, in_specs=specs, out_specs=(None, specs[0]))
    agrees(plan, train_step, *args)
    text = re.sub(r"# \S*test_plan.py:\d+", "# test_plan.py", str(plan)) + "\n"
    golden = GOLDENS / f"mlp_{name}.txt"
    if os.environ.get("GSPMD_UPDATE_GOLDENS"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data", {}),
        ("fsdp", {"all_gather": 2}),
        ("megatron", {"all_reduce": 1}),
    ],
)
def test_collectives_of_the_forward_pass(name: str, expected: dict[str, int]) -> None:
    specs = STRATEGIES[name]
    plan = gspmd.plan(mlp, *inputs(), mesh=MESH, in_specs=specs, out_specs=specs[1])
    assert kinds(plan) == expected


def test_collectives_of_the_backward_pass() -> None:
    grad = jax.grad(loss)
    params, x = inputs()
    data, fsdp, megatron = (STRATEGIES[name] for name in ("data", "fsdp", "megatron"))
    plans = {
        name: gspmd.plan(grad, params, x, mesh=MESH, in_specs=specs, out_specs=specs[0])
        for name, specs in {"data": data, "fsdp": fsdp, "megatron": megatron}.items()
    }
    # Data parallel: both gradients in one reduction, of exactly their bytes.
    assert kinds(plans["data"]) == {"all_reduce": 1}
    assert plans["data"].collectives[0].bytes == 2 * 8 * 32 * 4
    # Fully sharded: each gradient is scattered back to its owner.
    assert kinds(plans["fsdp"])["reduce_scatter"] == 2
    assert "all_reduce" not in kinds(plans["fsdp"])
    # Megatron: over `model` the forward's reduction only, as x needs no gradient.
    over = Counter(c.axes for c in plans["megatron"].collectives)
    assert over == {("model",): 1, ("data",): 1}


def test_sequence_parallelism_pays_a_sum_by_scattering_the_sequence() -> None:
    def block(params: Params, x: jax.Array) -> jax.Array:
        x = gspmd.annotate(x, P("data", "model"))  # batch, sequence, features
        h = jax.nn.gelu(jnp.einsum("bsm,mh->bsh", x, params["wi"]))
        h = gspmd.annotate(h, P("data", None, "model"))
        return gspmd.annotate(jnp.einsum("bsh,hm->bsm", h, params["wo"]), P("data", "model"))

    params, _ = inputs()
    x = np.random.default_rng(1).normal(size=(2, 12, 8)).astype(np.float32)
    weights = {"wi": P(None, "model"), "wo": P("model")}
    plan = gspmd.plan(block, params, x, mesh=MESH, in_specs=(weights, None))
    assert kinds(plan) == {"all_gather": 1, "reduce_scatter": 1}
    agrees(plan, block, params, x)


def test_a_sum_is_paid_late_and_once() -> None:
    """Two sums that are owed over one axis are added before they are paid."""
    x = np.ones((8, 12), np.float32)
    plan = gspmd.plan(
        lambda x, y: x @ y + x @ jnp.sin(y),
        x, x.T, mesh="x=4", in_specs=(P(None, "x"), P("x")), out_specs=P("x"),
    )  # fmt: skip
    assert kinds(plan) == {"reduce_scatter": 1}


def test_the_work_is_divided() -> None:
    """Local FLOPs x devices = global FLOPs where nothing is replicated or padded."""

    def flops(program: Any) -> int:
        total = 0
        for op, _ in program.walk():
            if op.name == "dot_general":
                (left, _), _ = op.params["dimension_numbers"]
                inner = np.prod([op.ins[0].shape[d] for d in left])
                total += 2 * int(inner * np.prod(op.outs[0].shape))
        return total

    for name in ("data", "fsdp", "megatron"):
        plan = gspmd.plan(train_step, *inputs(), mesh=MESH, in_specs=STRATEGIES[name])
        assert flops(plan.program) * 8 == flops(plan.model), name


# --- reading


@pytest.fixture(scope="module")
def megatron() -> gspmd.Plan:
    specs = STRATEGIES["megatron"]
    return gspmd.plan(mlp, *inputs(), mesh=MESH, in_specs=specs, out_specs=specs[1])


def test_the_fields_of_a_collective(megatron: gspmd.Plan) -> None:
    (one,) = megatron.collectives
    assert (one.number, one.kind, one.axes, one.trips) == (1, "all_reduce", ("model",), 1)
    assert one.bytes == 16 // 2 * 8 * 4
    assert one.wire_bytes == 2 * 3 / 4 * one.bytes == megatron.wire_bytes
    assert one.type == "f32[16@data,8]"
    assert one.phase == "forward"
    assert AT.search(one.source)
    assert str(one).startswith("#1 all_reduce[model] f32[16@data,8]: 1 x 384 B, forward, ")
    assert "  #1 %3: f32[16@data,8] = all_reduce[model] " in str(megatron)


def test_trips_count() -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.scan(lambda h, _: (jnp.tanh(h @ w @ w.T), None), x, None, length=7)[0]

    args = np.ones((4, 8), "f"), np.ones((8, 12), "f")
    plan = gspmd.plan(fn, *args, mesh="x=4", in_specs=(P(), P(None, "x")))
    (one,) = plan.collectives
    assert one.trips == 7
    assert plan.wire_bytes == 7 * one.wire_bytes


def test_why_a_collective(megatron: gspmd.Plan) -> None:
    answer = megatron.why(1)
    (one,) = megatron.collectives
    assert answer == f"{one}\n{one.why}"
    assert "a sum over model is owed: dot_general" in answer
    assert "the spec of params/wo" in answer
    assert one.source in answer
    assert megatron.why(one.source) == answer
    assert megatron.why(one.source.rsplit("/", 1)[1]) == answer


def test_why_a_value(megatron: gspmd.Plan) -> None:
    assert megatron.why("params/wi") == (
        "params/wi is f32[8,32@model]\n  dim 1 over model: the spec of params/wi"
    )
    line = int(megatron.collectives[0].source.rsplit(":", 1)[1]) - 1
    for file in ("test_plan.py", __file__):
        assert "f32[16@data,32@model]" in megatron.why(f"{file}:{line}")


def test_why_not(megatron: gspmd.Plan) -> None:
    with pytest.raises(GspmdError, match="there is no collective #2: this plan has 1"):
        megatron.why(2)
    with pytest.raises(GspmdError, match="no value named 'params/wii'; did you mean 'params/wi'"):
        megatron.why("params/wii")
    with pytest.raises(GspmdError, match=r"no op of this plan comes from 'nowhere\.py:1'"):
        megatron.why("nowhere.py:1")


def test_sharding_by_name() -> None:
    def fn(params: Params, x: jax.Array) -> dict[str, jax.Array]:
        h = checkpoint_name(x @ params["wi"], "hidden")
        return {"y": h @ params["wo"]}

    specs = STRATEGIES["megatron"]
    plan = gspmd.plan(fn, *inputs(), mesh=MESH, in_specs=specs)
    assert plan.sharding("params/wi") == P(None, "model")
    assert plan.sharding("hidden") == P("data", "model")
    assert plan.sharding("out/y") == P("data", None)
    with pytest.raises(GspmdError, match="no value named 'out/z'; did you mean 'out/y'"):
        plan.sharding("out/z")


def test_specs_come_back_in_the_structure_of_the_call(megatron: gspmd.Plan) -> None:
    assert megatron.in_specs == (
        {"wi": P(None, "model"), "wo": P("model", None)},
        P("data", None),
    )
    assert megatron.out_specs == P("data", None)


def test_graph(megatron: gspmd.Plan) -> None:
    graph = megatron.graph()
    assert nx.is_directed_acyclic_graph(graph)
    ops = {n: d for n, d in graph.nodes(data=True) if d["kind"] == "op"}
    values = {n: d for n, d in graph.nodes(data=True) if d["kind"] == "value"}
    assert len(ops) + len(values) == len(graph)
    products = [d for d in ops.values() if d["op"] == "dot_general"]
    assert len(products) == 2
    assert all(AT.search(d["source"]) for d in products)
    assert sorted(k for d in ops.values() for k in d["collectives"]) == [1]
    (wi,) = [n for n, d in values.items() if d["name"] == "params/wi"]
    assert values[wi]["type"] == "f32[8,32@model]"
    assert values[wi]["sharding"].dims == ((), ("model",))
    (out,) = [n for n in values if graph.out_degree(n) == 0]
    assert nx.has_path(graph, wi, out)


def test_repr_is_short(megatron: gspmd.Plan) -> None:
    assert repr(megatron) == "<Plan of mlp on data=2, model=4: 1 collectives>"
    assert str(megatron).startswith("# mlp on data=2, model=4\nprogram (")


# --- findings, strict, errors


def test_a_gathered_op_is_found_and_refused() -> None:
    x = np.eye(8, dtype=np.float32) + 1
    root = lambda x: jax.lax.linalg.cholesky(x, symmetrize_input=False)  # noqa: E731
    plan = gspmd.plan(root, x, mesh="x=2", in_specs=(P("x"),))
    (finding,) = plan.findings
    assert finding.code == "gathered"
    assert finding.bytes == 128
    assert "cholesky" in finding.message
    assert AT.search(finding.message)
    agrees(plan, root, x)
    with pytest.raises(StrictError, match=r"one op can only run on gathered operands:\n.*cholesky"):
        gspmd.plan(root, x, mesh="x=2", in_specs=(P("x"),), strict=True)
    stack = np.stack([x] * 4)
    rows = {"in_specs": (P(None, "x"),), "out_specs": P(None, "x")}
    other = gspmd.plan(root, stack, mesh="x=4", **rows, strict=True)
    assert other.findings == ()  # the split moves to the stack's dim


def test_an_unknown_primitive_is_gathered() -> None:
    def host(x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) * 2, shape, x, vmap_method="sequential")

    x = np.arange(8, dtype=np.float32)
    plan = gspmd.plan(lambda x: host(x) + 1, x, mesh="x=2", in_specs=(P("x"),))
    assert [f.code for f in plan.findings] == ["no-rule"]
    assert "pure_callback" in plan.findings[0].message
    with pytest.raises(StrictError, match="pure_callback"):
        gspmd.plan(host, x, mesh="x=2", in_specs=(P("x"),), strict=True)


def test_a_loop_without_bound_is_found() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x * 2, x)

    x = np.ones(8, np.float32)
    plan = gspmd.plan(fn, x, mesh="x=2", in_specs=(P("x"),))
    assert {f.code for f in plan.findings} == {"unbounded-loop"}
    assert {c.trips for c in plan.collectives} == {-1}
    agrees(plan, fn, x)


def test_a_loop_for_each_row() -> None:
    """Under vmap every row has its own predicate; JAX lets the loop run while any of them holds."""

    def row(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
        def test(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.sum(state[1]) < limit

        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return state[0] + 1, state[1] + 0.5

        return lax.while_loop(test, body, (jnp.int32(0), x))

    rows = jax.vmap(row)
    args = np.arange(15, dtype=np.float32).reshape(5, 3), np.array([9, 2, 30, 50, 40], np.float32)
    for spec in (P("x", "y"), P("y"), P(None, ("x", "y"))):
        plan = gspmd.plan(rows, *args, mesh="x=2,y=2", in_specs=(spec, P("x")))
        agrees(plan, rows, *args)
        assert "int64" not in str(plan)


def test_other_arguments_are_refused(megatron: gspmd.Plan) -> None:
    params, x = inputs()
    with pytest.raises(ArgumentError, match=r"argument x was planned with shape \(16, 8\)"):
        megatron.simulate(params, x[:4])
    with pytest.raises(ArgumentError, match=r"planned for other arguments: .* lacks params/wo"):
        megatron.simulate({"wi": params["wi"]}, x)
    with pytest.raises(ArgumentError, match="mlp was planned for other arguments"):
        megatron.simulate(params)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((None, P("model", "model")), "in_specs for x: P.* same mesh axis 'model'"),
        ((None, P("rows")), "in_specs for x: dim 0 .* names 'rows', which is no mesh axis"),
        ((None, P(None, None, "data")), "in_specs for x: .* 3 entries, but the tensor has 2 dims"),
        (({"wi": P()}, None), "in_specs for 'params': the dict of 1 specs lacks wo"),
    ],
)
def test_wrong_specs_name_the_argument(specs: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        gspmd.plan(mlp, *inputs(), mesh=MESH, in_specs=specs)


def test_wrong_effort() -> None:
    with pytest.raises(SpecError, match="effort=3: it is 0, 1 or 2"):
        gspmd.plan(mlp, *inputs(), mesh=MESH, effort=3)


# --- rules


def test_logical_names_are_resolved_by_rules() -> None:
    def fn(params: Params, x: jax.Array) -> jax.Array:
        h = gspmd.annotate(x @ params["wi"], P("batch", "mlp"))
        return h @ params["wo"]

    args = inputs()
    by_rule = {
        name: gspmd.plan(fn, *args, mesh=MESH, rules=rules, in_specs=(None, P("batch")))
        for name, rules in {
            "megatron": {"batch": "data", "mlp": "model"},
            "data": {"batch": ("data", "model"), "mlp": None},
        }.items()
    }
    assert by_rule["megatron"].in_specs[0] == {"wi": P(None, "model"), "wo": P("model", None)}
    assert by_rule["data"].in_specs[1] == P(("data", "model"), None)
    assert kinds(by_rule["data"]) == {}
    with pytest.raises(SpecError, match="'mlp', which is no mesh axis and no logical name"):
        gspmd.plan(fn, *args, mesh=MESH, rules={"batch": "data"})


# --- determinism

PROGRAM = """
import functools, jax, numpy as np, gspmd
from gspmd import P
from gspmd.models import text, training, transformer as t

config = t.CONFIGS["tiny"]
optimizer = training.make_optimizer(training.TrainConfig())
step = training.make_step(lambda p, b, k: t.loss(config, p, b), optimizer, 0)
state = jax.eval_shape(lambda: training.init_state(lambda k: t.init(config, k), optimizer, 0))
batch = {k: jax.ShapeDtypeStruct((8, config.seq), np.int32) for k in ("inputs", "targets")}
rules = t.rules_for("2d", ["data", "model"])
plan = gspmd.plan(
    step, state, batch, mesh="data=2,model=4", rules=rules, in_specs=(None, P("batch"))
)
print(plan)
print(*map(str, plan.collectives), *(c.why for c in plan.collectives), sep="\\n")
print(plan.in_specs, plan.out_specs)

def fn(w, x):
    return jax.numpy.tanh(x.reshape(4, 6, 8) @ w).reshape(24, 8)

grad = jax.grad(lambda w, x: fn(w, x).sum(), argnums=(0, 1))
print(gspmd.plan(grad, np.ones((8, 8), "f"), np.ones((24, 8), "f"), mesh="x=8,y=2",
                 in_specs=(P("y"), P("x"))))
"""


def test_every_process_makes_the_same_plan() -> None:
    def planned(seed: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE)

    first, second = (planned(seed).communicate()[0] for seed in ("1", "2"))
    assert first.count(b"\n") > 500
    assert first == second
