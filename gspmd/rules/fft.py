"""Rule of the Fourier transform: along a split dim the data is transposed over the devices.

A transform over several dims is one after another. While one of them is split the others are done;
then an all_to_all moves the split to one of these, and another moves it back.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from gspmd.ir import Op, Operand, Value
from gspmd.rules.build import Builder, resized, value
from gspmd.rules.factor import Dims, FactorRule, Factors, Split, rule


def _kind(op: Op) -> str:
    """`FFT`, `IFFT`, `RFFT` or `IRFFT`."""
    return lax.FftType(op.params["fft_type"]).name


def _fft_partition(
    b: Builder, op: Op, split: Split, ins: Sequence[Operand]
) -> Sequence[Value] | None:
    """The transform where one of its dims is split, and another can take the split over."""
    x = value(ins[0])
    lengths = _lengths(op)
    dim, *more = (d for d in lengths if split.ins[0].dims[d])
    if more or len(lengths) < 2:
        return None
    before, after = _around(_kind(op), dim, lengths)
    plain = "IFFT" if _kind(op) in ("IFFT", "IRFFT") else "FFT"
    x = _transform(b, x, before, op.outs[0].dtype)
    axes = split.ins[0].dims[dim]
    host = max((d for d in lengths if d != dim), key=lambda d: x.shape[d])
    n, block, group = x.shape[host], x.shape[dim], b.mesh.size(axes)
    x = b.resize(x, host, -(-n // group) * group)
    x = b.resize(b.all_to_all(x, axes, host, dim), dim, lengths[dim])
    x = _transform(b, x, ((plain, dim, lengths[dim]),), x.dtype)
    x = b.resize(x, dim, block * group)
    x = b.resize(b.all_to_all(x, axes, dim, host), host, n)
    return [_transform(b, x, after, op.outs[0].dtype)]


Steps = tuple[tuple[str, int, int], ...]  # kind, dim, length


def _lengths(op: Op) -> dict[int, int]:
    """The transformed dims with their lengths."""
    lengths, rank = op.params["fft_lengths"], len(op.ins[0].shape)
    return dict(zip(range(rank - len(lengths), rank), lengths, strict=True))


def _around(kind: str, dim: int, lengths: dict[int, int]) -> tuple[Steps, Steps]:
    """The transforms before and after that of `dim`: the real one is the first, or the last."""
    last = max(lengths)
    plain = "IFFT" if kind in ("IFFT", "IRFFT") else "FFT"
    others = tuple((plain, d, n) for d, n in lengths.items() if d not in (dim, last))
    if dim == last:
        return others, ()
    if kind == "IRFFT":
        return (), (*others, (kind, last, lengths[last]))
    return ((kind, last, lengths[last]), *others), ()


def _transform(b: Builder, x: Value, steps: Steps, dtype: Any) -> Value:
    """`x` transformed by `steps`, each over one dim that is whole."""
    for kind, dim, length in steps:
        size = length // 2 + 1 if kind == "RFFT" else length
        to = dtype if kind in ("RFFT", "IRFFT") else x.dtype
        how = {"dim": dim, "kind": kind, "length": length}
        (x,) = b.local("fft_along", _fft_along, [x], [(resized(x, dim, size), to)], **how)
    return x


def _fft_along(x: Any, *, dim: int, kind: str, length: int) -> Any:
    moved = jnp.moveaxis(x, dim, -1)
    return jnp.moveaxis(lax.fft(moved, kind, (length,)), -1, dim)


@rule("fft", partition=_fft_partition)
def fft(op: Op) -> FactorRule:
    """Batch dims pass; a transformed dim may be split if there is another one."""
    f = Factors()
    (x,), (out,) = op.ins, op.outs
    core = len(op.params["fft_lengths"])
    batch = f.dims(x.shape[: len(x.shape) - core])
    ins: list[tuple[int, ...]] = []
    outs: list[tuple[int, ...]] = []
    rest = range(len(batch), len(x.shape))
    for d, length in zip(rest, op.params["fft_lengths"], strict=True):
        same = core > 1 and x.shape[d] == length == out.shape[d]
        ins.append((f.new(x.shape[d], "pass" if same else "whole", exchanged=same),))
        outs.append(ins[-1] if same else (f.new(out.shape[d], "whole"),))
    dims: Dims = (*batch, *ins)
    return f.rule([dims], [(*batch, *outs)], linear=((0,),), forward=1, backward=1)
