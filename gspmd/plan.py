"""Plan: everything that compilation produced, to print, explain, simulate, run and compile."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import networkx as nx
import numpy as np
from jax import tree_util
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd import explain, run
from gspmd.call import match_call
from gspmd.collectives import axes_of, sent_by
from gspmd.compiled import Comparison, compare
from gspmd.devices import devices_mesh, topology_mesh
from gspmd.errors import GspmdError, nearest
from gspmd.findings import Finding
from gspmd.ir import COLLECTIVES, Op, Program, Value, bytes_of
from gspmd.printing import show
from gspmd.propagate import Propagated
from gspmd.sharding import (
    Axes,
    Mesh,
    merge_sub_axes,
    show_axes,
)
from gspmd.specs import to_spec
from gspmd.trace import Traced

if TYPE_CHECKING:
    from gspmd.meshes.chips import Chip
    from gspmd.meshes.placement import Placement
    from gspmd.meshes.topology import Topology
    from gspmd.report import Report


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a local program.

    `bytes` is the size of a device's operand, `wire_bytes` what it sends when the collective runs
    once; it runs `trips` times a call (below 0: in each turn of a loop without a bound). `source`
    is the user's line, `phase` the part of a training step; `why` tells which shardings met there,
    and whose they are.
    """

    number: int
    kind: str
    axes: Axes
    bytes: float
    wire_bytes: float
    trips: int
    source: str
    phase: str
    type: str
    why: str

    def __str__(self) -> str:
        times = "unbounded" if self.trips < 0 else f"{self.trips} x"
        return (
            f"#{self.number} {self.kind}[{show_axes(self.axes)}] {self.type}: "
            f"{times} {self.wire_bytes:,.0f} B, {self.phase}, {self.source}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A partitioned program with the way it came about.

    `program` is the local program, `model` the global one it came from, both on `mesh`, which is
    the user's mesh with an axis cut into sub-axes where a reshape asked for it. `seconds` says how
    long each pass took.
    """

    program: Program
    model: Program
    mesh: Mesh
    user_mesh: Mesh
    devices: jax.sharding.Mesh | None
    propagated: Propagated
    findings: tuple[Finding, ...]
    traced: Traced
    name: str
    statics: tuple[tuple[int, Any], ...]
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        return f"# {self.name} on {self.user_mesh}\n{show(self.program)}"

    def __repr__(self) -> str:
        return f"<Plan of {self.name} on {self.user_mesh}: {len(self.collectives)} collectives>"

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives in program order, loop bodies included."""
        return tuple(
            self._collective(i, op, trips)
            for i, (op, trips) in enumerate(self._collective_ops, start=1)
        )

    @functools.cached_property
    def _collective_ops(self) -> tuple[tuple[Op, int], ...]:
        return tuple((op, n) for op, n in self.program.walk() if op.name in COLLECTIVES)

    def _collective(self, number: int, op: Op, trips: int) -> Collective:
        return Collective(
            number=number,
            kind=op.name,
            axes=axes_of(op),
            bytes=bytes_of(op.ins),
            wire_bytes=sent_by(op, self.mesh),
            trips=trips,
            source=str(op.source) if op.source else "(boundary)",
            phase="boundary" if op.source is None else op.source.phase,
            type=", ".join(x.type for x in op.outs),
            why=explain.why_collective(op, self._context),
        )

    @functools.cached_property
    def _context(self) -> explain.Context:
        return explain.Context.of(self.model, self.propagated)

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in one call.

        An upper bound where there are branches, which all count; an unbounded loop counts once.
        """
        return sum(c.wire_bytes * abs(c.trips) for c in self.collectives)

    @property
    def in_specs(self) -> Any:
        """Pytree of PartitionSpec, like the arguments."""
        args, kwargs = tree_util.tree_unflatten(self.traced.in_tree, self.flat_specs[0])
        return (args, kwargs) if kwargs else args

    @property
    def out_specs(self) -> Any:
        """Pytree of PartitionSpec, like the results."""
        return tree_util.tree_unflatten(self.traced.out_tree, self.flat_specs[1])

    @property
    def flat_specs(self) -> tuple[tuple[P, ...], tuple[P, ...]]:
        """The specs of the flat inputs and of the flat outputs."""
        sides = (self.model.ins, [x for x in self.model.outs if isinstance(x, Value)])
        shardings = self.propagated.shardings
        ins, outs = (tuple(to_spec(shardings[v].dims, self.mesh) for v in side) for side in sides)
        return ins, outs

    @property
    def flat_shardings(self) -> tuple[tuple[NamedSharding, ...], tuple[NamedSharding, ...]]:
        """The flat specs with the mesh, so that no rule can give their names another meaning."""
        mesh = AbstractMesh(tuple(size for _, size in self.user_mesh.axes), self.user_mesh.names)
        ins, outs = (tuple(NamedSharding(mesh, p) for p in side) for side in self.flat_specs)
        return ins, outs

    def why(self, x: int | str) -> str:
        """Why a collective exists, or why a value is split as it is.

        Args:
          x: a collective's number as printed, a "file:line", or a pytree path ("params/mlp/wi").
        """
        if isinstance(x, (int, np.integer)):
            if not 1 <= x <= len(self.collectives):
                raise GspmdError(
                    f"there is no collective #{x}: this plan has {len(self.collectives)}, numbered "
                    "from 1 as print(plan) shows them."
                )
            one = self.collectives[x - 1]
            return f"{one}\n{one.why}"
        if isinstance(x, str) and re.search(r":\d+$", x):  # pyright: ignore[reportUnnecessaryIsInstance]
            ops = (op for op, _ in self._collective_ops)
            here = [
                c
                for c, op in zip(self.collectives, ops, strict=True)
                if any(_same_line(str(part.source), x) for part in op.parts or (op,))
            ]
            if here:
                return "\n\n".join(f"{c}\n{c.why}" for c in here)
            values = self._at_line(x)
            if not values:
                raise GspmdError(
                    f"no op of this plan comes from {x!r}; print(plan) lists the lines."
                )
            return "\n".join(explain.why_value(v, self._context) for v in values)
        return explain.why_value(self._find(x), self._context)

    def sharding(self, name: str) -> P:
        """The spec of an input or output (pytree path), a `checkpoint_name`, or a "file:line"."""
        value = self._find(name)
        return P(*(_entry(axes) for axes in self.propagated.shardings[value].dims))

    def _at_line(self, line: str) -> list[Value]:
        return [
            out
            for op, _ in self.model.walk()
            if op.source is not None and _same_line(str(op.source), line)
            for out in op.outs
        ]

    def _find(self, name: str) -> Value:
        named = self._context.named
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GspmdError(
                f"{name!r} of type {type(name).__name__} names nothing in a plan: write a pytree "
                'path such as "params/wi", a "file:line", or, for why, a collective\'s number.'
            )
        if name in named:
            return named[name]
        at_line = self._at_line(name) if re.search(r":\d+$", name) else []
        if at_line:
            return at_line[-1]
        raise GspmdError(
            f"this plan has no value named {name!r}{nearest(name, named)} Names are pytree paths "
            "of arguments and results, names given by checkpoint_name, and file:line."
        )

    def graph(self) -> "nx.DiGraph[str]":
        """The model as a graph: ops and values, with shardings and collectives as attributes."""
        return explain.graph(self._context, [op for op, _ in self._collective_ops])

    def simulate(self, *args: Any, **kwargs: Any) -> Any:
        """The global outputs, computed on one device that plays all devices of the mesh."""
        outs = self._simulator(*self.flatten(args, kwargs))
        return tree_util.tree_unflatten(self.traced.out_tree, outs)

    @functools.cached_property
    def _simulator(self) -> Callable[..., list[jax.Array]]:
        return run.simulator(self.program, self.mesh)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, computed on the mesh's devices; arrays sharded as `out_specs` says."""
        outs = self.executable(*self.flatten(args, kwargs))
        return tree_util.tree_unflatten(self.traced.out_tree, outs)

    @functools.cached_property
    def executable(self) -> "run.Executable":
        """Flat arguments to flat results on the mesh's devices; compiled on the first call."""
        devices = self.devices if self.devices is not None else devices_mesh(self.user_mesh)
        return run.compile_program(self.program, devices, self.mesh, donate=self.traced.donated)

    def compile(
        self, topology: Any = None, compiler_options: Mapping[str, Any] | None = None
    ) -> jax.stages.Compiled:
        """The program compiled ahead of time, for the mesh's devices or those of `topology`.

        `topology` is a `jax.sharding.Mesh`, a description from `jax.experimental.topologies`, or
        the name of TPUs, such as "tpu-v3:16x32", which takes the extra `tpu` and no TPU.

        Raises:
          MeshError: the topology is unknown, or its devices are not as many as the mesh has.
        """
        if topology is None:
            return self.executable.compile(compiler_options)
        devices = topology_mesh(self.user_mesh, topology)
        target = run.compile_program(self.program, devices, self.mesh, donate=self.traced.donated)
        return target.compile(compiler_options)

    def compare(self, compiled: jax.stages.Compiled) -> Comparison:
        """What a compiler made of the plan: collectives kept, added and removed, and its memory.

        Args:
          compiled: what `compile` returned, for any topology.
        """
        return compare(self.program, self.mesh, compiled)

    def report(
        self,
        chip: "Chip | str",
        topology: "Topology | Placement | str | None" = None,
        *,
        asynchronous: Sequence[str] | None = None,
        trips: int | None = None,
    ) -> "Report":
        """What one call costs on `chip`: seconds, memory, FLOPs and the share of the peak reached.

        Args:
          chip: one of `gspmd.meshes.CHIPS`, or its name: "tpu-v4", "h100".
          topology: how the chips are linked: "tpu-v4:8x8x16", "h100:8x32", a `Topology`, or a
            `Placement` from `gspmd.meshes.make_mesh`, which says where each axis lies. Without a
            placement, that which suits this plan's collectives best. None takes the smallest
            topology with enough devices.
          asynchronous: the collectives that run while a device computes; None: as XLA does for the
            chip's platform.
          trips: how often a loop without a bound runs.

        Raises:
          MeshError: chip or topology is unknown, the mesh does not fit, the chip has no peak for
            the program's dtype, or a loop has no bound.
        """
        from gspmd import performance  # and all known of hardware, which planning does without

        work = performance.Work(
            self.name, self.program, self.model, self.mesh, self.user_mesh, self.traced.donated
        )
        return performance.of(work, chip, topology, asynchronous, trips)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call's arguments, if they are of the plan's structure and types.

        Raises:
          ArgumentError: they do not.
        """
        return match_call(
            args,
            kwargs,
            name=self.name,
            parameters=self.traced.parameters,
            tree=self.traced.in_tree,
            values=self.model.ins,
            statics=self.statics,
        )


def _entry(axes: Axes) -> Any:
    merged = merge_sub_axes(axes)
    return None if not merged else merged[0] if len(merged) == 1 else merged


def _same_line(source: str, asked: str) -> bool:
    return source == asked or source.endswith("/" + asked) or asked.endswith("/" + source)
