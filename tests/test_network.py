"""The time of collectives: the published formulas, and the links themselves, block by block."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_simulation import simulated

from gspmd.errors import MeshError
from gspmd.meshes import Level, Placement, Topology, chip, make_mesh, seconds, topology
from gspmd.meshes.network import KINDS
from gspmd.sharding import Mesh

GB = 1e9


RING = Level("x", 4, "ring", 45 * GB, 1e-6)
# A slice of a v4 that no one can book: its smallest with rings has 64 chips.
RINGS = Topology("4x4 rings", chip("tpu-v4"), (RING, dataclasses.replace(RING, name="y")))


def bare(name: str) -> Topology:
    """The topology whose collectives begin at once."""
    it = RINGS if name == RINGS.name else topology(name)
    return dataclasses.replace(it, chip=dataclasses.replace(it.chip, start=0.0))


def placed(name: str, *sizes: int) -> Placement:
    """A mesh of axes a, b, ... where JAX would put it."""
    it = bare(name)
    return make_mesh(dict(zip("abcd", sizes or (it.devices,), strict=False)), it)


# One axis over all of the topology, GB/s that a device can send, seconds of 1 GB a device.
# n = 8: a line of v5e, 45 GB/s a link; n = 16: a ring of it.
FORMULAS = [
    ("tpu-v5e:16x1", "all_gather", 15 / (2 * 45)),
    ("tpu-v5e:16x1", "reduce_scatter", 15 / 16 / (2 * 45)),
    ("tpu-v5e:16x1", "all_reduce", 2 * 15 / 16 / (2 * 45)),
    ("tpu-v5e:16x1", "all_to_all", 16 / (8 * 45)),
    ("tpu-v5e:16x1", "collective_permute", 1 / 45),
    ("tpu-v5e:8x1", "all_gather", 7 / 45),
    ("tpu-v5e:8x1", "reduce_scatter", 7 / 8 / 45),
    ("tpu-v5e:8x1", "all_reduce", 2 * 7 / 8 / 45),
    ("tpu-v5e:8x1", "all_to_all", 8 / (4 * 45)),
    ("tpu-v5e:8x1", "collective_permute", 1 / 45),
    # Three dims of a torus at once, in both directions: six links of 45 GB/s.
    ("tpu-v4:4x4x4", "all_gather", 63 / (6 * 45)),
    ("tpu-v4:4x4x4", "all_reduce", 2 * 63 / 64 / (6 * 45)),
    ("tpu-v4:4x4x8", "all_to_all", 8 / (8 * 45)),  # the longest dim decides
    # Two lines at once: the corner has one link in each.
    ("tpu-v5e:4x4", "reduce_scatter", 15 / 16 / (2 * 45)),
    ("h100:8", "all_gather", 7 / 370.8),
    ("h100:8", "reduce_scatter", 7 / 8 / 370.8),
    ("h100:8", "all_to_all", 7 / 8 / 370.8),
    ("h100:8", "collective_permute", 1 / 370.8),
    # A node of 8 has eight network cards of 48 GB/s; an all-to-all needs each for its own.
    ("h100:8x32", "reduce_scatter", 31 / 32 / (8 * 48)),
    ("h100:8x4", "all_to_all", 24 / 32 / 48),
    ("tpu-v5e:16x16 x4 slices", "all_to_all", 3 / 4 / 3.125),
    ("tpu-v5e:4x4 x4 slices", "all_reduce", 2 * 3 / 4 / (16 * 3.125)),
    # Both cores of a chip share its links, and what both gather goes over them once.
    ("tpu-v3:16x16", "reduce_scatter", 255 / 256 / (2 * 73.8)),
]


@pytest.mark.parametrize(("name", "kind", "expected"), FORMULAS)
def test_published_formulas(name: str, kind: str, expected: float) -> None:
    it = placed(name)
    assert seconds(kind, GB, ("a",), it).bandwidth == pytest.approx(expected)


def test_what_was_measured() -> None:
    """TPU7x, 2x2: 178.8 GB/s into a chip (tpu-recipes); v5e, 4 chips in a line: 560 us before
    overheads (scaling book)."""
    v7 = seconds("all_gather", 403e6 / 8, ("a",), placed("tpu-v7:2x2x1")).bandwidth
    assert 403e6 * 3 / 4 / v7 == pytest.approx(178.8 * GB, rel=0.01)
    v5e = seconds("all_gather", 34e6 / 4, ("a",), placed("tpu-v5e:4x1")).bandwidth
    assert v5e == pytest.approx(560e-6, rel=0.02)


# Latency alone: hops of 1 us on a TPU, steps of 0.6 us over NVLink and 2.7 us over the network.
LATENCIES = [
    ("tpu-v5e:16x1", "all_gather", 8),
    ("tpu-v5e:8x1", "all_gather", 7),
    ("tpu-v4:4x4x8", "reduce_scatter", 2 + 2 + 4),
    ("tpu-v4:4x4x8", "all_reduce", 2 * 8),
    ("tpu-v4:4x4x8", "all_to_all", 8),
    ("tpu-v5e:16x1", "collective_permute", 1),
    ("tpu-v5e:8x1", "collective_permute", 7),
    ("h100:8", "all_gather", 3 * 0.6),
    ("h100:8", "all_to_all", 0.6),
    ("h100:8x4", "all_reduce", 2 * (2 * 2.7 + 3 * 0.6)),
    ("h100:8x4x2", "all_gather", 2 * 2.7 + 2 * 2.7 + 3 * 0.6),
    ("tpu-v5e:16x16 x4 slices", "all_to_all", 16),
]


@pytest.mark.parametrize(("name", "kind", "microseconds"), LATENCIES)
def test_latencies(name: str, kind: str, microseconds: float) -> None:
    assert seconds(kind, 0, ("a",), placed(name)).latency == pytest.approx(microseconds * 1e-6)


def test_a_collective_takes_its_start() -> None:
    it = make_mesh({"a": 8}, topology("h100:8"))
    assert seconds("all_gather", 0, ("a",), it).total == pytest.approx(6.6e-6 + 3 * 0.6e-6)


def test_groups_that_overlap_share_the_links() -> None:
    """On a ring of 16: four neighbours on a line of their own, or every fourth all around."""
    it = placed("tpu-v5e:16x1", 4, 4)
    assert str(it) == "tpu-v5e:16x1\n  a=4: 4 of x / 4\n  b=4: 4 of x"
    neighbours = seconds("all_gather", GB, ("b",), it).bandwidth
    apart = seconds("all_gather", GB, ("a",), it).bandwidth
    assert neighbours == pytest.approx(3 / 45)
    assert apart == pytest.approx(3 / (2 * 45 / 4))


# A topology, the sizes of a mesh on it, the axes of a collective: rings, lines, several dims at
# once, groups that share links, cores, switches, fat trees, slices; up to 32 devices.
NETWORKS = [
    ("tpu-v5e:16x1", (16,), ("a",)),
    ("tpu-v5e:16x1", (4, 4), ("a",)),
    ("tpu-v5e:16x1", (4, 4), ("b",)),
    ("tpu-v5e:8x1", (8,), ("a",)),
    ("tpu-v5e:1x5", (5,), ("a",)),
    ("tpu-v5e:8x2", (4, 4), ("a",)),
    ("tpu-v5e:4x4", (16,), ("a",)),
    ("4x4 rings", (16,), ("a",)),
    ("4x4 rings", (4, 4), ("b",)),
    ("tpu-v3:2x2", (8,), ("a",)),
    ("tpu-v3:2x4", (4, 4), ("a",)),
    ("tpu-v3:2x4", (4, 4), ("b",)),
    ("tpu-v7:2x2x1", (8,), ("a",)),
    ("h100:8", (8,), ("a",)),
    ("h100:4x4", (16,), ("a",)),
    ("h100:4x4", (8, 2), ("a",)),
    ("h100:4x4", (2, 8), ("b",)),
    ("h100:2x2x4", (16,), ("a",)),
    ("h100:2x2x4", (8, 2), ("a",)),
    ("tpu-v5e:4x2 x2 slices", (16,), ("a",)),
    ("tpu-v5e:4x2 x2 slices", (4, 4), ("a",)),
]
# Bytes as a multiple of those that take as long as the hops.
LATENCY_BOUND, BANDWIDTH_BOUND, BOTH = 0.001, 1000.0, 1.0


def agree(
    kind: str,
    times: float,
    axes: Sequence[str],
    it: Placement,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> None:
    """The formulas and the links say the same, within 5 %."""
    one = seconds(kind, 1.0, tuple(axes), it, pairs)
    bytes = times * one.latency / one.bandwidth
    # The last piece of a block is behind the first by what the pieces take on a link: the more
    # links there are on the way, the more pieces it takes until that is little.
    pieces = 128 if kind == "collective_permute" else 48 if it.topology.levels[-1].hosts else 24
    pieces = 1 if times == LATENCY_BOUND else pieces
    happened = simulated(kind, bytes, axes, it, pairs, pieces)
    assert seconds(kind, bytes, tuple(axes), it, pairs).total == pytest.approx(happened, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "sizes", "axes"), NETWORKS)
def test_hops_as_the_links_have_them(
    name: str, sizes: tuple[int, ...], axes: tuple[str, ...], kind: str
) -> None:
    agree(kind, LATENCY_BOUND, axes, placed(name, *sizes))


@pytest.mark.parametrize("kind", ["all_gather", "all_to_all", "collective_permute"])
@pytest.mark.parametrize(("name", "sizes", "axes"), NETWORKS)
def test_bytes_as_the_links_have_them(
    name: str, sizes: tuple[int, ...], axes: tuple[str, ...], kind: str
) -> None:
    agree(kind, BANDWIDTH_BOUND, axes, placed(name, *sizes))


@pytest.mark.parametrize("kind", ["reduce_scatter", "all_reduce"])
@pytest.mark.parametrize(
    ("name", "sizes", "axes"),
    [row if i % 4 == 0 else pytest.param(*row, marks=pytest.mark.exhaustive)
     for i, row in enumerate(NETWORKS)],
)  # fmt: skip
def test_sums_as_the_links_have_them(
    name: str, sizes: tuple[int, ...], axes: tuple[str, ...], kind: str
) -> None:
    agree(kind, BANDWIDTH_BOUND, axes, placed(name, *sizes))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize(
    ("name", "sizes", "axes"), [row for row in NETWORKS if row[0] != "h100:2x2x4"]
)
def test_bytes_and_hops_as_the_links_have_them(
    name: str, sizes: tuple[int, ...], axes: tuple[str, ...], kind: str
) -> None:
    agree(kind, BOTH, axes, placed(name, *sizes))


PERMUTED = [
    ("tpu-v5e:16x1", (4, 4)),
    ("tpu-v5e:8x2", (16,)),
    ("4x4 rings", (4, 4)),
    ("tpu-v3:2x4", (4, 4)),
    ("h100:2x2x4", (8, 2)),
    ("tpu-v5e:4x2 x2 slices", (16,)),
]


@pytest.mark.parametrize("times", [LATENCY_BOUND, BANDWIDTH_BOUND])
@pytest.mark.parametrize(("name", "sizes"), PERMUTED)
def test_permutations_as_the_links_have_them(
    name: str, sizes: tuple[int, ...], times: float
) -> None:
    it = placed(name, *sizes)
    n = sizes[0]
    draw = random.Random(n)
    for pairs in (
        [(i, i + 1) for i in range(n - 1)],
        [(i, (i + n // 2) % n) for i in range(n)],
        list(zip(range(n), draw.sample(range(n), n), strict=True)),
        [(0, n - 1)],
    ):
        agree("collective_permute", times, ("a",), it, pairs)


@given(
    st.sampled_from(KINDS),
    st.sampled_from([("tpu-v4:4x4x8", (8, 16)), ("h100:8x8", (4, 16)), ("tpu-v3:8x8", (16, 8))]),
    st.floats(1, 1e12),
)
def test_laws(kind: str, where: tuple[str, tuple[int, ...]], bytes: float) -> None:
    it = placed(where[0], *where[1])
    time = seconds(kind, bytes, ("a", "b"), it)
    longer = max(time.bandwidth, time.latency)
    assert longer * (1 - 1e-9) <= time.total <= (time.bandwidth + time.latency) * (1 + 1e-9)
    assert seconds(kind, 2 * bytes, ("a", "b"), it).total >= time.total
    assert seconds(kind, 2 * bytes, ("a", "b"), it).bandwidth == pytest.approx(2 * time.bandwidth)
    if kind != "collective_permute":
        assert seconds(kind, bytes, ("b", "a"), it) == time
    # A sum everywhere is a scattered one, gathered.
    scattered = seconds("reduce_scatter", bytes, ("a",), it).total
    gathered = seconds("all_gather", bytes / where[1][0], ("a",), it).total
    whole = seconds("all_reduce", bytes, ("a",), it).total
    assert scattered + gathered == pytest.approx(whole)


def test_an_axis_of_one_device_costs_nothing() -> None:
    it = placed("h100:8", 1, 8)
    for kind in KINDS:
        assert seconds(kind, GB, ("a",), it).total == 0
        assert seconds(kind, GB, ("a", "b"), it) == seconds(kind, GB, ("b",), it)


def test_blocks_that_stay_cost_nothing() -> None:
    it = placed("h100:8")
    assert seconds("collective_permute", GB, ("a",), it, [(0, 0), (3, 3)]).bandwidth == 0


def test_unknown_names() -> None:
    it = placed("h100:8")
    with pytest.raises(MeshError) as error:
        seconds("all_gathr", GB, ("a",), it)
    assert str(error.value) == (
        "'all_gathr' is no collective; did you mean 'all_gather'? There are all_gather, "
        "reduce_scatter, all_reduce, all_to_all, collective_permute."
    )
    with pytest.raises(MeshError, match="the mesh a=8 has no axis 'b'"):
        seconds("all_gather", GB, ("b",), it)


@pytest.mark.parametrize("pair", [(0, 99), (0, -1)])
def test_pairs_that_are_not_along_the_axes(pair: tuple[int, int]) -> None:
    with pytest.raises(MeshError) as error:
        seconds("collective_permute", GB, ("a",), placed("h100:8"), [(0, 1), pair])
    assert str(error.value) == (
        f"the pair {pair} of a collective_permute names a device that is not along a, which has 8; "
        "number them from 0 to 7."
    )


@pytest.mark.parametrize("bytes", [-1.0, float("nan"), float("inf")])
def test_bytes_that_are_no_number_of_bytes(bytes: float) -> None:
    with pytest.raises(MeshError) as error:
        seconds("all_gather", bytes, ("a",), placed("h100:8"))
    assert str(error.value) == (
        f"all_gather of {bytes} bytes a device; give a number that is at least 0."
    )


def test_sub_axes_of_a_mesh() -> None:
    it = placed("h100:8x4")
    cut = it.refined(Mesh((("a", 32),)).refine("a", 4))
    assert seconds("all_gather", GB, ("a:0",), cut).bandwidth == pytest.approx(3 / 48)
    assert seconds("all_gather", GB, ("a:1",), cut).bandwidth == pytest.approx(7 / 370.8)
