"""Several processes: they are started and ended together, and compute what one process does."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import distributed_program as program
import jax
import pytest
import yaml
from typer.testing import CliRunner

from gspmd import distributed
from gspmd.cli import app, launch
from gspmd.cli.clusters import CLUSTERS, how_to_start
from gspmd.cli.launch import Launch
from gspmd.distributed import ADDRESS, COUNT, NUMBER, DistributedError
from gspmd.models import training

ROOT = Path(__file__).parent.parent
PROGRAM = ("python", "-W", "error", str(Path(program.__file__)))


def started(
    processes: int, devices: int, *command: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """`gspmd launch` of `command` in `cwd`, the end of which is awaited."""
    with start(processes, devices, *command, cwd=cwd) as running:
        out, err = running.communicate()
        return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def start(processes: int, devices: int, *command: str, cwd: Path) -> "subprocess.Popen[str]":
    options = ["--processes", str(processes), "--devices-per-process", str(devices)]
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "gspmd", "launch", *options, "--", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": bin_first},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---------------------------------------------------------------------- what each process is given


def test_each_process_learns_its_place_and_its_devices():
    two = Launch(("gspmd", "train"), processes=2, devices=4)
    assert two.environment(1, port=4321, gpus=0) == {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:4321",
        "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:4321",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONUNBUFFERED": "1",
    }
    on_gpus = two.environment(1, port=4321, gpus=8)
    assert on_gpus["JAX_LOCAL_DEVICE_IDS"] == "4,5,6,7"
    assert not {"JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"} & on_gpus.keys()
    assert "JAX_LOCAL_DEVICE_IDS" not in two.environment(0, port=4321, gpus=7)


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 3),
        ({"JAX_PLATFORMS": "cuda,cpu"}, 3),
        ({"JAX_PLATFORMS": "cpu"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
    ],
)
def test_gpus_are_counted(tmp_path: Path, environ: dict[str, str], count: int):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "null"):
        (tmp_path / name).touch()
    assert launch.gpus_here(environ, tmp_path) == count


def test_gspmd_is_the_one_that_runs():
    assert Launch(("gspmd", "train"), 1, 1).argv == [sys.executable, "-m", "gspmd", "train"]
    assert Launch(("bash", "-c", "gspmd"), 1, 1).argv == ["bash", "-c", "gspmd"]


@pytest.mark.parametrize(
    ("processes", "devices", "command", "said"),
    [
        (0, 4, ("bash",), "--processes is 0; a run takes at least 1."),
        (2, -1, ("bash",), "--devices-per-process is -1; a run takes at least 1."),
        (2, 4, ("no-such-thing", "x"), "there is no command 'no-such-thing'; after -- comes what"),
        (2, 4, (), "no command to start; write it after --."),
    ],
)
def test_what_cannot_be_launched(processes: int, devices: int, command: tuple[str, ...], said: str):
    with pytest.raises(DistributedError, match=said):
        Launch(command, processes, devices)


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind((launch.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        options = ("--processes", "1", "--devices-per-process", "1", "--port", str(port))
        done = CliRunner().invoke(app, ["launch", *options, "--", "bash", "-c", "exit 3"])
    assert done.exit_code == 2
    assert done.stderr == (
        f"gspmd: port {port} of this machine is in use; take another one with --port, or leave it "
        "out for one that is free.\n"
    )
    launch.check_port(launch.free_port())
    with pytest.raises(DistributedError, match="port 70000 of this machine cannot be listened on"):
        launch.check_port(70000)


def test_logs_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--processes", "1", "--devices-per-process", "1", "--logs", str(tmp_path / "file/x")]
    done = CliRunner().invoke(app, ["launch", *words, "--", "bash", "-c", "exit 3"])
    assert done.exit_code == 2
    assert done.stderr == (
        f"gspmd: --logs {tmp_path}/file/x: Not a directory; name a folder that can be written to, "
        "or leave it out to keep no logs.\n"
    )


# ----------------------------------------------------------------------- what a process makes of it

PLACE = {ADDRESS: "host:12", COUNT: "2", NUMBER: "1"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({ADDRESS: ""}, f"has {COUNT} and {NUMBER}, but no {ADDRESS}; set all three, as gspmd"),
        ({ADDRESS: "", COUNT: ""}, f"has {NUMBER}, but no {ADDRESS} and no {COUNT}"),
        ({ADDRESS: "host"}, f"{ADDRESS}='host' is not like \"host:12355\""),
        ({NUMBER: "2"}, f"{NUMBER}=2 and {COUNT}=2: processes are numbered from 0 to 1."),
        ({NUMBER: "-1"}, f"{NUMBER}='-1' is not a whole number."),
        ({COUNT: "two"}, f"{COUNT}='two' is not a whole number."),
    ],
)
def test_a_place_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
):
    for name, value in {**PLACE, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=said):
        distributed.join()


def test_a_process_alone_joins_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ADDRESS, "host:12")  # which jax would read
    failure = KeyError()
    with pytest.raises(KeyError), distributed.joined():
        raise failure  # nobody waits for us
    assert not jax.distributed.is_initialized()


# -------------------------------------------------------------------------------------- supervision

SECOND = '[ "$JAX_PROCESS_ID" = 1 ]'


def supervised(script: str, logs: Path, processes: int = 2) -> tuple[int, list[str]]:
    """The exit code of `script` run by bash as several processes, and what was told."""
    said: list[str] = []
    code = launch.run(Launch(("bash", "-c", script), processes, 1), 1, logs, said.append)
    return code, said[1:]


def test_a_run_ends_well_when_all_processes_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    code, said = supervised('echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES"', tmp_path, 3)
    assert (code, said) == (0, [])
    assert capfd.readouterr().out == "0 of 3\n"
    logs = {log.name: log.read_text() for log in tmp_path.iterdir()}
    assert logs == {"process-1.log": "1 of 3\n", "process-2.log": "2 of 3\n"}


def test_a_process_that_fails_ends_the_others(tmp_path: Path):
    script = f"echo $$ > {tmp_path}/pid-$JAX_PROCESS_ID; if {SECOND}; then {{}}; fi; sleep 1000"
    code, said = supervised(script.format("seq 30; exit 7"), tmp_path)
    assert code == 7
    head, *tail = said[0].splitlines()
    assert head == "process 1 of 2 ended with exit code 7. Its log ends:"
    assert tail == [f"  1| {i}" for i in range(11, 31)]
    code, said = supervised(script.format("kill -KILL $$"), tmp_path)
    assert (code, said) == (
        137,
        ["process 1 of 2 ended with signal 9 (Killed). Its log is empty."],
    )
    for number in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{number}").read_text()), 0)


def test_the_first_process_has_printed_here_already(tmp_path: Path):
    code, said = supervised(f"if {SECOND}; then sleep 1000; fi; exit 3", tmp_path)
    assert (code, said) == (
        3,
        ["process 0 of 2 ended with exit code 3. What it printed stands above."],
    )


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_signal_stops_all(tmp_path: Path, name: str, code: int):
    before = signal.getsignal(signal.SIGINT)
    script = f"if {SECOND}; then kill -{name} $PPID; fi; sleep 1000"
    assert supervised(script, tmp_path) == (
        code,
        ["all processes are asked to stop; press Ctrl-C again to end them at once."],
    )
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_signal_ends_all_at_once(tmp_path: Path):
    """However they resist: these pass on the signal that asks them to stop."""
    script = "trap 'kill -INT $PPID' TERM; kill -INT $PPID; while :; do sleep 0.1; done"
    code, said = supervised(script, tmp_path)
    assert (code, len(said)) == (130, 1)


# ----------------------------------------------------------------------------------------- clusters

# What is passed on must arrive as it is written, whatever it holds.
WORDS = ("bash", "-c", 'echo $JAX_PROCESS_ID/$JAX_NUM_PROCESSES@$JAX_COORDINATOR_ADDRESS "$1"', "-",
         "it's $HOME \"x\"")  # fmt: skip
FAKES = {
    "scontrol": 'printf "%s\\n" node7 node8',
    "hostname": "echo node7",
    "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i "$@"; done',
    "mpirun": 'shift 4; for i in 0 1; do OMPI_COMM_WORLD_RANK=$i "$@"; done',
}


@pytest.mark.parametrize("where", ["slurm", "mpirun"])
def test_a_script_for_a_cluster_gives_each_process_its_place(tmp_path: Path, where: str):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", how_to_start(Launch(WORDS, 2, 4), where), "-", "hosts"],
        env={
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[7-8]",
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{i}/2@node7:12355 {WORDS[-1]}" for i in (0, 1)]


def test_a_manifest_for_kubernetes_gives_each_pod_its_place():
    service, job = yaml.safe_load_all(how_to_start(Launch(WORDS, 2, 4), "gke"))
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    assert container["command"] == list(WORDS)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    place = {one["name"]: one for one in container["env"]}
    subdomain = spec["template"]["spec"]["subdomain"]
    assert subdomain == service["metadata"]["name"]
    assert place[ADDRESS]["value"] == f"{job['metadata']['name']}-0.{subdomain}:12355"
    assert place[COUNT]["value"] == "2"
    assert place[NUMBER]["valueFrom"]["fieldRef"]["fieldPath"].endswith("job-completion-index']")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_the_command_line_prints_how_to_start_elsewhere():
    options = ("--processes", "2", "--devices-per-process", "4", "--for")
    for where in CLUSTERS:
        done = CliRunner().invoke(
            app, ["launch", *options, where, "gspmd", "train", "--mesh", "x=8"]
        )
        assert done.exit_code == 0, done.stderr
        assert "JAX_NUM_PROCESSES" in done.stdout
    done = CliRunner().invoke(app, ["launch", *options, "slrm", "--", "gspmd"])
    assert done.exit_code == 2
    assert "'slrm' is not a way to start processes; did you mean 'slurm'?" in done.stderr


# ----------------------------------------------------------------------------- processes that train


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The losses of the program without this library, on one device."""
    losses: list[float] = []
    config = training.TrainConfig(steps=program.STEPS, warmup=2)
    training.train(
        config,
        program.init,
        program.loss,
        program.batch,
        on_step=lambda record: losses.append(record.loss),
    )
    return losses


def numbers(text: str) -> list[float]:
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(float(line))
    return found


# A sum over devices is taken in another order by Gloo than within a process: the last bit of a
# float32 (6e-8) may differ in each of the few sums that lead to a loss, and does.
same = functools.partial(pytest.approx, rel=1e-6)


def check_death_and_resumption(
    done: subprocess.CompletedProcess[str], folder: Path, alone: Sequence[float]
) -> None:
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert "process 1 of" in done.stderr
    assert "ended with signal 9 (Killed). Its log ends:\n" in done.stderr
    assert "1| these are its last words" in done.stderr
    assert numbers(done.stdout) == same(alone[: program.DIES_AFTER])
    assert sorted(x.name for x in (folder / "run").iterdir()) == ["2", "4"]


def test_a_process_that_dies_ends_the_run_and_leaves_the_checkpoint(
    tmp_path: Path, alone: list[float]
):
    done = started(2, 4, *PROGRAM, "run", "arguments", "dies", cwd=tmp_path)
    assert "all arguments arrive" in done.stdout, done.stderr
    check_death_and_resumption(done, tmp_path, alone)
    assert program.train(tmp_path / "run", resume=True) == same(alone[4:])  # in one process


def test_a_process_that_fails_does_not_wait_for_those_that_wait_for_it(tmp_path: Path):
    done = started(2, 4, *PROGRAM, "run", "fails", cwd=tmp_path)
    assert done.returncode == 1
    assert "  1| ValueError: this process is out of luck" in done.stderr


@pytest.mark.exhaustive
def test_four_processes(tmp_path: Path, alone: list[float]):
    done = started(4, 2, *PROGRAM, "run", "arguments", "dies", cwd=tmp_path)
    check_death_and_resumption(done, tmp_path, alone)
    done = started(2, 4, *PROGRAM, "run", "resumes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout) == same(alone[4:])


TRAIN = ("gspmd", "train", "transformer", "--mesh", "data=2,model=4", "--batch", "8", "--seq", "32")


@pytest.mark.exhaustive
def test_the_command_line_trains_alike_in_any_number_of_processes(tmp_path: Path):
    found = {}
    for processes, devices in ((1, 8), (2, 4), (4, 2)):
        done = started(
            processes, devices, *TRAIN, "--steps", "4", "--sample", "20", "--json", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found[processes] = json.loads(done.stdout)  # Gloo's chatter would be in the way
    assert found[2]["losses"] == same(found[1]["losses"])
    assert found[4]["losses"] == same(found[1]["losses"])
    assert found[1]["plan"] == found[2]["plan"] == found[4]["plan"]
    assert found[2]["sample"].startswith("def ")


@pytest.mark.exhaustive
def test_ctrl_c_stops_all_processes_after_the_same_step(tmp_path: Path):
    kept = ("--checkpoint", "run", "--save-every", "4000")
    with start(2, 4, *TRAIN, *kept, "--steps", "5000", cwd=tmp_path) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("step 1/"):
                running.send_signal(signal.SIGINT)
                break
        _, err = running.communicate()
    assert running.returncode == 130, err
    (saved,) = [int(folder.name) for folder in (tmp_path / "run").iterdir()]
    assert f"stopped after step {saved}; start all processes again, with --resume" in err
    steps = ("--steps", str(saved + 2), "--resume", "--json", "--sample", "0")
    done = started(4, 2, *TRAIN, *kept, *steps, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["first_step"] == saved + 1


@pytest.mark.exhaustive
def test_processes_and_devices_must_make_up_the_mesh(tmp_path: Path):
    done = started(2, 2, *TRAIN, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "mesh data=2, model=4 has 8 devices, and 2 processes x 2 devices are 4; make them as many."
        in done.stderr
    )
