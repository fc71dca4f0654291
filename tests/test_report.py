"""The report of a plan: FLOPs, seconds and shares that add up, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import gspmd
from gspmd import P, meshes
from gspmd.report import PARTS, Flops, Report

MESH = {"data": 4, "model": 8}
POD = "tpu-v4:2x4x4"
CUBE = 2 * 4096**3  # FLOPs of SQUARE @ SQUARE
SQUARE = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def mlp_loss(w: Any, x: Any) -> Any:
    def layer(x: Any, one: Any) -> tuple[Any, None]:
        up, down = one
        h = gspmd.annotate(jnp.tanh(x @ up), P("data", "model"))
        return gspmd.annotate(x + h @ down, P("data", None)), None

    return jnp.mean(lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32) ** 2)


WIDTH, HIDDEN, LAYERS, BATCH = 2048, 8192, 6, 65_536
ARGS = ((bf16(LAYERS, WIDTH, HIDDEN), bf16(LAYERS, HIDDEN, WIDTH)), bf16(BATCH, WIDTH))
SPECS = ((P(None, None, "model"), P(None, "model", None)), P("data"))


@pytest.fixture(scope="module")
def plan() -> gspmd.Plan:
    return gspmd.plan(jax.grad(mlp_loss), *ARGS, mesh=MESH, in_specs=SPECS)


@pytest.fixture(scope="module")
def report(plan: gspmd.Plan) -> Report:
    return plan.report("tpu-v4", POD)


def test_model_flops_are_those_of_forward_and_backward(report: Report) -> None:
    forward = 2 * LAYERS * 2 * BATCH * WIDTH * HIDDEN
    assert report.flops.model == 3 * forward


def test_hardware_flops_have_what_remat_repeats(report: Report) -> None:
    """The second product of a layer is not needed for its gradient: one is computed again."""
    forward = 2 * LAYERS * 2 * BATCH * WIDTH * HIDDEN / 32
    assert report.flops.counted == 3 * forward
    assert report.flops.hardware == 3.5 * forward


def test_a_step_is_computing_and_exposed_communication(report: Report) -> None:
    s = report.seconds
    assert s.step == pytest.approx(s.compute + s.exposed)
    assert s.communication == pytest.approx(s.hidden + s.exposed)
    assert s.communication == pytest.approx(sum(r.seconds * r.trips for r in report.collectives))


def test_shares_are_flops_over_what_the_peaks_allow(report: Report) -> None:
    allowed = 275e12 * report.seconds.step
    assert report.mfu == pytest.approx(report.flops.model / (32 * allowed))
    assert report.hfu == pytest.approx(report.flops.hardware / allowed)
    assert report.utilization == pytest.approx(report.flops.counted / allowed)
    assert 0 < report.mfu <= report.utilization < report.hfu < 1


def test_it_has_a_row_for_every_collective(plan: gspmd.Plan, report: Report) -> None:
    rows = [(row.number, row.kind, row.trips, row.bytes) for row in report.collectives]
    assert rows == [(c.number, c.kind, c.trips, c.bytes) for c in plan.collectives]


def test_what_stops_the_computation_is_exposed(plan: gspmd.Plan) -> None:
    stopped = plan.report("tpu-v4", POD, asynchronous=())
    assert stopped.seconds.exposed == pytest.approx(stopped.seconds.communication)
    free = plan.report("tpu-v4", POD, asynchronous=("all_gather", "reduce_scatter", "all_reduce"))
    assert free.seconds.step < stopped.seconds.step
    assert free.seconds.communication == pytest.approx(stopped.seconds.communication)


def test_more_bandwidth_takes_less_time(plan: gspmd.Plan) -> None:
    slow = plan.report("tpu-v5e", "tpu-v5e:4x8").seconds.communication
    fast = plan.report("tpu-v5p", "tpu-v5p:2x4x4").seconds.communication
    assert fast < slow


def test_a_placement_by_hand_is_taken(plan: gspmd.Plan) -> None:
    topology = meshes.topology("h100:8x4")
    inside = {"model": ("nvlink",), "data": ("network",)}
    good = plan.report("h100", meshes.make_mesh(MESH, topology, parts=inside))
    across = {
        "data": (meshes.Part("nvlink", 4),),
        "model": ("network", meshes.Part("nvlink", 2, 4)),
    }
    bad = plan.report("h100", meshes.make_mesh(MESH, topology, parts=across))
    assert good.seconds.communication < bad.seconds.communication / 2
    assert [f.code for f in bad.findings] == ["slow-axis"]
    assert "axis 'model' crosses the hosts' network" in bad.findings[0].message
    chosen = plan.report("h100", topology)
    assert chosen.seconds.communication <= good.seconds.communication


def test_without_a_topology_it_is_the_smallest(plan: gspmd.Plan) -> None:
    assert plan.report("tpu-v4").topology.chips == 32
    assert plan.report("tpu-v3").topology.chips == 16
    assert plan.report("h100").topology.name == "h100:8x4"


@pytest.mark.parametrize("what", PARTS)
def test_every_number_says_what_it_is_made_of(report: Report, what: str) -> None:
    text = report.why(what)
    assert text.startswith(what)
    if what.startswith(("flops", "seconds")):
        assert "test_report.py:" in text


def test_the_parts_of_the_step_add_up(report: Report) -> None:
    shares = [float(line.split("%")[0]) for line in report.why("seconds.step").splitlines()[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_it_prints(report: Report) -> None:
    text = str(report)
    assert text.startswith(f"# mlp_loss on 32 devices of {POD}")
    assert f"MFU {100 * report.mfu:.1f} %" in text
    assert " kWh a step, the chips alone" in text


def test_an_energy_that_is_not_known_says_so(plan: gspmd.Plan) -> None:
    text = str(plan.report("tpu-v5e"))
    assert "energy         not published: the mean power of tpu-v5e" in text


def test_what_does_not_fit_is_a_finding(plan: gspmd.Plan) -> None:
    def wide(x: Any) -> Any:
        return jnp.sort(x)

    made = gspmd.plan(wide, bf16(2**20, 2**14), mesh={"x": 1}).report("tpu-v5e")
    assert not made.fits
    (finding,) = made.findings
    assert finding.code == "memory"
    assert "of which tpu-v5e has 17.18 GB" in finding.message


# ------------------------------------------------------------------------------------- bad input


def test_a_mesh_that_does_not_fit_the_topology(plan: gspmd.Plan) -> None:
    with pytest.raises(gspmd.MeshError, match="has 32 devices, but topology tpu-v4:4x4x4 has 64"):
        plan.report("tpu-v4", "tpu-v4:4x4x4")


def test_a_topology_of_other_chips(plan: gspmd.Plan) -> None:
    with pytest.raises(gspmd.MeshError, match="for h100, but topology tpu-v4:2x4x4 is made of tpu"):
        plan.report("h100", POD)


def test_a_chip_that_there_is_not(plan: gspmd.Plan) -> None:
    with pytest.raises(gspmd.MeshError, match=r"'tpu-v9' is not a chip.* There are tpu-v2"):
        plan.report("tpu-v9")


def test_what_is_no_chip_or_topology(plan: gspmd.Plan) -> None:
    with pytest.raises(gspmd.MeshError, match="such as 'h100', got None of type NoneType"):
        plan.report(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(gspmd.MeshError, match="such as 'h100:8x4', got 4 of type int"):
        plan.report("h100", 4)  # pyright: ignore[reportArgumentType]


def test_a_chip_without_a_peak_for_the_programs_dtype(plan: gspmd.Plan) -> None:
    with pytest.raises(gspmd.MeshError, match="v100 has no published peak for bfloat16"):
        plan.report("v100", "v100:16x2")


def test_a_kind_that_is_no_collective(plan: gspmd.Plan) -> None:
    with pytest.raises(gspmd.GspmdError, match="'all_gathr', which is no collective; did you mean"):
        plan.report("tpu-v4", POD, asynchronous=("all_gathr",))


def test_a_placement_of_another_mesh(plan: gspmd.Plan) -> None:
    other = meshes.make_mesh({"x": 32}, meshes.topology(POD))
    with pytest.raises(gspmd.MeshError, match="the plan is for mesh data=4, model=8, and"):
        plan.report("tpu-v4", other)


def test_a_number_that_it_has_not(report: Report) -> None:
    with pytest.raises(gspmd.GspmdError, match="a report has no number 'flops'; it has"):
        report.why("flops")


def test_a_loop_without_a_bound_needs_a_number() -> None:
    def run(x: Any) -> Any:
        return lax.while_loop(lambda c: jnp.sum(c) < 10, lambda c: c @ c, x)

    made = gspmd.plan(run, bf16(64, 64), mesh={"x": 1})
    with pytest.raises(gspmd.MeshError, match=r"the loop at .*test_report.py:\d+ has no bound"):
        made.report("tpu-v4")
    one, ten = (made.report("tpu-v4", trips=n) for n in (1, 10))
    assert ten.flops.model == 10 * one.flops.model
    assert ten.seconds.step > 5 * one.seconds.step


def test_branches_count_as_the_slowest() -> None:
    def run(p: Any, x: Any) -> Any:
        return lax.cond(p, lambda x: x @ x @ x, lambda x: x, x)

    made = gspmd.plan(run, jax.ShapeDtypeStruct((), bool), bf16(1024, 1024), mesh={"x": 1})
    rows = made.report("tpu-v4").ops
    assert [row.name for row in rows if row.flops] == ["dot_general", "dot_general"]


@pytest.mark.parametrize(("branch", "most"), [("a @ b", 1), ("a @ b @ b", 2)])
def test_of_branches_one_is_counted(branch: str, most: int) -> None:
    one, other = (eval(f"lambda a, b: {text}") for text in ("a @ b", branch))
    made = gspmd.plan(
        lambda i, a, b: lax.switch(i, [one, one, other], a, b),
        jax.ShapeDtypeStruct((), jnp.int32), SQUARE, SQUARE, mesh={"x": 1},
    ).report("tpu-v4")  # fmt: skip
    assert made.flops == Flops(most * CUBE, most * CUBE, most * CUBE)
    assert 0 < made.mfu == made.hfu < 1


def test_loops_in_a_loop_without_a_bound() -> None:
    """As in decoding: layers in steps, whose number is said; and steps in steps, both so often."""

    def layers(x: Any) -> Any:
        return lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=8)[0]

    def until(step: Any) -> Any:
        return lambda x: lax.while_loop(lambda c: jnp.sum(c) < 9, step, x)

    for fn, runs in ((until(layers), 8 * 10), (until(until(jnp.square)), 0), (
        until(until(lambda x: x @ x)), 10 * 10
    )):  # fmt: skip
        made = gspmd.plan(fn, SQUARE, mesh={"x": 1}).report("tpu-v4", trips=10)
        assert made.flops == Flops(runs * CUBE, runs * CUBE, runs * CUBE)
        assert sum(row.flops * row.trips for row in made.ops) == runs * CUBE


@pytest.mark.parametrize("trips", [0, -3, 2.5, True])
def test_a_number_of_trips_is_a_number(trips: Any) -> None:
    made = gspmd.plan(lambda x: x @ x, SQUARE, mesh={"x": 1})
    with pytest.raises(gspmd.GspmdError, match=f"trips={trips!r}: .* a whole number, at least 1"):
        made.report("tpu-v4", trips=trips)


@pytest.mark.parametrize("fn", [jax.grad, jax.value_and_grad])
def test_what_no_result_needs_is_not_counted(fn: Any) -> None:
    """The gradient of a sum needs no forward product; its value needs all."""
    loss = lambda w, x: jnp.sum((x @ w).astype(jnp.float32))  # noqa: E731
    made = gspmd.plan(fn(loss), SQUARE, SQUARE, mesh={"x": 1}).report("tpu-v4")
    needed = CUBE if fn is jax.grad else 2 * CUBE
    assert made.flops == Flops(needed, needed, needed)


@pytest.mark.parametrize(("fn", "repeated"), [(jax.grad, 0), (jax.value_and_grad, 1)])
def test_what_runs_once_is_not_repeated(fn: Any, repeated: int) -> None:
    """Where nobody asks for the value, the only forward pass is the one of the backward pass."""

    @jax.checkpoint
    def loss(w: Any, x: Any) -> Any:
        h = jnp.tanh(x @ w)
        return jnp.sum((h @ w).astype(jnp.float32))

    made = gspmd.plan(fn(loss), SQUARE, SQUARE, mesh={"x": 1}).report("tpu-v4")
    once = (4 + repeated) * CUBE  # one product forward, two with the value, and three backward
    assert made.flops == Flops(once, once + repeated * CUBE, once)
    assert "backward" in made.why("flops.counted")


ALGORITHM = lax.DotAlgorithmPreset
PASSES = [
    (None, 1, 1), ("default", 1, 1), ("high", 3, 1), ("highest", 6, 156 / 19.5),
    (ALGORITHM.F32_F32_F32, 6, 156 / 19.5), (ALGORITHM.TF32_TF32_F32, 1, 1),
    (ALGORITHM.BF16_BF16_F32, 1, 0.5), (ALGORITHM.BF16_BF16_F32_X3, 3, 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("precision", "tpu", "gpu"), PASSES)
def test_precision_takes_its_time(precision: Any, tpu: float, gpu: float) -> None:
    """Of bfloat16 on a TPU; on an A100, 312 TFLOP/s in bfloat16, 156 in TF32, 19.5 in float32."""
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.float32)
    plain, made = (
        gspmd.plan(lambda a, b, p=p: jnp.dot(a, b, precision=p), x, x, mesh={"x": 1})
        for p in (None, precision)
    )
    for chip, times in (("tpu-v4", tpu), ("a100", gpu)):
        ratio = made.report(chip).seconds.compute / plain.report(chip).seconds.compute
        assert ratio == pytest.approx(times)


def test_a_program_without_products_has_no_utilization() -> None:
    made = gspmd.plan(jnp.tanh, bf16(1024, 512), mesh={"x": 4}, in_specs=(P("x"),)).report("tpu-v4")
    assert (made.mfu, made.hfu, made.utilization) == (0, 0, 0)
    assert "no matrix products" in str(made)
    assert "no matrix products" in made.why("mfu")
    assert made.seconds.step > 0


def test_what_is_not_counted_is_said() -> None:
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    made = gspmd.plan(jnp.linalg.cholesky, x, mesh={"x": 1}).report("tpu-v4")
    (finding,) = (f for f in made.findings if f.code == "uncounted")
    assert "cholesky at (boundary) counts with its memory traffic alone" in finding.message


def test_a_permute_is_timed_by_who_sends_to_whom() -> None:
    """From x major to y major on a line of 8: most blocks go further than to the next device."""
    mesh = {"x": 2, "y": 4}
    specs = {"in_specs": (P(("x", "y")),), "out_specs": P(("y", "x"))}
    plan = gspmd.plan(lambda x: x, bf16(8, 1 << 20), mesh=mesh, **specs)
    assert [c.kind for c in plan.collectives] == ["collective_permute"]
    placed = meshes.make_mesh(mesh, meshes.topology("tpu-v5e:1x8"))
    (row,) = plan.report("tpu-v5e", placed).collectives
    link = 45e9
    assert row.seconds > 1.9 * row.bytes / link
