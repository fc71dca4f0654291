"""Examples: failing programs as files that run by themselves, for whoever has to mend it."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspmd.testing.equivalence import assert_equivalent
from gspmd.testing.program import DrawnProgram


@dataclasses.dataclass(frozen=True)
class Examples:
    """A folder for the examples that fail; called like `assert_equivalent`, it fills it.

    `folder()` gives the path; it is asked at the first failure.
    """

    folder: Callable[[], Path]

    def __call__(self, fn: Any, *args: Any, **options: Any) -> None:
        """Returns if `fn(*args)`, or a drawn program with its own arguments, passes.

        What a drawn program raises, planning included, is raised with the path of its script in a
        note. One test keeps one script: the last, which is hypothesis' smallest.
        """
        if not isinstance(fn, DrawnProgram) or args:
            assert_equivalent(fn, *args, **options)
            return
        try:
            fn.check(**options)
        except Exception as error:
            path = self._write(fn.script(**options))
            error.add_note(f"As a script that runs by itself: {path}")
            raise

    def _write(self, text: str) -> Path:
        test = os.environ.get("PYTEST_CURRENT_TEST", "example").rpartition(" ")[0] or "example"
        name = re.sub(r"\W+", "_", test.rpartition("/")[2]).strip("_")
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.py"
        path.write_text(text)
        return path
