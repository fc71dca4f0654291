"""Builder: emits the local ops and collectives of one op whose shards need each other's entries."""

import itertools
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from jax.extend.core.primitives import slice_p

from gspmd import local
from gspmd.collectives import result_shape, sent_by
from gspmd.exchange import Pairs, Round, Runs, assemble, cut, rounds
from gspmd.ir import Cause, Op, Operand, Value
from gspmd.rules.factor import Split
from gspmd.sharding import Axes, Mesh

Type = tuple[tuple[int, ...], Any]  # local shape, dtype
Source = tuple[Value, Runs, tuple[Runs, ...]]  # a value, what its shards hold, what each wants


def value(x: Operand) -> Value:
    """An operand that has dims, which no literal has."""
    assert isinstance(x, Value)
    return x


def resized(x: Operand, dim: int, size: int) -> tuple[int, ...]:
    """The shape of `x` with another size of one dim."""
    return (*x.shape[:dim], size, *x.shape[dim + 1 :])


class Builder:
    """Collects `ops`, whose new values get the numbers that `ids` yields."""

    def __init__(self, mesh: Mesh, op: Op, split: Split, ids: "itertools.count[int]") -> None:
        self.mesh, self.op, self.split, self.ids = mesh, op, split, ids
        self.ops: list[Op] = []

    def local(
        self, name: str, call: Callable[..., Any], ins: Sequence[Operand], outs: Sequence[Type],
        **params: Any,
    ) -> list[Value]:  # fmt: skip
        """The results of `call(*ins, **params)` on each device; `outs` are their types.

        `name` and `params` say all that `call` does: ops that agree in them are merged.
        """
        return self._emit(name, call, ins, outs, params, None)

    def all_gather(self, x: Value, axes: Axes, dim: int) -> Value:
        return self._collective("all_gather", x, {"axes": axes, "dim": dim})

    def all_reduce(self, x: Value, axes: Axes, reduction: str) -> Value:
        return self._collective("all_reduce", x, {"axes": axes, "reduction": reduction})

    def all_to_all(self, x: Value, axes: Axes, split_dim: int, concat_dim: int) -> Value:
        params = {"axes": axes, "split_dim": split_dim, "concat_dim": concat_dim}
        return self._collective("all_to_all", x, params)

    def permute(self, x: Value, axes: Axes, pairs: Pairs) -> Value:
        """What the sender of each (sender, receiver) holds; zeros for who receives nothing."""
        return self._collective("collective_permute", x, {"axes": axes, "pairs": pairs})

    def resize(self, x: Value, dim: int, size: int) -> Value:
        """`x` with zeros appended to a dim, or entries cut off its end, so that it has `size`."""
        shape = resized(x, dim, size)
        if size > x.shape[dim]:
            params = {"dim": dim, "size": size}
            return self.local("pad_to", local.pad_to, [x], [(shape, x.dtype)], **params)[0]
        if size < x.shape[dim]:
            limits = {"start_indices": (0,) * len(shape), "limit_indices": shape, "strides": None}
            return self.local("slice", slice_p.bind, [x], [(shape, x.dtype)], **limits)[0]
        return x

    def mask(self, x: Value, dim: int, axes: Axes, n: int, reduction: str) -> Value:
        """`x` with neutral elements past the end of a dim of logical size `n`."""
        if n % self.mesh.size(axes) == 0:
            return x
        params = {"axes": axes, "dim": dim, "size": n, "reduction": reduction}
        return self.local("mask", local.mask, [x], [(x.shape, x.dtype)], **params)[0]

    def exchange(
        self,
        sources: Sequence[Source],
        dim: int,
        axes: Axes,
        size: int,
        fill: Operand | None = None,
    ) -> Value:
        """A dim of local `size` in which each device has what it wants of each source.

        Elsewhere it holds `fill`, or anything if that is None. The sources are split over `axes`.
        """
        pieces: list[Value] = []
        moves: list[Round] = []
        for x, have, wants in sources:
            if len(sources) == 1 and wants == (have,) and size == x.shape[dim]:
                return x
            for move in rounds(have, wants, x.shape[dim]):
                pieces.append(self._moved(x, dim, axes, move))
                moves.append(move)
        x, have, _ = sources[0]
        if not pieces:  # nobody has anything that anybody wants
            pieces, moves = [x], [Round.empty(have.group, x.shape[dim])]
        shape = resized(x, dim, size)
        if fill is None and len(moves) == 1 and moves[0].fills(size):
            return pieces[0]
        params = {"axes": axes, "dim": dim, "size": size, "rounds": tuple(moves)}
        ins = pieces if fill is None else [*pieces, fill]
        return self.local("assemble", assemble, ins, [(shape, x.dtype)], **params)[0]

    def _moved(self, x: Value, dim: int, axes: Axes, move: Round) -> Value:
        """What this device receives in one round."""
        if move.size != x.shape[dim]:
            shape = resized(x, dim, move.size)
            params = {"axes": axes, "dim": dim, "at": move.cut, "size": move.size}
            (x,) = self.local("cut", cut, [x], [(shape, x.dtype)], **params)
        return self.permute(x, axes, move.pairs) if move.pairs else x

    def _collective(self, name: str, x: Value, params: dict[str, Any]) -> Value:
        shape = result_shape(name, x.shape, self.mesh.size(params["axes"]), params)
        i = self._operand()
        at = self.split.ins[i]
        cause = Cause(value(self.op.ins[i]), at, at, self.op, f"operand {i}")
        return self._emit(name, None, [x], [(shape, x.dtype)], params, cause)[0]

    def _operand(self) -> int:
        """The operand to name as the reason of a collective: the first that is split."""
        split = [i for i, at in enumerate(self.split.ins) if at.axes]
        return split[0] if split else 0

    def _emit(
        self,
        name: str,
        call: Callable[..., Any] | None,
        ins: Sequence[Operand],
        outs: Sequence[Type],
        params: dict[str, Any],
        cause: Cause | None,
    ) -> list[Value]:
        made = [Value(next(self.ids), tuple(shape), dtype) for shape, dtype in outs]
        frozen = MappingProxyType(params)
        self.ops.append(
            Op(name, tuple(ins), tuple(made), frozen, source=self.op.source, call=call, cause=cause)
        )
        return made

    @property
    def wire_bytes(self) -> float:
        """What one device sends in all collectives so far."""
        return sum(sent_by(op, self.mesh) for op in self.ops if op.call is None)
