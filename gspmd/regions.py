"""shard_map in a jaxpr: where its operands lie, and what its collectives are in our table."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from gspmd.errors import TraceError
from gspmd.ir import Source
from gspmd.rules.manual import axis_index, from_source
from gspmd.sharding import Axes, Mesh, show_axes


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A `shard_map`: its manual axes, and those that split each dim of operands and results."""

    axes: Axes
    ins: tuple[tuple[Axes, ...], ...]
    outs: tuple[tuple[Axes, ...], ...]


def region_of(eqn: Any, mesh: Mesh, source: Source | None) -> Region:
    """What a `shard_map` equation says of the mesh.

    Raises:
      TraceError: its mesh is not `mesh`.
    """
    theirs = Mesh(tuple(eqn.params["mesh"].shape.items()))
    where = f" at {source}" if source else ""
    if theirs != mesh:
        raise TraceError(
            f"the shard_map{where} is written for the mesh {theirs}, and the plan is for {mesh}; "
            "give both the same axes and sizes, or call it outside of the planned function."
        )

    def dims(specs: Sequence[Any], variables: Sequence[Any]) -> tuple[tuple[Axes, ...], ...]:
        return tuple(
            _dims(spec, len(v.aval.shape)) for spec, v in zip(specs, variables, strict=True)
        )

    manual = eqn.params["newly_manual_axes"]
    return Region(
        tuple(axis for axis in mesh.names if axis in manual),
        dims(eqn.params["in_specs"], eqn.invars),
        dims(eqn.params["out_specs"], eqn.outvars),
    )


def _dims(spec: Any, rank: int) -> tuple[Axes, ...]:
    entries = [_axes(entry) for entry in spec]
    return (*entries, *((),) * (rank - len(entries)))


def _axes(entry: Any) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@dataclasses.dataclass(frozen=True, slots=True)
class Spelled:
    """A collective of JAX in the words of our table, with what reshapes its operand and result."""

    name: str
    params: dict[str, Any]
    call: Callable[..., Any] | None = None  # of what is no collective
    before: Callable[[Any], Any] | None = None
    after: Callable[[Any], Any] | None = None


_NOTHING_TO_DO = frozenset({"pvary", "pcast", "reduced_vary_cast_p"})  # they change types alone


def is_manual(name: str) -> bool:
    """Whether the primitive called `name` exists in manual regions only."""
    return name in _SPELLINGS or name in _NOTHING_TO_DO or name in _UNKNOWN


def spell(eqn: Any, mesh: Mesh, source: Source | None) -> tuple[Spelled, ...]:
    """The steps that one operand of a JAX collective goes through; none if it does not move.

    Raises:
      TraceError: the table has nothing like it.
    """
    name, params = eqn.primitive.name, eqn.params
    where = f" at {source}" if source else ""
    if name in _NOTHING_TO_DO:
        return ()
    if name in _UNKNOWN:
        raise TraceError(
            f"{name}{where} is in a shard_map, whose collectives this library runs itself, and it "
            "has none like it; call the shard_map outside of the planned function."
        )
    if params.get("axis_index_groups") is not None:
        raise TraceError(
            f"{name}{where} is over groups of devices (axis_index_groups), which are no axis of "
            "the mesh; make them one: a mesh axis of their size, and reduce over that."
        )
    axes = _axes(params["axes"] if "axes" in params else params["axis_name"])
    if not all(isinstance(axis, str) for axis in axes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TraceError(f"{name}{where} is over {axes}, and an axis is named by a string.")
    if name == "ppermute":  # it numbers the devices in the order of the mesh, whatever is written
        axes = tuple(axis for axis in mesh.names if axis in axes)
        _check_pairs(params["perm"], axes, mesh.size(axes), where)
    return _SPELLINGS[name](axes, params) if axes else ()


def _reduced(reduction: str) -> Callable[[Axes, Mapping[str, Any]], tuple[Spelled, ...]]:
    return lambda axes, params: (Spelled("all_reduce", {"axes": axes, "reduction": reduction}),)


def _all_gather(axes: Axes, params: Mapping[str, Any]) -> tuple[Spelled, ...]:
    dim = params["all_gather_dimension"]
    stacked = None if params["tiled"] else lambda x: lax.expand_dims(x, (dim,))
    return (Spelled("all_gather", {"axes": axes, "dim": dim}, before=stacked),)


def _reduce_scatter(axes: Axes, params: Mapping[str, Any]) -> tuple[Spelled, ...]:
    dim = params["scatter_dimension"]
    taken = None if params["tiled"] else lambda x: lax.squeeze(x, (dim,))
    return (Spelled("reduce_scatter", {"axes": axes, "dim": dim, "reduction": "sum"}, after=taken),)


def _all_to_all(axes: Axes, params: Mapping[str, Any]) -> tuple[Spelled, ...]:
    # Whether tiled or not: what lax.all_to_all stacks, it reshapes before and after.
    split, concat = params["split_axis"], params["concat_axis"]
    return (Spelled("all_to_all", {"axes": axes, "split_dim": split, "concat_dim": concat}),)


def _check_pairs(pairs: Sequence[tuple[int, int]], axes: Axes, size: int, where: str) -> None:
    """Nothing, if each device of `size` sends at most once, and receives at most once."""
    for side, what in enumerate(("source", "destination")):
        seen: set[int] = set()
        for pair in pairs:
            if pair[side] in seen or not 0 <= pair[side] < size:
                problem = "there twice" if pair[side] in seen else "no device there"
                raise TraceError(
                    f"ppermute{where}: of the pair {tuple(map(int, pair))} the {what} {pair[side]} "
                    f"is {problem}, over {show_axes(axes)} of {size} devices; name each of 0 to "
                    f"{size - 1} at most once as a {what}."
                )
            seen.add(pair[side])


def _permute(axes: Axes, params: Mapping[str, Any]) -> tuple[Spelled, ...]:
    pairs = tuple((int(a), int(b)) for a, b in params["perm"])
    return (Spelled("collective_permute", {"axes": axes, "pairs": pairs}),)


def _broadcast(axes: Axes, params: Mapping[str, Any]) -> tuple[Spelled, ...]:
    return (
        Spelled("from_source", {"axes": axes, "source": params["source"]}, from_source),
        Spelled("all_reduce", {"axes": axes, "reduction": "sum"}),
    )


def _index(axes: Axes, params: Mapping[str, Any]) -> tuple[Spelled, ...]:
    return (Spelled("axis_index", {"axes": axes}, axis_index),)


_SPELLINGS: dict[str, Callable[[Axes, Mapping[str, Any]], tuple[Spelled, ...]]] = {
    "psum": _reduced("sum"),
    "psum_invariant": _reduced("sum"),
    "pmax": _reduced("max"),
    "pmin": _reduced("min"),
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "ppermute": _permute,
    "pbroadcast": _broadcast,
    "axis_index": _index,
}
_UNKNOWN = frozenset(
    {
        "ragged_all_to_all", "psend", "precv", "all_gather_reduced", "unreduced_reduce_scatter",
        "unreduced_psum", "preduced", "vary_unreduced_cast_p",
    }
    | {
        f"{name}_{half}"
        for name in ("psum", "psum_invariant", "unreduced_psum", "all_gather", "all_gather_reduced",
                     "reduce_scatter", "unreduced_reduce_scatter", "all_to_all", "pbroadcast",
                     "ppermute")
        for half in ("start", "done")
    }
)  # fmt: skip
