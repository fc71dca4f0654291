"""Energy and carbon: published runs are reproduced, and the four Ms make up every difference."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspmd.meshes.energy import (
    PUBLISHED,
    EnergyError,
    Machine,
    Run,
    energy,
    factors,
    published,
    system_watts,
)

# "Measured performance", TFLOP/s a chip, in tables 1 and 4 of Patterson et al. 2021.
ACHIEVED = {
    "transformer-big-p100": 6.7,
    "evolved-medium-p100": 4.7,
    "transformer-big-tpu-v2": 28.8,
    "evolved-medium-tpu-v2": 24.0,
    "evolved-transformer-search": 24.8,
    "t5-11b": 45.6,
    "meena": 42.3,
    "gshard-600b": 48.0,
    "switch-1.5t": 34.4,
    "gpt-3": 24.6,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_follow_from_their_inputs(name: str) -> None:
    """Within 2 %: the days are rounded."""
    found = published(name)
    assert found.run.energy / 1000 == pytest.approx(found.energy, rel=0.02)
    assert found.run.co2e == pytest.approx(found.gross, rel=0.02)
    assert found.net_run.co2e == pytest.approx(found.net, rel=0.02)
    if name in ACHIEVED:
        assert found.run.machine.throughput / 1e12 == pytest.approx(ACHIEVED[name], rel=0.02)


def test_the_formula() -> None:
    assert energy(hours=2, chips=3, watts=500, pue=1.5) == 4.5
    assert energy(hours=1 / 3600, chips=1000, watts=360) == pytest.approx(0.1)  # a step of 1 s


def test_what_made_the_evolved_transformer_emit_57_times_less() -> None:
    """Patterson et al. 2021, table 1: from P100s in the average data center to TPUs in Iowa."""
    before = published("transformer-big-p100").run
    after = published("evolved-medium-tpu-v2").net_run
    gained = factors(before, after)
    assert gained.model == pytest.approx(1.61 / 1.03)
    assert gained.machine == pytest.approx((296 / 6.7) / (227 / 24.0), rel=0.01)
    assert gained.mechanization == pytest.approx(1.59 / 1.11)
    assert gained.map == pytest.approx(0.429 / 0.080)
    assert gained.co2e == pytest.approx(57, rel=0.02)


def test_glam_draws_2_8_and_emits_14_times_less_than_gpt_3() -> None:
    gained = factors(published("gpt-3").run, published("glam-600b-tokens").run)
    assert gained.energy == pytest.approx(2.8, rel=0.02)
    assert gained.co2e == pytest.approx(14, rel=0.02)


def runs() -> st.SearchStrategy[Run]:
    positive = st.floats(1, 1e6)
    machines = st.builds(Machine, st.just("chip"), positive, positive)
    return st.builds(
        Run, st.just("run"), positive, machines, st.floats(1, 3), positive, st.integers(1, 9999)
    )


@given(runs(), runs())
def test_the_factors_make_up_the_whole_difference(before: Run, after: Run) -> None:
    gained = factors(before, after)
    assert gained.energy == pytest.approx(before.energy / after.energy)
    assert gained.co2e == pytest.approx(before.co2e / after.co2e)
    back = factors(after, before)
    assert gained.machine * back.machine == pytest.approx(1)


@given(runs(), runs(), st.sampled_from(("model", "machine", "mechanization", "map")))
def test_one_m_changes_its_own_factor_alone(before: Run, other: Run, m: str) -> None:
    changed = dataclasses.replace(before, **{m: getattr(other, m)})
    gained = dataclasses.asdict(factors(before, changed))
    assert {name: x for name, x in gained.items() if name != m} == {
        name: 1.0 for name in gained if name != m
    }
    assert gained[m] == getattr(factors(before, other), m)


def test_more_chips_take_less_time_and_the_same_energy() -> None:
    run = published("gpt-3").run
    wider = dataclasses.replace(run, chips=2 * run.chips)
    assert wider.hours == pytest.approx(run.hours / 2)
    assert wider.energy == pytest.approx(run.energy)


def test_water_power_emits_nothing() -> None:
    run = published("gpt-3").run
    clean = dataclasses.replace(run, map=0.0)
    assert clean.co2e == 0
    assert (factors(run, clean).map, factors(clean, clean).map) == (math.inf, 1.0)


RUN = {
    "hours": 1.0, "name": "mine", "flops": 1e18, "machine": "h100", "watts": 700.0, "chips": 8,
    "pue": 1.1, "carbon": 0.4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hours": -3.0}, "hours is -3; a run takes more than 0."),
        ({"hours": 0.0}, "hours is 0; a run takes more than 0."),
        ({"hours": math.nan}, "hours is nan, which is no finite number."),
        ({"pue": 0.9}, "mechanization is 0.9; it is at least 1: a building draws no less"),
        ({"chips": 0}, "chips is 0; it is at least 1."),
        ({"watts": -5.0}, "machine.watts is -5; it is at least 1."),
        ({"flops": math.inf}, "flops is inf, which is no finite number."),
        ({"flops": -1.0}, "flops is -1; it is at least 1."),
        ({"carbon": -0.1}, "map is -0.1; it is at least 0."),
    ],
)
def test_numbers_that_no_run_has(changes: dict[str, float], said: str) -> None:
    with pytest.raises(EnergyError, match=said):
        Run.taking(**{**RUN, **changes})


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((-1, 1, 1, 1), "hours is -1; it is at least 0."),
        (
            (1, 1, 1, 0.9),
            "pue is 0.9; it is at least 1: a building draws no less than the machines",
        ),
        ((1, 0, 1, 1), "chips is 0"),
        ((1, 1, math.nan, 1), "watts is nan"),
    ],
)
def test_numbers_that_the_formula_refuses(numbers: tuple[float, ...], said: str) -> None:
    with pytest.raises(EnergyError, match=said):
        energy(*numbers)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(EnergyError, match="'gpt3' is not a published run; did you mean 'gpt-3'"):
        published("gpt3")
    with pytest.raises(EnergyError, match="no mean power of h100 with its host is published, only"):
        system_watts("h100")
    assert system_watts("tpu-v3") == 283
