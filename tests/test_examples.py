"""Each example runs as a user would run it, and prints its point."""

import re
from pathlib import Path

import pytest
from processes import ROOT, run

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 70  # lines; an example is read in one go

# A line that must be there, as a pattern, for each thing that the example shows.
SHOWN = {
    "existing_program": [
        r"^\d+ collectives, 361,476 bytes a device and step$",
        r"^  #1 all_reduce\[model\] f32\[512@data,64\]: 1 x 98,304 B, forward, .*\.py:\d+$",
        r"^loss (\d\.\d+) here, \1 by jax\.jit$",
        r"^largest difference in any result: (0\.0e\+00|\d\.\de-0[5-9])$",
    ],
    "halo": [
        r"^the network, what each device sends:$",
        r"^  #1 collective_permute\[rows\] f32\[2,2,128,3\]: 1 x 6,144 B, forward, .*halo.py:28$",
        r"^  #3 collective_permute\[rows\] f32\[2,1,128,16\]: .*, forward, .*halo.py:29$",
        r"^  #12 all_reduce\[\(data,rows\)\] .* 25,536 B, backward, ",
        r"^largest difference: (0\.0e\+00|\d\.\de-0[6-9]) of the largest entry$",
    ],
    "overlap": [
        r'^overlap="none": 2 x all_gather, reduce_scatter: 469\.8 MB$',
        r'^overlap="auto": 14 x collective_permute: 469\.8 MB$',
    ],
    "pipeline": [
        r"^  #7 collective_permute\[stage\] f32\[4@stage,8,64\]: 19 x 2,048 B, backward, ",
        r"^not pipelined: loss 0\.\d+, \d\.\d\d MB sent; over stages:$",
    ],
    "pod_on_a_laptop": [
        r"^137,702,416,384 parameters, 138,334,336 on each device;",
        r"^reduce_scatter +model +\d+ +\d+\.\d\d$",
        r"^planned in \d+\.\d\d s: trace ",
    ],
    "ring_attention": [
        r"^#1 collective_permute\[seq\] f32\[4,251,8@model,16\]: 3 x 257,024 B, forward, ",
        r"^gradient of q: off by (0|\d)e[-+]0[0-9] of the largest entry$",
    ],
    "uneven": [
        r"^gathered at the boundary: 0$",
        r"^step 2: loss (\d\.\d{4})\d*, on one device \1",
        r"^out is Uneven\(f32\[6@model,8,32\]\); .*\(2, 8, 32\)",
        r"^np.asarray\(out\) has shape \(6, 8, 32\)$",
    ],
    "why": [
        r"^5 collectives send 83\.9 MB a device and step",
        r"^15%: #1 all_reduce\[model\] f32\[4096@data,1024\]: 4 x 3,145,728 B, forward, .*\.py:",
        r"^ +operand 0 f32\[4096@data,4096@model\], dim 1: annotate .*\(.*\.py:\d+\)$",
        r"^params/up is f32\[4,1024,4096@model\]$",
    ],
}


def test_every_example_is_listed() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(SHOWN)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_shows_its_point(path: Path) -> None:
    printed = run(path)
    for pattern in SHOWN[path.stem]:
        assert re.search(pattern, printed, re.MULTILINE), f"no {pattern!r} in:\n{printed}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LONGEST


def test_the_existing_program_knows_nothing_of_gspmd() -> None:
    """Above the line that says so, neither code nor imports mention it."""
    text = (ROOT / "examples/existing_program.py").read_text()
    program, _, reader = text.partition("gspmd reads it")
    assert "gspmd" not in program.partition("the program: Flax")[2]
    assert "import gspmd" in reader
