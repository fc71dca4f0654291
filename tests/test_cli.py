"""The command line: what it prints, its exit codes, and that an error is one clear sentence."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import environment
from typer.testing import CliRunner

from gspmd.cli import app, chart, load, show
from gspmd.cli.terminal import InputError, printable

FILE = """
import functools

import jax
import jax.numpy as jnp

import gspmd
from gspmd import P

print("a file may print")


def mlp(x, wi, wo):
    h = jnp.tanh(x @ wi)
    return h @ wo


def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


ARGS = (of(8, 16), of(16, 32), of(32, 16))
number = 3


def step():
    return mlp, ARGS, {"in_specs": (P("data"), P(None, "model"), P("model"))}


def plain():
    return mlp, list(ARGS)


def with_mesh():
    return mlp, ARGS, {"mesh": {"model": 4}, "in_specs": (None, P(None, "model"), P("model"))}


def logical():
    return mlp, ARGS, {"in_specs": (P("batch"), P(None, "mlp"), P("mlp"))}


@functools.partial(gspmd.partition, mesh="data=2,model=4")
def decorated():
    return gspmd.annotate(jnp.ones((8, 16)), P("data")).sum()


def gathers():
    def roots(x):
        return jnp.linalg.eigvalsh(x)

    return roots, (of(8, 8),), {"in_specs": P("data")}


def many():
    def sums(*xs):
        return [x.sum(0) for x in xs]

    return sums, (of(8, 4),) * 9, {"in_specs": (P("x"),) * 9, "out_specs": P()}


def needs(size, kind=None, *rest, **options):
    return size


def wrong():
    return 3


def incomplete():
    return mlp, 3


def fails():
    raise KeyError("no such layer")


def stops():
    raise SystemExit("bye")


def untraceable():
    def fn(x):
        return x if x.sum() > 0 else -x

    return fn, ARGS[:1]


def misspelt():
    return mlp, ARGS, {"in_spec": P("data")}


def numbered():
    return mlp, ARGS, {3: 4}


def broken():
    def fn(x):
        return {}["layer"]

    return fn, ARGS[:1]


def wordy():
    return lambda x: "done", ARGS[:1]
"""
PRODUCT = FILE.splitlines().index("    return h @ wo") + 1
MESH = ("--mesh", "data=2,model=4")


@pytest.fixture
def gspmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command line in a folder with `prog.py` and a file that does not import."""
    (tmp_path / "prog.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("import jax\n\nlayers = 4 +\n")
    (tmp_path / "raises.py").write_text("import jax\n\nraise ValueError('too few\\nlayers')\n")
    (tmp_path / "notes.txt").write_text("step")
    (tmp_path / "dir.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "prog", raising=False)
    return lambda *args: CliRunner().invoke(app, list(args))


def in_process(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gspmd", *args],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
    )


def test_plan_sums_up_what_is_sent(gspmd: Callable[..., Any]) -> None:
    done = gspmd("plan", "prog.py:step", *MESH)
    assert done.exit_code == 0, done.stderr
    head, table = done.stdout.split("\n\n")[:2]
    assert head == "mesh data=2, model=4 (8 devices)"
    assert [line.split() for line in table.splitlines()] == [
        ["collectives", "over", "times", "wire", "bytes"],
        ["all_reduce", "model", "1", "384", "B"],  # 2 (4-1)/4 of 4 x 16 floats
        ["in", "all", "1", "384", "B"],
        ["per", "device", "and", "call"],
    ]
    assert f"dot_general (prog.py:{PRODUCT})" in done.stdout
    assert done.stderr == "a file may print\n"
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())


def test_of_a_long_reason_a_summary_has_the_first_lines(gspmd: Callable[..., Any]) -> None:
    """One all_reduce that was combined of many has a reason for each."""
    done = gspmd("plan", "prog.py:many", "--mesh", "x=2")
    (left,) = re.findall(r"    \.\.\. (\d+) more lines: plan\.why\(1\)", done.stdout)
    whole = gspmd("explain", "prog.py:many", "1", "--mesh", "x=2").stdout
    # Without the collective itself, which may take more than one line.
    assert sum(line.startswith("  ") for line in whole.splitlines()) == 8 + int(left)
    assert done.stdout.count("a sum over x is owed") < whole.count("a sum over x is owed") == 9


def test_plan_prints_the_program(gspmd: Callable[..., Any]) -> None:
    done = gspmd("plan", "prog.py:step", *MESH, "--program")
    assert "\n# mlp on data=2, model=4\nprogram (x: f32[8@data,16]" in done.stdout
    assert "#1 %3: f32[8@data,16] = all_reduce[model] %2" in done.stdout


def test_plan_without_specs_sends_nothing(gspmd: Callable[..., Any]) -> None:
    done = gspmd("plan", "prog.py:plain", *MESH)
    assert done.exit_code == 0
    assert "collectives none: nothing is sent" in done.stdout


def test_json(gspmd: Callable[..., Any]) -> None:
    done = gspmd("plan", "prog.py:step", *MESH, "--json", "--program")
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 2, "model": 4}
    assert (found["devices"], found["executions"], found["wire_bytes"]) == (8, 1, 384)
    assert found["by_kind"] == [
        {"kind": "all_reduce", "axes": ["model"], "executions": 1, "wire_bytes": 384}
    ]
    (one,) = found["collectives"]
    assert (one["number"], one["kind"], one["bytes"], one["trips"]) == (1, "all_reduce", 256, 1)
    assert found["findings"] == found["broken_limits"] == []
    assert found["program"].startswith("# mlp on data=2, model=4\n")


@pytest.mark.parametrize("target", ["prog.py:with_mesh", "prog.py:decorated"])
def test_a_file_may_bring_its_mesh(gspmd: Callable[..., Any], target: str) -> None:
    found = json.loads(gspmd("plan", target, "--json").stdout)
    assert [c["kind"] for c in found["collectives"]] == ["all_reduce"]
    other = json.loads(gspmd("plan", target, "--mesh", "data=2,model=2", "--json").stdout)
    assert other["devices"] == 4, "the command line's mesh goes first"


@pytest.mark.parametrize(
    ("rules", "kinds"),
    [
        (["batch=data,mlp=model"], ["all_reduce"]),
        (["batch=data", "mlp="], []),
        (["batch=data+model,mlp="], []),
    ],
)
def test_rules(gspmd: Callable[..., Any], rules: list[str], kinds: list[str]) -> None:
    given = [word for table in rules for word in ("--rules", table)]
    done = gspmd("plan", "prog.py:logical", *MESH, *given, "--json")
    assert [c["kind"] for c in json.loads(done.stdout)["collectives"]] == kinds


@pytest.mark.parametrize(
    ("limit", "code", "said"),
    [
        (("--max-wire-bytes", "384"), 0, ""),
        (("--max-wire-bytes", "0.3kB"), 1, "sends 384 B, more than the 300 B of --max-wire-bytes."),
        (("--max-collectives", "1"), 0, ""),
        (("--max-collectives", "0"), 1, "executes 1 collectives, more than the 0 of"),
    ],
)
def test_limits(gspmd: Callable[..., Any], limit: tuple[str, str], code: int, said: str) -> None:
    done = gspmd("plan", "prog.py:step", *MESH, *limit, "--json")
    assert done.exit_code == code
    assert said in done.stderr
    assert len(json.loads(done.stdout)["broken_limits"]) == code, "the plan is printed all the same"


def test_strict(gspmd: Callable[..., Any]) -> None:
    done = gspmd("plan", "prog.py:gathers", "--mesh", "data=2")
    assert done.exit_code == 0
    assert "findings\ngathered: eigh at prog.py" in done.stdout
    done = gspmd("plan", "prog.py:gathers", "--mesh", "data=2", "--strict")
    assert done.exit_code == 1
    assert "strict" in done.stderr
    assert "eigh" in done.stderr


@pytest.mark.parametrize("about", ["1", "wo", f"prog.py:{PRODUCT}"])
def test_explain(gspmd: Callable[..., Any], about: str) -> None:
    done = gspmd("explain", "prog.py:step", about, *MESH)
    assert done.exit_code == 0, done.stderr
    assert "the spec of " in done.stdout
    as_json = gspmd("explain", "prog.py:step", about, *MESH, "--json")
    found = json.loads(as_json.stdout)
    assert found["about"] == about
    assert found["why"].split() == done.stdout.split()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("plan prog.py", "'prog.py' is neither FILE.py:FUNCTION nor models.NAME:CONFIG"),
        ("plan prg.py:step", "there is no file 'prg.py'; did you mean 'prog.py'?"),
        ("plan no/where.py:step", "there is no file 'no/where.py'."),
        ("plan notes.txt:step", "'notes.txt' is not a Python file"),
        ("plan prog.py:stp", "prog.py has no function 'stp'; did you mean 'step'?"),
        ("plan prog.py:number", "prog.py:number is of type int, not a function"),
        ("plan broken.py:step", "broken.py cannot be imported: SyntaxError: invalid syntax"),
        ("plan raises.py:step", "cannot be imported: ValueError: too few (raises.py:3)."),
        ("plan prog.py:needs", "prog.py:needs takes size, but the command line has nothing"),
        ("plan prog.py:wrong", "returned something of type int: it must return (fn, args)"),
        ("plan prog.py:incomplete", "returned a tuple of (function, int): it must return"),
        ("plan prog.py:fails", "prog.py:fails failed: KeyError: 'no such layer' (prog.py:"),
        ("plan prog.py:stops", "prog.py:stops failed: SystemExit: bye (prog.py:"),
        ("plan prog.py:step", "no mesh: add --mesh data=2,model=4, for instance."),
        ("plan prog.py:step --mesh data=x", "'data=x' is not NAME=SIZE"),
        ("plan prog.py:step --mesh x=2", "names 'data', which is no mesh axis"),
        ("plan prog.py:untraceable --mesh x=2", "fn does not trace at prog.py:"),
        ("plan prog.py:step --mesh x=2 --rules batch", "'batch' is not NAME=AXIS"),
        ("plan prog.py:step --mesh x=2 --rules b=x,b=x", "'b' is given twice"),
        ("plan prog.py:step --mesh x=2 --max-wire-bytes 10Q", "'10Q' is not a size in bytes"),
        ("explain prog.py:step 7 --mesh data=2,model=4", "no collective #7: this plan has 1"),
        ("explain prog.py:step wx --mesh data=2,model=4", "no value named 'wx'"),
        ("train transfomer --mesh x=2", "'transfomer' is not a model; did you mean 'transformer'?"),
        ("train transformer --mesh x=2 --config tny", "did you mean 'tiny'? There is tiny, small"),
        ("train transformer --mesh x=2 --strategy 3d", "no strategy '3d'"),
        ("train transformer --mesh x=2 --resume", "--resume needs --checkpoint DIR"),
        ("train transformer --mesh x=2 --plot a.b", "ends in .png, .pdf, .svg."),
        ("train transformer --mesh x=2 --plot no/a.png", "there is no folder 'no'."),
        ("train transformer --mesh x=0", "mesh axis 'x' has size 0"),
        ("train transformer --mesh x=9999", "mesh x=9999 has 9999 devices; to train here, 1024"),
        ("train transformer --mesh x=2 --plot dir.png", "dir.png: it cannot be written: Is a dir"),
        ("train transformer --mesh x=2 --checkpoint notes.txt", "notes.txt cannot be a folder"),
        ("train transformer --mesh x=2 --checkpoint new --resume", "new holds no checkpoint"),
        ("plan dir.png:step --mesh x=2", "there is no file 'dir.png'."),
        ("plan prog.py:misspelt --mesh x=2", "keyword argument 'in_spec'; did you mean 'in_specs'"),
        ("plan prog.py:numbered --mesh x=2", "returned options {3: 4}: their names are strings."),
        ("plan prog.py:broken --mesh x=2", "fn does not trace at prog.py:"),
        ("plan prog.py:wordy --mesh x=2", "returns at out something of type str, which is no"),
    ],
)
def test_bad_input_is_one_sentence(gspmd: Callable[..., Any], args: str, said: str) -> None:
    done = gspmd(*args.split())
    assert done.exit_code == 2, done.stderr
    *printed, sentence = done.stderr.splitlines()
    assert set(printed) <= {"a file may print"}
    assert sentence.startswith("gspmd: ")
    assert said in sentence
    assert sentence[-1] in ".?)"
    assert done.stdout == ""
    assert "Traceback" in gspmd(*args.split(), "--debug").stderr


@pytest.mark.parametrize("args", ["", "plan", "bogus", "plan a.py:b --max-collectives -1"])
def test_bad_usage(gspmd: Callable[..., Any], args: str) -> None:
    done = gspmd(*args.split())
    assert done.exit_code == 2
    assert "Usage: " in done.output


@pytest.mark.parametrize("command", [(), ("plan",), ("explain",), ("train",), ("demo",)])
def test_help(gspmd: Callable[..., Any], command: tuple[str, ...]) -> None:
    done = gspmd(*command, "--help")
    assert done.exit_code == 0
    assert "..." not in done.stdout.partition("Commands:")[2], "each first line fits"


def test_colors_only_where_they_are_wanted(gspmd: Callable[..., Any], tmp_path: Path) -> None:
    args = ("plan", "prog.py:step", *MESH)
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}  # what rich takes for a terminal
    assert "\x1b[" in in_process(*args, cwd=tmp_path, **terminal).stdout
    for env in ({}, {**terminal, "NO_COLOR": "1"}):
        done = in_process(*args, cwd=tmp_path, **env)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout


def test_ascii_terminals(gspmd: Callable[..., Any], tmp_path: Path) -> None:
    done = in_process("plan", "prog.py:step", *MESH, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


TRAIN = ("train", "transformer", "--mesh", "data=3", "--batch", "6", "--seq", "16", "--sample", "9")


def test_train_stops_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C leaves a checkpoint and says how to go on from it."""
    kept = ("--checkpoint", "run", "--save-every", "4000")
    running = subprocess.Popen(
        [sys.executable, "-m", "gspmd", *TRAIN, *kept, "--steps", "5000"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("step 1/"):
            running.send_signal(signal.SIGINT)
            break
    _, rest = running.communicate()
    assert running.returncode == 130, rest
    assert rest.splitlines()[-1].startswith("gspmd: stopped after step ")
    assert rest.endswith(" --resume\n")
    (saved,) = [int(folder.name) for folder in (tmp_path / "run").iterdir()]

    steps = str(saved + 3)
    resumed = in_process(
        *TRAIN, *kept, "--steps", steps, "--resume", "--json", "--plot", "a.png", cwd=tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    found = json.loads(resumed.stdout)
    assert found["first_step"] == saved + 1
    assert found["plan"]["devices"] == 3
    assert len(found["losses"]) == 3
    assert found["sample"].startswith("def ")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_demo(tmp_path: Path) -> None:
    done = in_process("demo", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("annotate(") == 9
    assert "mesh data=2, model=4 (8 devices)" in done.stdout
    assert "The first 3 steps again, on one device" in done.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("10GB", 1e10), ("1.5 GiB", 1.5 * 2**30), ("2kb", 2000), ("7B", 7)],
)
def test_read_bytes(text: str, size: float) -> None:
    assert load.read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1.2.3", "-1", "1 XB", "1e", "nan"])
def test_read_bytes_refuses(text: str) -> None:
    with pytest.raises(InputError, match="not a size in bytes; write 10GB"):
        load.read_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234, "1.23 kB"), (3.2e9, "3.2 GB"),
     (9e17, "900 PB")],
)  # fmt: skip
def test_show_bytes(count: float, text: str) -> None:
    assert show.show_bytes(count) == text


def test_curve() -> None:
    drawn = chart.curve([(1, 3.0), (2, 1.0), (5, 1.0)], width=8, height=3, plain=True)
    assert drawn.splitlines() == [
        "       3 |**",
        "         | *",
        "       1 | *******",
        "          step 1 5",
    ]


def test_curve_of_little_or_of_nothing_finite() -> None:
    nan, inf = float("nan"), float("inf")
    assert chart.curve([]) == chart.curve([(1, 2.0)]) == chart.curve([(1, nan), (2, inf)]) == ""
    flat = chart.curve([(1, 2.0), (2, nan), (3, 2.0)], width=4, height=1)
    assert flat.splitlines()[0] == "       2 │⠉⠉⠉⠉"


def test_printable() -> None:
    assert printable("a\tb\n\x1b[2Jé\x00") == "a\tb\n�[2Jé�"
