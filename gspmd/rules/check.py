"""Brute-force check of the rule table: split a factor, run the pieces, put them together, compare.

`python -m gspmd.rules.check` prints a row per sample: how many splits were tried, which went wrong,
and which factors are *missing*: called whole, though plain pieces would do. Nothing here is shared
with the partitioner. Padding is filled with NaNs and nonsense, as nothing may be read from it.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.evaluate import evaluate
from gspmd.ir import Op, Program, Value
from gspmd.rules import op_rule
from gspmd.rules.build import Builder
from gspmd.rules.cases import Case, Sample, Words, case_of
from gspmd.rules.factor import REDUCTIONS, RULES, Dims, FactorRule, Split
from gspmd.rules.pieces import cut_all, equal, join_all, reduce_pieces
from gspmd.rules.samples import samples
from gspmd.sharding import Mesh, Sharding

QUICK = {"xla_backend_optimization_level": "0"}  # compilation is what takes the time here
BATCH = 16  # samples compiled together
SEVERAL = 4  # factors split at once


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What the check of one primitive found; `wrong` and `missing` name factors of `rule`."""

    primitive: str
    rule: FactorRule
    tried: int
    wrong: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        found = [f"WRONG {x}" for x in self.wrong] + [f"missing {x}" for x in self.missing]
        verdict = "; ".join(found) or "ok"
        return f"{self.primitive:28} {self.tried:3} tried  {verdict:6}  {self.rule}"


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A computation to compare with the whole op: `fn(words)`, and `join` of what comes out."""

    label: str
    words: Any
    fn: Callable[[Any], Any]
    join: Callable[[Any], list[Words]]


def run_trials(trials: Sequence[Trial]) -> list[list[Words] | str]:
    """The results of each trial, or in a few words why there are none.

    All are compiled at once, which is several times faster; one by one if that fails.
    """

    def run(words: list[Any]) -> list[Any]:
        return [trial.fn(x) for trial, x in zip(trials, words, strict=True)]

    try:
        outs = jax.jit(run, compiler_options=QUICK)([trial.words for trial in trials])
        return [t.join(jax.tree.map(np.asarray, out)) for t, out in zip(trials, outs, strict=True)]
    except Exception as error:  # a rule that does not run, for whatever reason, is a wrong rule
        if len(trials) > 1:
            return [result for trial in trials for result in run_trials([trial])]
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"]


def split_trial(case: Case, parts: Mapping[int, int]) -> Trial | None:
    """The op with each factor in `parts` split so many ways, its pieces run and put together.

    None if the op has no such form, and does not claim to.
    """
    rule, known = case.rule, op_rule(case.op)
    pieces, sizes = cut_all(case, parts, rule)
    devices = list(pieces)
    split = _split(case.op, parts, rule)
    params = {**case.op.params}
    if known is not None and known.params is not None:
        params |= known.params(case.op, split)
    names, sizes_of_mesh = split.mesh.names, [k for _, k in split.mesh.axes]
    call = known.call(case.op, split) if known is not None and known.call is not None else None
    if rule.exchanged.intersection(parts):
        call = _exchanging(case.op, split)
        if call is None:
            return None
    # The first is there to be mapped over, in case nothing else is.
    stacked = [np.zeros(len(devices)), *(np.stack(xs) for xs in zip(*pieces.values(), strict=True))]

    def device_results(call: Callable[..., Any], words: list[Any]) -> list[Any]:
        return case.run_as(call, words[1:], params)

    def run(words: Any) -> list[list[Any]]:
        if call is None:
            outs = lax.map(lambda xs: case.run(xs[1:], params), words)
            return [[x[i] for x in outs] for i in range(len(devices))]
        simulated = _simulated(functools.partial(device_results, call), names)
        outs = simulated([x.reshape(*sizes_of_mesh, *x.shape[1:]) for x in words])
        return [[x[device] for x in outs] for device in devices]

    def join(outs: list[list[Words]]) -> list[Words]:
        for results in outs:
            for shape, x, out in zip(split.out_shapes, results, case.op.outs, strict=True):
                found = x.shape[: len(out.shape)]
                assert found == shape, f"a piece has shape {found}, by the rule {shape}"
        shapes = [out.shape for out in case.op.outs]
        return join_all(dict(zip(devices, outs, strict=True)), parts, rule, sizes, shapes)

    label = ", ".join(f"{rule.names[f]} of {rule.sizes[f]} in {k}" for f, k in parts.items())
    return Trial(label, stacked, run, join)


def _exchanging(op: Op, split: Split) -> Callable[..., Any] | None:
    """The op on local arrays, where its pieces need entries of each other."""
    partition = RULES[op.name].partition
    assert partition is not None, f"{op.name} has exchanged factors, but nothing partitions them"
    ids = itertools.count()
    ins = [Value(next(ids), n, x.dtype) for x, n in zip(op.ins, split.in_shapes, strict=True)]
    builder = Builder(split.mesh, op, split, ids)
    outs = partition(builder, op, split, ins)
    if outs is None:
        return None
    program = Program(tuple(ins), tuple(builder.ops), tuple(outs))
    return lambda *operands, **_: evaluate(program, operands, "simulated")


def _simulated(run: Callable[[Any], Any], names: Sequence[str]) -> Callable[[Any], Any]:
    """All devices at once: `run` vmapped over the axes `names` of a mesh, outermost first."""
    for name in reversed(names):
        run = jax.vmap(run, axis_name=name)
    return run


def _split(op: Op, parts: Mapping[int, int], rule: FactorRule) -> Split:
    names = {factor: f"axis{factor}" for factor in parts}
    mesh = Mesh(tuple((names[factor], k) for factor, k in parts.items()))
    axes = tuple((names[f],) if f in names else () for f in range(len(rule.sizes)))

    def sharding(dims: Dims, owed: bool) -> Sharding:
        held = {f for factors in dims for f in factors}
        partial = tuple(
            names[f] for f in parts if owed and f not in held and rule.kinds[f] in REDUCTIONS
        )
        split = tuple(tuple(a for f in factors for a in axes[f]) for factors in dims)
        return Sharding(split, partial)

    ins = tuple(sharding(dims, False) for dims in rule.ins)
    outs = tuple(sharding(dims, True) for dims in rule.outs)
    return Split.of(op, mesh, axes, ins, outs)


# --- the three checks


def check(samples: Iterable[Sample | Case], exhaustive: bool = True) -> Iterator[Row]:
    """Tries every factor of each sample's rule, and every factor that it calls whole.

    Each is split unevenly, if its kind allows; with `exhaustive` also 2 and 3 ways.
    """
    rest = iter(samples)
    while batch := [_Check.of(x, exhaustive) for x in itertools.islice(rest, BATCH)]:
        results = iter(run_trials([trial for work in batch for trial in work.trials]))
        for work in batch:
            yield work.row([next(results) for _ in work.trials])


@dataclasses.dataclass(frozen=True, slots=True)
class _Check:
    """The trials of one case: the whole op, the claims of its rule, the factors called whole."""

    case: Case
    whole: Trial
    claims: tuple[Trial, ...]
    halves: tuple[Trial, ...]

    @classmethod
    def of(cls, sample: Sample | Case, exhaustive: bool) -> "_Check":
        case = sample if isinstance(sample, Case) else case_of(sample)
        rule = case.rule
        assert_fits(rule, case.op)
        splits = list(_splits(rule, exhaustive))
        known = op_rule(case.op)
        if known is not None and known.call is not None and len(splits) > 1:
            # It knows which shard it holds: so all factors at once, each over an axis of its own.
            splits.append({f: k for parts in splits[:SEVERAL] for f, k in parts.items()})
        tried = [split_trial(case, parts) for parts in splits]
        claims = [trial for trial in tried if trial is not None]
        claims += [
            _linear_trial(case, group) for group in rule.linear if _is_number(case.op, group)
        ]
        halves = [_halves_trial(case, factor) for factor in _called_whole(rule)]
        fitting = [trial for trial in halves if _has_shape(trial)]
        whole = Trial("whole", list(case.words), case.run, list)
        return cls(case, whole, tuple(claims), tuple(fitting))

    @property
    def trials(self) -> tuple[Trial, ...]:
        return (self.whole, *self.claims, *self.halves)

    def row(self, results: list[list[Words] | str]) -> Row:
        expected, *found = results
        assert not isinstance(expected, str), f"{self.case.primitive} does not run: {expected}"
        claimed, halved = found[: len(self.claims)], found[len(self.claims) :]
        wrong = tuple(
            f"{trial.label}: {fault}"
            for trial, made in zip(self.claims, claimed, strict=True)
            if (fault := _fault(made, expected))
        )
        missing = tuple(
            f"{trial.label} {', '.join(ways)}"
            for trial, made in zip(self.halves, halved, strict=True)
            if not isinstance(made, str) and (ways := _ways(made, expected))
        )
        return Row(self.case.primitive, self.case.rule, len(self.claims), wrong, missing)


def _is_number(op: Op, group: Iterable[int]) -> bool:
    return not any(jnp.issubdtype(op.ins[i].dtype, jnp.bool_) for i in group)


def assert_fits(rule: FactorRule, op: Op) -> None:
    """Every dim has the size of its factors; only dims of size 1 have none.

    Dims that exchange entries have one factor, and a size of their own.
    """
    for x, dims in zip((*op.ins, *op.outs), (*rule.ins, *rule.outs), strict=True):
        sizes = tuple(
            n if rule.exchanged.issuperset(factors) and len(factors) == 1
            else math.prod(rule.sizes[f] for f in factors)
            for factors, n in zip(dims, x.shape, strict=True)
        )  # fmt: skip
        assert sizes == x.shape, f"{op.name}: factors of sizes {sizes} for the shape {x.shape}"


def _splits(rule: FactorRule, exhaustive: bool) -> Iterator[dict[int, int]]:
    compound = {f for dims in (*rule.ins, *rule.outs) for fs in dims if len(fs) > 1 for f in fs}
    for factor, (n, kind) in enumerate(zip(rule.sizes, rule.kinds, strict=True)):
        if kind == "whole" or n < 2:
            continue
        even = {k for k in range(2, n + 1) if n % k == 0}
        ways = even if factor in compound else {2, 3, 4} - even
        if exhaustive:
            ways |= {2, 3} & even
        for k in sorted(ways) if exhaustive else [min(ways)]:
            yield {factor: k}


def _fault(results: list[Words] | str, expected: list[Words]) -> str:
    """What went wrong, in a few words, or nothing."""
    if isinstance(results, str):
        return results
    bad = [i for i, (x, y) in enumerate(zip(results, expected, strict=True)) if not equal(x, y)]
    return f"results {bad} differ" if bad else ""


def _linear_trial(case: Case, group: tuple[int, ...]) -> Trial:
    """The sum of the results on two summands of the operands in `group`."""
    values = [i for i, x in enumerate(case.op.ins) if isinstance(x, Value)]
    first = [np.flip(x) if i in group else x for i, x in zip(values, case.words, strict=True)]
    rest = [
        (x - y).astype(x.dtype) if i in group else x
        for i, x, y in zip(values, case.words, first, strict=True)
    ]
    literals = [i for i in group if i not in values]
    zeroed = tuple(
        dataclasses.replace(x, value=0 * x.value) if i in literals else x  # type: ignore[type-var]
        for i, x in enumerate(case.op.ins)
    )
    bare = Case(dataclasses.replace(case.op, ins=zeroed), case.words)

    def run(words: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [case.run(words[0]), bare.run(words[1])]

    def join(outs: list[list[Words]]) -> list[Words]:
        return [reduce_pieces(xs, "sum").astype(xs[0].dtype) for xs in zip(*outs, strict=True)]

    return Trial(f"linear in operands {group}", [first, rest], run, join)


def _called_whole(rule: FactorRule) -> list[int]:
    """The operands' factors that are whole and could be halved."""
    held = {f for dims in rule.ins for factors in dims for f in factors}
    return sorted(
        f for f in held if rule.kinds[f] == "whole" and rule.sizes[f] % 2 == 0 < rule.sizes[f]
    )


def _halves_trial(case: Case, factor: int) -> Trial:
    """The results on both halves of a factor that is called whole, one half after the other."""
    pieces, _ = cut_all(case, {factor: 2}, case.rule)

    def join(outs: list[list[Words]]) -> list[Words]:
        return [x for results in outs for x in results]

    return Trial(
        case.rule.names[factor], list(pieces.values()), lambda xs: [case.run(x) for x in xs], join
    )


def _has_shape(trial: Trial) -> bool:
    """Whether the params fit the pieces."""
    try:
        jax.jit(trial.fn).lower(trial.words)
    except Exception:  # JAX says no in many ways
        return False
    return True


def _ways(halves: list[Words], expected: list[Words]) -> list[str]:
    """How the halves' results make up each expected one, if they do for all."""
    count = len(expected)
    ways = [_way(halves[j::count], whole) for j, whole in enumerate(expected)]
    return ways if all(ways) else []


def _way(pieces: Sequence[Words], whole: Words) -> str:
    if not whole.size:
        return ""
    for dim in range(min(whole.ndim, pieces[0].ndim)):
        if all(x.shape[:dim] == whole.shape[:dim] for x in pieces):
            shapes = {(*x.shape[:dim], *x.shape[dim + 1 :]) for x in (*pieces, whole)}
            if len(shapes) == 1 and equal(np.concatenate(pieces, dim), whole):
                return f"passes in dim {dim}"
    for kind in ("sum", "max", "min"):
        fits = pieces[0].shape == whole.shape and whole.dtype != np.bool_
        if fits and equal(reduce_pieces(pieces, kind), whole):
            return f"is a {kind}"
    return ""


def main(names: Sequence[str] = ()) -> int:
    """Checks the samples of the primitives `names`, or all; returns how many rules are wrong."""
    wrong = 0
    for row in check(x for x in samples() if not names or x.primitive in names):
        wrong += bool(row.wrong)
        sys.stdout.write(f"{row}\n")
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
