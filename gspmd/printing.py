"""Programs as text: one line an op, types in the design's notation, collectives numbered.

    program (x: f32[8@data,16], w: f32[16,64@model])
      %0: f32[8@data,64@model] = dot_general x, w        # mlp.py:8
      return %0

Numbers `#1`, `#2`, ... in front of collectives are those that `plan.why` takes. Values are numbered
anew in order of appearance, so that equal programs print alike.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from gspmd.ir import COLLECTIVES, Op, Operand, Program, Value
from gspmd.sharding import show_axes, show_dtype

SHOWN_PARAMS = (
    "axes", "axis", "dim", "dimension", "dimensions", "permutation", "new_dtype", "split_dim",
    "concat_dim", "src", "dst", "reduction", "length", "unroll", "k", "y", "bit_width",
)  # fmt: skip
AXES_PARAMS = ("src", "dst")
MANY = 4  # pairs of devices shown of one permutation


def show(program: Program, name: str = "program") -> str:
    """The whole program as text, bodies indented."""
    return "\n".join(_Printer().program(program, name, ""))


class _Printer:
    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.count = 0
        self.collectives = 0

    def program(self, program: Program, name: str, indent: str) -> Iterator[str]:
        ins = [f"{self.name(value)}: {value.type}" for value in program.ins]
        ins += [f"const {self.name(value)}: {value.type}" for value, _ in program.consts]
        flat = f"{indent}{name} ({', '.join(ins)})"
        if len(flat) <= 100:
            yield flat
        else:
            yield f"{indent}{name} ("
            yield from (f"{indent}    {line}," for line in ins)
            yield f"{indent})"
        for op in program.ops:
            yield from self.op(op, indent + "  ")
        yield f"{indent}  return {', '.join(map(self.operand, program.outs))}"

    def op(self, op: Op, indent: str) -> Iterator[str]:
        number = ""
        if op.name in COLLECTIVES:
            self.collectives += 1
            number = f"#{self.collectives} "
        ins = ", ".join(map(self.operand, op.ins))
        outs = ", ".join(f"{self.name(value)}: {value.type}" for value in op.outs)
        head = f"{outs} = " if outs else ""
        line = f"{indent}{number}{head}{op.name}{_params(op)} {ins}".rstrip()
        yield f"{line:<80}  # {op.source}" if op.source else line
        for k, body in enumerate(op.bodies):
            yield from self.program(body, _body_name(op, k), indent + "  ")

    def operand(self, x: Operand) -> str:
        return self.name(x) if isinstance(x, Value) else f"{x}:{show_dtype(x.dtype)}"

    def name(self, value: Value) -> str:
        if value.name:
            return value.name
        if value.id not in self.names:
            self.names[value.id] = f"%{self.count}"
            self.count += 1
        return self.names[value.id]


def _body_name(op: Op, k: int) -> str:
    if op.name == "while":
        return ("condition", "body")[k]
    return f"branch {k}" if op.name == "cond" else "body"


def _params(op: Op) -> str:
    """The params that say what an op does; shapes and defaults are seen in the types already."""
    if op.name in COLLECTIVES and "axes" in op.params:
        rest = {
            k: v for k, v in op.params.items() if k != "axes" and (k, v) != ("reduction", "sum")
        }
        return f"[{show_axes(op.params['axes'])}]" + _list(rest)
    return _list(
        {
            k: v
            for k, v in op.params.items()
            if k in SHOWN_PARAMS and v is not None and (k, v) != ("unroll", 1)
        }
    )


def _list(params: dict[str, Any]) -> str:
    shown: list[str] = []
    for key, value in params.items():
        if key in ("axes", *AXES_PARAMS) and value and isinstance(value[0], str):
            value = show_axes(value)
        elif key == "new_dtype":
            value = show_dtype(value)
        elif key == "pairs":
            value = _pairs(value)
        shown.append(f"{key}={_plain(value)}")
    return f"[{' '.join(shown)}]" if shown else ""


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    """`+1` where everyone sends to the next, `+1mod4` where the last sends to the first, else who
    sends to whom: `1>0,3>2`."""
    distances = {receiver - sender for sender, receiver in pairs}
    if len(distances) == 1:
        return f"{distances.pop():+d}"
    n, around = len(pairs), {(receiver - sender) % len(pairs) for sender, receiver in pairs}
    if n > 2 and len(around) == 1 and {sender for sender, _ in pairs} == set(range(n)):
        return f"{min(distances, key=abs):+d}mod{n}"
    shown = [f"{sender}>{receiver}" for sender, receiver in pairs[:MANY]]
    return ",".join(shown) + (",..." if len(pairs) > MANY else "")


def _plain(value: Any) -> str:
    """`value` without spaces, numpy's integers like Python's."""
    if not isinstance(value, tuple):
        return str(value).replace(" ", "")
    inside = ",".join(map(_plain, cast("tuple[Any, ...]", value)))
    return f"({inside},)" if len(value) == 1 else f"({inside})"
