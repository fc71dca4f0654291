"""Value, Op, Program: the one representation, for global and for local programs alike.

A *global* program is what the user wrote, for one device of unlimited size. A *local* program is
what each device runs on its shards; its values carry a `Layout` that says what they are shards of,
and its collectives are ops like any other. Control flow is an op with `bodies`. All three types are
frozen; a pass builds another program.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gspmd.sharding import Mesh, Sharding, itemsize, show_type

COLLECTIVES = (
    "all_gather", "all_reduce", "reduce_scatter", "all_to_all", "collective_permute",
)  # fmt: skip
PIPELINE = "gspmd.pipeline"
"""The scope of a pipeline's loop; what begins the name of its results, before its numbers."""
PADDING = "gspmd.stack_stages"
"""What begins the name of a mask of layers, before the number of these, and of their places."""
NO_PARAMS: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The user's line that an op comes from, and in which part of a training step it runs.

    It is false where the part is known, but no line, as of the gradient of a user's function.
    """

    file: str
    line: int
    function: str = ""
    phase: str = "forward"  # or "backward", "rematerialized"
    scope: str = ""  # PIPELINE: of a pipeline's own loop

    def __bool__(self) -> bool:
        return bool(self.file)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What a local value is a shard of: the logical shape and how that is split.

    `of` is the id of the global program's value, where it is one.
    """

    shape: tuple[int, ...]
    sharding: Sharding
    of: int | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """One tensor. `id` is unique in a program and all its bodies.

    `shape` is the logical shape in a global program and one device's shape in a local program.
    """

    id: int
    shape: tuple[int, ...]
    dtype: Any
    name: str = ""
    layout: Layout | None = None

    def __hash__(self) -> int:
        return self.id

    def __str__(self) -> str:
        return self.name or f"%{self.id}"

    @property
    def type(self) -> str:
        """`f32[8@x,16]+y`: for a local value the logical type it is a shard of."""
        if self.layout is None:
            return show_type(self.shape, self.dtype)
        return show_type(self.layout.shape, self.dtype, self.layout.sharding)


@dataclasses.dataclass(frozen=True, slots=True)
class Literal:
    """A scalar written into the program."""

    value: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def __str__(self) -> str:
        return f"{self.value}"


Operand = Value | Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Cause:
    """Why a local op exists which the user did not write: a reshard of `value` for `consumer`.

    Both belong to the global program. `consumer` is None at the program's boundary. `sums` says for
    each axis over which `value` still owes a sum, which op it arose in.
    """

    value: Value
    src: Sharding
    dst: Sharding
    consumer: "Op | None" = None
    role: str = ""  # "operand 1", "result", "output", "carry", ...
    sums: "tuple[tuple[str, Op], ...]" = ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operation: `call(*ins, **params)` gives the outs; control flow keeps its `bodies`.

    `name` is the JAX primitive's name, or the name of a collective or of a local op of ours.
    """

    name: str
    ins: tuple[Operand, ...]
    outs: tuple[Value, ...]
    params: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NO_PARAMS)
    bodies: "tuple[Program, ...]" = ()
    source: Source | None = None
    call: Callable[..., Any] | None = None
    cause: Cause | None = None
    effects: bool = False  # it must run even if nobody reads its results, and as often as written
    parts: "tuple[Op, ...]" = ()  # the ops that were combined into this one


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Inputs, ops in order, outputs; `consts` are values known already, with their arrays."""

    ins: tuple[Value, ...]
    ops: tuple[Op, ...]
    outs: tuple[Operand, ...]
    consts: tuple[tuple[Value, Any], ...] = ()

    def walk(self) -> Iterator[tuple[Op, int]]:
        """Every op, bodies included, and how often it runs.

        Below 0 it is inside of loops without a bound, and runs as often in each turn of theirs.
        """
        yield from _walk(self, 1)


def trip_count(op: Op) -> int:
    """How often the bodies of `op` run: a scan's length, -1 for `while` (no bound), else 1."""
    if op.name == "scan":
        return op.params["length"]
    return -1 if op.name == "while" else 1


def _walk(program: Program, trips: int) -> Iterator[tuple[Op, int]]:
    for op in program.ops:
        yield op, trips
        if op.bodies:
            inner = trip_count(op)
            known = abs(trips * inner)
            for body in op.bodies:
                yield from _walk(body, -known if trips < 0 or inner < 0 else known)


def next_id(program: Program) -> int:
    """The first id that no value of `program` has, bodies included."""
    defined = (
        *program.ins,
        *(value for value, _ in program.consts),
        *(value for op, _ in program.walk() for value in op.outs),
        *(v for op, _ in program.walk() for body in op.bodies for v in body.ins),
        *(v for op, _ in program.walk() for body in op.bodies for v, _ in body.consts),
    )
    return max((value.id for value in defined), default=0) + 1


def bytes_of(operands: Iterable[Operand]) -> float:
    """Bytes that the operands take together: one device's, in a local program."""
    return sum(math.prod(x.shape) * itemsize(x.dtype) for x in operands)


def leading_to(wanted: Iterable[Op], ops: Sequence[Op]) -> list[Op]:
    """Those of `ops` that are `wanted`, and those that these depend on, in order."""
    values = {x for op in wanted for x in op.outs}
    found: list[Op] = []
    for op in reversed(ops):
        if not values.isdisjoint(op.outs):
            values.update(values_of(op.ins))
            found.append(op)
    return found[::-1]


def values_of(operands: tuple[Operand, ...]) -> tuple[Value, ...]:
    """The operands that are values, in order."""
    return tuple(x for x in operands if isinstance(x, Value))


def verify(program: Program, mesh: Mesh | None = None) -> Program:
    """Returns `program` if every value is defined once and before its use, bodies included.

    With a `mesh`, `program` is a local program: each laid-out value must have the shape of a shard.
    """
    _verify(program, set(), mesh)
    return program


def _verify(program: Program, defined: set[Value], mesh: Mesh | None) -> None:
    def define(value: Value, where: str) -> None:
        if value in defined:
            raise ValueError(f"{value} is defined a second time, by {where}")
        if mesh is not None and value.layout is not None:
            expected = value.layout.sharding.local_shape(value.layout.shape, mesh)
            if expected != value.shape:
                raise ValueError(
                    f"{value}: {value.type} has local shape {value.shape}, expected {expected}, "
                    f"in {where}"
                )
        defined.add(value)
        seen.add(value)

    seen: set[Value] = set()  # a body sees its own values only
    for value in (*program.ins, *(value for value, _ in program.consts)):
        define(value, "the inputs")
    for op in program.ops:
        if missing := [str(x) for x in values_of(op.ins) if x not in seen]:
            raise ValueError(f"{missing} used before they are defined, in: {op.name} {op.source}")
        for body in op.bodies:
            _verify(body, defined, mesh)
        for value in op.outs:
            define(value, op.name)
    if missing := [str(x) for x in values_of(program.outs) if x not in seen]:
        raise ValueError(f"{missing} returned but never defined")
