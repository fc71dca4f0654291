"""lay_out: when each value of a local program is in memory, as XLA has it.

Time is counted in fusions, in the order in which they run; the body of a loop stands once, between
what is before and after it, and the branches of a condition one after the other. A value that never
leaves its fusion is in no memory, nor is a slice that a loop reads.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from gspmd.footprint import Footprint
from gspmd.fusion import Fusion
from gspmd.ir import Op, Operand, Program, Value, values_of
from gspmd.ordering import Order, order
from gspmd.simplified import simplified
from gspmd.storage import Storage

FOREVER = 1 << 60


@dataclasses.dataclass(slots=True, eq=False)
class Block:
    """Memory that holds `value`, or what takes its place later, from time `start` to time `end`.

    `fixed` is that of an argument, which may be overwritten where it is `given`. `loop` is the
    index of the loop in whose body it is made, `maker` the op that makes it, `readers` the last ops
    of the fusions that read it.
    """

    value: Value
    bytes: float
    start: int
    end: int
    loop: int = 0
    maker: Op | None = None
    fixed: bool = False
    given: bool = False
    readers: list[Op] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Loop:
    """A loop in the body of the loop `outer` (0 is the program itself), and the bytes it carries,
    results that it stacks included."""

    outer: int
    start: int
    end: int
    carried: float


@dataclasses.dataclass(frozen=True, slots=True)
class Laid:
    """The blocks of a program, its arguments' first; `loops[0]` is the program itself."""

    blocks: tuple[Block, ...]
    loops: tuple[Loop, ...]


def lay_out(program: Program, donated: Sequence[bool], storage: Storage) -> Laid:
    """The blocks of memory that `program` needs on each device."""
    program = simplified(program)
    walk = _Walk(Footprint.of(program, storage))
    walk.whole(program, donated)
    return Laid(tuple(walk.blocks), tuple(walk.loops))


def taken_over(program: Program, donated: Sequence[bool]) -> dict[Value, Value]:
    """By result, the donated argument whose memory it takes: the first of its type, as in JAX."""
    free: dict[str, list[Value]] = collections.defaultdict(list)
    for value, given in zip(program.ins, donated, strict=True):
        if given:
            free[value.type].append(value)
    found: dict[Value, Value] = {}
    for out in values_of(program.outs):
        if out not in found and free[out.type]:
            found[out] = free[out.type].pop(0)
    return found


# ---------------------------------------------------------------------------------------- the walk


@dataclasses.dataclass(frozen=True, slots=True)
class _Home:
    """Where a value goes if it can: into `block`, once nobody reads `before` from it any more."""

    block: Block
    before: Value | None


@dataclasses.dataclass(slots=True)
class _Frame:
    """A program that is being walked: the blocks of its values, and when each is read last."""

    held: dict[Value, Block]
    homes: Mapping[Value, _Home]
    last: Mapping[Value, int]
    made: set[Value]  # by its ops, and not overwritten yet; inputs are none of its own
    at: int = 0

    def dies(self, x: Operand | None) -> bool:
        """Whether nobody reads `x` after the fusion that the walk is at."""
        return not isinstance(x, Value) or self.last.get(x, -1) <= self.at

    def home(self, x: Value, fusion: Fusion) -> Block | None:
        """The block that is kept for `x`, if `fusion` can write it there."""
        home = self.homes.get(x)
        if home is None or not self.dies(home.before):
            return None
        reads = home.before in fusion.reads
        replaces = reads and home.before in fusion.replaces[fusion.writes.index(x)]
        return home.block if replaces or not reads else None


class _Walk:
    """The time, and the blocks and loops up to it."""

    def __init__(self, footprint: Footprint) -> None:
        self.footprint = footprint
        self.orders: Mapping[Program, Order] = {}
        self.now = 0
        self.blocks: list[Block] = []
        self.loops: list[Loop] = [Loop(0, 0, FOREVER, 0.0)]
        self.loop = 0

    def whole(self, program: Program, donated: Sequence[bool]) -> None:
        taken = taken_over(program, donated)
        size = lambda x: 0.0 if x in taken else self.footprint.size(x)  # noqa: E731
        self.orders = order(program, size, self.footprint.scratch)
        held: dict[Value, Block] = {}
        for value, given in zip(program.ins, donated, strict=True):
            block = Block(value, self.footprint.size(value), 0, FOREVER, fixed=True, given=given)
            self.blocks.append(block)
            held[value] = block
        homes = {out: _Home(held[x], x) for out, x in taken.items()}
        self.run(program, held, homes)
        for x in values_of(program.outs):
            held[x].end = FOREVER

    def run(self, program: Program, held: dict[Value, Block], homes: Mapping[Value, _Home]) -> None:
        """Walks `program`, given the blocks of its inputs; adds those of all that it stores."""
        held.update((value, self.place(value, None)) for value, _ in program.consts)
        fusions = self.orders[program].fusions
        last = {x: i for i, fusion in enumerate(fusions) for x in fusion.reads}
        made = {x for op in program.ops for x in op.outs}
        last.update((x, len(fusions)) for x in values_of(program.outs) if x in made)
        frame = _Frame(held, homes, last, made)
        control = {"scan": self.scan, "while": self.repeat, "cond": self.branch}
        for frame.at, fusion in enumerate(fusions):
            self.now += 1
            for x in fusion.reads:
                held[x].end = max(held[x].end, self.now)
                held[x].readers.append(fusion.root)
            if fusion.root.name in control:
                control[fusion.root.name](fusion, frame)
                continue
            for x, bytes in self.footprint.staged(fusion.root):
                self.place(x, fusion.root, bytes)
            for out in fusion.writes:
                self.store(out, fusion, frame)
        self.keep([held[x] for x in values_of(program.outs) if not held[x].fixed])

    # ---- blocks

    def place(self, value: Value, maker: Op | None, bytes: float | None = None) -> Block:
        """A new block that is needed now."""
        size = self.footprint.size(value) if bytes is None else bytes
        block = Block(value, size, self.now, self.now, self.loop, maker)
        self.blocks.append(block)
        return block

    def keep(self, blocks: Sequence[Block]) -> None:
        """The blocks are needed up to now."""
        for block in blocks:
            block.end = max(block.end, self.now)

    def store(self, out: Value, fusion: Fusion, frame: _Frame) -> Block:
        """The block that `fusion` writes `out` into: one that is kept for it, or one whose value it
        replaces entry by entry, else a new one."""
        block = frame.home(out, fusion)
        if block is None:
            block = self.replaced(out, fusion, frame) or self.place(out, fusion.root)
        self.keep([block])
        frame.held[out] = block
        return block

    def replaced(self, out: Value, fusion: Fusion, frame: _Frame) -> Block | None:
        """The block of a value that nobody else reads, and which `out` can replace."""
        size = self.footprint.size(out)
        for x in fusion.replaces[fusion.writes.index(out)]:
            if x in frame.made and frame.dies(x) and frame.held[x].bytes == size:
                frame.made.remove(x)  # it is gone, also for what else the fusion writes
                return frame.held[x]
        return None

    # ---- control flow

    def scan(self, fusion: Fusion, frame: _Frame) -> None:
        op = fusion.root
        (body,) = op.bodies
        consts, carry = op.params["num_consts"], op.params["num_carry"]
        first = consts + carry
        carried = self.carry(op, op.ins[consts:first], body.ins[consts:first], frame)
        inner = dict(zip(body.ins[consts:first], carried, strict=True))
        homes: dict[Value, _Home] = {}
        for value, out in zip(body.ins[consts:first], body.outs, strict=False):
            if isinstance(out, Value) and out != value:
                homes.setdefault(out, _Home(inner[value], value))
        used: list[Block] = []
        for i, (value, x) in enumerate(zip(body.ins, op.ins, strict=True)):
            if not consts <= i < first:
                inner[value] = self.outside(x, value, op, frame)
                used.append(inner[value])
        read = {x for inside in body.ops for x in values_of(inside.ins)}
        for out, y in zip(op.outs[carry:], body.outs[carry:], strict=True):
            carried.append(self.store(out, fusion, frame))
            if isinstance(y, Value) and y not in read:
                homes.setdefault(y, _Home(carried[-1], None))
        self.inside([body], [inner], [homes], carried)
        self.keep([*used, *carried])

    def repeat(self, fusion: Fusion, frame: _Frame) -> None:
        """A loop until a condition fails."""
        op = fusion.root
        condition, body = op.bodies
        a, b = op.params["cond_nconsts"], op.params["body_nconsts"]
        carried = self.carry(op, op.ins[a + b :], body.ins[b:], frame)
        consts = [
            self.outside(x, value, op, frame)
            for x, value in zip(op.ins, (*condition.ins[:a], *body.ins[:b]), strict=False)
        ]
        tests = dict(zip(condition.ins, (*consts[:a], *carried), strict=True))
        inner = dict(zip(body.ins, (*consts[a:], *carried), strict=True))
        homes = {
            out: _Home(block, value)
            for out, value, block in zip(body.outs, body.ins[b:], carried, strict=True)
            if isinstance(out, Value) and out != value
        }
        self.inside([condition, body], [tests, inner], [{}, homes], carried)
        self.keep([*consts, *carried])

    def branch(self, fusion: Fusion, frame: _Frame) -> None:
        """Branches, of which one runs."""
        op = fusion.root
        results = [self.store(out, fusion, frame) for out in op.outs]
        used: list[Block] = []
        for body in op.bodies:
            inner = {
                value: self.outside(x, value, op, frame)
                for value, x in zip(body.ins, op.ins[1:], strict=True)
            }
            used += inner.values()
            homes = {
                out: _Home(block, None)
                for out, block in zip(body.outs, results, strict=True)
                if isinstance(out, Value) and out not in inner
            }
            self.run(body, inner, homes)
            self.now += 1
        self.keep([*results, *used])

    def inside(
        self,
        bodies: Sequence[Program],
        inner: Sequence[dict[Value, Block]],
        homes: Sequence[Mapping[Value, _Home]],
        carried: Sequence[Block],
    ) -> None:
        """Walks the bodies of a loop."""
        outer, start, number = self.loop, self.now, len(self.loops)
        self.loops.append(Loop(outer, start, start, 0.0))
        self.loop = number
        for body, held, kept in zip(bodies, inner, homes, strict=True):
            self.run(body, held, kept)
        self.loop = outer
        self.now += 1
        self.loops[number] = Loop(outer, start, self.now, sum(block.bytes for block in carried))

    def outside(self, x: Operand, value: Value, op: Op, frame: _Frame) -> Block:
        """The block of an operand that a body reads."""
        return frame.held[x] if isinstance(x, Value) else self.place(value, op)

    def carry(
        self, op: Op, xs: Sequence[Operand], values: Sequence[Value], frame: _Frame
    ) -> list[Block]:
        """The blocks of what a loop carries, which are its first results': those of the first
        values where nobody else reads these, else copies."""
        found: list[Block] = []
        for x, value, out in zip(xs, values, op.outs, strict=False):
            block = frame.held.get(x) if isinstance(x, Value) and frame.dies(x) else None
            home = frame.homes.get(out)
            kept = home is not None and home.before == x
            if block is None or block in found or not (x in frame.made or kept):
                block = self.place(value, op)
            frame.held[out] = block
            found.append(block)
        return found
