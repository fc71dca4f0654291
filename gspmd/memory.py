"""memory: how much of a device's memory a local program needs at once, and for what."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from gspmd.ir import Op, Program, Value, values_of
from gspmd.liveness import FOREVER, Block, lay_out, taken_over
from gspmd.storage import Storage

Kind = Literal["parameter", "optimizer state", "input", "activation", "gradient", "temporary"]


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """A piece of memory that is live when the most is.

    `kind` is told by what the program does with it: an argument whose like the program returns is a
    "parameter" where the loss depends on it, else "optimizer state"; any other is an "input". What
    the forward pass makes and the backward pass reads is an "activation", what the backward pass
    makes of a parameter's shape a "gradient"; all else is "temporary". `bytes` are one device's,
    the padding of its tiles included.
    """

    name: str
    kind: Kind
    type: str
    bytes: float
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device.

    `peak_bytes` is the most that is live at once: all arguments and results, and temporaries;
    `buffers` is what that is, the largest first. `output_bytes` are those of results that take no
    argument's memory, `temporary_bytes` those that all temporaries take together as they are
    placed, with the holes between them.
    """

    peak_bytes: float
    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    buffers: tuple[Buffer, ...]

    @property
    def reserved_bytes(self) -> float:
        """What a device must have for the program to be loaded: its memory, holes included."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes


def memory(program: Program, donated: Sequence[bool], storage: Storage) -> Memory:
    """The memory that a local program needs on each device.

    Args:
      program: as in `Plan.program`.
      donated: for each of its inputs, whether a result may take its memory (`Traced.donated`).
      storage: how the platform keeps values: `gspmd.storage.STORAGE["tpu"]`.
    """
    blocks = lay_out(program, donated, storage).blocks
    arguments = [block for block in blocks if block.fixed]
    results = [block for block in blocks if not block.fixed and block.end >= FOREVER]
    temporaries = _without_hosts((b for b in blocks if b.end < FOREVER), results)
    peak, moment = _peak(temporaries)
    live = [block for block in temporaries if block.start <= moment <= block.end]
    kinds = _Kinds(program, donated)
    buffers = [kinds.buffer(block) for block in (*arguments, *results, *live)]
    given, made = (sum(block.bytes for block in side) for side in (arguments, results))
    return Memory(
        peak_bytes=given + made + peak,
        argument_bytes=given,
        output_bytes=made,
        temporary_bytes=placed(temporaries, storage.granule),
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)),
    )


def _without_hosts(temporaries: Iterable[Block], results: Iterable[Block]) -> list[Block]:
    """The temporaries that are not in the memory of a result that is written later.

    The largest come first, and each goes into the first result that is as large and free while it
    lives. (XLA's buffer assignment, which tries what results have before it places the others.)
    """
    hosts: list[tuple[Block, list[Block]]] = [(block, [block]) for block in results if block.start]
    left: list[Block] = []
    for block in sorted(temporaries, key=lambda block: -block.bytes):
        for host, guests in hosts:
            if block.bytes <= host.bytes and all(
                block.end < guest.start or guest.end < block.start for guest in guests
            ):
                guests.append(block)
                break
        else:
            left.append(block)
    return left


def _peak(blocks: Iterable[Block]) -> tuple[float, int]:
    """The most bytes that are live at once, and when."""
    change: dict[int, float] = collections.defaultdict(float)
    for block in blocks:
        change[block.start] += block.bytes
        change[block.end + 1] -= block.bytes
    now = most = 0.0
    moment = 0
    for time in sorted(change):
        now += change[time]
        if now > most:
            most, moment = now, time
    return most, moment


def placed(blocks: Iterable[Block], granule: int) -> float:
    """Bytes that `blocks` take where each, in the order of time, goes into the smallest hole that
    is large enough, in multiples of `granule`; without one, as if there were no holes.
    """
    blocks = sorted(blocks, key=lambda block: block.start)
    if not granule:
        return _peak(blocks)[0]
    top = 0.0
    taken: list[tuple[float, float, int]] = []  # from, to, and until when; by place
    for block in blocks:
        size = -(-block.bytes // granule) * granule
        taken = [one for one in taken if one[2] >= block.start]
        edges = [0.0, *(end for _, end, _ in taken)]
        holes = [
            (start - edge, i)
            for i, ((start, _, _), edge) in enumerate(zip(taken, edges, strict=False))
            if start - edge >= size
        ]
        i = min(holes)[1] if holes else len(taken)
        taken.insert(i, (edges[i], edges[i] + size, block.end))
        top = max(top, edges[i] + size)
    return top


class _Kinds:
    """What the values of a program are for."""

    def __init__(self, program: Program, donated: Sequence[bool]) -> None:
        self.inputs = frozenset(program.ins)
        kept: Mapping[Value, Value] = taken_over(program, donated)
        self.forward = self._read_forward(program)
        # What a training step returns, if only by its type, is state; inference returns no input.
        trains = any(_phases(op) & _BACKWARD for op in program.ops)
        returned = {v.type for v in values_of(program.outs)} if trains else set[str]()
        self.state = {*kept.values(), *(v for v in program.ins if v.type in returned and v.shape)}
        self.shapes = {_whole(v) for v in self.state if v in self.forward}

    @staticmethod
    def _read_forward(program: Program) -> frozenset[Value]:
        """The inputs that something made before or in the backward pass depends on."""
        wanted: set[Value] = set()
        for op in reversed(program.ops):
            if _phases(op) & _BACKWARD or not wanted.isdisjoint(op.outs):
                wanted.update(values_of(op.ins))
        return frozenset(wanted & set(program.ins))

    def buffer(self, block: Block) -> Buffer:
        """`block` as the user is told of it."""
        value, maker = block.value, block.maker
        name = value.name or (maker.name if maker is not None else str(value))
        source = str(maker.source) if maker is not None and maker.source is not None else ""
        return Buffer(name, self.of(block), value.type, block.bytes, source)

    def of(self, block: Block) -> Kind:
        value = block.value
        if block.fixed and value in self.inputs:
            if value not in self.state:
                return "input"
            return "parameter" if value in self.forward else "optimizer state"
        made = block.maker.source.phase if block.maker and block.maker.source else ""
        read = {op.source.phase for op in block.readers if op.source is not None}
        if made == "backward" and _whole(value) in self.shapes:
            return "gradient"
        if made == "forward" and read & _BACKWARD:
            return "activation"
        return "temporary"


_BACKWARD = frozenset(("backward", "rematerialized"))


def _phases(op: Op) -> set[str]:
    """The phases of a training step that `op` and the ops of its bodies are of."""
    return {inner.source.phase for inner in _all(op) if inner.source is not None}


def _whole(value: Value) -> tuple[int, ...]:
    """The shape of what `value` is a shard of."""
    return value.shape if value.layout is None else value.layout.shape


def _all(op: Op) -> Iterator[Op]:
    """`op` and the ops of its bodies."""
    yield op
    for body in op.bodies:
        for inner, _ in body.walk():
            yield inner
