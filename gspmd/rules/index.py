"""Indexing: what the rules of gather and scatter have in common, and how indices become local.

Both move slices between an operand and an array of slices (a gather's result, a scatter's updates),
at places that index vectors name. A dim of the operand that the slices do not take in full may be
split all the same: each device translates the places to its own shard, row by row of the slice
where a slice may reach over several shards. What is out of bounds is decided for the whole slice
and the whole array, whatever a device holds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from gspmd.ir import Op
from gspmd.local import as_words, is_key
from gspmd.rules.factor import Dims, Factors
from gspmd.sharding import Axes

DROP = lax.GatherScatterMode.FILL_OR_DROP


def sum_kind(dtype: Any) -> str:
    """The reduction that finds the one contribution which is not zero, or `whole` if none does.

    PRNG keys are summed by their words. A sum loses the sign of a zero: -0.0 arrives as 0.0.
    """
    if jnp.issubdtype(dtype, jnp.bool_):
        return "or"
    if is_key(dtype):
        return "sum"
    has_zero = str(dtype) != "float8_e8m0fnu"  # powers of two alone
    return "sum" if jnp.issubdtype(dtype, jnp.number) and has_zero else "whole"


def zeros_but(mine: Any, x: Any) -> Any:
    """`x` where `mine` is true, zeros elsewhere; `mine` has the leading dims of `x`."""
    words, restore = as_words(x)
    mine = lax.broadcast_in_dim(mine, words.shape, range(mine.ndim))
    return restore(jnp.where(mine, words, jnp.zeros_like(words)))


def clamped(index: Any, bound: int) -> Any:
    """`index` clamped into [0, bound], in a signed type of at least 32 bits."""
    index = jnp.asarray(index)
    signed = jnp.issubdtype(index.dtype, jnp.signedinteger) and index.dtype.itemsize >= 4
    index = jnp.clip(index, 0, min(bound, int(jnp.iinfo(index.dtype).max)))
    return index if signed else index.astype(jnp.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Indexing:
    """How slices of an operand are named by index vectors.

    A slice takes `sizes[d]` of dim d, which has `shape[d]`. Dim p of the array of slices runs over
    dim `windows[p]` of the operand; where that is None, over the next dim of the indices. Component
    i of an index vector is the start in dim `indexed[i]`; other slices start at 0. `paired` are the
    (dim of the operand, dim of the indices) that go together, a batch of operands.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    windows: tuple[int | None, ...]
    indexed: tuple[int, ...]
    collapsed: tuple[int, ...]
    paired: tuple[tuple[int, int], ...]

    @classmethod
    def of_gather(cls, op: Op) -> "Indexing":
        numbers = op.params["dimension_numbers"]
        return cls._of(
            op.ins[0].shape,
            op.params["slice_sizes"],
            len(op.outs[0].shape),
            numbers.offset_dims,
            numbers.start_index_map,
            numbers.collapsed_slice_dims,
            tuple(
                zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
            ),
        )

    @classmethod
    def of_scatter(cls, op: Op) -> "Indexing":
        numbers = op.params["dimension_numbers"]
        paired = tuple(
            zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
        )
        single = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        dims = iter(numbers.update_window_dims)
        sizes = tuple(
            1 if d in single else op.ins[2].shape[next(dims)] for d in range(len(op.ins[0].shape))
        )
        return cls._of(
            op.ins[0].shape,
            sizes,
            len(op.ins[2].shape),
            numbers.update_window_dims,
            numbers.scatter_dims_to_operand_dims,
            numbers.inserted_window_dims,
            paired,
        )

    @classmethod
    def _of(
        cls,
        shape: Sequence[int],
        sizes: Sequence[int],
        rank: int,
        offset_dims: Sequence[int],
        indexed: Sequence[int],
        collapsed: Sequence[int],
        paired: tuple[tuple[int, int], ...],
    ) -> "Indexing":
        gone = {*collapsed, *(d for d, _ in paired)}
        kept = iter(d for d in range(len(shape)) if d not in gone)
        windows = tuple(next(kept) if p in offset_dims else None for p in range(rank))
        return cls(tuple(shape), tuple(sizes), windows, tuple(indexed), tuple(collapsed), paired)

    def full(self, dim: int) -> bool:
        """Whether every slice takes all of a dim of the operand."""
        return self.shape[dim] == self.sizes[dim] and dim in self.windows

    def dims(
        self, f: Factors, indices: Sequence[int], taken: str, batch: str
    ) -> tuple[Dims, Dims, Dims]:
        """The factors of the operand, the indices and the slices.

        Dims that slices take in full pass, as does a batch of operands. Other dims of the operand
        are of kind `taken`, other dims of the indices of kind `batch`.
        """
        together = {i for _, i in self.paired}
        index_dims = tuple(
            (f.new(n, "pass" if i in together else batch),) for i, n in enumerate(indices[:-1])
        )
        pairs = dict(self.paired)
        operand: Dims = tuple(
            index_dims[pairs[d]]
            if d in pairs
            else (f.new(n, "pass" if self.full(d) else taken if size > 0 and n > 1 else "whole"),)
            for d, (n, size) in enumerate(zip(self.shape, self.sizes, strict=True))
        )
        rest = iter(index_dims)
        slices: Dims = tuple(
            next(rest)
            if d is None
            else operand[d]
            if self.full(d)
            else (f.new(self.sizes[d], "whole"),)
            for d in self.windows
        )
        return operand, (*index_dims, (f.new(indices[-1], "whole"),)), slices


@dataclasses.dataclass(frozen=True, slots=True)
class Localized:
    """An `Indexing` of shards, in which the dims of the operand that are `cut` are taken by rows.

    Slices that take several rows of a cut dim fall into as many slices of one row: their dim of the
    array of slices becomes one more dim of the indices, so that array stays as it is.
    """

    whole: Indexing
    cut: tuple[tuple[int, Axes, int], ...]  # dim of the operand, the axes that split it, the shard

    @classmethod
    def of(cls, whole: Indexing, axes: Sequence[Axes], local: Sequence[int]) -> "Localized":
        """`axes` split the operand's dims, of which a device holds `local`."""
        paired = {d for d, _ in whole.paired}
        return cls(
            whole,
            tuple(
                (d, names, local[d])
                for d, names in enumerate(axes)
                if names and d not in paired and not whole.full(d)
            ),
        )

    @property
    def _rows(self) -> dict[int, int]:
        """The dims of the slices whose rows are named one by one, each with the operand's dim."""
        dims = {d for d, _, _ in self.cut}
        return {p: d for p, d in enumerate(self.whole.windows) if d is not None and d in dims}

    @property
    def _named(self) -> list[int]:
        """The dims of the slices that the indices run over."""
        return [p for p, d in enumerate(self.whole.windows) if d is None or p in self._rows]

    @property
    def indexed(self) -> tuple[int, ...]:
        at = self.whole.indexed
        return (*at, *(d for d, _, _ in self.cut if d not in at))

    @property
    def collapsed(self) -> tuple[int, ...]:
        return tuple(sorted({*self.whole.collapsed, *self._rows.values()}))

    @property
    def windows(self) -> tuple[int, ...]:
        """The dims of the slices that are no dims of the indices."""
        return tuple(p for p in range(len(self.whole.windows)) if p not in self._named)

    @property
    def batching(self) -> tuple[int, ...]:
        """The dims of the indices which belong to a batch of operands."""
        batch = [i for i, p in enumerate(self._named) if p not in self._rows]
        return tuple(batch[i] for _, i in self.whole.paired)

    def sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The slices' sizes, of which `sizes` are those of dims not taken by rows."""
        rows = set(self._rows.values())
        return tuple(1 if d in rows else n for d, n in enumerate(sizes))

    def translate(self, indices: Any) -> tuple[Any, Any, Any]:
        """The index vectors for a device's shard; which are its own; which are valid.

        A slice is valid if it lies within the operand, else clamped into it. A row that another
        device holds is moved to the nearest row held here.
        """
        whole = self.whole
        # A dim of size 1 for each dim of the slices whose rows are to be named.
        new = [i for i, p in enumerate(self._named) if p in self._rows]
        indices = jnp.expand_dims(indices, new)
        shape = indices.shape[:-1]
        valid = jnp.ones(shape, bool)
        starts: dict[int, Any] = {}
        for i, d in enumerate(whole.indexed):
            starts[d] = clamped(indices[..., i], whole.shape[d] - whole.sizes[d])
            valid &= starts[d] == indices[..., i]
        own = jnp.ones(shape, bool)
        for d, names, block in self.cut:
            index = starts.get(d, jnp.zeros(shape, jnp.int32))
            for i, p in enumerate(self._named):
                if self._rows.get(p) == d:
                    index = index + lax.broadcasted_iota(
                        index.dtype, (*(1,) * i, whole.sizes[d], *(1,) * (len(shape) - i - 1)), i
                    )
            index -= (lax.axis_index(names) * block).astype(index.dtype)
            own = own & (index >= 0) & (index < block)
            starts[d] = jnp.clip(index, 0, block - 1)
        parts = [starts[d] for d in self.indexed]
        dtype = jnp.result_type(*parts)
        shape = jnp.broadcast_shapes(*(part.shape for part in parts))
        vectors = jnp.stack([jnp.broadcast_to(x.astype(dtype), shape) for x in parts], axis=-1)
        return vectors, jnp.broadcast_to(own, shape), jnp.broadcast_to(valid, shape)
