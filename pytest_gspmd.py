"""The pytest plugin of gspmd: the fixture `assert_partitioned`, the option `--gspmd-examples`.

It is a module of its own, for pytest loads it at each start, and `import gspmd` imports jax.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gspmd.testing.examples import Examples


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("gspmd").addoption(
        "--gspmd-examples",
        metavar="FOLDER",
        type=_folder,
        help="where the scripts of drawn programs that fail are written (a temporary folder)",
    )


def _folder(text: str) -> Path:
    """The folder `text`, which need not exist yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder.")
    return path


@pytest.fixture(scope="session")
def assert_partitioned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Examples:
    """`gspmd.testing.assert_equivalent`, which also takes a drawn program alone.

    `assert_partitioned(program, grad=False, on="simulated")` checks a program drawn by
    `gspmd.testing.programs` with its own arguments, mesh and specs. If it fails, the message names
    a Python file that shows the failure by itself, in the folder of `--gspmd-examples` or a
    temporary one.
    """
    from gspmd.testing.examples import Examples

    given: Path | None = request.config.getoption("--gspmd-examples")
    made: list[Path] = []

    def folder() -> Path:
        if given is not None:
            return given.absolute()
        if not made:
            made.append(tmp_path_factory.mktemp("gspmd-examples"))
        return made[0]

    return Examples(folder)
