"""What users write about shardings, read into our types: meshes, specs, rule tables, spec trees.

A spec is a `PartitionSpec` of mesh axes or logical names, a `NamedSharding`, or None (left open).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

import jax
import numpy as np
from jax import tree_util
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd.errors import MeshError, SpecError, nearest
from gspmd.sharding import Axes, Constraint, Mesh, root_axis

Spec = P | NamedSharding | None
Rules = Mapping[str, str | Sequence[str] | None]
AnyMesh = jax.sharding.Mesh | AbstractMesh | Mapping[str, int] | str

_MOST_DEVICES = 2**31 - 1
_EXAMPLE = 'write "data=256,model=8"'


def read_mesh(mesh: AnyMesh) -> tuple[Mesh, jax.sharding.Mesh | None]:
    """The logical mesh, and JAX's own where `mesh` has devices.

    `mesh` may be a `jax.sharding.Mesh`, an `AbstractMesh`, `{"data": 256}` or `"data=256,model=8"`.

    Raises:
      MeshError: none of these, or a bad name or size.
    """
    if isinstance(mesh, str):
        axes = _parse_mesh(mesh)
    elif isinstance(mesh, Mapping):
        axes = tuple(mesh.items())
    elif isinstance(mesh, (jax.sharding.Mesh, AbstractMesh)):  # pyright: ignore[reportUnnecessaryIsInstance]
        axes = tuple(mesh.shape.items())
    else:
        raise MeshError(
            "mesh must be a jax.sharding.Mesh, an AbstractMesh, a dict or a string, "
            f'got {mesh!r} of type {type(mesh).__name__}; {_EXAMPLE} or {{"data": 256}}.'
        )
    if not axes:
        raise MeshError(f"the mesh has no axes; {_EXAMPLE}.")
    devices = mesh if isinstance(mesh, jax.sharding.Mesh) else None
    logical = Mesh(tuple(_axis(*axis) for axis in axes))
    if logical.devices > _MOST_DEVICES:
        raise MeshError(
            f"mesh {logical} has {logical.devices} devices; JAX counts them in 32 bits, so that "
            f"{_MOST_DEVICES} are the most."
        )
    return logical, devices


def _axis(name: Any, size: Any) -> tuple[str, int]:
    if not isinstance(name, str) or not name or ":" in name:
        raise MeshError(
            f"mesh axis {name!r} is not a name: it must be a string without ':', which gspmd "
            "keeps for parts of an axis."
        )
    return name, int(size) if isinstance(size, np.integer) else size


def _parse_mesh(text: str) -> tuple[tuple[str, int], ...]:
    axes: list[tuple[str, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^\s=]+)\s*=\s*(-?\d+)\s*", part)
        if match is None:
            raise MeshError(f"mesh {text!r}: {part.strip()!r} is not NAME=SIZE; {_EXAMPLE}.")
        axes.append((match[1], int(match[2])))
    return tuple(axes)


def check_rules(rules: Rules | None, mesh: Mesh) -> dict[str, Axes]:
    """The rule table with a tuple of mesh axes for each logical name.

    Raises:
      SpecError: a rule names an axis that `mesh` lacks, or one axis twice.
    """
    if rules is None:
        return {}
    if not isinstance(rules, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(
            f"rules must map logical names to mesh axes, got {rules!r} of type "
            f'{type(rules).__name__}; write {{"batch": "data", "embed": None}}.'
        )
    return {name: _rule(name, target, mesh) for name, target in rules.items()}


def _rule(name: str, target: str | Sequence[str] | None, mesh: Mesh) -> Axes:
    if not isinstance(target, (str, tuple, list, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(
            f"rules[{name!r}] is {target!r} of type {type(target).__name__}; write a mesh axis, a "
            "tuple of them, or None for a dim that stays whole."
        )
    axes = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    for i, axis in enumerate(axes):
        if axis not in mesh.names:
            raise SpecError(
                f"rules[{name!r}] names mesh axis {axis!r}, but the mesh has {mesh}"
                f"{nearest(axis, mesh.names)}"
            )
        if axis in axes[:i]:
            raise SpecError(f"rules[{name!r}] names mesh axis {axis!r} twice; drop one.")
    return axes


def resolve(
    spec: Spec, rank: int, mesh: Mesh, rules: Rules | None = None, where: str = "spec"
) -> Constraint | None:
    """The mesh axes of each of `rank` dims: `()` where whole, None where open.

    Names are looked up in `rules` first, then among the mesh's axes. Dims past the end of `spec`
    are whole. A `spec` of None says nothing: None comes back. `where` is how an error names the
    tensor.

    Raises:
      SpecError: an unknown name, an axis used twice, or more entries than dims.
    """
    if spec is None:
        return None
    if isinstance(spec, NamedSharding):
        check_same_mesh(spec, mesh, where)
        spec, rules = spec.spec, None  # its names are axes already
    if spec.unreduced or spec.reduced:
        raise SpecError(
            f"{where}: {show_spec(spec)} speaks of sums that are owed, but a spec says how dims "
            "are split and no more; drop unreduced and reduced, gspmd finds out what is owed."
        )
    if len(spec) > rank:
        raise SpecError(
            f"{where}: {show_spec(spec)} has {len(spec)} entries, but the tensor has {rank} dims; "
            f"drop {len(spec) - rank}."
        )
    dims: list[Axes | None] = []
    users: dict[str, tuple[int, str]] = {}  # axis -> the dim that it splits, and its name there
    for dim, entry in enumerate(spec):
        if entry is P.UNCONSTRAINED:
            dims.append(None)
            continue
        axes: list[str] = []
        for name in _names(entry):
            for axis in _lookup(name, dim, spec, mesh, rules, where):
                if axis in users:
                    raise _used_twice(where, spec, axis, users[axis], (dim, name))
                users[axis] = dim, name
                axes.append(axis)
        dims.append(tuple(axes))
    return (*dims, *((),) * (rank - len(spec)))


def _names(entry: Any) -> tuple[Any, ...]:
    if entry is None:
        return ()
    return cast("tuple[Any, ...]", entry) if isinstance(entry, tuple) else (entry,)


def _lookup(name: Any, dim: int, spec: P, mesh: Mesh, rules: Rules | None, where: str) -> Axes:
    if rules is not None and name in rules:
        return _rule(name, rules[name], mesh)
    if name in mesh.names:
        return (name,)
    known = list(rules or ())
    logical = f"the rules know {', '.join(known)}" if known else "there are no rules"
    raise SpecError(
        f"{where}: dim {dim} of {show_spec(spec)} names {name!r}, which is no mesh axis and no "
        f"logical name: the mesh has {mesh}, {logical}{nearest(str(name), [*mesh.names, *known])}"
    )


def _used_twice(
    where: str, spec: P, axis: str, first: tuple[int, str], second: tuple[int, str]
) -> SpecError:
    def user(dim: int, name: str) -> str:
        return f"dim {dim}" if name == axis else f"dim {dim} (as {name!r})"

    if first[0] == second[0]:
        return SpecError(
            f"{where}: dim {first[0]} of {show_spec(spec)} names mesh axis {axis!r} twice; "
            "drop one."
        )
    return SpecError(
        f"{where}: {show_spec(spec)} splits {user(*first)} and {user(*second)} over the same mesh "
        f"axis {axis!r}; an axis can split one dim only, so drop it from one."
    )


def same_mesh(sharding: Any, mesh: Mesh) -> TypeGuard[NamedSharding]:
    """Whether `sharding` is a NamedSharding on a mesh with the axes and sizes of `mesh`."""
    return isinstance(sharding, NamedSharding) and dict(sharding.mesh.shape) == dict(mesh.axes)


def check_same_mesh(sharding: NamedSharding, mesh: Mesh, where: str) -> None:
    """Raises SpecError unless `sharding` is on a mesh with the axes and sizes of `mesh`."""
    if not same_mesh(sharding, mesh):
        other = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
        raise SpecError(
            f"{where}: the NamedSharding {show_spec(sharding.spec)} is on a mesh with "
            f"{other or 'no axes'}, but the program is planned for {mesh}; use one mesh, or a bare "
            "PartitionSpec."
        )


def spec_tree(
    specs: Any, tree: Any, what: str = "in_specs", names: Sequence[str] = ()
) -> list[Spec]:
    """One spec for each leaf of `tree`, in the order of `jax.tree.leaves`.

    `specs` is a pytree prefix of `tree` (a pytree, or the PyTreeDef of one): a spec, or a None,
    stands for all leaves below it. `names` are those of the first level, in messages.

    Raises:
      SpecError: `specs` is no prefix of `tree`, or a leaf of it is no spec.
    """
    if isinstance(tree, tree_util.PyTreeDef):
        tree = tree_util.tree_unflatten(tree, range(tree.num_leaves))
    return list(_broadcast(specs, tree, (), what, tuple(names)))


def _broadcast(
    specs: Any, tree: Any, path: tuple[str, ...], what: str, names: tuple[str, ...]
) -> Iterator[Spec]:
    if specs is None or isinstance(specs, (P, NamedSharding)):
        for _ in tree_util.tree_leaves(tree):
            yield specs
        return
    where = f"{what} for {'/'.join(path)!r}" if path else what
    given = _children(specs)
    if given is None:
        raise SpecError(
            f"{where}: expected a PartitionSpec, a NamedSharding or None, got {specs!r} of type "
            f"{type(specs).__name__}; write P('data')."
        )
    needed = _children(tree)
    if needed is None:
        raise SpecError(
            f"{where}: got a {type(specs).__name__} of {len(given)} specs, but there is one array "
            "here; give one PartitionSpec."
        )
    if list(given) != list(needed) and set(given) != set(needed):
        raise SpecError(_mismatch(where, specs, given, needed, names if not path else ()))
    for i, (key, child) in enumerate(needed.items()):
        name = names[i] if not path and i < len(names) else key
        yield from _broadcast(given[key], child, (*path, name), what, names)


def _children(node: Any) -> dict[str, Any] | None:
    """The children of a pytree node by name; None for a leaf."""
    # Not flatten_one_level_with_keys: in JAX 0.10 it gives all fields of a namedtuple one name.
    pairs, _ = tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if any(not path for path, _ in pairs):
        return None
    return {key_name(path[0]): child for path, child in pairs}


def _mismatch(
    where: str,
    specs: Any,
    given: Mapping[str, Any],
    needed: Mapping[str, Any],
    names: tuple[str, ...],
) -> str:
    kind = type(specs).__name__
    if names:
        return (
            f"{where} is a {kind} of {len(given)} specs, but there are {len(needed)} positional "
            f"arguments ({', '.join(names)}); give one spec tree each, as in jax.jit's "
            "in_shardings: (first, second)."
        )
    missing = [key for key in needed if key not in given]
    unknown = [key for key in given if key not in needed]
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    if unknown:
        parts.append(f"has {', '.join(unknown)}, which the arrays have not")
    return (
        f"{where}: the {kind} of {len(given)} specs {' and '.join(parts)}; {len(needed)} are "
        "needed, or one PartitionSpec or None for all of them."
    )


def key_name(key: Any) -> str:
    """One step of a pytree path as a bare word: `wi`, `0`."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def to_spec(dims: Sequence[Axes], mesh: Mesh) -> P:
    """The PartitionSpec of a sharding's `dims`, in the user's axes.

    Raises:
      ValueError: a dim is split over a part of a user's axis, which no PartitionSpec can say.
    """
    return P(*(_entry(axes, mesh) for axes in dims))


def entries_of(spec: P | NamedSharding) -> P:
    """What `spec` says of the dims, without its mesh."""
    return spec.spec if isinstance(spec, NamedSharding) else spec


def show_spec(spec: P) -> str:
    """`P('x', None, ('y', 'z'))`: what the user writes to get `spec`."""
    entries = [
        "P.UNCONSTRAINED" if entry is P.UNCONSTRAINED else repr(entry) for entry in spec.partitions
    ]
    owed = {"unreduced": spec.unreduced, "reduced": spec.reduced}
    entries += [f"{key}={{{str(sorted(axes))[1:-1]}}}" for key, axes in owed.items() if axes]
    return f"P({', '.join(entries)})"


def _entry(axes: Axes, mesh: Mesh) -> str | Axes | None:
    whole: list[str] = []
    while axes:
        root = root_axis(axes[0])
        parts = mesh.sub_axes(root)
        if axes[: len(parts)] != parts:
            raise ValueError(f"{axes[0]!r} is a part of mesh axis {root!r} and has no spec")
        whole.append(root)
        axes = axes[len(parts) :]
    return None if not whole else whole[0] if len(whole) == 1 else tuple(whole)
