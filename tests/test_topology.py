"""Topologies by name: their levels, their graphs, and names that mean nothing."""

import dataclasses

import networkx as nx
import pytest

from gspmd.errors import MeshError
from gspmd.meshes import Level, Topology, chip, smallest, topology


def shapes(name: str) -> dict[str, tuple[int, str]]:
    return {level.name: (level.size, level.shape) for level in topology(name).levels}


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("tpu-v4:8x8x16", {"x": (8, "ring"), "y": (8, "ring"), "z": (16, "ring")}),
        ("tpu-v4:4x4x4", {"x": (4, "ring"), "y": (4, "ring"), "z": (4, "ring")}),
        # The wraparound is between cubes of 4x4x4.
        ("tpu-v4:2x2x4", {"x": (2, "line"), "y": (2, "line"), "z": (4, "line")}),
        ("tpu-v5p:4x4x2", {"x": (4, "line"), "y": (4, "line"), "z": (2, "line")}),
        ("tpu-v5e:8x16", {"x": (8, "line"), "y": (16, "ring")}),
        ("tpu-v6e:16x16", {"x": (16, "ring"), "y": (16, "ring")}),
        ("tpu-v2:16x16", {"core": (2, "switch"), "x": (16, "ring"), "y": (16, "ring")}),
        ("tpu-v3:16x16", {"core": (2, "switch"), "x": (16, "line"), "y": (16, "line")}),
        ("tpu-v3:16x32", {"core": (2, "switch"), "x": (16, "line"), "y": (32, "ring")}),
        (
            "tpu-v5e:16x16 x4 slices",
            {"x": (16, "ring"), "y": (16, "ring"), "slices": (4, "switch")},
        ),
        ("h100:8x256", {"nvlink": (8, "switch"), "network": (256, "switch")}),
        (
            "h100:8x32x8",
            {"nvlink": (8, "switch"), "network": (32, "switch"), "spine": (8, "spine")},
        ),
        ("gb200:72", {"nvlink": (72, "switch")}),
        ("h100", {"nvlink": (1, "switch")}),
        ("tpu-v4", {"x": (1, "line"), "y": (1, "line"), "z": (1, "line")}),
    ],
)
def test_levels(name: str, levels: dict[str, tuple[int, str]]) -> None:
    assert shapes(name) == levels


@pytest.mark.parametrize(
    ("name", "devices", "chips"),
    [
        ("tpu-v3:32x32", 2048, 1024),
        ("tpu-v4:12x16x16", 3072, 3072),
        ("tpu-v7:4x4x4", 128, 64),
        ("tpu-v5e:16x16 x32 slices", 8192, 8192),
        ("h100:8x256", 2048, 2048),
    ],
)
def test_sizes(name: str, devices: int, chips: int) -> None:
    it = topology(name)
    assert (it.devices, it.chips) == (devices, chips)


def test_bandwidths_are_of_one_device() -> None:
    """Two cores of a TPU v3 share the links of their chip; a GPU has a network card of its own."""
    v3 = {level.name: level.bandwidth for level in topology("tpu-v3:32x32").levels}
    assert v3["x"] == chip("tpu-v3").links.bandwidth / 2
    gpu = {level.name: level.bandwidth for level in topology("h100:8x256").levels}
    assert gpu["nvlink"] == pytest.approx(370.8e9)
    assert gpu["network"] == pytest.approx(48e9)


@pytest.mark.parametrize("name", ["tpu-v4:4x4x8", "tpu-v5e:8x16", "tpu-v5e:4x4", "tpu-v3:32x32"])
def test_the_graph_of_a_torus(name: str) -> None:
    it = topology(name)
    dims = [level for level in it.levels if level.torus]
    torus = [nx.cycle_graph(x.size) if x.shape == "ring" else nx.path_graph(x.size) for x in dims]
    expected = torus[0]
    for other in torus[1:]:
        expected = nx.cartesian_product(other, expected)
    graph = it.graph()
    graph.remove_edges_from([*nx.selfloop_edges(graph)])
    # networkx numbers the nodes by their coordinates, we in the order of the devices, x fastest.
    expected = nx.convert_node_labels_to_integers(expected)
    assert {frozenset(edge) for edge in graph.edges} == {frozenset(edge) for edge in expected.edges}
    assert {x["bandwidth"] for *_, x in graph.edges(data=True)} == {it.chip.links.bandwidth}
    assert all(graph.degree(n) <= it.chip.links.count for n in graph)


def test_the_cores_of_a_chip_exchange_over_an_edge_to_itself() -> None:
    graph = topology("tpu-v3:2x2").graph()
    assert nx.number_of_selfloops(graph) == 4
    assert graph.edges[0, 0] == {"level": "core", "bandwidth": 900e9, "latency": 1e-6}


def test_the_graph_of_a_fat_tree() -> None:
    graph = topology("h100:8x4x3").graph()
    kinds = [node if isinstance(node, int) else node[0] for node in graph]
    assert sum(isinstance(kind, int) for kind in kinds) == 96
    assert [kinds.count(name) for name in ("nvlink", "network", "spine")] == [12, 3, 1]
    assert graph.edges[8, ("nvlink", 1)]["bandwidth"] == pytest.approx(370.8e9)
    assert graph.edges[95, ("network", 2)]["bandwidth"] == pytest.approx(48e9)
    # A leaf switch of 32 GPUs has as much towards the spine as towards them.
    assert graph.edges[("network", 1), ("spine", 0)]["bandwidth"] == pytest.approx(32 * 48e9)
    up_and_down = nx.shortest_path_length(graph, 0, 95, weight=lambda a, b, x: x["latency"])
    assert up_and_down == pytest.approx(2 * 2.7e-6)


def test_slices_are_joined_by_their_hosts() -> None:
    graph = topology("tpu-v5e:16x16 x4 slices").graph()
    assert graph.degree(("slices", 0)) == 1024
    assert graph.edges[1023, ("slices", 0)]["bandwidth"] == 3.125e9


def test_thousands_of_chips() -> None:
    graph = topology("tpu-v5p:16x20x28").graph()
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (8960, 3 * 8960)


def test_a_topology_is_a_value() -> None:
    one, other = topology("h100:8x2"), topology("h100:8x2")
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "mine"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("chip_name", "devices", "name"),
    [
        ("tpu-v3", 2048, "tpu-v3:32x32"),
        ("tpu-v3", 1024, "tpu-v3:16x32"),
        ("tpu-v3", 512, "tpu-v3:16x16"),
        ("tpu-v4", 2048, "tpu-v4:8x16x16"),
        ("tpu-v4", 192, "tpu-v4:4x4x12"),
        ("tpu-v4", 64, "tpu-v4:4x4x4"),
        ("tpu-v4", 4, "tpu-v4:2x2x1"),
        ("tpu-v4", 6144, "tpu-v4:12x16x16 x2 slices"),
        ("tpu-v5e", 1024, "tpu-v5e:16x16 x4 slices"),
        ("tpu-v7", 128, "tpu-v7:4x4x4"),
        ("h100", 2048, "h100:8x256"),
        ("h100", 12, "h100:6x2"),
        ("h100", 8, "h100:8"),
        ("gb200", 144, "gb200:72x2"),
    ],
)
def test_the_smallest_topology(chip_name: str, devices: int, name: str) -> None:
    it = smallest(chip(chip_name), devices)
    assert it.name == name
    assert it.devices == devices
    assert smallest(chip_name, devices) == it
    own = dataclasses.replace(it.chip, name="mine")  # a chip that no table knows
    assert smallest(own, devices) == Topology(name.replace(chip_name, "mine"), own, it.levels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu-v8:4x4", "'tpu-v8' is not a chip; did you mean 'tpu-v7'? There are tpu-v2, "),
        ("tpu-v4:4x4", "has 2 dims, but tpu-v4 chips form a torus of 3, of at most 16x16x16."),
        ("tpu-v5e:16x32", "is a slice of 16x32, 512 chips, but one of tpu-v5e is part of 16x16, "
         "256 chips; write 'tpu-v5e:16x16 x2 slices'."),
        ("tpu-v5e:1x256", "is a slice of 1x256, 256 chips, but one of tpu-v5e is part of 16x16, "
         "256 chips; write 'tpu-v5e:16x16'."),
        ("tpu-v3:32x64", "one of tpu-v3 is part of 32x32, 1024 chips; write 'tpu-v3:32x32'."),
        ("tpu-v4:16x16x32", "is a slice of 16x16x32, 8192 chips, but one of tpu-v4 is part of a "
         "cube of 4x4x4, or whole cubes, at most 4096 chips; write 'tpu-v4:16x16x16 x2 slices'."),
        ("tpu-v4:3x5x7", "is a slice of 3x5x7, 105 chips, but one of tpu-v4 is part of a cube of "
         "4x4x4, or whole cubes, at most 4096 chips; write 'tpu-v4:4x4x8'."),
        ("tpu-v4:8x8x17", "write 'tpu-v4:4x4x68'."),
        ("tpu-v4:1000x2x2", "write 'tpu-v4:12x12x28'."),
        ("tpu-v5p:4x8x6", "write 'tpu-v5p:4x4x12'."),
        ("tpu-v3:32x32 x2 slices", "no bandwidth between slices of tpu-v3 is published"),
        ("h100:16x2", "has 16 GPUs in a node, but NVLink joins at most 8 of h100; write "
         "'h100:8x4'."),
        ("h100:8x2 x2 slices", "GPUs have no slices"),
        ("h100:8x2x2x2", "at most three numbers: GPUs in a node, nodes at a leaf switch"),
        ("tpu-v4:0x4x4", "topology 'tpu-v4:0x4x4' has a dim of size 0; each must be at least 1."),
        ("tpu-v4 4x4x4", "'tpu-v4 4x4x4' is not a topology; write a chip and how many lie along"),
        ("tpu-v4:4,4,4", "is not a topology"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(MeshError) as error:
        topology(name)
    assert message in str(error.value)


def test_no_topology_of_half_a_chip() -> None:
    with pytest.raises(MeshError, match="3 devices are no whole number of tpu-v3 chips of 2; use"):
        smallest(chip("tpu-v3"), 3)


@pytest.mark.parametrize(
    ("chip_name", "devices", "message"),
    [
        ("h100", 11, "11 chips of h100 cannot be shared out evenly: a node is at most 8 chips; use "
         "12 devices, 'h100:6x2', or name the topology that you have."),
        ("h100", 26, "use 28 devices, 'h100:7x4', or"),
        ("tpu-v4", 17, "17 chips of tpu-v4 cannot be shared out evenly: a slice is part of a cube "
         "of 4x4x4, or whole cubes, at most 4096 chips; use 32 devices, 'tpu-v4:2x4x4', or "),
        ("tpu-v4", 9000, "use 9024 devices, 'tpu-v4:4x4x188 x3 slices', or"),
        ("tpu-v7", 34, "17 chips of tpu-v7 cannot be shared out evenly: a slice is part of a cube "
         "of 4x4x4, or whole cubes, at most 9216 chips; use 64 devices, 'tpu-v7:2x4x4', or"),
        ("tpu-v5e", 17, "a slice is part of 16x16, 256 chips; use 18 devices, 'tpu-v5e:3x6', or"),
    ],
)  # fmt: skip
def test_chips_that_cannot_be_shared_out(chip_name: str, devices: int, message: str) -> None:
    with pytest.raises(MeshError) as error:
        smallest(chip(chip_name), devices)
    assert message in str(error.value)


SWITCH = Level("nodes", 4, "switch", 1e9, 1e-6)
RING = Level("x", 4, "ring", 1e9, 1e-6)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((RING, RING), "the levels of mine must have distinct names, got ['x', 'x']."),
        ((SWITCH, RING), "level 'x' of mine is a ring of groups of 4 devices"),
        ((dataclasses.replace(SWITCH, shape="spine"),), "is a spine, which joins switches"),
        ((dataclasses.replace(RING, size=0),), "level 'x' of mine has size 0"),
        ((dataclasses.replace(RING, bandwidth=0.0),), "0.0 bytes/s; both must be positive."),
    ],
)
def test_levels_that_do_not_fit(levels: tuple[Level, ...], message: str) -> None:
    with pytest.raises(MeshError) as error:
        Topology("mine", chip("tpu-v4"), levels)
    assert message in str(error.value)


def test_a_topology_without_the_cores_of_its_chips() -> None:
    with pytest.raises(MeshError, match="tpu-v3 chips have 2 each; give it a level of 2 cores"):
        Topology("mine", chip("tpu-v3"), (dataclasses.replace(SWITCH, size=3),))
    with pytest.raises(MeshError, match="rings and lines join chips of 2"):
        Topology("mine", chip("tpu-v3"), (RING,))


def test_an_unknown_level() -> None:
    with pytest.raises(MeshError) as error:
        topology("h100:8x2").level("netwrk")
    assert str(error.value) == (
        "h100:8x2 has no level 'netwrk'; did you mean 'network'? It has nvlink, network."
    )
