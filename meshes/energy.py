"""Energy: what a training run draws and emits, and which of four choices made it so much.

The four are the 4 Ms of Patterson et al. 2022 (arXiv 2204.05149): the *model* fixes the operations,
the *machine* how many of them a joule buys, *mechanization* (the data center) what the building
adds, and the *map* what a kWh emits where the building stands. A `Run` holds one number for each;
`dataclasses.replace` changes one, `factors` says what each change gained.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from gspmd.errors import GspmdError, nearest

_DAY = 24.0  # hours
_HOUR = 3600.0  # seconds


class EnergyError(GspmdError, ValueError):
    """A number that no run can have, or a run that nobody published."""


def energy(hours: float, chips: int, watts: float, pue: float = 1.0) -> float:
    """kWh that `chips` chips draw in `hours` at `watts` each, of which `pue` times are paid for.

    Per step or per run, as `hours` says. PUE, the power usage effectiveness, is the energy of a
    whole data center over that of its machines.

    Raises:
      EnergyError: a number is out of range.
    """
    _check("hours", hours, 0)
    _check("chips", chips, 1)
    _check("watts", watts, 0)
    _check("pue", pue, 1)
    return hours * chips * watts * pue / 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What one chip does on average in a run: FLOP/s that it achieves, and watts that it takes.

    The watts are those of a chip with its share of memory, network, fans and host.
    """

    name: str
    throughput: float
    watts: float

    def __post_init__(self) -> None:
        _check("machine.throughput", self.throughput, 1)
        _check("machine.watts", self.watts, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A training run by its 4 Ms.

    `model` is the floating-point operations that the training takes, `mechanization` the PUE of the
    data center, `map` the kg of CO2 equivalents that a kWh emits there. More `chips` take less
    time, and the same energy.
    """

    name: str
    model: float
    machine: Machine
    mechanization: float
    map: float
    chips: int

    def __post_init__(self) -> None:
        _check("model", self.model, 1)
        _check("mechanization", self.mechanization, 1)
        _check("map", self.map, 0)
        _check("chips", self.chips, 1)

    @classmethod
    def taking(
        cls,
        hours: float,
        *,
        name: str,
        flops: float,
        machine: str,
        watts: float,
        chips: int,
        pue: float,
        carbon: float,
    ) -> Self:
        """The run that took `hours`: what a chip achieved follows from the `flops` of the training.

        `carbon` is kg of CO2 equivalents a kWh.
        """
        if hours <= 0:
            raise EnergyError(f"hours is {hours:g}; a run takes more than 0.")
        _check("hours", hours, 0)
        _check("flops", flops, 1)
        _check("chips", chips, 1)
        throughput = flops / (hours * _HOUR * chips)
        return cls(name, flops, Machine(machine, throughput, watts), pue, carbon, chips)

    @property
    def hours(self) -> float:
        return self.model / (self.machine.throughput * self.chips) / _HOUR

    @property
    def energy(self) -> float:
        """kWh."""
        return energy(self.hours, self.chips, self.machine.watts, self.mechanization)

    @property
    def co2e(self) -> float:
        """Tonnes of CO2 equivalents."""
        return self.energy * self.map / 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """How many times less one run takes than another, by what was changed."""

    model: float
    machine: float
    mechanization: float
    map: float

    @property
    def energy(self) -> float:
        return self.model * self.machine * self.mechanization

    @property
    def co2e(self) -> float:
        return self.energy * self.map


def factors(before: Run, after: Run) -> Factors:
    """What each M contributed on the way from `before` to `after`; above 1 is a gain.

    Their product is the ratio of what the two runs emit, that of the first three the ratio of what
    they draw.
    """
    joules = [run.machine.watts / run.machine.throughput for run in (before, after)]
    return Factors(
        before.model / after.model,
        joules[0] / joules[1],
        before.mechanization / after.mechanization,
        _ratio(before.map, after.map),
    )


def _ratio(before: float, after: float) -> float:
    """`before / after`, of which both may be zero: a kWh of water power."""
    if after == 0:
        return 1.0 if before == 0 else math.inf
    return before / after


def _check(name: str, value: float, least: float) -> None:
    if not math.isfinite(value):
        raise EnergyError(f"{name} is {value}, which is no finite number.")
    if value < least:
        building = name in ("pue", "mechanization")
        why = ": a building draws no less than the machines in it" if building else ""
        raise EnergyError(f"{name} is {value:g}; it is at least {least}{why}.")


# ---------------------------------------------------------------------------------- published runs


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A run with what was published of it: MWh, and tonnes with the grid's mix (`gross`).

    `net` counts the clean energy that its owner bought as well: kg a kWh, and tonnes.
    """

    run: Run
    energy: float
    gross: float
    net: float
    net_map: float
    source: str

    @property
    def net_run(self) -> Run:
        return dataclasses.replace(self.run, map=self.net_map)


_TABLE_1 = "Patterson et al. 2021 (arXiv 2104.10350), table 1"
_TABLE_4 = "Patterson et al. 2021 (arXiv 2104.10350), table 4"
_LAMDA = "Thoppilan et al. 2022 (arXiv 2201.08239); FLOPs: 56.5 % of 123 TFLOP/s a chip"
_GLAM = (
    "Du et al. 2021 (arXiv 2112.06905), hours and grid as reported of Patterson et al. 2022; "
    "FLOPs: 6 x 96.6e9 active parameters x tokens"
)

_ROWS = (
    # name, chip, chips, W a chip, hours, FLOPs, PUE, kg/kWh gross, net, MWh, t gross, t net, source
    ("transformer-big-p100", "p100", 8, 296, 3.5 * _DAY, 1.61e19, 1.59, 0.429, 0.429,
     0.316, 0.1357, 0.1357, _TABLE_1),
    ("transformer-big-p100-iowa", "p100", 8, 296, 3.5 * _DAY, 1.61e19, 1.11, 0.478, 0.080,
     0.221, 0.1055, 0.0177, _TABLE_1),
    ("evolved-medium-p100", "p100", 8, 271, 3.2 * _DAY, 1.03e19, 1.11, 0.478, 0.080,
     0.185, 0.0883, 0.0148, _TABLE_1),
    ("transformer-big-tpu-v2", "tpu-v2", 8, 229, 0.81 * _DAY, 1.61e19, 1.11, 0.478, 0.080,
     0.040, 0.0189, 0.0032, _TABLE_1),
    ("evolved-medium-tpu-v2", "tpu-v2", 8, 227, 0.62 * _DAY, 1.03e19, 1.11, 0.478, 0.080,
     0.030, 0.0143, 0.0024, _TABLE_1),
    ("evolved-transformer-search", "tpu-v2", 200, 208, 6.8 * _DAY, 2.91e21, 1.10, 0.431, 0.431,
     7.5, 3.2, 3.2, _TABLE_4),
    ("t5-11b", "tpu-v3", 512, 310, 20 * _DAY, 4.05e22, 1.12, 0.545, 0.545,
     85.7, 46.7, 46.7, _TABLE_4),
    ("meena", "tpu-v3", 1024, 289, 30 * _DAY, 1.12e23, 1.09, 0.415, 0.415,
     232, 96.4, 96.4, _TABLE_4),
    ("gshard-600b", "tpu-v3", 1024, 288, 3.1 * _DAY, 1.33e22, 1.09, 0.201, 0.177,
     24.1, 4.8, 4.3, _TABLE_4),
    ("switch-1.5t", "tpu-v3", 1024, 245, 27 * _DAY, 8.22e22, 1.10, 0.403, 0.330,
     179, 72.2, 59.1, _TABLE_4),
    ("gpt-3", "v100", 10_000, 330, 14.8 * _DAY, 3.14e23, 1.10, 0.429, 0.429,
     1287, 552.1, 552.1, _TABLE_4),
    ("lamda-137b", "tpu-v3", 1024, 289, 57.7 * _DAY, 3.55e23, 1.10, 0.056, 0.056,
     451, 25.2, 25.2, _LAMDA),
    ("glam-600b-tokens", "tpu-v4", 1024, 326, 1230.0, 3.48e23, 1.11, 0.088, 0.088,
     456, 40.2, 40.2, _GLAM),
    ("glam-280b-tokens", "tpu-v4", 1024, 326, 574.0, 1.62e23, 1.11, 0.088, 0.088,
     213, 18.7, 18.7, _GLAM),
)  # fmt: skip


def _published() -> Mapping[str, Published]:
    found: dict[str, Published] = {}
    for row in _ROWS:
        name, machine, chips, watts, hours, flops, pue, carbon, net_map = row[:9]
        run = Run.taking(
            hours,
            name=name,
            flops=flops,
            machine=machine,
            watts=watts,
            chips=chips,
            pue=pue,
            carbon=carbon,
        )
        mwh, gross, net, source = row[9:]
        found[name] = Published(run, mwh, gross, net, net_map, source)
    return MappingProxyType(found)


PUBLISHED: Mapping[str, Published] = _published()

SYSTEM_WATTS: Mapping[str, float] = MappingProxyType(
    # Means over runs in production; tpu-v4 is that of GLaM.
    {"p100": 271, "v100": 325, "tpu-v2": 221, "tpu-v3": 283, "tpu-v4": 326}
)
"""Watts of one chip with its share of the system: Patterson et al. 2021, table 3."""


def published(name: str) -> Published:
    """The published run called `name`.

    Raises:
      EnergyError: there is none.
    """
    if name not in PUBLISHED:
        raise EnergyError(
            f"{name!r} is not a published run{nearest(name, PUBLISHED)} There are "
            f"{', '.join(PUBLISHED)}."
        )
    return PUBLISHED[name]


def system_watts(chip: str) -> float:
    """Mean watts of a chip called `chip`, with its share of memory, network, fans and host.

    Raises:
      EnergyError: none were published.
    """
    if chip not in SYSTEM_WATTS:
        raise EnergyError(
            f"no mean power of {chip} with its host is published, only of "
            f"{', '.join(SYSTEM_WATTS)}; measure it, or take one of these."
        )
    return SYSTEM_WATTS[chip]
