"""compare: what a compiler made of a plan's collectives, and the memory that it takes."""

import collections
import dataclasses
from collections.abc import Iterable

import jax

from gspmd import hlo
from gspmd.collectives import axes_of, is_collective, sent_by
from gspmd.errors import GspmdError
from gspmd.ir import Program
from gspmd.sharding import Mesh


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A collective as a device sees it: the bytes that it sends in one execution, and how often.

    `count` collectives are alike in all that is said here.
    """

    kind: str
    group: int
    wire_bytes: float
    trips: int
    count: int = 1

    @property
    def total(self) -> float:
        """Bytes that all of them send in a call."""
        return self.wire_bytes * self.trips * self.count

    def __str__(self) -> str:
        times = f"{self.count} of them, " if self.count > 1 else ""
        return (
            f"{self.kind} over {self.group}: {times}{self.trips} x {self.wire_bytes:,.0f} B, "
            f"{self.total / 1e9:.3f} GB in all"
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A compiled program beside its plan.

    `kept` are collectives that are in both, `removed` those of the plan alone, `added` those of the
    compiler alone. One that is combined with others, or turned into another kind, is removed and
    its successor added. `peak_bytes` are arguments, results and temporaries of one device.
    """

    kept: tuple[Sent, ...]
    added: tuple[Sent, ...]
    removed: tuple[Sent, ...]
    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    peak_bytes: float

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in a call of the compiled program."""
        return sum(one.total for one in (*self.kept, *self.added))

    def __str__(self) -> str:
        sides = (("kept", self.kept), ("added", self.added), ("removed", self.removed))
        lines = [
            f"compiled: {self.wire_bytes / 1e9:.3f} GB sent by each device, "
            f"{self.peak_bytes / 1e9:.3f} GB of memory "
            f"({self.argument_bytes / 1e9:.3f} arguments, "
            f"{self.temporary_bytes / 1e9:.3f} temporaries)"
        ]
        for name, found in sides:
            total = sum(one.total for one in found)
            lines.append(f"{name}: {sum(x.count for x in found)}, {total / 1e9:.3f} GB")
            lines += [f"  {one}" for one in sorted(found, key=lambda one: -one.total)]
        return "\n".join(lines)


def compare(program: Program, mesh: Mesh, compiled: jax.stages.Compiled) -> Comparison:
    """What was compiled of a local program, beside it.

    Raises:
      GspmdError: the compiler tells neither its program nor its memory.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise GspmdError("this back end shows neither what it compiled nor the memory that takes.")
    planned = _counted(
        Sent(op.name, mesh.size(axes_of(op)), round(sent_by(op, mesh)), abs(trips))
        for op, trips in program.walk()
        if is_collective(op.name)
    )
    made = _counted(
        Sent(one.kind.replace("-", "_"), one.group, round(one.bytes), one.trips)
        for one in hlo.collectives(text)
        if one.bytes
    )
    return Comparison(
        kept=_listed(planned & made),
        added=_listed(made - planned),
        removed=_listed(planned - made),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )


def _counted(collectives: Iterable[Sent]) -> collections.Counter[Sent]:
    return collections.Counter(one for one in collectives if one.total)


def _listed(counted: collections.Counter[Sent]) -> tuple[Sent, ...]:
    return tuple(dataclasses.replace(one, count=n) for one, n in counted.items())
