"""Footprint: the bytes that the values of a program take, and those that its ops need besides."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax import lax
from jax import numpy as jnp

from gspmd.fusion import MOVES, Fusion
from gspmd.ir import COLLECTIVES, Op, Program, Value, values_of
from gspmd.rules import factor_rule, product_of
from gspmd.sharding import itemsize
from gspmd.storage import Storage

_CARRIES = (*MOVES, "all_gather", "all_to_all", "collective_permute")
_KEEP_DIMS = MOVES - {"broadcast_in_dim", "reshape", "transpose", "squeeze", "tile", "iota"}


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """What a program needs where its values are kept as `storage` says.

    `narrow` are the values that are kept in a narrower type than they have, and that type;
    `features` those of which one dim lies along the lanes, and that dim.
    """

    storage: Storage
    narrow: Mapping[Value, Any]
    features: Mapping[Value, int]

    @classmethod
    def of(cls, program: Program, storage: Storage) -> "Footprint":
        """That of `program` and all bodies in it."""
        narrow: dict[Value, Any] = {}
        features: dict[Value, int] = {}
        programs = [program, *(body for op, _ in program.walk() for body in op.bodies)]
        for one in programs:
            narrow.update(_converted(one))
            if storage.narrow_products:
                narrow.update((x, np.dtype(jnp.bfloat16)) for x in _only_multiplied(one))
            features.update(_feature_dims(one))
        return cls(storage, narrow, features)

    def size(self, value: Value) -> float:
        """Bytes of a value that the program makes, padding included."""
        dtype = self.narrow.get(value, value.dtype)
        dim = self.features.get(value)
        if dim is None:
            return self.storage.tiling.least(value.shape, dtype)
        rows = math.prod((*value.shape[:dim], *value.shape[dim + 1 :]))
        return self.storage.tiling.bytes((rows, value.shape[dim]), dtype)

    def scratch(self, fusion: Fusion) -> float:
        """Bytes that a fusion needs while it runs."""
        return sum(bytes for _, bytes in self.staged(fusion.root))

    def staged(self, op: Op) -> Iterator[tuple[Value, float]]:
        """What `op` makes for itself, in bytes: operands or results in the layout that it wants."""
        if op.name == "gather" or op.name.startswith("scatter"):
            yield from self.rows(op)
        elif op.name in ("all_gather", "reduce_scatter"):
            yield from self.parts(op)
        elif op.name == "conv_general_dilated":
            yield from self.offsets(op)

    def rows(self, op: Op) -> Iterator[tuple[Value, float]]:
        """What a gather picks, or a scatter adds, with each row of it along the lanes."""
        picks = op.name == "gather"
        x, numbers = op.outs[0] if picks else op.ins[2], op.params["dimension_numbers"]
        if not isinstance(x, Value):
            return
        window = numbers.offset_dims if picks else numbers.update_window_dims
        row = math.prod(x.shape[d] for d in window)
        shape = (math.prod(x.shape) // max(row, 1), row)
        rows = self.storage.tiling.bytes(shape, self.narrow.get(x, x.dtype))
        if rows > self.size(x) or (picks and _is_masked(x)):
            yield x, rows

    def parts(self, op: Op) -> Iterator[tuple[Value, float]]:
        """The whole that a collective gathers or scatters, its parts one behind the other."""
        scatters, forms = op.name == "reduce_scatter", self.storage.forms
        parts, wholes = (op.outs, op.ins) if scatters else (op.ins, op.outs)
        first = forms.scatter_first if scatters else forms.gather_first
        dims = op.params["dim"]
        dims = [dims] * len(parts) if isinstance(dims, int) else dims
        for part, x, dim in zip(parts, wholes, dims, strict=True):
            if isinstance(x, Value) and first(part.shape, dim, part.dtype):
                yield x, self.size(x)

    def offsets(self, op: Op) -> Iterator[tuple[Value, float]]:
        """The images that the gradient of a kernel sums over, once for each offset of the window
        along a row, where they are too few to fill a tile (XLA's space_to_batch_converter.cc)."""
        lhs, _, result = op.params["dimension_numbers"]
        x, gradient, out = op.ins[0], op.ins[1], op.outs[0]
        is_kernel = math.prod(out.shape) < math.prod(gradient.shape)
        if is_kernel and isinstance(x, Value) and x.shape[lhs[1]] < self.storage.tiling.rows:
            yield x, out.shape[result[-1]] * self.size(x)


def _converted(program: Program) -> Iterator[tuple[Value, Any]]:
    """What gathers pick only to have it converted to a narrower type, and that type."""
    readers = collections.defaultdict[Value, list[Op]](list)
    for op in program.ops:
        for x in dict.fromkeys(values_of(op.ins)):
            readers[x].append(op)
    for op in program.ops:
        if op.name == "gather":
            (x,) = op.outs
            if [reader.name for reader in readers[x]] == ["convert_element_type"]:
                yield x, min(x.dtype, readers[x][0].outs[0].dtype, key=itemsize)


def _only_multiplied(program: Program) -> Iterator[Value]:
    """The float32 values that nothing but matrix products reads, from wherever they are moved."""
    used = set(values_of(program.outs))  # by something else
    for op in reversed(program.ops):
        plain = op.params.get("precision") in (None, (lax.Precision.DEFAULT,) * 2)
        multiplies = plain and product_of(op) is not None
        if not (multiplies or (op.name in _CARRIES and used.isdisjoint(op.outs))):
            used.update(values_of(op.ins))
    for op in program.ops:
        yield from (x for x in op.outs if x not in used and x.dtype == np.float32)


def _feature_dims(program: Program) -> dict[Value, int]:
    """The dim of the features of what convolutions read and write: it lies along the lanes."""
    found: dict[Value, int] = {}
    if not any(op.name == "conv_general_dilated" for op in program.ops):
        return found
    for op in program.ops:
        if op.name == "conv_general_dilated":
            lhs, _, out = op.params["dimension_numbers"]
            found[op.outs[0]] = out[1]
            if isinstance(op.ins[0], Value):
                found.setdefault(op.ins[0], lhs[1])
        elif op.name in _KEEP_DIMS or (
            op.name not in COLLECTIVES and not op.bodies and factor_rule(op).elementwise
        ):
            for out in op.outs:
                like = (x for x in values_of(op.ins) if len(x.shape) == len(out.shape))
                found.update((out, found[x]) for x in like if x in found)
    return found


def _is_masked(picked: Value) -> bool:
    """Whether a gather is from a table that is split: what others hold is zero here."""
    return picked.layout is not None and bool(picked.layout.sharding.partial)
