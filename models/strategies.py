"""Strategies: tables that give each role of a dim the mesh axes that split it.

A model annotates roles ("batch", "mlp"). A strategy is a table from roles to "data", "model" or
"expert", written beside the model; `rules_for` fits it to the axes that a mesh has.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast

from gspmd.errors import SpecError, nearest


class Layered(Protocol):
    """The sizes, a dataclass, of a model whose layers may be a pipeline."""

    @property
    def stages(self) -> int: ...
    @property
    def microbatches(self) -> int | None: ...


S = TypeVar("S", bound=Layered)

Axis = str | tuple[str, ...] | None

Rules = Mapping[str, Axis]
"""Logical name of a dim -> the mesh axes that split it, outermost first; None leaves it whole."""


def table(roles: Sequence[str], **axes: Axis) -> Rules:
    """A table of `roles`, whole where `axes` does not name them.

    A role with a prefix, such as "encoder_mlp", is split as the one without, if it is not named;
    "stage" by an axis of that name.

    Raises:
      SpecError: no such role.
    """
    if unknown := [role for role in axes if role not in roles]:
        raise SpecError(f"no role {unknown[0]!r}{nearest(unknown[0], roles)}")
    plain = {role: axes.get(role.partition("_")[2]) for role in roles}
    stage = {"stage": "stage"} if "stage" in roles else {}
    return MappingProxyType({**plain, **stage, **axes})


def rules_for(
    tables: Mapping[str, Rules], strategy: str, mesh_axes: Sequence[str]
) -> dict[str, Axis]:
    """The table `tables[strategy]` for a mesh with these axes, outermost first.

    * Axes that the mesh lacks are dropped; "expert" is read as "data" where the mesh lacks it.
    * Every axis other than `model` splits what "data" splits of a role that ends in "batch"; that
      of the stages of a pipeline only what is outside of it, "outer_batch".
    * Weights are split by `data` and `expert`; or by an axis `fsdp`, where the mesh has one, in
      place of `data`, which then holds copies of them.
    * What splits "expert" splits no other dim of an expert: of the roles that begin with "expert_".

    Raises:
      SpecError: no such strategy, or an axis with all but the name of one that a table speaks of.
    """
    if strategy not in tables:
        raise SpecError(f"no strategy {strategy!r}: choose one of {', '.join(tables)}.")
    rules = tables[strategy]
    known = {"data", "fsdp", "expert", "model"}.union(*map(_axes, rules.values()))
    for axis in mesh_axes:
        near = difflib.get_close_matches(axis, known, n=1, cutoff=0.75)
        if near and near[0] not in mesh_axes:
            raise SpecError(
                f"mesh axis {axis!r} is none that strategy {strategy!r} speaks of, so that it "
                f"would split the batch alone; call it {near[0]!r} if you mean that, or otherwise."
            )
    weights = ("fsdp" if "fsdp" in mesh_axes else "data", "expert")
    stage = _axes(rules.get("stage"))

    def fit(role: str) -> tuple[str, ...]:
        found: list[str] = []
        for name in _axes(rules.get(role)):
            if role.endswith("batch") and name == "data":
                found += [a for a in mesh_axes if a not in ("model", *stage)]
                # Last, so that the stages' devices share what each split of the layers' batch has.
                found += stage if role == "outer_batch" else ()
            elif name == "expert" and name not in mesh_axes:
                found.append("data")
            else:
                found += weights if name == "data" else (name,)
        return tuple(a for a in dict.fromkeys(found) if a in mesh_axes)

    experts = fit("expert")
    fitted: dict[str, Axis] = {}
    for role in rules:
        axes = fit(role)
        if role.startswith("expert_"):
            axes = tuple(a for a in axes if a not in experts)
        single = len(axes) == 1 and not role.endswith("batch")
        fitted[role] = axes[0] if single else axes or None
    return fitted


def pipelined(
    sizes: S,
    rules: Rules,
    mesh: Mapping[str, int],
    batch_size: int,
    microbatches: int | None = None,
) -> S:
    """`sizes` with the stages into which a table puts the layers on a mesh of these axes and sizes.

    If `microbatches` does not say it, nor `sizes`, there are four for each stage; or fewer, so that
    each has as many of the batch's examples on all devices.
    """
    stages = _size(rules.get("stage"), mesh)
    if stages == 1:
        return sizes
    split = max(_size(rules.get(role), mesh) for role in ("batch", "encoder_batch"))
    most = (n for n in range(4 * stages, 1, -1) if batch_size % (n * split) == 0)
    count = microbatches or sizes.microbatches or next(most, min(stages, batch_size))
    return dataclasses.replace(cast(Any, sizes), stages=stages, microbatches=count)


def _size(axis: Axis, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[name] for name in _axes(axis))


def _axes(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()
