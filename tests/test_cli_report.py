"""`gspmd report` and `gspmd sweep`: what they print, draw and refuse."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gspmd.cli.commands import app
from gspmd.cli.estimate import Request, Row, best, read_shapes, shapes, sweep
from gspmd.cli.scaling import curves, longest
from gspmd.cli.terminal import InputError

PROGRAM = """
import jax, jax.numpy as jnp
import gspmd
from gspmd import P

def step():
    def loss(w, x):
        h = gspmd.annotate(jnp.tanh(x @ w["up"]), P("batch", "mlp"))
        return jnp.mean((h @ w["down"]) ** 2)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    w = {"up": f32(1024, 4096), "down": f32(4096, 1024)}
    rules = {"batch": "data", "mlp": "model"}
    return jax.grad(loss), (w, f32(8192, 1024)), {"rules": rules}
"""

LOOP = """
import jax, jax.numpy as jnp

def step():
    run = lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 10, lambda c: c @ c, x)
    return run, (jax.ShapeDtypeStruct((64, 64), jnp.float32),)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("programs") / "mlp.py"
    path.write_text(PROGRAM)
    return f"{path}:step"


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


def succeed(*words: str) -> str:
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def fail(*words: str) -> str:
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    return done.stderr


def test_report_prints_time_utilization_and_memory(target: str) -> None:
    text = succeed("report", target, "--mesh", "data=8,model=4", "--topology", "tpu-v4:2x4x4")
    assert "tpu-v4:2x4x4 32 chips, 32 devices" in text
    for name in ("step", "MFU", "HFU", "as GSPMD counts", "memory", "energy", "compute", "exposed"):
        assert f"\n{name} " in text
    assert "all_reduce" in text
    assert "dot_general" in text


def test_report_as_json_adds_up(target: str) -> None:
    words = ("--mesh", "data=8,model=4", "--topology", "h100:8x4", "--json")
    found = json.loads(succeed("report", target, *words))
    step = found["seconds.compute"] + found["seconds.exposed"]
    assert found["seconds.step"] == pytest.approx(step)
    assert found["flops.model"] == 3 * 2 * 2 * 8192 * 1024 * 4096 - 2 * 8192 * 1024 * 1024 * 4
    assert found["mesh"] == {"data": 8, "model": 4}


def test_report_says_what_a_number_is_made_of(target: str) -> None:
    words = ("--mesh", "data=4,model=2", "--chip", "h100", "--why", "seconds.compute")
    text = succeed("report", target, *words)
    assert text.startswith("seconds.compute ")
    assert "mlp.py:8" in text


def test_report_plans_a_reference_model() -> None:
    words = ("--mesh", "data=2,model=4", "--topology", "tpu-v5e:2x4", "--batch", "16", "--json")
    found = json.loads(succeed("report", "models.transformer:tiny", *words))
    assert found["devices"] == 8
    assert found["fits"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "no hardware: add --topology tpu-v3:16x32, or --chip h100"),
        (("--chip", "h1000"), "'h1000' is not a chip; did you mean 'h100'?"),
        (("--topology", "tpu-v4:2x2"), "'tpu-v4:2x2' has 2 dims, but tpu-v4 chips form a torus"),
        (("--topology", "tpu-v4:4x4x4"), "has 8 devices, but topology tpu-v4:4x4x4 has 64"),
        (("--chip", "h100", "--topology", "tpu-v4:2x2x2"), "for h100, but topology tpu-v4:2x2x2"),
        (("--chip", "h100", "--why", "flops"), "a report has no number 'flops'"),
    ],
)
def test_report_refuses(target: str, words: tuple[str, ...], sentence: str) -> None:
    assert sentence in fail("report", target, "--mesh", "data=4,model=2", *words)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("models.transfomer:tiny", "'transfomer' is not a model; did you mean 'transformer'?"),
        ("models.transformer:tini", "'tini' is not a configuration of transformer; did you mean"),
        ("transformer", "is neither FILE.py:FUNCTION nor models.NAME:CONFIG"),
    ],
)
def test_report_refuses_a_target(name: str, sentence: str) -> None:
    assert sentence in fail("report", name, "--mesh", "data=8", "--chip", "h100")


def test_every_shape_is_there_once() -> None:
    found = list(shapes(12, ("x", "y", "z")))
    assert len(found) == len(set(found)) == 18  # 12 = 2 * 2 * 3: 6 ways for 4, 3 for 3
    for mesh in found:
        assert math.prod(int(part.split("=")[1]) for part in mesh.split(",")) == 12


def test_sweep_tables_every_shape_and_draws(target: str, tmp_path: Path) -> None:
    image = tmp_path / "sweep.png"
    words = ("--topology", "tpu-v4:2x2x2", "--processes", "1", "--plot", str(image))
    text = succeed("sweep", target, *words)
    rows = [line for line in text.splitlines() if line.startswith("data=")]
    assert [row.split()[0] for row in rows] == list(shapes(8, ("data", "model")))
    assert image.stat().st_size > 10_000


def test_sweep_compares_topologies(target: str) -> None:
    words = ("--topology", "h100:4x1", "--topology", "h100:8x1", "--processes", "1", "--json")
    rows = json.loads(succeed("sweep", target, *words))["rows"]
    assert [row["devices"] for row in rows] == [4] * 3 + [8] * 4
    assert all(row["step"] == pytest.approx(row["compute"] + row["exposed"]) for row in rows)


def test_processes_find_the_same_rows(target: str) -> None:
    alone, together = (
        list(sweep(Request(target), ["h100:4x1"], ["data", "model"], "all", n)[1]) for n in (1, 2)
    )
    assert alone == together


def test_a_shape_that_cannot_be_planned_says_why(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(PROGRAM.replace('"mlp": "model"', '"mlp": "z"'))
    image = tmp_path / "sweep.png"
    words = ("--topology", "h100:4x1", "--processes", "1", "--plot", str(image))
    done = invoke("sweep", f"{path}:step", *words)
    assert "\ndata=4,model=1: rules['mlp'] names mesh axis 'z', but" in done.stdout
    # None can be: that is an error, and nothing is drawn.
    assert done.exit_code == 2
    assert "none of the 3 mesh shapes can be reported on; of data=4,model=1: " in done.stderr
    assert not image.exists()


def test_a_loop_without_a_bound_is_told_how_often_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "loop.py"
    path.write_text(LOOP)
    words = ("sweep", f"{path}:step", "--topology", "h100:2x1", "--processes", "1")
    said = fail(*words)
    assert "has no bound, so that its time is unknown; say how often it runs, with trips=" in said
    assert "trips=100 or --trips 100, or write it as a scan" in said
    assert invoke(*words).stdout.count("has no bound") == 1  # what is true of all shapes, once
    assert "data=2,model=1  49.2 kB  yes" in succeed(*words, "--trips", "100")


@pytest.mark.parametrize("option", ["--strategy=2d", "--batch=8", "--optimizer=sgd"])
def test_what_is_for_models_alone(target: str, option: str) -> None:
    for command in ("report", "sweep"):
        mesh = ("--mesh", "data=4,model=2") if command == "report" else ("--processes", "1")
        said = fail(command, target, "--topology", "h100:8", *mesh, option)
        name = option.partition("=")[0]
        assert (
            f"{name} is for models.NAME:CONFIG, but {target} makes its own step; leave it " in said
        )


def test_a_sweep_of_no_examples() -> None:
    words = ("--topology", "h100:8x1", "--batch", "0")
    assert fail("sweep", "models.transformer:tiny", *words) == (
        "gspmd: --batch 0 on 8 devices is 0 examples in a step; give at least 0.125 a device.\n"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2", "'2' is not a shape of 2 axes (data, model); write all, or 16x64,32x32"),
        ("2x0", "'2x0' is not a shape"),
        ("2x8", "2x8 has 16 devices, the topology has 8"),
    ],
)
def test_shapes_that_are_none(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        read_shapes(text, ("data", "model"), 8)
    assert sentence in str(error.value)


def test_the_best_is_the_quickest_that_fits() -> None:
    def row(topology: str, step: float, peak: float, failure: str = "") -> Row:
        return Row(topology, 8, "x=8", peak_bytes=peak, memory=10, step=step, failure=failure)

    rows = [row("a", 3, 5), row("a", 1, 20), row("a", 2, 5), row("b", 1, 5, "no"), row("b", 9, 5)]
    assert [r.step for r in best(rows)] == [2, 9]


def test_a_line_is_drawn_for_each_kind_of_chip() -> None:
    def row(topology: str, step: float, peak: float = 5) -> Row:
        return Row(topology, 8, "x=8", peak_bytes=peak, memory=10, step=step)

    names = ("tpu-v4:4x4x8", "tpu-v3:16x16", "tpu-v3:8x8", "tpu-v3:8x16", "tpu-v3:4x32")
    rows = [row(name, step) for step, name in enumerate(names, start=1)]
    found = curves([*rows, row("tpu-v3:8x8", 177, peak=20)])
    assert {chip: {n: r.topology for n, r in curve.items()} for chip, curve in found.items()} == {
        "tpu-v4": {128: "tpu-v4:4x4x8"},
        "tpu-v3": {256: "tpu-v3:16x16", 64: "tpu-v3:8x8", 128: "tpu-v3:8x16"},
    }


def test_what_does_not_fit_does_not_stretch_the_axis() -> None:
    rows = [
        Row("h100:8", 8, "x=8", peak_bytes=p, memory=10, step=s) for s, p in ((2, 5), (177, 20))
    ]
    assert longest(rows) == 2
    assert longest(rows[1:]) == 177
