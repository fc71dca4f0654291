"""The devices of a mesh: those of this process, or of a topology that need not exist."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import Mesh as DeviceMesh

from gspmd.errors import MeshError
from gspmd.sharding import Mesh


def devices_mesh(mesh: Mesh) -> DeviceMesh:
    """A mesh of this process' devices, in the order that `jax.make_mesh` prefers.

    Raises:
      MeshError: there are too few.
    """
    devices = jax.devices()
    if len(devices) < mesh.devices:
        raise MeshError(
            f"mesh {show_mesh(dict(mesh.axes))} needs {mesh.devices} devices, this process has "
            f"{len(devices)}; use plan.simulate, or set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={mesh.devices} before jax starts."
        )
    return _arrange(mesh, devices[: mesh.devices])


def topology_mesh(mesh: Mesh, topology: Any) -> DeviceMesh:
    """A mesh of the devices of `topology`.

    That is a jax mesh, a description from `jax.experimental.topologies`, or the name of TPUs, such
    as "tpu-v3:16x32".

    Raises:
      MeshError: its devices, or its axes, are not those of `mesh`; the TPU compiler does not know
        it, or is not installed.
    """
    if isinstance(topology, str):
        topology = _described(topology)
    if not isinstance(topology, DeviceMesh):
        if not hasattr(topology, "devices"):
            raise MeshError(
                f"the topology to compile for is {topology!r} of type {type(topology).__name__}; "
                "give a jax.sharding.Mesh, what jax.experimental.topologies describes, or the name "
                'of TPUs, such as "tpu-v5e:2x4".'
            )
        if len(topology.devices) != mesh.devices:
            raise MeshError(
                f"mesh {show_mesh(dict(mesh.axes))} has {mesh.devices} devices, the topology has "
                f"{len(topology.devices)}; take one of that size."
            )
        return _arrange(mesh, topology.devices)
    if tuple(topology.shape.items()) != mesh.axes:
        raise MeshError(
            f"the plan is for mesh {show_mesh(dict(mesh.axes))}, and is to be compiled for mesh "
            f"{show_mesh(topology.shape)}; plan for that mesh instead."
        )
    return topology


# What the TPU compiler calls a generation, where that is not as in our topologies' names; and what
# it must be told: the two cores of a v4 chip run as one device ("megacore"), as on the real ones.
_CALLED = {"v7": "tpu7x"}
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


def _arrange(mesh: Mesh, devices: Sequence[Any]) -> DeviceMesh:
    sizes = tuple(size for _, size in mesh.axes)
    kinds = (AxisType.Auto,) * len(sizes)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        # `jax.make_mesh` is for one slice. Slice by slice, the major axes are those that cross.
        rows = np.array(sorted(devices, key=lambda device: (device.slice_index, device.id)))
        return DeviceMesh(rows.reshape(sizes), mesh.names, axis_types=kinds)
    return jax.make_mesh(sizes, mesh.names, kinds, devices=devices)


def _described(name: str) -> Any:
    """What the TPU compiler knows of the TPUs called `name`; none of them is needed."""
    if importlib.util.find_spec("libtpu") is None:
        raise MeshError(
            f"topology={name!r}: to compile for TPUs takes their compiler, which is not installed; "
            "pip install 'gspmd[tpu]' has it, and needs no TPU."
        )
    from jax.experimental import topologies  # it is slow to import, and seldom used

    short, _, slices = name.strip().removeprefix("tpu-").partition(" x")
    generation, _, shape = short.partition(":")
    options: dict[str, Any] = dict(_OPTIONS.get(generation, {}))
    if slices.endswith(" slices") and slices.removesuffix(" slices").isdecimal():
        options["num_slices"] = int(slices.removesuffix(" slices"))
    called = f"{_CALLED.get(generation, generation)}:{shape}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=called, **options)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).strip().partition("\n")[0]
        if not said.startswith("INVALID_ARGUMENT"):
            raise MeshError(
                f"topology={name!r}: the TPU compiler does not start ({said}); where another "
                "process holds it, set ALLOW_MULTIPLE_LIBTPU_LOAD=1 in both."
            ) from error
        raise MeshError(
            f"topology={name!r}: the TPU compiler does not know it ({said}); write a generation "
            'and its chips, such as "tpu-v3:16x32" or "tpu-v4:8x8x16".'
        ) from error


def show_mesh(shape: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in shape.items())
