"""Several processes of one program on this machine: started, watched, and ended together."""

import contextlib
import dataclasses
import errno
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

from gspmd.distributed import ADDRESS, COUNT, NUMBER, DistributedError

HOST = "127.0.0.1"
TAIL = 20  # lines of a log
# Seconds. A run that is asked to stop ends its step and saves it; one that has failed cannot.
GRACE_TO_STOP, GRACE_TO_FAIL = 60.0, 5.0
POLL = 0.1  # seconds
_HOST_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Launch:
    """`command` as `processes` processes on this machine that have `devices` devices each.

    Raises:
      DistributedError: there are none, or no such command.
    """

    command: tuple[str, ...]
    processes: int
    devices: int

    def __post_init__(self) -> None:
        for option, n in (("processes", self.processes), ("devices-per-process", self.devices)):
            if n < 1:
                raise DistributedError(f"--{option} is {n}; a run takes at least 1.")
        if not self.command:
            raise DistributedError("no command to start; write it after --.")
        if self.command[0] != "gspmd" and shutil.which(self.command[0]) is None:
            raise DistributedError(
                f"there is no command {self.command[0]!r}; after -- comes what each process runs, "
                "such as gspmd train, or python train.py."
            )

    @property
    def argv(self) -> list[str]:
        """The command; `gspmd` is the one that runs now, wherever it is installed."""
        if self.command[0] == "gspmd":
            return [sys.executable, "-m", "gspmd", *self.command[1:]]
        return list(self.command)

    def environment(self, number: int, port: int, gpus: int) -> dict[str, str]:
        """What process `number` has in its environment besides ours: its place, its devices.

        CPU devices stand in where this machine has fewer `gpus` than the run has devices.
        """
        place = {
            ADDRESS: f"{HOST}:{port}",
            "JAX_COORDINATOR_BIND_ADDRESS": f"{HOST}:{port}",  # nobody else need reach it
            COUNT: str(self.processes),
            NUMBER: str(number),
            "PYTHONUNBUFFERED": "1",  # a log that ends with the process
        }
        if self.on_gpus(gpus):
            first = number * self.devices
            mine = map(str, range(first, first + self.devices))
            return {**place, "JAX_LOCAL_DEVICE_IDS": ",".join(mine)}
        return {**place, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices)}

    def on_gpus(self, gpus: int) -> bool:
        return gpus >= self.processes * self.devices


def gpus_here(environ: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs jax would use on this machine."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    here = len(list(dev.glob("nvidia[0-9]*")))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return here if visible is None else min(here, len([x for x in visible.split(",") if x]))


def free_port() -> int:
    """A port that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raises DistributedError if something on this machine listens on `port`."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "is in use" if in_use else f"cannot be listened on ({error})"
            raise DistributedError(
                f"port {port} of this machine {why}; take another one with --port, or leave it out "
                "for one that is free."
            ) from error


def make_folder(logs: Path) -> None:
    """Raises DistributedError if nothing can be written to `logs`, which is made if need be."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=logs):
            pass
    except OSError as error:
        raise DistributedError(
            f"--logs {logs}: {error.strerror}; name a folder that can be written to, or leave it "
            "out to keep no logs."
        ) from error


def run(launch: Launch, port: int, logs: Path, tell: Callable[[str], None]) -> int:
    """The exit code of the run: 0 if all processes end well, else that of the first that does not.

    The first process speaks for all, the others write to `process-1.log` and so on in `logs`.
    `tell` hears why a run ends early. Ctrl-C asks all to stop, by SIGTERM; a second one kills them.
    """
    gpus = gpus_here(os.environ)
    where = "GPUs" if launch.on_gpus(gpus) else "CPU devices"
    tell(
        f"{launch.processes} processes x {launch.devices} {where}; elsewhere: --for slurm, --for "
        "gke or --for mpirun prints how to start the same."
    )
    children: list[subprocess.Popen[bytes]] = []
    with _stoppable() as begin:
        try:
            for number in range(launch.processes):
                children += [_start(launch, number, port, gpus, logs)]
            begin()
            return _watch(children, logs, tell)
        except _Stop as stop:
            tell("all processes are asked to stop; press Ctrl-C again to end them at once.")
            with contextlib.suppress(_Stop):
                _end(children, GRACE_TO_STOP)
            return 128 + stop.number
        finally:
            _kill(children)


def _start(
    launch: Launch, number: int, port: int, gpus: int, logs: Path
) -> subprocess.Popen[bytes]:
    """Starts process `number`, in a session of its own: Ctrl-C reaches only us, who pass it on."""
    environ = dict(os.environ)
    kept = [x for x in environ.get("XLA_FLAGS", "").split() if not x.startswith(_HOST_DEVICES)]
    environ |= {"XLA_FLAGS": " ".join(kept)} | launch.environment(number, port, gpus)
    with contextlib.ExitStack() as closing:
        log = None if number == 0 else closing.enter_context(_log(logs, number).open("wb"))
        return subprocess.Popen(
            launch.argv,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
        )


def _log(logs: Path, number: int) -> Path:
    return logs / f"process-{number}.log"


def _watch(
    children: Sequence[subprocess.Popen[bytes]], logs: Path, tell: Callable[[str], None]
) -> int:
    """Waits until all have ended well, or one has not: then the others are ended as well."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number, child in enumerate(children):
        threading.Thread(target=_await, args=(child, number, ended), daemon=True).start()
    for _ in children:
        first = ended.get()
        if children[first].returncode:
            break
    else:
        return 0
    # Others may have ended by now because of it; one that was killed did not.
    failed = [first, *(n for n, child in enumerate(children) if child.poll() and n != first)]
    failed.sort(key=lambda number: children[number].returncode > 0)
    for number in failed:
        tell(_failure(number, children[number].returncode, len(children), logs))
    _end(children, GRACE_TO_FAIL)
    code = children[failed[0]].returncode
    return code if code > 0 else 128 - code


def _await(child: subprocess.Popen[bytes], number: int, ended: "queue.SimpleQueue[int]") -> None:
    child.wait()
    ended.put(number)


def _failure(number: int, code: int, count: int, logs: Path) -> str:
    """How process `number` ended, and the end of its log."""
    how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.strsignal(-code)})"
    said = f"process {number} of {count} ended with {how}."
    if number == 0:
        return f"{said} What it printed stands above."
    tail = _log(logs, number).read_text(errors="replace").splitlines()[-TAIL:]
    if not tail:
        return f"{said} Its log is empty."
    return "\n".join([f"{said} Its log ends:", *(f"  {number}| {line}" for line in tail)])


def _end(children: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Asks those that still run to stop; those that do after `grace` seconds are killed."""
    for child in children:
        _send(child, signal.SIGTERM)
    until = time.monotonic() + grace
    while time.monotonic() < until and any(child.poll() is None for child in children):
        time.sleep(POLL)
    _kill(children)


def _kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        _send(child, signal.SIGKILL)
        child.wait()


def _send(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends a signal to a process, if it runs, and to those that it has started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


class _Stop(BaseException):
    """A signal that asks us to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stoppable() -> Generator[Callable[[], None]]:
    """Turns two of the signals that would end us into _Stop; ignored ones stay so (`nohup`).

    What comes before the yielded function is called, that raises: a process that is being started
    must not be lost.
    """
    early: list[int] = []
    left = 0

    def stop(number: int, frame: object = None) -> None:
        nonlocal left
        if left:
            left -= 1
            raise _Stop(number)
        early.append(number)

    def begin() -> None:
        nonlocal left
        left = 2
        if early:
            stop(early[0])

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield begin
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
