"""Options: what one may choose about a plan beyond its shardings; Target: what it is made for."""

import dataclasses
from typing import Literal, get_args

from gspmd.errors import SpecError

Overlap = Literal["none", "auto", "always"]
Platform = Literal["tpu", "gpu", "cpu"]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a kind of device is good at.

    `flops_per_wire_byte` is the work that takes as long as sending a byte, so that repeated work is
    not free: peak FLOP/s over the bytes/s that one device sends.
    """

    platform: Platform
    flops_per_wire_byte: float


TARGETS = {
    # 375 on TPU v3, 1020 on v4, 850 on v5p, in bfloat16: a factor of 2 changes no choice.
    "tpu": Target("tpu", 1000.0),
    # H100: 990e12 FLOP/s in bfloat16, 450e9 bytes/s by NVLink.
    "gpu": Target("gpu", 2200.0),
    # 50e9 FLOP/s of a core in float32, and a copy in memory at some 5e9 bytes/s. The devices
    # of a process share its cores, so that work done twice takes twice as long.
    "cpu": Target("cpu", 10.0),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a plan is made; `gspmd.plan(..., options=gspmd.Options(...))`.

    Args:
      target: the devices to plan for; None takes the platform of the mesh's devices, and TPUs where
        it has none.
      overlap: "always" turns each gather that feeds a product, and each product that feeds a
        scatter, into a loop of permutes and partial products; "auto" does where that hides more
        than it costs; "none" leaves them.

    Raises:
      SpecError: a value is none of those above.
    """

    target: Platform | None = None
    overlap: Overlap = "none"

    def __post_init__(self) -> None:
        _one_of("target", self.target, (None, *TARGETS))
        _one_of("overlap", self.overlap, get_args(Overlap))

    def on(self, platform: str | None) -> Target:
        """The target of a plan whose mesh has devices of `platform`; None where it has none."""
        return TARGETS.get(self.target or platform or "tpu", TARGETS["gpu"])


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        listed = ", ".join(map(str, allowed[:-1]))
        raise SpecError(f"{name}={value!r}: it is {listed} or {allowed[-1]}.")


def options_of(given: object) -> Options:
    """The options that a caller gave; the defaults for None.

    Raises:
      SpecError: they are something else.
    """
    if given is None:
        return Options()
    if not isinstance(given, Options):
        raise SpecError(f"options={given!r}: give gspmd.Options(...), or None.")
    return given
