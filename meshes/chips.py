"""Chips: what one accelerator computes, holds, moves and draws, each number beside its source.

Sources, where a comment says no more: TPUs from docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,
v6e,tpu7x} and the scaling book (jax-ml/scaling-book, tpus.md); GPUs from NVIDIA's data sheets and
the scaling book's gpus.md. FLOP/s are dense. A GB of memory is 2**30 bytes, a GB/s is 1e9 bytes/s.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

from gspmd.errors import MeshError, nearest
from gspmd.meshes import cpu

Platform = Literal["tpu", "gpu", "cpu"]
Curve = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Power:
    """Watts of one chip under a load: the least, the mean and the most; None is not published."""

    idle: float | None = None
    mean: float | None = None
    maximum: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Links:
    """What joins chips to one another: the ports of one chip, and how far they reach.

    `bandwidth` is what one link carries each way, in bytes/s, of which the chip has `count`: the
    usable, not the nominal rate. `latency` is that of one hop, in seconds. A TPU's `largest` is the
    shape of the whole torus, of a GPU the number in one NVLink domain. An axis of a torus wraps
    around where its size is a multiple of `wraps`: with three dims, the side of a cube.
    """

    count: int
    bandwidth: float
    latency: float
    largest: tuple[int, ...]
    wraps: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    """One way out: the bytes/s that can be sent through it, and the seconds until they arrive."""

    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """One kind of accelerator. All numbers are of the whole chip, which is `devices` JAX devices.

    `peak` is FLOP/s by dtype, `memory` bytes, `bandwidth` bytes/s of memory. A matrix unit pads to
    `tile` rows and columns. `efficiency` is what matrix products of cubes reach, of the peak, by
    the side of the cube; `memory_efficiency` what streaming reaches of the bandwidth; `launch` the
    seconds that the smallest op takes, `start` those that the smallest collective takes beyond its
    hops. `exact` is the FLOP/s of float32 products that round nothing, where those of `peak` do and
    the chip has units for it. `between` is what one device can send to another of the chip,
    `network` what the chip can send over the network of the hosts; `host` is bytes/s between the
    chip and its host's memory.
    """

    name: str
    platform: Platform
    devices: int
    peak: Mapping[str, float] = dataclasses.field(hash=False)
    memory: float
    bandwidth: float
    tile: int
    efficiency: Curve
    memory_efficiency: float
    launch: float
    start: float
    links: Links
    exact: float | None = None
    between: Port | None = None
    network: Port | None = None
    host: float | None = None
    power: Power = Power()

    @property
    def device_memory(self) -> float:
        """Bytes of memory of one JAX device."""
        return self.memory / self.devices

    @property
    def device_bandwidth(self) -> float:
        """Bytes/s of memory of one JAX device."""
        return self.bandwidth / self.devices

    def peak_flops(self, dtype: object) -> float:
        """FLOP/s of one JAX device on operands of `dtype`.

        Raises:
          MeshError: the chip has no peak for it.
        """
        name = str(getattr(dtype, "name", dtype))
        if name not in self.peak:
            others = [chip.name for chip in CHIPS.values() if name in chip.peak]
            raise MeshError(
                f"{self.name} has no published peak for {name}: it has one for "
                f"{', '.join(self.peak)}; compute the product in one of these"
                f"{f', or take {others[0]}' if others else ', as no chip here has one for it'}."
            )
        return self.peak[name] / self.devices


def chip(name: str | Chip) -> Chip:
    """The chip called `name`; "cpu" is a core of this machine, measured when first asked for.

    "a100" is the one of 80 GB. A `Chip` is itself.

    Raises:
      MeshError: there is none of that name.
    """
    if isinstance(name, Chip):
        return name
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MeshError(
            f"a chip is a gspmd.meshes.Chip or the name of one, such as 'h100', got {name!r} of "
            f"type {type(name).__name__}."
        )
    if name == "cpu":
        return measured_cpu()
    if _SHORT.get(name, name) not in CHIPS:
        known = (*CHIPS, "cpu")
        raise MeshError(
            f"{name!r} is not a chip{nearest(name, (*_SHORT, *known))} There are "
            f"{', '.join(known)}."
        )
    return CHIPS[_SHORT.get(name, name)]


@functools.cache
def measured_cpu() -> Chip:
    """One core of this machine, measured when first asked for."""
    core = cpu.measure()
    return Chip(
        name="cpu",
        platform="cpu",
        devices=1,
        peak=core.peak,
        memory=core.memory,
        bandwidth=core.bandwidth,
        tile=1,
        efficiency=core.efficiency,
        memory_efficiency=1.0,  # as measured
        launch=core.launch,
        start=150 * _US,  # 8 devices that wait for one another, JAX 0.10.2 on 2 cores
        # What one core sends another is written once and read once.
        links=Links(1, core.bandwidth / 2, core.launch, (core.cores,)),
    )


_SHORT = {"a100": "a100-80gb"}
_T = 1e12
_G = 1e9
_GIB = 2.0**30
_US = 1e-6

# Of a link's nominal rate: 45 of 50 GB/s on v4 and v5e, 90 of 100 on v5p, v6e, v7. It is assumed of
# v2 and v3, for which no usable rate is published: v3's all-reduce of 340 TB/s a pod is at the
# nominal one, but so is v5e's of 51.2.
_USABLE = 0.9

# Products of cubes in bf16 on one TensorCore of TPU7x: the side, and the TFLOP/s reached
# (AI-Hypercomputer/tpu-recipes, microbenchmarks). The smallest take 1.6 us.
_MEASURED = (
    (128, 2.6), (256, 18), (512, 105), (1024, 350), (2048, 679), (4096, 893), (16384, 950),
    (32768, 956),
)  # fmt: skip


# The most that products reach of the peak, where it is not published of the very chip. On v2, an
# [8192,8192] by an [8192,16384] takes 96 ms, and 95.6 at the peak (scaling book, profiling.md); the
# TPU compiler's own estimate is 0.98 there and on v3, to which it is taken over. Where two cores
# share a product, and nothing is published, it is what TPU7x reaches.
_OWN_CORES = 0.99
_SHARED = 0.829


def _curve(most: float, teraflops: float) -> Curve:
    """The curve of a device with a peak of `teraflops`, of which the largest products reach `most`.

    What a product loses is time, to start and to fill the units: products lose the same share on
    two chips if they take the same time on both, so the sides go with the cube root of the speed.
    """
    largest = _MEASURED[-1][1]
    scale = (most * teraflops / largest) ** (1 / 3)
    return tuple((round(side * scale), most * reached / largest) for side, reached in _MEASURED)


def _tpu_peaks(
    bf16: float, int8: float | None = None, float8: float | None = None
) -> Mapping[str, float]:
    """Peaks by dtype: products of f32 are made in one pass of bf16, JAX's default precision."""
    peaks = {"bfloat16": bf16 * _T, "float32": bf16 * _T}
    if int8 is not None:
        peaks |= {"int8": int8 * _T, "uint8": int8 * _T}
    if float8 is not None:
        peaks |= {"float8_e4m3fn": float8 * _T, "float8_e5m2": float8 * _T}
    return peaks


def _tpu(
    generation: str,
    *,
    devices: int,
    peak: Mapping[str, float],
    gib: float,
    gb_per_s: float,
    links: Links,
    tile: int = 128,
    most: float = _SHARED,
    between: float | None = None,
    dcn: float | None = None,
    host: float | None = None,
    power: Power = Power(),
) -> Chip:
    return Chip(
        name=f"tpu-{generation}",
        platform="tpu",
        devices=devices,
        peak=peak,
        memory=gib * _GIB,
        bandwidth=gb_per_s * _G,
        tile=tile,
        efficiency=_curve(most, peak["bfloat16"] / devices / _T),
        memory_efficiency=0.87,  # TPU7x: copies of 512 MB and more at 6.4 of 7.38 TB/s
        launch=1.6 * _US,  # TPU7x: a product of side 128
        # TPU v5e, 4 chips in a line: gathering 131 kB takes 8 us, of which 3 are hops.
        start=5 * _US,
        links=links,
        between=None if between is None else Port(between * _G, 1 * _US),
        # The latency is not published: two hosts and the switches between them, over TCP.
        network=None if dcn is None else Port(dcn * _G, 10 * _US),
        host=None if host is None else host * _G,
        power=power,
    )


def _ici(count: int, nominal: float, largest: tuple[int, ...], wraps: int) -> Links:
    return Links(count, nominal * _USABLE * _G, 1 * _US, largest, wraps)


def _gpu(
    name: str,
    teraflops: Mapping[str, float],
    most: float,
    gib: float,
    gb_per_s: float,
    nvlink: Links,
    nic: float,
    host: float,
    watts: float,
    exact: float | None = None,
) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        devices=1,
        peak={dtype: peak * _T for dtype, peak in teraflops.items()},
        memory=gib * _GIB,
        bandwidth=gb_per_s * _G,
        tile=128,  # rows and columns of a product's piece that a thread block computes in cuBLAS
        efficiency=_curve(most, teraflops["float16"]),
        memory_efficiency=0.93,  # H100, f32 sum of 2**30: 3.84 of 4.1 ms (scaling book)
        launch=1.5 * _US,  # H100, f32 sum of 64k (scaling book)
        exact=None if exact is None else exact * _T,
        start=6.6 * _US,  # NCCL, src/graph/tuning.cc: base latency of a ring, LL
        links=nvlink,
        # 24 of 25 GB/s over HDR (NVIDIA/nccl issue 412); NCCL, the same: a step of a ring, LL.
        network=Port(0.96 * nic * _G, 2.7 * _US),
        host=host * _G,
        power=Power(maximum=watts),
    )


def _nvlink(count: int, per_link: float, domain: int) -> Links:
    """NCCL's usable rate a link (tuning.cc), and its latency of a step of a ring, LL."""
    return Links(count, per_link * _G, 0.6 * _US, (domain,))


_V100 = {"float16": 125, "float32": 15.7, "float64": 7.8}
_A100 = {"bfloat16": 312, "float16": 312, "float32": 156, "float64": 19.5, "int8": 624}
_H100 = {
    "bfloat16": 989.4, "float16": 989.4, "float32": 494.7, "float64": 66.9, "int8": 1979,
    "float8_e4m3fn": 1979, "float8_e5m2": 1979,
}  # fmt: skip
_B200 = {
    "bfloat16": 2250, "float16": 2250, "float32": 1125, "float64": 40, "int8": 4500,
    "float8_e4m3fn": 4500, "float8_e5m2": 4500, "float4_e2m1fn": 9000,
}  # fmt: skip
_GB200 = {
    "bfloat16": 2500, "float16": 2500, "float32": 1250, "float64": 40, "int8": 5000,
    "float8_e4m3fn": 5000, "float8_e5m2": 5000, "float4_e2m1fn": 10000,
}  # fmt: skip

CHIPS: Mapping[str, Chip] = {
    row.name: row
    for row in (
        _tpu(
            "v2",
            devices=2,
            peak=_tpu_peaks(46),
            gib=16,
            gb_per_s=700,
            most=_OWN_CORES,
            links=_ici(4, 62, (16, 16), wraps=16),
            between=350,  # through the memory, of which a core has half the bandwidth
            power=Power(maximum=280),
        ),
        _tpu(
            "v3",
            devices=2,
            peak=_tpu_peaks(123),
            gib=32,
            gb_per_s=900,
            most=_OWN_CORES,
            # 656 Gb/s; the pod's published all-reduce of 340 TB/s is 83 GB/s a link.
            links=_ici(4, 82, (32, 32), wraps=32),
            between=450,  # as on v2
            power=Power(123, 220, 262),
        ),
        _tpu(
            "v4",
            devices=1,
            peak=_tpu_peaks(275, int8=275),
            gib=32,
            gb_per_s=1200,
            links=_ici(6, 50, (16, 16, 16), wraps=4),
            dcn=6.25,
            host=16,
            power=Power(90, 170, 192),
        ),
        _tpu(
            "v5e",
            devices=1,
            peak=_tpu_peaks(197, int8=394),
            gib=16,
            gb_per_s=819,
            most=0.92,  # a side of 16384 by the TPU compiler's estimate (libtpu 0.0.42)
            links=_ici(4, 50, (16, 16), wraps=16),
            dcn=3.125,
            host=16,
        ),
        _tpu(
            "v5p",
            devices=1,
            peak=_tpu_peaks(459, int8=918, float8=459),
            gib=95,
            gb_per_s=2765,
            links=_ici(6, 100, (16, 20, 28), wraps=4),
            dcn=6.25,
            host=16,
        ),
        _tpu(
            "v6e",
            devices=1,
            peak=_tpu_peaks(918, int8=1836),
            gib=32,
            gb_per_s=1640,
            tile=256,
            most=0.90,  # 827 of 918 TFLOP/s at a side of 8192 (tpu-recipes, microbenchmarks)
            links=_ici(4, 100, (16, 16), wraps=16),
            dcn=12.5,
            host=32,
        ),
        _tpu(
            "v7",
            devices=2,
            peak=_tpu_peaks(2307, float8=4614),
            gib=192,
            gb_per_s=7380,
            tile=256,
            most=0.829,  # as measured, above
            links=_ici(6, 100, (16, 24, 24), wraps=4),
            between=600,  # the link between its two dies is six times one between chips
            dcn=12.5,
        ),
        # most: the best that a search over shapes reached, 271 of 312 TFLOP/s on A100, 794.5 of
        # 989 on H100, "H200 is the same", 1745 of 2250 on B200, 1822 of 2500 on GB200
        # (stas00/ml-engineering, compute/accelerator). None is known for V100: taken as A100's.
        # The last number is FP32 of the data sheets, beside which `peak` has TF32.
        #                        most   GiB  GB/s  NVLinks                NIC  host  W
        _gpu("v100", _V100,      0.87,   32,  900, _nvlink(6, 20, 16),   12.5,  16,  300),
        _gpu("a100-40gb", _A100, 0.87,   40, 1555, _nvlink(12, 20, 8),     25,  32,  400, 19.5),
        _gpu("a100-80gb", _A100, 0.87,   80, 2039, _nvlink(12, 20, 8),     25,  32,  400, 19.5),
        _gpu("h100", _H100,      0.803,  80, 3350, _nvlink(18, 20.6, 8),   50,  64,  700, 66.9),
        _gpu("h200", _H100,      0.803, 141, 4800, _nvlink(18, 20.6, 8),   50,  64,  700, 66.9),
        _gpu("b200", _B200,      0.776, 180, 8000, _nvlink(18, 40.1, 8),   50,  64, 1000, 75),
        _gpu("gb200", _GB200,    0.729, 186, 8000, _nvlink(18, 40.1, 72),  50, 450, 1200, 80),
    )
}  # fmt: skip
