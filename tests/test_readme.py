"""Every block of the README runs, and prints what the README says.

After a change of what is printed, `python tests/test_readme.py` writes it into the README.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
from processes import ROOT

README = ROOT / "README.md"

BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Runs blocks one after another in one namespace; prints what each printed.
DRIVER = """if True:
    import contextlib, io, json, sys
    namespace, printed = {"__name__": "__main__"}, []
    for name, source in json.load(sys.stdin):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, name, "exec"), namespace)
        printed.append(out.getvalue())
    print(json.dumps(printed))
"""


def environment(folder: Path) -> dict[str, str]:
    """Eight CPU devices, the checkout to import from, and `gspmd` as a command of this Python."""
    command = folder / "gspmd"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gspmd "$@"\n')
    command.chmod(0o755)
    return processes.environment(
        JAX_PLATFORMS="cpu",
        PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )


def run_python(blocks: list[tuple[str, str]], folder: Path) -> list[str]:
    """What each (file name, source) prints, all run in one process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER],
        input=json.dumps(blocks),
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_console(text: str, folder: Path) -> str:
    """The lines of `text` that start with $, each followed by what it prints."""
    parts: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            done = subprocess.run(
                ["bash", "-c", line[2:]],
                env=environment(folder),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            parts += [f"{line}\n", done.stdout]
    return "".join(parts)


def executed(readme: str, folder: Path) -> str:
    """The README with what its blocks really print."""
    blocks = list(BLOCK.finditer(readme))
    sources = [(block[2] or "example.py", block[3]) for block in blocks if block[1] == "python"]
    printed = iter(run_python(sources, folder))
    return "".join(_pieces(readme, blocks, printed, folder))


def _pieces(
    readme: str, blocks: list[re.Match[str]], printed: Iterator[str], folder: Path
) -> Iterator[str]:
    at, said = 0, ""
    for block in blocks:
        kind = block[1]
        yield readme[at : block.start(3)]
        assert kind == "text" or not said, f"nothing shows what is printed: {said}"
        if kind == "text":
            yield said
        else:
            yield run_console(block[3], folder) if kind == "console" else block[3]
        said = next(printed) if kind == "python" else ""
        at = block.end(3)
    assert not said, f"nothing shows what is printed: {said}"
    yield readme[at:]


def test_blocks_print_what_the_readme_says(tmp_path: Path) -> None:
    readme = README.read_text()
    assert executed(readme, tmp_path) == readme


def test_blocks_are_of_known_kinds() -> None:
    """Nothing is shown that no test runs."""
    kinds = {block[1] for block in BLOCK.finditer(README.read_text())}
    assert kinds == {"python", "text", "console", "sh"}
    assert README.read_text().count("\n```") == 2 * len(BLOCK.findall(README.read_text()))


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    blocks = [block[3] for block in BLOCK.finditer(README.read_text()) if block[1] == "sh"]
    commands = [line.partition("#")[0].split() for text in blocks for line in text.splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    for _, target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_files_that_are_named_exist() -> None:
    text = README.read_text()
    named = re.findall(r"(?:examples|benchmarks|models|gspmd)/[\w/]+\.(?:py|svg)", text)
    named += re.findall(r"\b(\w+\.md|LICENSE)\b", text)
    assert named
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_first_program_is_twelve_lines() -> None:
    first = next(block for block in BLOCK.finditer(README.read_text()) if block[1] == "python")
    assert len([line for line in first[3].splitlines() if line.strip()]) <= 12


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        README.write_text(executed(README.read_text(), Path(made)))
