"""Drawing: a program under construction, step by step, by a hypothesis test.

Values are `exact` while they are small whole numbers, whose sums are the same in any order. What
jumps (comparisons, argmax, sort, rounding) is done to these only, so that no rounding can make two
right programs differ. Integers and booleans are always exact.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gspmd.testing.program import DrawnProgram, Step, compile_text

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12)
LARGEST = 600  # elements of a value
LARGEST_ARGUMENT = 200
MOST_DIMS = 4
MOST_RESULTS = 6
_KINDS = {"f": "float", "i": "int", "u": "int", "b": "bool", "c": "complex"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a value while a program is drawn."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    exact: bool

    @property
    def kind(self) -> str:
        """ "float" for float32, "narrow" for smaller floats, else "int", "bool" or "complex"."""
        small = jnp.issubdtype(self.dtype, jnp.floating) and self.dtype.itemsize < 4
        return "narrow" if small else _KINDS[self.dtype.kind]

    @property
    def rank(self) -> int:
        return len(self.shape)


class Drawing:
    """A program under construction on `mesh`; a `smooth` one is to have a reverse-mode derivative.

    The moves of `gspmd.testing.moves` extend it, each by a step, or not at all where nothing fits.
    """

    def __init__(self, draw: Any, mesh: dict[str, int], smooth: bool) -> None:
        self.draw, self.mesh, self.smooth = draw, mesh, smooth
        self.entries: list[Entry] = []
        self.arguments: list[Step] = []
        self.steps: list[Step] = []

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def order(self, n: int) -> tuple[int, ...]:
        return tuple(self.draw(st.permutations(range(n))))

    def spec(self, shape: Sequence[int], loose: bool = True) -> P:
        return draw_spec(self.draw, shape, self.mesh, loose)

    def find(self, wanted: Callable[[Entry], bool]) -> Entry | None:
        """One of the values that are `wanted`, the newest with preference."""
        found = [e for e in reversed(self.entries) if wanted(e)]
        if not found:
            return None
        return found[0] if self.flag() else self.pick(found)

    def floats(self, low: int = 0, high: int = MOST_DIMS, exact: bool = False) -> Entry | None:
        """A value of float32 with `low` to `high` dims."""
        return self.find(
            lambda e: e.kind == "float" and low <= e.rank <= high and (e.exact or not exact)
        )

    def integers(self, low: int = 0, high: int = MOST_DIMS) -> Entry | None:
        """A value of integers with `low` to `high` dims."""
        return self.find(lambda e: e.kind == "int" and low <= e.rank <= high)

    def dim(self, e: Entry) -> int:
        return self.number(0, e.rank - 1)

    def parameter(self, shape: tuple[int, ...]) -> Entry | None:
        """An exact value of `shape`, a new constant if there is none yet."""
        found = self.find(lambda e: e.shape == shape and e.kind == "float" and e.exact)
        if found is not None:
            return found
        draw = f"np.random.default_rng({len(self.steps)}).integers(-2, 3, {shape})"
        return self.add(f"jnp.asarray({draw}, jnp.float32)", exact=True, grows=False)

    def argument(self, shape: tuple[int, ...], dtype: str, low: int, high: int) -> None:
        """A new argument, of whole numbers from `low` to `high`."""
        name, seed = f"v{len(self.entries)}", len(self.entries)
        draw = f"np.random.default_rng({seed}).integers({low}, {high + 1}, {shape})"
        self.arguments.append(Step(name, f"{draw}.astype(np.{dtype})"))
        self.entries.append(Entry(name, shape, np.dtype(dtype), True))

    def add(self, code: str, exact: bool = False, grows: bool = True) -> Entry | None:
        """The new value that `code` gives, if it is small enough to keep.

        `code` is an expression, maybe after statements on lines before it. Exact floats that may
        have grown are clipped, lest their sums be rounded.
        """
        *before, expression = code.splitlines()
        name = f"v{len(self.entries)}"
        reads = tuple(dict.fromkeys(re.findall(r"\bv\d+\b", code)))
        known = {e.name: e for e in self.entries}
        types = tuple((known[r].shape, known[r].dtype) for r in reads)
        made = _type_of(code, reads, types)
        if not 0 < math.prod(made.shape) <= LARGEST or len(made.shape) > MOST_DIMS:
            return None
        entry = Entry(name, made.shape, np.dtype(made.dtype), exact)
        if exact and grows and entry.kind in ("float", "narrow"):
            expression = f"jnp.clip({expression}, -9, 9)"
        entry = dataclasses.replace(entry, exact=exact or entry.kind in ("int", "bool"))
        self.steps.append(Step(name, "\n".join((*before, f"{name} = {expression}")), reads))
        self.entries.append(entry)
        return entry

    def _split_spec(self, shape: Sequence[int]) -> P:
        """A spec that splits something: of programs that nothing splits, there is little to say."""
        spec = self.spec(shape)
        if any(entry is not None and entry is not P.UNCONSTRAINED for entry in spec):
            return spec
        entries = list(spec)
        entries[self.number(0, len(shape) - 1)] = self.pick(tuple(self.mesh))
        return P(*entries)

    def finish(self) -> DrawnProgram:
        """The program: its results are what no step reads, and no step is in vain."""
        read = {name for step in self.steps for name in step.reads}
        unread = [step.name for step in self.steps if step.name not in read]
        outs = tuple(unread[-MOST_RESULTS:]) or (self.entries[-1].name,)
        needed, kept = set(outs), list[Step]()
        for step in reversed(self.steps):
            if step.name in needed:
                needed.update(step.reads)
                kept.append(step)
        shapes = {e.name: e.shape for e in self.entries}

        def given(argument: Step) -> P | None:
            return self.spec(shapes[argument.name]) if self.number(0, 3) else None

        return DrawnProgram(
            tuple(self.arguments),
            tuple(reversed(kept)),
            outs,
            self.mesh,
            (self._split_spec(shapes["v0"]), *map(given, self.arguments[1:])),
            tuple(self.spec(shapes[name]) if self.flag() else None for name in outs),
        )


@functools.lru_cache(maxsize=4096)
def _type_of(
    code: str, reads: tuple[str, ...], types: tuple[tuple[tuple[int, ...], Any], ...]
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what `code` gives; `types` are those of the values that it reads."""
    *before, expression = code.splitlines()
    body = (f"    {line}" for line in (*before, f"return {expression}"))
    text = "\n".join((f"def step({', '.join(reads)}):", *body))
    avals = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types)
    return jax.eval_shape(compile_text(text, "step"), *avals)


def draw_mesh(draw: Any, max_devices: int, max_axes: int) -> dict[str, int]:
    """A mesh of 1 to `max_axes` axes of sizes 1 to 4; the first has 2 or more if it may."""
    mesh: dict[str, int] = {}
    for name in "xyzw"[: draw(st.integers(1, max_axes))]:
        room = max_devices // math.prod(mesh.values())
        sizes = (2, 3, 4, 1) if mesh or room < 2 else (2, 3, 4)
        mesh[name] = draw(st.sampled_from([k for k in sizes if k <= room]))
    return mesh


def draw_spec(draw: Any, shape: Sequence[int], mesh: dict[str, int], loose: bool) -> P:
    """A spec for `shape`: each axis in one dim at most, whether it divides the dim or not."""
    free = list(mesh)
    dims: list[Any] = []

    def axis() -> str:
        return free.pop(draw(st.integers(0, len(free) - 1)))

    for _ in shape:
        what = draw(st.integers(0, 5))
        if what in (1, 2, 3) and free:
            dims.append(axis())
        elif what == 4 and len(free) > 1:
            dims.append(tuple(axis() for _ in range(draw(st.integers(2, len(free))))))
        else:
            dims.append(P.UNCONSTRAINED if loose and what == 5 else None)
    return P(*dims)
