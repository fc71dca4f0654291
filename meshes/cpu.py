"""What a core of this machine does, measured."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, slots=True)
class Core:
    """One of the `cores` that this process may use, as a share of what all of them do at once.

    `peak` is FLOP/s by dtype, `efficiency` the share of it that products of cubes reach, by side;
    `memory` is bytes, `bandwidth` bytes/s, `launch` seconds of the smallest op.
    """

    cores: int
    peak: Mapping[str, float]
    efficiency: tuple[tuple[int, float], ...]
    memory: float
    bandwidth: float
    launch: float


_SIDES = (64, 256, 1024)


def measure() -> Core:
    """What products, sums and the smallest op take in JAX's programs on this machine.

    All cores work at once, as they do for a mesh of as many devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        rates = {side: _flops(side, "float32") for side in _SIDES}
        best = max(rates.values())
        peak = {"float32": best / cores}
        peak |= {dtype: _flops(512, dtype) / cores for dtype in ("bfloat16", "float16")}
        words = jnp.ones(1 << 23, jnp.float32)
        bandwidth = 2 * words.nbytes / _seconds(lambda x: x * 0.5, words, 4) / cores
        launch = _seconds(lambda x: x @ x, jnp.zeros((8, 8)), 256)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / cores
    # A larger product is no slower: where the clock says so, the machine was busy.
    curve = zip(_SIDES, itertools.accumulate(rates.values(), max), strict=True)
    efficiency = tuple((side, rate / best) for side, rate in curve)
    return Core(cores, peak, efficiency, memory, bandwidth, launch)


def _flops(side: int, dtype: str) -> float:
    """FLOP/s of a product of cubes of `side`."""
    matrix = jnp.full((side, side), 1 / side, dtype)
    times = min(max(2**28 // side**3, 1), 256)
    return 2.0 * side**3 / _seconds(lambda x: x @ matrix, matrix, times)


def _seconds(step: Callable[[jax.Array], jax.Array], x: jax.Array, times: int) -> float:
    """Seconds of one `step` of a program of `times`, which Python calls once; of the best run."""
    run = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, x: step(x), x))
    run(x).block_until_ready()  # compiles
    taken: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        run(x).block_until_ready()
        taken.append(time.perf_counter() - start)
    return min(taken) / times
