"""Several processes, one program: how a process finds the others, and how it leaves them.

Three environment variables say where the first process listens, how many there are, and which of
them this is. `gspmd launch` sets them on one machine; what it prints for Slurm, GKE and `mpirun`
sets them there.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Generator, Mapping

import jax

from gspmd.errors import GspmdError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class DistributedError(GspmdError, ValueError):
    """The processes of a run cannot find each other, or do not do the same."""


@contextlib.contextmanager
def joined() -> Generator[None]:
    """Inside, this process is one of those that the environment tells of, or alone.

    For programs, around all that they do with jax:

        with gspmd.distributed.joined():
            train()
    """
    with leaving_at_once():
        join()
        yield


def join() -> None:
    """Joins the run that the environment tells of; without the three variables, does nothing.

    Must come before the first use of jax's devices, which then are those of all processes.

    Raises:
      DistributedError: some of the three variables are missing or malformed.
    """
    place = _place(os.environ)
    if place is not None and not jax.distributed.is_initialized():
        # "deactivate": under Slurm, jax would give each process no more than one device.
        jax.distributed.initialize(*place, cluster_detection_method="deactivate")


def _place(environ: Mapping[str, str]) -> tuple[str, int, int] | None:
    """The address, the count and the number that `environ` gives, if any."""
    given = {name: environ[name] for name in (ADDRESS, COUNT, NUMBER) if environ.get(name)}
    if COUNT not in given and NUMBER not in given:  # an address alone is for jax to read
        return None
    missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
    if missing:
        raise DistributedError(
            f"the environment has {' and '.join(given)}, but no {' and no '.join(missing)}; set "
            "all three, as gspmd launch does, or none."
        )
    count, number = _integer(COUNT, given[COUNT]), _integer(NUMBER, given[NUMBER])
    if not 0 <= number < count:
        raise DistributedError(
            f"{NUMBER}={number} and {COUNT}={count}: processes are numbered from 0 to "
            f"{max(count - 1, 0)}."
        )
    host, _, port = given[ADDRESS].rpartition(":")
    if not (host and port.isdecimal()):
        raise DistributedError(f'{ADDRESS}={given[ADDRESS]!r} is not like "host:12355".')
    return given[ADDRESS], count, number


def _integer(name: str, text: str) -> int:
    if not text.isdecimal():
        raise DistributedError(f"{name}={text!r} is not a whole number.")
    return int(text)


@contextlib.contextmanager
def leaving_at_once() -> Generator[None]:
    """Ends a process of several as soon as the block fails, with its exit code.

    An ordinary exit waits for the others to end as well, and they wait for this process to go on:
    minutes would pass until anyone hears of the failure.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            _leave(error)
        raise


def _leave(error: BaseException) -> None:
    """Says what Python would say of `error` and ends the process; returns if it is no failure."""
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(code, str):
        print(code, file=sys.stderr)  # noqa: T201
    if code:
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
