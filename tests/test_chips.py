"""What is published of chips, per chip and per JAX device."""

import itertools

import numpy as np
import pytest

from gspmd.errors import MeshError
from gspmd.meshes import CHIPS, chip

TERA, GIGA, GIB = 1e12, 1e9, 2.0**30

# name, JAX devices, FLOP/s in bf16 (f16 on V100), GiB, GB/s, links, nominal GB/s of a link each way
PUBLISHED = (
    ("tpu-v2", 2, 46, 16, 700, 4, 62),
    ("tpu-v3", 2, 123, 32, 900, 4, 82),
    ("tpu-v4", 1, 275, 32, 1200, 6, 50),
    ("tpu-v5e", 1, 197, 16, 819, 4, 50),
    ("tpu-v5p", 1, 459, 95, 2765, 6, 100),
    ("tpu-v6e", 1, 918, 32, 1640, 4, 100),
    ("tpu-v7", 2, 2307, 192, 7380, 6, 100),
    ("v100", 1, 125, 32, 900, 6, 25),
    ("a100-40gb", 1, 312, 40, 1555, 12, 25),
    ("a100-80gb", 1, 312, 80, 2039, 12, 25),
    ("h100", 1, 989.4, 80, 3350, 18, 25),
    ("h200", 1, 989.4, 141, 4800, 18, 25),
    ("b200", 1, 2250, 180, 8000, 18, 50),
    ("gb200", 1, 2500, 186, 8000, 18, 50),
)


def test_every_chip_is_published() -> None:
    assert set(CHIPS) == {name for name, *_ in PUBLISHED}


@pytest.mark.parametrize(("name", "devices", "flops", "gib", "rate", "count", "nominal"), PUBLISHED)
def test_numbers(
    name: str, devices: int, flops: float, gib: float, rate: float, count: int, nominal: float
) -> None:
    this = chip(name)
    dtype = "float16" if name == "v100" else "bfloat16"
    assert this.devices == devices
    assert this.peak_flops(dtype) * devices == pytest.approx(flops * TERA)
    assert this.memory == gib * GIB
    assert this.device_memory == gib * GIB / devices
    assert this.bandwidth == rate * GIGA
    assert this.device_bandwidth == rate * GIGA / devices
    assert this.links.count == count
    assert 0.79 <= this.links.bandwidth / (nominal * GIGA) <= 0.91  # what is usable of it


def test_a_core_of_tpu_v3_is_a_device() -> None:
    """The peak that the GSPMD paper counts with."""
    assert chip("tpu-v3").peak_flops("bfloat16") == 61.5 * TERA


def test_products_of_f32_take_one_pass_of_bf16_on_a_tpu() -> None:
    assert chip("tpu-v4").peak_flops(np.dtype("float32")) == 275 * TERA
    assert chip("h100").peak_flops(np.dtype("float32")) == 494.7 * TERA  # TF32


def test_power() -> None:
    power = chip("tpu-v3").power
    assert (power.idle, power.mean, power.maximum) == (123, 220, 262)
    assert chip("tpu-v5e").power.mean is None


def test_a100_is_the_one_of_80_gb() -> None:
    assert chip("a100") == chip("a100-80gb")


@pytest.mark.parametrize("name", CHIPS)
def test_chips_are_sound(name: str) -> None:
    this = chip(name)
    assert hash(this) == hash(CHIPS[name])
    sides, shares = zip(*this.efficiency, strict=True)
    assert all(a < b for a, b in itertools.pairwise(sides))
    assert all(0 < a < b <= 1 for a, b in itertools.pairwise(shares))
    assert 0 < this.memory_efficiency < 1
    assert 0 < this.launch < 1e-5
    assert (this.between is None) == (this.devices == 1)
    power = [x for x in (this.power.idle, this.power.mean, this.power.maximum) if x is not None]
    assert power == sorted(power)


def test_the_curve_of_the_chip_that_was_measured() -> None:
    """TPU7x: 350 of 1153.5 TFLOP/s in a product of side 1024, 956 in one of 32768."""
    curve = dict(chip("tpu-v7").efficiency)
    assert curve[1024] == pytest.approx(350 / 1153.5, rel=0.01)
    assert max(curve.values()) == pytest.approx(956 / 1153.5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu-v5", "'tpu-v5' is not a chip; did you mean 'tpu-v5p'? There are tpu-v2, "),
        ("H100", "'H100' is not a chip; did you mean 'h100'? There are tpu-v2, "),
        ("A100", "'A100' is not a chip; did you mean 'a100'? "),
        ("B200", "'B200' is not a chip; did you mean 'b200'? "),
        ("TPU-V4", "'TPU-V4' is not a chip; did you mean 'tpu-v4'? "),
        ("v4", "'v4' is not a chip; did you mean 'tpu-v4'? "),
        ("v8", "'v8' is not a chip. There are tpu-v2, "),
        ("", "'' is not a chip. There are tpu-v2, "),
    ],
)
def test_unknown_chips(name: str, message: str) -> None:
    with pytest.raises(MeshError) as error:
        chip(name)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("gb200, cpu.")


@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        ("float64", "or take v100."),
        ("int32", "as no chip here has one for it."),
        ("complex64", "as no chip here has one for it."),
    ],
)
def test_a_chip_without_a_peak_for_the_dtype(dtype: str, way_out: str) -> None:
    with pytest.raises(MeshError) as error:
        chip("tpu-v3").peak_flops(np.dtype(dtype))
    assert str(error.value) == (
        f"tpu-v3 has no published peak for {dtype}: it has one for bfloat16, float32; compute the "
        f"product in one of these, {way_out}"
    )


def test_the_core_of_this_machine_is_measured_once() -> None:
    core = chip("cpu")
    assert chip("cpu") is core
    assert (core.platform, core.devices, core.tile) == ("cpu", 1, 1)
    # What any machine of this century can do, and none.
    assert 1e8 < core.peak_flops("float32") < 1e13
    assert 1e7 < core.bandwidth < 1e12
    assert 1e8 < core.memory < 1e14
    assert 0 < core.launch < 1e-2
    shares = [share for _, share in core.efficiency]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] == 1
    with pytest.raises(MeshError, match="cpu has no published peak for int8"):
        core.peak_flops("int8")
