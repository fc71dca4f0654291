"""Programs that tests run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(**changes: str) -> dict[str, str]:
    """What a process is given: quick compilation, but not the devices and columns of the tests."""
    left_out = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    flags = [flag for flag in kept["XLA_FLAGS"].split() if "device_count" not in flag]
    return {**kept, "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags), **changes}


def run(script: Path, *args: str, cwd: Path = ROOT) -> str:
    """What a script prints, run on its own: warnings are errors, devices are its own matter."""
    given = environment()
    given.pop("JAX_PLATFORMS", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *args],
        cwd=cwd,
        env=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
