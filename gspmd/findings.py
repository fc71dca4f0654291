"""Finding: what a user should know about a plan although nothing is wrong with its values."""

import dataclasses
import math
from collections.abc import Collection, Sequence

from gspmd.choose import Choice
from gspmd.ir import COLLECTIVES, Op, Program, Source
from gspmd.reshard import reshard_cost
from gspmd.rules.factor import RULES, FactorRule
from gspmd.sharding import Mesh, Sharding, itemsize, show_axes


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """`code` names the kind, `message` says it in a sentence, `bytes` is what each device sends."""

    code: str
    message: str
    source: Source | None = None
    bytes: float = 0.0

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def gathered(
    op: Op, rule: FactorRule, choice: Choice, have: Sequence[Collection[Sharding]], mesh: Mesh
) -> Finding | None:
    """The finding that `op` makes operands whole for want of a better strategy, if it does.

    `have[i]` are the shardings in which operand i exists before.
    """
    known = op.name in RULES
    if known and not rule.exchanged and "whole" not in rule.kinds:
        return None
    moved = 0.0
    axes: dict[str, None] = {}
    for x, dims, needs, versions in zip(op.ins, rule.ins, choice.ins, have, strict=True):
        able = [s for s in versions if set(needs.partial) <= set(s.partial)]
        lost = [
            axis
            for sharding in able
            for factors, held in zip(dims, sharding.dims, strict=True)
            for axis in held
            if axis not in needs.axes and any(_is_hard(rule, choice, f) for f in factors)
        ]
        if lost:
            axes.update(dict.fromkeys(lost))
            moved += min(reshard_cost(x.shape, x.dtype, mesh, s, needs) for s in able)
    if known and not moved:
        return None
    where = f" at {op.source}" if op.source else ""
    split = f" over {show_axes(tuple(axes))}" if axes else ""
    if known:
        code, why = "gathered", f"{op.name}{where} needs a dim whole that is split{split}"
    else:
        code, why = (
            "no-rule",
            f"{op.name}{where} has no factor rule, so it runs whole on every device"
            + (", with its side effect" if op.effects else ""),
        )
    return Finding(code, f"{why}: {moved:,.0f} bytes per device gathered", op.source, moved)


def _is_hard(rule: FactorRule, choice: Choice, factor: int) -> bool:
    """Whether a factor is whole for want of a better strategy."""
    if factor in rule.exchanged:
        return not choice.optional
    return rule.kinds[factor] == "whole" and factor not in rule.copied


GENERATORS = ("random_bits", "random_gamma", "random_split", "rng_bit_generator", "rng_uniform")


def generated_whole(
    op: Op, made: Sharding, wanted: Collection[Sharding], mesh: Mesh
) -> Finding | None:
    """The finding that devices draw random numbers of which each keeps a part, if they do.

    The numbers of `op` come out as `made`; `wanted` are the shardings that propagation gave them,
    and those of the operands.
    """
    if op.name not in GENERATORS:
        return None
    axes = dict.fromkeys(axis for sharding in wanted for axis in sharding.axes)
    lost = tuple(axis for axis in axes if axis not in made.axes)
    if not lost:
        return None
    out = op.outs[-1]
    drawn = math.prod(made.local_shape(out.shape, mesh)) * itemsize(out.dtype)
    kept = drawn / mesh.size(lost)
    where = f" at {op.source}" if op.source else ""
    message = (
        f"{op.name}{where} draws with {_generator(op)}, whose numbers come in one piece: over "
        f"{show_axes(lost)} each device draws {drawn:,.0f} bytes, {drawn - kept:,.0f} beyond its "
        "shard, and sends none"
    )
    return Finding("generated-whole", message, op.source)


def _generator(op: Op) -> str:
    """The random number generator of `op`, as JAX calls it."""
    names = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
    dtype = str(op.ins[0].dtype) if op.ins else ""
    return names.get(dtype, dtype if dtype.startswith("key<") else "XLA's own generator")


def unbounded(program: Program) -> tuple[Finding, ...]:
    """A finding for each collective of a local program in a loop whose trip count is unknown."""
    return tuple(
        Finding(
            "unbounded-loop",
            f"{op.name} at {op.source} runs in a loop without a trip count: its bytes count once",
            op.source,
        )
        for op, trips in program.walk()
        if trips < 0 and op.name in COLLECTIVES
    )


def unchecked(program: Program) -> tuple[Finding, ...]:
    """A finding for each primitive whose rule is a user's and cannot be tried.

    Raises:
      RuleError: it can, and is wrong.
    """
    found: dict[str, Finding] = {}
    for op, _ in program.walk():
        check = RULES[op.name].check if op.name in RULES else None
        if check is None or op.name in found or not (reason := check(op)):
            continue
        where = f" at {op.source}" if op.source else ""
        message = f"the rule of {op.name}{where} is taken on trust: it does not run here ({reason})"
        found[op.name] = Finding("unchecked-rule", message, op.source)
    return tuple(found.values())


PIPELINE = "gspmd.pipeline"
"""What begins the name that `gspmd.pipeline` gives its results; then come its numbers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline of a program: each stage works in `busy` of its loop's `ticks`."""

    stages: int
    microbatches: int
    ticks: int
    busy: int
    source: Source | None

    @property
    def bubble(self) -> float:
        """The share of its ticks in which a stage has nothing to work on."""
        return 1 - self.busy / self.ticks

    def runs(self, op: Op) -> bool:
        """Whether `op` is its loop, forward or backward."""
        return (
            op.name == "scan"
            and op.params["length"] == self.ticks
            and str(op.source) == str(self.source)
        )


def pipelines(program: Program) -> tuple[Pipeline, ...]:
    """The pipelines of a program, each once."""
    found: dict[tuple[str, str], Pipeline] = {}
    for op, _ in program.walk():
        name = str(op.params.get("name", "")) if op.name == "name" else ""
        if name.startswith(PIPELINE):
            stages, micro, ticks, busy = map(int, name.removeprefix(PIPELINE).split())
            found[name, str(op.source)] = Pipeline(stages, micro, ticks, busy, op.source)
    return tuple(found.values())


def short_pipelines(program: Program) -> tuple[Finding, ...]:
    """A finding for each pipeline that has fewer microbatches than stages."""
    return tuple(
        Finding(
            "pipeline-bubble",
            f"the pipeline at {p.source} has {p.microbatches} microbatches for {p.stages} stages: "
            f"each stage works in {p.busy} of {p.ticks} ticks, and {100 * p.bubble:.0f} % is "
            "bubble; cut the batch into more",
            p.source,
        )
        for p in pipelines(program)
        if p.microbatches < p.stages
    )
