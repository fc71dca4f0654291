"""Every primitive that JAX's own harnesses exercise is right on drawn meshes, even and uneven."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from harness import Case, Outcome, cases, difference, judge, recalled, row, sample, table

GROUPS = tuple(cases())
PART = 60  # cases of one exhaustive test
PARTS = tuple(
    (group, part) for group, found in cases().items() for part in range(-(-len(found) // PART))
)
DRAWS = (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile() -> Iterator[None]:
    """Thousands of small programs, each run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def wrong(outcomes: list[Outcome]) -> list[str]:
    return [str(outcome) for outcome in outcomes if outcome.wrong]


@pytest.mark.parametrize("group", GROUPS)
def test_a_sample_of_each_group(group: str) -> None:
    found = cases()[group]
    chosen = sample(found, math.ceil(len(found) ** 0.4))
    assert wrong([outcome for case in chosen for outcome in judge(case, (0,))]) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(("group", "part"), PARTS)
def test_every_case(group: str, part: int, record_property: Callable[[str, object], None]) -> None:
    """The rows of the table that ends the run come from here: see `conftest.py`."""
    chosen = cases()[group][part * PART : (part + 1) * PART]
    outcomes = [outcome for case in chosen for outcome in judge(case, DRAWS)]
    record_property("harness", row(group, outcomes))
    jax.clear_caches()  # thousands of programs would not fit
    assert wrong(outcomes) == []


def test_the_cases_are_those_of_jax() -> None:
    names = [(group, case.name) for group, found in cases().items() for case in found]
    assert len(set(names)) == len(names)
    assert len(names) > 5400
    assert len(GROUPS) > 130
    assert {group for group, part in PARTS} == {*GROUPS}


# --- the judge tells right from wrong


def changing(change: Callable[[int], Any]) -> Case:
    """A case whose function does something else each time it is traced."""
    traces = itertools.count()
    return Case("ours", "changing", lambda x: x + change(next(traces)), lambda: [np.ones(5)])


def test_a_plan_that_computes_something_else_is_wrong() -> None:
    (outcome,) = judge(changing(lambda i: i), (0,))
    assert "ours/changing: mesh {" in str(outcome)
    assert "result 0 differs by" in outcome.wrong


def test_what_cannot_be_planned_is_wrong() -> None:
    (outcome,) = judge(changing(lambda i: 0 if i == 0 else 1 / 0), (0,))
    assert "ZeroDivisionError: division by zero" in outcome.wrong


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (np.int32([1, 2]), np.int32([1, 3]), "result: 1 of 2 entries differ"),
        (np.float32([1, 2]), np.float16([1, 2]), "result is float32[2], not float16[2]"),
        (np.float32([1]), np.float32([1, 2]), "result is float32[1], not float32[2]"),
        (np.float32([1, np.nan]), np.float32([1, 2]), "result differs by nan"),
        (np.float32([1, 2]), np.float32([1, np.nan]), "result: other infinities or NaNs"),
        (np.float32([1, 100]), np.float32([1.001, 100]), "result differs by 0.001"),
        (np.complex64([1 + 2j]), np.complex64([1 + 3j]), "result differs by 1"),
    ],
)
def test_what_differs_is_found(got: np.ndarray, want: np.ndarray, message: str) -> None:
    assert difference("result", got, want, 0.0).startswith(message)


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        ([0, 1, 3], [9, 7, 7], ""),  # of two equal entries, either
        ([0, 1, 4], [9, 7, 6], ""),  # one may be missed
        ([0, 4, 5], [9, 6, 5], "2 of 3 entries missed"),
        ([0, 1, 1], [9, 7, 7], "an entry is chosen twice"),
        ([0, 1, 2], [9, 7, 7], "the values are not those at the indices"),
    ],
)
def test_an_approximate_top_k_is_judged_by_its_recall(
    index: list[int], values: list[int], message: str
) -> None:
    x = np.float32([9, 7, 1, 7, 6, 5])
    for largest, sign in ((True, 1), (False, -1)):
        got = [sign * np.float32(values), np.int32(index)]
        assert recalled([sign * x], got, largest=largest) == message


def test_the_table_adds_up_the_parts_of_a_group() -> None:
    parts = [("gather", 60, 178, 2, 3), ("abs", 7, 21, 0, 0), ("gather", 2, 6, 0, 1)]
    assert table(parts) == (
        "group   cases  right  wrong  gathered\n"
        "abs         7     21      0         0\n"
        "gather     62    184      2         4\n"
        "all        69    205      2         4"
    )
