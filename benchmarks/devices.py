"""The meshes that benchmarks compile for: CPU devices here, or a pod the TPU compiler knows of."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

TOPOLOGY = "v3:16x32"  # 1024 cores


def devices_mesh(platform: str, axes: Mapping[str, int]) -> Mesh:
    """The mesh of CPU devices, or of those of `TOPOLOGY`, which need not exist."""
    if platform == "cpu":
        devices: Sequence[Any] = jax.devices("cpu")
    else:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), kinds, devices=devices)
