"""Measurements in a process of their own, which may die of one: the others are made all the same.

The process runs `work`: it reads what to measure, tells `doing` before each part of it, and prints
what it found. When it dies, or hangs, the next one leaves out that part.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

LONGEST = 180  # seconds that a part may take before it counts as hanging

Found = dict[str, Any]
"""What was measured of one thing, as JSON has it."""


class Measured(NamedTuple):
    """What was found, and of which parts the process died, and how."""

    found: Found
    died: Mapping[str, str]


class End(NamedTuple):
    """What a process was at when it died, and of what."""

    number: int
    part: str
    stage: str
    longest: int
    why: str


# ---------------------------------------------------------------------------------- in the process


def work(measure: Callable[[int, Sequence[str]], Found]) -> None:
    """Calls `measure(number, parts to skip)` for each number that standard input asks for."""
    for number, skip in json.loads(sys.stdin.read()):
        _tell(number=number)
        _tell(found=measure(number, skip))


def doing(part: str, stage: str, longest: int = LONGEST) -> None:
    """Says what comes next: a stage, such as compiling, of a part that can be skipped."""
    signal.alarm(longest)  # its default action ends the process, whatever native code it is in
    _tell(part=part, stage=stage, longest=longest)


def _tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


# ---------------------------------------------------------------------------------- outside of it


def measure_all(
    command: Sequence[str], environment: Mapping[str, str], numbers: Sequence[int]
) -> dict[int, Measured]:
    """What processes started by `command`, which are to call `work`, find for each number."""
    found: dict[int, Found] = {}
    died: dict[int, dict[str, str]] = {number: {} for number in numbers}
    while len(found) < len(numbers):
        todo = [(number, list(died[number])) for number in numbers if number not in found]
        end = _follow(command, environment, todo, found)
        if end is None:
            continue
        if not end.part or end.part in died[end.number]:
            raise SystemExit(f"measuring {end.number} fails outside of its parts: {end.why}")
        died[end.number][end.part] = f"{end.stage}, {end.why}"
    return {number: Measured(found[number], died[number]) for number in numbers}


def _follow(
    command: Sequence[str],
    environment: Mapping[str, str],
    todo: Sequence[tuple[int, Sequence[str]]],
    found: dict[int, Found],
) -> End | None:
    """Adds to `found` what one process measures; its end, if it dies before it is through."""
    at: dict[str, Any] = {"number": todo[0][0], "part": "", "stage": "", "longest": LONGEST}
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as given:
        json.dump(todo, given)
        given.seek(0)
        with subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdout
            for line in process.stdout:
                event = json.loads(line)
                if "found" in event:
                    found[at["number"]] = event["found"]
                elif "number" in event:
                    at = {"part": "", "stage": "", "longest": LONGEST, **event}
                else:
                    at |= event
        if not process.returncode:
            return None
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode == -signal.SIGALRM:
        return End(**at, why=f"more than {at['longest']} s")
    checks = [line.partition("] ")[2] for line in said if re.match(r"F\d{4} ", line)]
    last = (checks or said[-1:] or [f"exit status {process.returncode}"])[0]
    return End(**at, why=f"the process dies: {last}")
