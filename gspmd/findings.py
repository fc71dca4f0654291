"""Finding: what a user should know about a plan although nothing is wrong with its values."""

import dataclasses
import math
from collections.abc import Collection, Sequence

from gspmd.choose import Choice
from gspmd.collectives import axes_of, sent_by
from gspmd.ir import COLLECTIVES, PADDING, PIPELINE, Op, Program, Source
from gspmd.reshard import reshard_cost
from gspmd.rules.factor import RULES, FactorRule
from gspmd.sharding import Axes, Mesh, Sharding, itemsize, root_axis, show_axes


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


@dataclasses.dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline of a program: each stage works in `busy` of its loop's `ticks`.

    `axes` are those of the user's mesh that split the stages.
    """

    stages: int
    microbatches: int
    ticks: int
    busy: int
    source: Source | None
    axes: Axes = ()

    @property
    def bubble(self) -> float:
        """The share of its ticks in which a stage has nothing to work on."""
        return 1 - self.busy / self.ticks

    def runs(self, op: Op) -> bool:
        """Whether `op` is its loop, forward or backward."""
        return (
            op.name == "scan"
            and op.params["length"] == self.ticks
            and op.source is not None
            and op.source.scope == PIPELINE
            and str(op.source) == str(self.source)
        )


def pipelines(program: Program) -> tuple[Pipeline, ...]:
    """The pipelines of a global program, each once."""
    found: list[Pipeline] = []
    for source, (stages, micro, ticks, busy) in _named(program, PIPELINE):
        pipeline = Pipeline(stages, micro, ticks, busy, source)
        found.append(dataclasses.replace(pipeline, axes=_stage_axes(program, pipeline)))
    return tuple(found)


def _named(program: Program, prefix: str) -> list[tuple[Source | None, tuple[int, ...]]]:
    """The numbers in the names that begin with `prefix`, and where these are, each once."""
    found: dict[tuple[str, str], tuple[Source | None, tuple[int, ...]]] = {}
    for op, _ in program.walk():
        name = str(op.params.get("name", "")) if op.name == "name" else ""
        if name.startswith(prefix):
            numbers = tuple(map(int, name.removeprefix(prefix).split()))
            found[name, str(op.source)] = op.source, numbers
    return list(found.values())


def _stage_axes(program: Program, pipeline: Pipeline) -> Axes:
    """The axes of the constraint on what a tick hands to the next: its first carry."""
    for loop, _ in program.walk():
        if pipeline.runs(loop):
            (body,) = loop.bodies
            for op in body.ops:
                if op.name == "constraint" and body.outs[0] in op.outs:
                    return op.params["dims"][0] or ()
    return ()


def about_pipelines(
    model: Program, mesh: Mesh, program: Program, refined: Mesh
) -> tuple[Finding, ...]:
    """A finding for each pipeline of few microbatches, and for stages and layers left over.

    `model` is the global program and `mesh` the user's; `program`, on `refined`, is the local one.
    """
    found: list[Finding] = []
    for p in pipelines(model):
        parts = mesh.size(p.axes)
        if p.microbatches < p.stages:
            alone = "" if p.axes else "; no axis splits the stages, so each device works in all"
            found.append(
                Finding(
                    "pipeline-bubble",
                    f"the pipeline at {p.source} has {p.microbatches} microbatches for {p.stages} "
                    f"stages: each stage works in {p.busy} of {p.ticks} ticks, and "
                    f"{100 * p.bubble:.0f} % is bubble{alone}; cut the batch into more",
                    p.source,
                )
            )
        if idle := -p.stages % parts:
            sent = sum(
                sent_by(op, refined) * abs(trips)
                for op, trips in program.walk()
                if op.name in COLLECTIVES
                and str(op.source) == str(p.source)
                and not set(p.axes).isdisjoint(map(root_axis, axes_of(op)))
            )
            found.append(
                Finding(
                    "pipeline-padding",
                    f"the pipeline at {p.source} has {p.stages} stages, which do not go into the "
                    f"{parts} devices along {show_axes(p.axes)}: {idle} of {p.stages + idle} "
                    f"places stay empty, and {sent:,.0f} bytes per device cross them; make stages "
                    f"a multiple of {parts}, or give the pipeline an axis of its stages",
                    p.source,
                    sent,
                )
            )
    for source, (layers, places) in _named(model, PADDING):
        found.append(
            Finding(
                "pipeline-padding",
                f"the {layers} layers dealt out at {source} do not go into the stages: they have "
                f"room for {places}, and {100 * (1 - layers / places):.0f} % of what these compute "
                "is dropped",
                source,
            )
        )
    return tuple(found)
