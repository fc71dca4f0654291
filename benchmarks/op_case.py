"""Case: a function with the types and shardings of its operands and results, written in a line.

The notation is the library's: `f32[64@x,32]` has 64 rows over axis x, `f32[64@(x,y),32]` over both.
The mesh is `x=8` where nothing names y, else `x=4,y=2`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

DTYPES = {
    "f32": np.float32, "bf16": jnp.bfloat16, "c64": np.complex64, "i32": np.int32,
    "u32": np.uint32, "bool": np.bool_,
}  # fmt: skip


class Tensor(NamedTuple):
    """A type with its sharding; `dims` are the axes that split each dim."""

    dtype: np.dtype
    shape: tuple[int, ...]
    dims: tuple[tuple[str, ...], ...]

    @property
    def spec(self) -> P:
        return P(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in self.dims))

    def padded(self, mesh: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with each dim rounded up to what its axes divide."""
        parts = [math.prod(mesh[axis] for axis in axes) for axes in self.dims]
        return tuple(-(-n // k) * k for n, k in zip(self.shape, parts, strict=True))


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=shape)


def positive(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.uniform(0.5, 1.5, shape)


def definite(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Symmetric positive definite matrices, if the shape is that of square ones; else `normal`."""
    x = normal(random, shape)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        return x
    return np.matmul(x, np.swapaxes(x, -1, -2)) / shape[-1] + np.eye(shape[-1])


class Case(NamedTuple):
    """`fn` on operands of the types before the arrow, with results of those behind it.

    `named` cases are those that the project promises to run at a quarter of XLA's bytes or less.
    """

    group: str
    name: str
    fn: Callable[..., Any]
    types: str
    named: bool = False
    below: int = 64  # integers are drawn from [0, below)
    draw: Draw = normal

    @property
    def mesh(self) -> dict[str, int]:
        return {"x": 4, "y": 2} if re.search(r"[@,]y", self.types) else {"x": 8}

    @property
    def ins(self) -> tuple[Tensor, ...]:
        return _tensors(self.types.split("->")[0])

    @property
    def outs(self) -> tuple[Tensor, ...]:
        return _tensors(self.types.split("->")[1])

    def arguments(self) -> list[np.ndarray]:
        """The same arrays every time, of the logical shapes."""
        random = np.random.default_rng(0)
        return [self._drawn(random, tensor) for tensor in self.ins]

    def _drawn(self, random: np.random.Generator, tensor: Tensor) -> np.ndarray:
        if np.issubdtype(tensor.dtype, np.integer):
            return random.integers(0, self.below, tensor.shape).astype(tensor.dtype)
        x = self.draw(random, tensor.shape)
        if np.issubdtype(tensor.dtype, np.complexfloating):
            x = x + 1j * self.draw(random, tensor.shape)
        return x.astype(tensor.dtype)


def _tensors(text: str) -> tuple[Tensor, ...]:
    found = re.findall(r"(\w+)\[(.*?)\](?=,|\s|$)", text)
    return tuple(_tensor(np.dtype(DTYPES[dtype]), dims) for dtype, dims in found)


def _tensor(dtype: np.dtype, text: str) -> Tensor:
    dims = re.findall(r"(\d+)(?:@(\w|\([\w,]+\)))?", text)
    shape = tuple(int(n) for n, _ in dims)
    return Tensor(dtype, shape, tuple(tuple(re.findall(r"\w", axes)) for _, axes in dims))
