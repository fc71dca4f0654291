"""Brute-force check of the rule table: split a factor, run the pieces, put them together, compare.

`python -m gspmd.rules.check` prints a row per primitive: how many splits were tried, which went wrong,
and which factors are *missing*: called whole, though plain pieces would do. Nothing here is shared
with the partitioner. Padding is filled with NaNs and nonsense, as nothing may be read from it.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspmd._compat import bind
from gspmd.ir import Literal, Op, Value
from gspmd.local import is_key, neutral_value
from gspmd.rules import factor_rule, op_rule
from gspmd.rules.factor import REDUCTIONS, Dims, FactorRule, Split
from gspmd.sharding import Mesh, Sharding

IMPLEMENTATIONS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg"}
Device = tuple[int, ...]  # an index along each split factor
Words = np.ndarray  # an array; of PRNG keys their words, in a trailing dim


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One use of a primitive: `fn(*args)` binds it, directly or under way."""

    primitive: str
    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()


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
        return f"{self.primitive:28} {self.tried:3} tried  {'; '.join(found) or 'ok':6}  {self.rule}"


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """An op on known operands: `words` are those of its operands that are values."""

    op: Op
    words: tuple[Words, ...]

    @property
    def primitive(self) -> str:
        return self.op.name

    @property
    def rule(self) -> FactorRule:
        return factor_rule(self.op)

    def run(self, words: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
        """The results, as words, if the op's values are `words`."""
        assert self.op.call is not None
        return self.run_as(self.op.call, words, self.op.params if params is None else params)

    def run_as(
        self, call: Callable[..., Any], words: Sequence[Any], params: Mapping[str, Any]
    ) -> list[Any]:
        """The results, as words, of `call` instead of the op's own."""
        rest = iter(words)
        operands = [
            np.asarray(x.value, x.dtype) if isinstance(x, Literal) else to_array(next(rest), x.dtype)
            for x in self.op.ins
        ]
        out = call(*operands, **params)
        return [to_words(x) for x in (out if isinstance(out, list | tuple) else [out])]


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A computation to compare with the whole op: `fn(words)`, and `join` of what comes out."""

    label: str
    words: Any
    fn: Callable[[Any], Any]
    join: Callable[[Any], list[Words]]


def run_trials(trials: Sequence[Trial]) -> list[list[Words] | str]:
    """The results of each trial, or in a few words why there are none; compiled all at once."""
    try:
        outs: list[Any] = jax.jit(lambda xs: [t.fn(x) for t, x in zip(trials, xs, strict=True)])(
            [t.words for t in trials]
        )
        return [t.join(jax.tree.map(np.asarray, out)) for t, out in zip(trials, outs, strict=True)]
    except Exception as error:  # of whatever kind: a rule that does not run is as wrong as one that errs
        if len(trials) > 1:
            return [result for trial in trials for result in run_trials([trial])]
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"]


def to_words(x: Any) -> Any:
    return jax.random.key_data(x) if is_key(x.dtype) else x


def to_array(words: Words, dtype: Any) -> Any:
    if not is_key(dtype):
        return jnp.asarray(words)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=IMPLEMENTATIONS[str(dtype)])


def case_of(sample: Sample) -> Case:
    """The sample's op, and the operands that it gets when the sample runs."""
    closed = jax.make_jaxpr(sample.fn)(*sample.args)
    found = _find(closed.jaxpr, [*closed.consts, *sample.args], sample.primitive)
    assert found is not None, f"the sample of {sample.primitive} never binds it"
    eqn, values = found
    ids = itertools.count()

    def value(var: Any) -> Value:
        return Value(next(ids), tuple(var.aval.shape), var.aval.dtype)

    ins = tuple(
        Literal(v.val, v.aval.dtype) if hasattr(v, "val") and not v.aval.shape else value(v)
        for v in eqn.invars
    )
    outs = tuple(value(v) for v in eqn.outvars)
    op = Op(eqn.primitive.name, ins, outs, dict(eqn.params), call=bind(eqn.primitive))
    words = [np.asarray(to_words(x)) for x, y in zip(values, ins, strict=True) if isinstance(y, Value)]
    return Case(op, tuple(words))


def _find(jaxpr: Any, args: Sequence[Any], name: str) -> tuple[Any, list[Any]] | None:
    """The first equation of primitive `name` in `jaxpr` or the calls it makes, and its operands."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if hasattr(v, "val") else env[v] for v in eqn.invars]
        values = [jnp.asarray(x) if isinstance(x, bool | int | float) else x for x in values]
        if eqn.primitive.name == name:
            return eqn, values
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None:
            found = _find(inner.jaxpr, [*inner.consts, *values], name)
            if found is not None:
                return found
        out = bind(eqn.primitive)(*values, **eqn.params)
        env |= zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True)
    return None


# --- cutting and joining


def _place(dims: Dims, sizes: Sequence[int], factor: int) -> tuple[int, int, int] | None:
    """The dim that holds `factor`, and the sizes in it which are major and minor to the factor."""
    for dim, factors in enumerate(dims):
        if factor in factors:
            i = factors.index(factor)
            major, minor = factors[:i], factors[i + 1 :]
            return dim, math.prod(sizes[f] for f in major), math.prod(sizes[f] for f in minor)
    return None


def cut(
    x: Words, dims: Dims, sizes: Sequence[int], factor: int, parts: int, filler: Any
) -> list[Words]:
    """The pieces of `x`, the last ones filled up to ceil(n / parts); whole if it lacks the factor."""
    place = _place(dims, sizes, factor)
    if place is None:
        return [x] * parts
    dim, major, minor = place
    n = sizes[factor]
    block = -(-n // parts)
    x = x.reshape(*x.shape[:dim], major, n, minor, *x.shape[dim + 1 :])
    widths = [(0, block * parts - n if d == dim + 1 else 0) for d in range(x.ndim)]
    x = np.pad(x, widths, constant_values=filler)
    pieces = np.split(x, parts, dim + 1)
    return [p.reshape(*p.shape[:dim], major * block * minor, *p.shape[dim + 3 :]) for p in pieces]


def join(
    pieces: Sequence[Words], dims: Dims, sizes: Sequence[int], factor: int, n: int, kind: str
) -> Words:
    """What the pieces of a result make: side by side, reduced, or all the same."""
    place = _place(dims, sizes, factor)
    if place is None:
        if kind in REDUCTIONS:
            return reduce_pieces(pieces, kind)
        assert all(equal(p, pieces[0]) for p in pieces), "the pieces of a whole result differ"
        return pieces[0]
    dim, major, minor = place
    split = [p.reshape(*p.shape[:dim], major, -1, minor, *p.shape[dim + 1 :]) for p in pieces]
    x = np.concatenate(split, dim + 1)
    x = x[(slice(None),) * (dim + 1) + (slice(n),)]
    return x.reshape(*x.shape[:dim], major * n * minor, *x.shape[dim + 3 :])


UFUNCS = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def reduce_pieces(pieces: Sequence[Words], kind: str) -> Words:
    total = pieces[0]
    for piece in pieces[1:]:
        total = UFUNCS[kind](total, piece)
    return total


def equal(x: Words, y: Words) -> bool:
    """Integers exactly, floats up to the order of additions."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return np.array_equal(x, y)
    wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
    rtol = max(1e-4, 8 * float(jnp.finfo(x.dtype).eps))
    return np.allclose(x.astype(wide), y.astype(wide), rtol, 1e-5, equal_nan=True)


def _garbage(dtype: Any) -> Any:
    return np.nan if jnp.issubdtype(dtype, jnp.inexact) else 119 if dtype != np.bool_ else True


# --- running pieces


def split_trial(case: Case, parts: Mapping[int, int]) -> Trial:
    """The op with each factor in `parts` split so many ways, its pieces run and put together."""
    rule, known = case.rule, op_rule(case.op)
    pieces, sizes = _cut_all(case, parts, rule)
    devices = list(pieces)
    split = _split(case.op, parts, rule, sizes)
    params = {**case.op.params}
    if known is not None and known.params is not None:
        params |= known.params(case.op, split)
    words: Any = list(pieces.values())
    call = known.call(case.op, split) if known is not None and known.call is not None else None
    if call is not None:
        words = _stack(words, split.mesh)

    def run(words: Any) -> list[list[Any]]:
        if call is None:
            return [case.run(xs, params) for xs in words]
        outs = _simulated(lambda xs: case.run_as(call, xs, params), split.mesh)(words)
        return [[x[device] for x in outs] for device in devices]

    def join(outs: list[list[Words]]) -> list[Words]:
        for results in outs:
            for shape, x, out in zip(split.out_shapes, results, case.op.outs, strict=True):
                found = x.shape[: len(out.shape)]
                assert found == shape, f"a piece has shape {found}, by the rule {shape}"
        return _join_all(dict(zip(devices, outs, strict=True)), parts, rule, sizes)

    label = ", ".join(f"{rule.names[f]} of {rule.sizes[f]} split {k} ways" for f, k in parts.items())
    return Trial(label, words, run, join)


def _stack(pieces: Sequence[Sequence[Words]], mesh: Mesh) -> list[Words]:
    """Each operand's pieces in one array, whose leading dims are the axes of the mesh."""
    sizes = [k for _, k in mesh.axes]
    operands = zip(*pieces, strict=True)
    return [np.zeros(sizes), *(np.stack(xs).reshape(*sizes, *xs[0].shape) for xs in operands)]


def _simulated(run: Callable[[list[Any]], list[Any]], mesh: Mesh) -> Callable[[Any], list[Any]]:
    """All devices at once: `run` vmapped over every axis of the mesh, by name."""

    def one(words: list[Any]) -> list[Any]:
        return run(words[1:])  # the first is there to be mapped over, in case nothing else is

    for name in reversed(mesh.names):
        one = jax.vmap(one, axis_name=name)
    return one


def _cut_all(
    case: Case, parts: Mapping[int, int], rule: FactorRule
) -> tuple[dict[Device, list[Words]], list[int]]:
    """What each device holds, and the local sizes of the factors."""
    sizes = list(rule.sizes)
    values = [dims for x, dims in zip(case.op.ins, rule.ins, strict=True) if isinstance(x, Value)]
    pieces: dict[Device, list[Words]] = {(): list(case.words)}
    for factor, k in parts.items():
        kind = rule.kinds[factor] if rule.masked else "pass"
        cuts: dict[Device, list[Words]] = {}
        for device, xs in pieces.items():
            split = [
                cut(x, dims, sizes, factor, k,
                    neutral_value(kind, x.dtype) if kind in REDUCTIONS else _garbage(x.dtype))
                for x, dims in zip(xs, values, strict=True)
            ]  # fmt: skip
            cuts |= {(*device, i): [x[i] for x in split] for i in range(k)}
        pieces = cuts
        sizes[factor] = -(-sizes[factor] // k)
    return pieces, sizes


def _split(op: Op, parts: Mapping[int, int], rule: FactorRule, sizes: list[int]) -> Split:
    names = {factor: f"axis{factor}" for factor in parts}
    mesh = Mesh(tuple((names[factor], k) for factor, k in parts.items()))
    axes = tuple((names[f],) if f in names else () for f in range(len(rule.sizes)))

    def sharding(dims: Dims, owed: bool) -> Sharding:
        held = {f for factors in dims for f in factors}
        partial = tuple(
            names[f] for f in parts if owed and f not in held and rule.kinds[f] in REDUCTIONS
        )
        return Sharding(tuple(tuple(a for f in factors for a in axes[f]) for factors in dims), partial)

    def shape(x: Any, dims: Dims) -> tuple[int, ...]:
        return tuple(
            math.prod(sizes[f] for f in factors) if factors else n
            for n, factors in zip(x.shape, dims, strict=True)
        )

    return Split(
        mesh,
        axes,
        tuple(sharding(dims, False) for dims in rule.ins),
        tuple(sharding(dims, True) for dims in rule.outs),
        tuple(shape(x, dims) for x, dims in zip(op.ins, rule.ins, strict=True)),
        tuple(shape(x, dims) for x, dims in zip(op.outs, rule.outs, strict=True)),
    )


def _join_all(
    outs: dict[Device, list[Words]], parts: Mapping[int, int], rule: FactorRule, sizes: list[int]
) -> list[Words]:
    sizes = list(sizes)
    for factor, k in reversed(parts.items()):
        groups: dict[Device, list[list[Words]]] = {}
        for device, xs in outs.items():
            groups.setdefault(device[:-1], []).append(xs)
        n = rule.sizes[factor]
        outs = {
            device: [
                join(pieces, dims, sizes, factor, n, rule.kinds[factor])
                for dims, *pieces in zip(rule.outs, *results, strict=True)
            ]
            for device, results in groups.items()
        }
        assert all(len(results) == k for results in groups.values())
        sizes[factor] = n
    return outs[()]


# --- the three checks


def check(sample: Sample | Case, exhaustive: bool = True) -> Row:
    """Tries every factor of the sample's rule, and every factor that it calls whole.

    Each is split unevenly, if its kind allows; with `exhaustive` also 2 and 3 ways.
    """
    case = sample if isinstance(sample, Case) else case_of(sample)
    rule = case.rule
    assert_fits(rule, case.op)
    trials = [split_trial(case, parts) for parts in _splits(rule, exhaustive)]
    trials += [
        _linear_trial(case, group)
        for group in rule.linear
        if not any(np.issubdtype(case.op.ins[i].dtype, np.bool_) for i in group)
    ]
    opened = [_plain_trial(case, factor) for factor in _called_whole(rule)]
    opened = [trial for trial in opened if _has_shape(trial)]
    whole = Trial("whole", list(case.words), case.run, list)
    expected, *found = run_trials([whole, *trials, *opened])
    assert not isinstance(expected, str), f"{case.primitive} does not run: {expected}"
    wrong = [
        f"{trial.label}: {fault}"
        for trial, results in zip(trials, found[: len(trials)], strict=True)
        if (fault := _fault(results, expected))
    ]
    missing = [
        f"{trial.label} {', '.join(ways)}"
        for trial, results in zip(opened, found[len(trials) :], strict=True)
        if not isinstance(results, str) and (ways := _ways(results, expected))
    ]
    return Row(case.primitive, rule, len(trials), tuple(wrong), tuple(missing))


def assert_fits(rule: FactorRule, op: Op) -> None:
    """Every dim has the size of its factors; only dims of size 1 have none."""
    for x, dims in zip((*op.ins, *op.outs), (*rule.ins, *rule.outs), strict=True):
        sizes = tuple(math.prod(rule.sizes[f] for f in factors) for factors in dims)
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


def _plain_trial(case: Case, factor: int) -> Trial:
    """The results on both halves of a factor that is called whole, one half after the other."""
    pieces, _ = _cut_all(case, {factor: 2}, case.rule)

    def join(outs: list[list[Words]]) -> list[Words]:
        return [x for results in outs for x in results]

    return Trial(
        case.rule.names[factor], list(pieces.values()), lambda xs: [case.run(x) for x in xs], join
    )


def _has_shape(trial: Trial) -> bool:
    """Whether the params fit the pieces."""
    try:
        jax.eval_shape(trial.fn, trial.words)
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


def main(names: Iterable[str] = ()) -> int:
    """Checks the samples of the primitives `names`, or all; returns how many rules are wrong."""
    from gspmd.rules.samples import samples

    wanted = set(names)
    wrong = 0
    for sample in samples():
        if not wanted or sample.primitive in wanted:
            row = check(sample)
            wrong += bool(row.wrong)
            sys.stdout.write(f"{row}\n")
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
