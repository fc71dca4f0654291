"""Hypothesis strategies: meshes, specs, and whole programs with a way to partition them.

Hypothesis is an extra (`pip install 'gspmd[test]'`), imported when a strategy is asked for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jax.sharding import PartitionSpec as P

from gspmd.errors import GspmdError
from gspmd.specs import AnyMesh, read_mesh
from gspmd.testing.program import DrawnProgram

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def meshes(max_devices: int = 16, max_axes: int = 4) -> "SearchStrategy[dict[str, int]]":
    """A strategy for meshes of 1 to `max_axes` (at most 4) axes of sizes 1 to 4.

    They come as `gspmd.plan` takes them, `{"x": 2, "y": 3}`, and have `max_devices` at most. The
    first axis has more than one device, if it may: of a mesh without, there is little to say.

    Raises:
      GspmdError: hypothesis is not installed, or a limit is out of range.
    """
    if not _are_ints((max_devices, max_axes), 1) or max_axes > 4:
        raise GspmdError(
            f"meshes(max_devices={max_devices}, max_axes={max_axes}): a mesh has 1 to 4 axes, and "
            "1 device or more."
        )
    return _composites("meshes").meshes(max_devices, max_axes)


def specs(shape: Sequence[int], mesh: AnyMesh, open_dims: bool = True) -> "SearchStrategy[P]":
    """A strategy for PartitionSpecs of an array of `shape`, with one entry for each dim.

    An entry is None, an axis, several axes, or, with `open_dims`, `P.UNCONSTRAINED`. No axis is
    used twice. Axes need not divide their dim, which may even be smaller than they are.

    Raises:
      GspmdError: hypothesis is not installed, or `shape` is none.
      MeshError: `mesh` is none.
    """
    axes = dict(read_mesh(mesh)[0].axes)
    if not isinstance(shape, (tuple, list)) or not _are_ints(shape, 0):
        raise GspmdError(f"specs({shape!r}, ...): a shape is a tuple of sizes, such as (8, 16).")
    return _composites("specs").specs(tuple(shape), axes, open_dims)


def programs(
    steps: int = 12,
    smooth: bool = False,
    annotated: bool = True,
    mesh: "SearchStrategy[dict[str, int]] | AnyMesh | None" = None,
) -> "SearchStrategy[DrawnProgram]":
    """A strategy for JAX programs of up to `steps` steps, with arguments, a mesh and specs.

    A step is a line or a small loop: pointwise ops, contractions, reductions, sorts, cumulative
    sums, convolutions and pooling, reshapes, slices, pads, joins, gathers, scatters, FFTs,
    factorizations, random numbers, `scan`, `while`, `cond`, `checkpoint`, in float32, bfloat16,
    float16, complex64, integers and booleans. All that is sensitive to rounding is done to small
    whole numbers only, so that programs may be compared within a tolerance.

    Args:
      steps: the most steps; a step is one to a dozen ops.
      smooth: only programs with a reverse-mode derivative.
      annotated: whether intermediate values are annotated, here and there.
      mesh: the mesh, or a strategy for it; `meshes()` if None.

    Raises:
      GspmdError: hypothesis is not installed, or there is to be no step.
      MeshError: `mesh` is none.
    """
    composites = _composites("programs")
    if not _are_ints((steps,), 1):
        raise GspmdError(f"programs(steps={steps!r}): a program has 1 step or more.")
    drawn = meshes() if mesh is None else mesh
    if not composites.is_strategy(drawn):
        drawn = dict(read_mesh(cast("AnyMesh", drawn))[0].axes)
    return composites.programs(steps, smooth, annotated, drawn)


def _are_ints(numbers: Sequence[Any], least: int) -> bool:
    return all(isinstance(n, (int, np.integer)) and n >= least for n in numbers)


def _composites(asked: str) -> Any:
    try:
        from gspmd.testing import composites
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "hypothesis":
            raise
        raise GspmdError(
            f"gspmd.testing.{asked} draws with hypothesis, which is not installed; "
            "pip install 'gspmd[test]', or hypothesis alone."
        ) from error
    return composites
