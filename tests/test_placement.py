"""Where meshes lie: as JAX would have it, as one says by hand, and as suits the traffic best."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import mesh_utils

from gspmd.errors import MeshError
from gspmd.meshes import Part, Placement, Topology, Traffic, chip, make_mesh, seconds, topology
from gspmd.meshes.network import KINDS
from gspmd.sharding import Mesh

KINDS_OF_DEVICES = {
    "tpu-v2": "TPU v2",
    "tpu-v3": "TPU v3",
    "tpu-v4": "TPU v4",
    "tpu-v5e": "TPU v5 lite",
    "tpu-v5p": "TPU v5p",
    "tpu-v6e": "TPU v6 lite",
    "tpu-v7": "TPU7x",
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What `jax.experimental.mesh_utils` asks of a device."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int = 0
    process_index: int = 0


def devices_of(it: Topology) -> list[Device]:
    size = {level.name: level.size for level in it.levels}
    x, y, z, core, slices = (size.get(name, 1) for name in ("x", "y", "z", "core", "slices"))
    kind = KINDS_OF_DEVICES[it.chip.name]
    places = itertools.product(*map(range, (slices, z, y, x, core)))
    return [Device(i, "tpu", kind, (a, b, c), d, s) for i, (s, c, b, a, d) in enumerate(places)]


def numbers(devices: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda device: device.id)(devices)


def factored(size: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (size,)
        return
    for n in (n for n in range(1, size + 1) if size % n == 0):
        yield from ((n, *rest) for rest in factored(size // n, parts - 1))


def mesh_of(sizes: Sequence[int]) -> Mesh:
    return Mesh(tuple(zip("abcdef", sizes, strict=False)))


@pytest.mark.parametrize(
    "name",
    [
        "tpu-v4:4x4x4",
        "tpu-v4:4x4x8",
        "tpu-v5e:8x16",
        "tpu-v6e:4x8",
        "tpu-v5p:4x4x12",
        "tpu-v7:4x4x4",
        "tpu-v4:2x2x1",
        "tpu-v5e:4x8",
    ],
)
def test_without_traffic_a_mesh_lies_as_jax_places_it(name: str) -> None:
    it = topology(name)
    devices = devices_of(it)
    for sizes in itertools.chain(factored(it.devices, 2), factored(it.devices, 3)):
        expected = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        placed = make_mesh(mesh_of(sizes), it).device_array()
        assert (placed == numbers(expected)).all(), sizes


@pytest.mark.parametrize(
    "name",
    ["tpu-v2:4x4", "tpu-v3:4x4", "tpu-v5e:2x2", "tpu-v5e:4x4", "tpu-v5p:2x2x2", "tpu-v6e:2x4",
     "tpu-v7:2x2x4"],
)  # fmt: skip
def test_where_jax_places_otherwise(name: str) -> None:
    """The exceptions that `make_mesh` names."""
    it = topology(name)
    devices = devices_of(it)
    jaxs = numbers(mesh_utils.create_device_mesh((it.devices,), devices))
    ours = make_mesh({"a": it.devices}, it).device_array()
    assert sorted(jaxs) == sorted(ours)
    assert (jaxs != ours).any()
    listed = it.chip.name in ("tpu-v2", "tpu-v3")
    assert (jaxs == np.arange(it.devices)).all() == listed


@pytest.mark.parametrize(
    ("sizes", "inside", "outside"),
    [((64, 16), (16, 16), (4, 1)), ((4, 16, 16), (1, 16, 16), (4, 1, 1)),
     ((8, 8, 16), (2, 8, 16), (4, 1, 1)), ((2, 32, 16), (1, 16, 16), (2, 2, 1))],
)  # fmt: skip
def test_the_first_axes_go_over_slices(
    sizes: tuple[int, ...], inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    it = topology("tpu-v5e:16x16 x4 slices")
    expected = mesh_utils.create_hybrid_device_mesh(
        inside, outside, devices_of(it), allow_split_physical_axes=True
    )
    assert (make_mesh(mesh_of(sizes), it).device_array() == numbers(expected)).all()


def test_the_last_axes_go_over_nvlink() -> None:
    for sizes in ((256, 8), (64, 32), (2, 16, 64), (2048,), (4, 512)):
        placed = make_mesh(mesh_of(sizes), topology("h100:8x256"))
        assert (placed.device_array() == np.arange(2048).reshape(sizes)).all()


MEGATRON = (
    Traffic("all_reduce", 1e8, ("b",), 96),
    Traffic("reduce_scatter", 1e8, ("a",)),
    Traffic("all_gather", 1e6, ("a",)),
)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("tpu-v4:4x4x8", (8, 16)), ("tpu-v4:8x8x8", (8, 64)), ("tpu-v5e:16x16", (16, 16)),
     ("tpu-v5e:16x16 x4 slices", (64, 16)), ("h100:8x32", (32, 8))],
)  # fmt: skip
def test_where_jax_places_best_its_placement_is_kept(name: str, sizes: tuple[int, ...]) -> None:
    mesh, it = mesh_of(sizes), topology(name)
    assert make_mesh(mesh, it, MEGATRON) == make_mesh(mesh, it)


def test_heavy_traffic_stays_off_the_network() -> None:
    """Where JAX would give NVLink to the last axis, and the first one has the traffic."""
    it = topology("h100:8x256")
    heavy = [Traffic("all_reduce", 1e8, ("a",), 96), Traffic("all_gather", 1e6, ("b",))]
    placed = make_mesh(mesh_of((8, 256)), it, heavy)
    assert placed.parts == {"a": (Part("nvlink", 8),), "b": (Part("network", 256),)}
    assert placed.hosts(("a",)) == ()
    assert placed.hosts(("b",)) == ("network",)
    assert make_mesh(mesh_of((8, 256)), it).hosts(("a",)) == ("network",)


def total(traffic: Sequence[Traffic], placed: Placement) -> float:
    return sum(x.trips * seconds(x.kind, x.bytes, x.axes, placed).total for x in traffic)


def every_placement(mesh: Mesh, it: Topology) -> Iterator[Placement]:
    """All ways to cut the levels among the axes, in every order on each level."""

    def cuts(size: int, need: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not need:
            if size == 1:
                yield ()
            return
        for n in (n for n in range(1, size + 1) if size % n == 0 and need[0] % n == 0):
            yield from ((n, *rest) for rest in cuts(size // n, need[1:]))

    sizes = tuple(size for _, size in mesh.axes)
    orders = list(itertools.permutations(range(len(sizes))))
    for chosen in itertools.product(*(list(cuts(level.size, sizes)) for level in it.levels)):
        taken_by = zip(*chosen, strict=True)
        if any(math.prod(taken) != n for taken, n in zip(taken_by, sizes, strict=True)):
            continue
        for order in itertools.product(orders, repeat=len(it.levels)):
            parts: dict[str, list[Part]] = {axis: [] for axis in mesh.names}
            for level, taken, ranks in zip(it.levels, chosen, order, strict=True):
                stride = 1
                for a in ranks:
                    if taken[a] > 1:
                        parts[mesh.names[a]].append(Part(level.name, taken[a], stride))
                    stride *= taken[a]
            yield Placement(mesh, it, {axis: tuple(mine) for axis, mine in parts.items()})


@given(st.data())
def test_no_placement_is_quicker(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tpu-v4:4x4x4", "tpu-v3:4x4", "h100:8x4", "tpu-v5e:16x2"]))
    it = topology(name)
    mesh = mesh_of(data.draw(st.sampled_from([*factored(it.devices, 2)])))
    rows = st.builds(
        Traffic,
        st.sampled_from(KINDS[:4]),
        st.sampled_from([1e3, 1e6, 1e9]),
        st.sampled_from([("a",), ("b",), ("a", "b")]),
        st.integers(1, 9),
    )
    traffic = data.draw(st.lists(rows, min_size=1, max_size=4))
    found = total(traffic, make_mesh(mesh, it, traffic))
    least = min(total(traffic, placed) for placed in every_placement(mesh, it))
    assert found == pytest.approx(least, rel=1e-6)
    assert found <= total(traffic, make_mesh(mesh, it)) * (1 + 1e-9)


def test_by_hand() -> None:
    it = topology("tpu-v4:4x4x8")
    placed = make_mesh(
        {"data": 16, "model": 8}, it, parts={"data": ("x", Part("z", 4, 2)), "model": [
            "y", Part("z", 2)]}
    )  # fmt: skip
    assert str(placed) == (
        "tpu-v4:4x4x8\n  data=16: 4 of x x 4 of z / 2\n  model=8: 4 of y x 2 of z"
    )
    array = placed.device_array()
    assert array.shape == (16, 8)
    assert sorted(array.ravel()) == list(range(128))
    x, y, z = 1, 4, 16  # how far the neighbours in a dim are apart
    assert array[5, 3] == 1 * x + 1 * (2 * z) + 1 * y + 1 * z


@given(st.data())
def test_a_refined_mesh_has_the_same_devices(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tpu-v4:4x4x8", "tpu-v3:4x8", "h100:8x8", "h100:4x4x4"]))
    it = topology(name)
    placed = make_mesh(mesh_of(data.draw(st.sampled_from([*factored(it.devices, 2)]))), it)
    mesh = placed.mesh
    for _ in range(data.draw(st.integers(1, 3))):
        cuts = [(axis, k) for axis, n in mesh.axes for k in range(2, n) if n % k == 0]
        if cuts:
            mesh = mesh.refine(*data.draw(st.sampled_from(cuts)))
    refined = placed.refined(mesh)
    assert refined.mesh == mesh
    before, after = placed.device_array(), refined.device_array()
    assert (after.reshape(before.shape) == before).all()
    for axis in placed.mesh.names:
        for kind in KINDS[:4]:
            whole = seconds(kind, 1e8, (axis,), placed)
            cut = seconds(kind, 1e8, mesh.sub_axes(axis) or (axis,), refined)
            assert cut.total == pytest.approx(whole.total)


def test_the_mesh_of_this_process() -> None:
    it = topology("h100:4x2")
    devices = jax.devices()
    placed = make_mesh({"a": 2, "b": 4}, it)
    for given_order in (devices, devices[::-1]):
        mesh = placed.jax_mesh(given_order)
        assert mesh.axis_names == ("a", "b")
        assert (numbers(mesh.devices) == np.arange(8).reshape(2, 4)).all()


def test_the_devices_of_a_tpu_are_told_by_their_coordinates() -> None:
    it = topology("tpu-v7:4x4x4")
    placed = make_mesh({"a": 8, "b": 16}, it)
    shuffled = np.random.default_rng(0).permutation(np.array(devices_of(it), object))
    ordered = placed.arranged(list(shuffled))
    assert (numbers(ordered) == placed.device_array()).all()


@pytest.mark.parametrize(
    ("sizes", "parts", "message"),
    [
        (
            {"a": 8, "b": 8},
            None,
            "mesh a=8, b=8 has 64 devices, but topology h100:8x4 has 32 (32 chips of 1 device); "
            "give sizes whose product is 32.",
        ),
        ({"a": 8, "b": 4}, {"a": ("nvlnk",), "b": ("network",)}, "did you mean 'nvlink'?"),
        (
            {"a": 8, "b": 4},
            {"a": ("network",), "b": ("nvlink",)},
            "mesh axis 'a' has size 8, but its parts hold 4: 4 of network.",
        ),
        ({"a": 8, "b": 4}, {"a": ("nvlink",)}, "mesh axis 'b' has size 4, but its parts hold 1"),
        (
            {"a": 8, "b": 4},
            {"a": ("nvlink",), "b": ("network",), "c": ()},
            "parts are given for 'c', which is no axis of the mesh a=8, b=4.",
        ),
        (
            {"a": 8, "b": 4},
            {"a": (Part("nvlink", 8, 2),), "b": ("network",)},
            "mesh axis 'a' takes 8 units of level 'nvlink' with stride 2, but the parts below it "
            "hold 1 of its 8: give stride 1.",
        ),
        (
            {"a": 8, "b": 4},
            {"a": (Part("nvlink", 4), Part("nvlink", 2, 4)), "b": (Part("nvlink", 4, 8),)},
            "level 'nvlink' of h100:8x4 has 8 units, but the axes of the mesh take 32 of them.",
        ),
        (
            {"a": 8, "b": 4},
            {"a": (Part("nvlink", 4), Part("network", 2)), "b": (Part("network", 4, 2),)},
            "level 'nvlink' of h100:8x4 has 8 units, but the axes of the mesh take 4 of them.",
        ),
    ],
)
def test_meshes_that_do_not_fit(
    sizes: dict[str, int], parts: dict[str, tuple[Part | str, ...]] | None, message: str
) -> None:
    with pytest.raises(MeshError) as error:
        make_mesh(sizes, topology("h100:8x4"), parts=parts)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("shape", "where", "message"),
    [
        ({"x": 64.0}, "h100:8x8", "mesh axis 'x' has size 64.0; a size is an int of at least 1."),
        ({"x": "64"}, "h100:8x8", "mesh axis 'x' has size '64'; a size is an int of at least 1."),
        ("x=64", "h100:8x8", """with their sizes, such as {"data": 8}, got 'x=64' of type str."""),
        ({"x": 64}, 64, "such as 'h100:8x4', got 64 of type int."),
    ],
)
def test_what_is_no_mesh_or_topology(shape: Any, where: Any, message: str) -> None:
    with pytest.raises(MeshError) as error:
        make_mesh(shape, where)
    assert message in str(error.value)


def test_a_topology_by_its_name() -> None:
    name = "tpu-v4:4x4x4"
    assert make_mesh({"a": 16, "b": 4}, name) == make_mesh({"a": 16, "b": 4}, topology(name))


def test_a_sub_axis_across_levels_that_it_does_not_divide() -> None:
    placed = make_mesh({"a": 12}, topology("h100:4x3"))
    with pytest.raises(MeshError) as error:
        placed.refined(Mesh((("a", 12),)).refine("a", 2))
    assert str(error.value) == (
        "mesh axis 'a' lies as 3 of network x 4 of nvlink, of which its sub-axis 'a:0' of size 2 "
        "is no whole part; place it by hand, on levels that it divides."
    )


def test_too_few_devices() -> None:
    with pytest.raises(MeshError, match="h100:8x4 has 32 devices, but 8 are given"):
        make_mesh({"a": 32}, topology("h100:8x4")).jax_mesh(jax.devices())


def test_a_mesh_of_one_device() -> None:
    placed = make_mesh({"a": 1}, topology("h100"))
    assert placed.device_array().tolist() == [0]
    assert seconds("all_reduce", 1e9, ("a",), placed).total == 0
    assert chip("h100") == placed.topology.chip
