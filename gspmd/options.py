"""Options: what one may choose about a plan beyond its shardings; Target: what it is made for."""

import dataclasses
from typing import Literal, get_args

from gspmd.errors import SpecError

ROOM = 1 << 26
"""Bytes per device by which one loop may grow what it holds, where nobody says. Weights that are
gathered layer by layer, or in each microbatch, are mostly so for want of memory: those of a large
model stay inside.
"""

Overlap = Literal["none", "auto", "always"]
Reduction = Literal["as written", "narrow"]
Platform = Literal["tpu", "gpu", "cpu"]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a kind of device is good at.

    `flops_per_wire_byte` is the work that takes as long as sending a byte, so that repeated work is
    not free: peak FLOP/s over the bytes/s that one device sends.

    What a loop of permutes is weighed by: `flops` and `memory` are the peak FLOP/s and bytes/s of
    memory; `link` the bytes/s that a device sends to one neighbour, `directions` to how many
    neighbours along an axis it does so at once while it computes (0: who computes does not send),
    `hop` the seconds until a message arrives; `tile` the rows that a product is padded to.
    """

    platform: Platform
    flops_per_wire_byte: float
    flops: float
    memory: float
    link: float
    directions: int
    hop: float
    tile: int


TARGETS = {
    # 375 on TPU v3, 1020 on v4, 850 on v5p, in bfloat16: a factor of 2 changes no choice.
    # The rest is v4's: 275e12 FLOP/s, 1228e9 bytes/s, links of 45e9 bytes/s each way, 1 us a hop,
    # a matrix unit of 128 x 128 (cloud.google.com/tpu/docs/v4, jax-ml.github.io/scaling-book).
    "tpu": Target("tpu", 1000.0, 275e12, 1228e9, 45e9, 2, 1e-6, 128),
    # H100: 990e12 FLOP/s in bfloat16, 3350e9 bytes/s, 450e9 bytes/s by NVLink to all together,
    # some 7 us a message (NVIDIA's data sheet; NCCL's src/graph/tuning.cc).
    "gpu": Target("gpu", 2200.0, 990e12, 3350e9, 450e9, 1, 7e-6, 128),
    # 50e9 FLOP/s of a core in float32, and a copy in memory at some 5e9 bytes/s. The devices
    # of a process share its cores, so that work done twice takes twice as long.
    "cpu": Target("cpu", 10.0, 50e9, 5e9, 5e9, 0, 1e-5, 1),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a plan is made; `gspmd.plan(..., options=gspmd.Options(...))`.

    Args:
      target: the devices to plan for; None takes the platform of the mesh's devices, and TPUs where
        it has none.
      overlap: "always" turns each gather that feeds a product, and each product that feeds a
        scatter, into a loop of permutes and partial products, and gathers what the next step of a
        loop needs of its weights one step ahead; "auto" does where that hides more than it costs;
        "none" leaves them.
      reduction: "narrow" reduces in the narrower type what is converted to it right after the
        reduction, or from it right before: fewer bytes, and sums rounded in that type; "as written"
        reduces in the type that the program has.
      room: bytes per device that gathered copies may take while a loop runs that uses them in every
        step. What fits is gathered once, before the loop; the rest in each step, also what would
        be gathered before it. None: copies of up to 64 MiB leave a loop, and none enters it.
      shard_update: split the state of an optimizer, where no spec fixes it, over the devices that
        share a batch. It costs no bytes where parameters and gradients are of one type; where the
        gradients are narrower, to gather the new parameters costs more than it saves.
      keep: bytes per device that results of collectives may take from the forward pass to the
        backward pass, where `jax.checkpoint` would have them sent again. 0: remat as written.

    Raises:
      SpecError: a value is none of those above.
    """

    target: Platform | None = None
    overlap: Overlap = "none"
    reduction: Reduction = "as written"
    room: int | None = None
    keep: int = 0
    shard_update: bool = False

    def __post_init__(self) -> None:
        _one_of("target", self.target, (None, *TARGETS))
        _one_of("overlap", self.overlap, get_args(Overlap))
        _one_of("reduction", self.reduction, get_args(Reduction))
        _bytes("room", self.room, or_none=True)
        _bytes("keep", self.keep)
        _true_or_false("shard_update", self.shard_update)

    @property
    def loop_room(self) -> int:
        """Bytes per device by which a loop may grow what it holds."""
        return ROOM if self.room is None else self.room

    def on(self, platform: str | None) -> Target:
        """The target of a plan whose mesh has devices of `platform`; None where it has none."""
        return TARGETS.get(self.target or platform or "tpu", TARGETS["gpu"])


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        listed = ", ".join(map(str, allowed[:-1]))
        raise SpecError(f"{name}={value!r}: it is {listed} or {allowed[-1]}.")


def _bytes(name: str, value: object, or_none: bool = False) -> None:
    if or_none and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        none = ", or None" if or_none else ""
        raise SpecError(f"{name}={value!r}: it is a number of bytes, 0 or more{none}.")


def _true_or_false(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise SpecError(f"{name}={value!r}: it is True or False.")


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
