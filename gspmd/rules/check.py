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

    def run(self) -> list[Words]:
        """The results on whole operands."""
        assert self.op.call is not None
        arrays = self.operands(self.words)
        return _results(self.op.call(*arrays, **self.op.params))

    def operands(self, words: Sequence[Words]) -> list[Any]:
        """What the op is called with, literals included, if its values are `words`."""
        rest = iter(words)
        return [
            np.asarray(x.value, x.dtype) if isinstance(x, Literal) else to_array(next(rest), x.dtype)
            for x in self.op.ins
        ]


def to_words(x: Any) -> Words:
    return np.asarray(jax.random.key_data(x) if is_key(x.dtype) else x)


def to_array(words: Words, dtype: Any) -> Any:
    if not is_key(dtype):
        return jnp.asarray(words)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=IMPLEMENTATIONS[str(dtype)])


def _results(out: Any) -> list[Words]:
    return [to_words(x) for x in (out if isinstance(out, list | tuple) else [out])]


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
    words = [to_words(x) for x, y in zip(values, ins, strict=True) if isinstance(y, Value)]
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


def run_split(case: Case, parts: Mapping[int, int]) -> list[Words]:
    """The results when each factor in `parts` is split so many ways and its pieces are combined."""
    rule, known = case.rule, op_rule(case.op)
    pieces, sizes = _cut_all(case, parts, rule)
    split = _split(case.op, parts, rule, sizes, next(iter(pieces.values())))
    params = {**case.op.params}
    if known is not None and known.params is not None:
        params |= known.params(case.op, split)
    if known is not None and known.call is not None:
        outs = _run_simulated(case, pieces, known.call(case.op, split), params, split.mesh)
    else:
        assert case.op.call is not None
        call = case.op.call
        outs = {d: _results(call(*case.operands(xs), **params)) for d, xs in pieces.items()}
    for results in outs.values():
        for shape, x, out in zip(split.out_shapes, results, case.op.outs, strict=True):
            rank = len(out.shape)
            assert x.shape[:rank] == shape, f"a piece has shape {x.shape}, the rule says {shape}"
    return _join_all(outs, parts, rule, sizes)


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


def _split(
    op: Op, parts: Mapping[int, int], rule: FactorRule, sizes: list[int], local: Sequence[Words]
) -> Split:
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


def _run_simulated(
    case: Case,
    pieces: Mapping[Device, Sequence[Words]],
    call: Callable[..., Any],
    params: Mapping[str, Any],
    mesh: Mesh,
) -> dict[Device, list[Words]]:
    """Each device's results, all devices at once: vmapped over every axis of the mesh, by name."""
    sizes = [k for _, k in mesh.axes]

    def one(_device: Any, words: list[Any]) -> list[Any]:
        out = call(*case.operands(words), **params)
        out = out if isinstance(out, list | tuple) else [out]
        return [jax.random.key_data(x) if is_key(x.dtype) else x for x in out]

    run: Callable[..., list[Any]] = one
    for name in reversed(mesh.names):
        run = jax.vmap(run, axis_name=name)
    stacked = [np.stack(xs).reshape(*sizes, *xs[0].shape) for xs in zip(*pieces.values(), strict=True)]
    outs = jax.jit(run)(np.zeros(sizes), stacked)
    return {device: [np.asarray(x[device]) for x in outs] for device in pieces}


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
    expected = case.run()
    wrong: list[str] = []
    tried = 0
    for parts in _splits(rule, exhaustive):
        tried += 1
        fault = _fault(lambda parts=parts: run_split(case, parts), expected)
        if fault:
            (factor, k), = parts.items()  # fmt: skip
            wrong.append(f"{rule.names[factor]} of {rule.sizes[factor]} split {k} ways: {fault}")
    for group in rule.linear:
        if any(np.issubdtype(x.dtype, np.bool_) for i, x in enumerate(case.op.ins) if i in group):
            continue
        tried += 1
        fault = _fault(lambda group=group: _sum_of_parts(case, group), expected)
        if fault:
            wrong.append(f"linear in operands {group}: {fault}")
    return Row(case.op.name, rule, tried, tuple(wrong), tuple(_missing(case, expected)))


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


def _fault(run: Callable[[], list[Words]], expected: list[Words]) -> str:
    """What went wrong, in a few words, or nothing."""
    try:
        results = run()
    except Exception as error:  # a rule that does not run is as wrong as one that errs
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    bad = [i for i, (x, y) in enumerate(zip(results, expected, strict=True)) if not equal(x, y)]
    return f"results {bad} differ" if bad else ""


def _sum_of_parts(case: Case, group: tuple[int, ...]) -> list[Words]:
    """The sum of the results on two summands of the operands in `group`."""
    assert case.op.call is not None
    first, second = case.operands(case.words), case.operands(case.words)
    for i in group:
        x = np.asarray(first[i])
        first[i] = jnp.asarray(np.flip(x))  # not parallel to x
        second[i] = jnp.asarray((x - np.flip(x)).astype(x.dtype))
    pieces = [_results(case.op.call(*xs, **case.op.params)) for xs in (first, second)]
    return [reduce_pieces(xs, "sum").astype(xs[0].dtype) for xs in zip(*pieces, strict=True)]


def _missing(case: Case, expected: list[Words]) -> Iterator[str]:
    """Factors called whole whose plain pieces, put side by side or reduced, give all results."""
    rule = case.rule
    held = {f for dims in rule.ins for factors in dims for f in factors}
    for factor in sorted(held):
        n = rule.sizes[factor]
        if rule.kinds[factor] != "whole" or n % 2 or 0 in (n, *(x.size for x in expected)):
            continue
        opened = dataclasses.replace(rule, outs=tuple(((),) * len(dims) for dims in rule.outs))
        pieces, _ = _cut_all(case, {factor: 2}, opened)
        assert case.op.call is not None
        try:
            runs = [_results(case.op.call(*case.operands(xs), **case.op.params))
                    for xs in pieces.values()]  # fmt: skip
        except Exception:  # the params do not fit the pieces: JAX says so in many ways
            continue
        ways = [_way(xs, whole) for *xs, whole in zip(*runs, expected, strict=True)]
        if all(ways):
            yield f"{rule.names[factor]}: {', '.join(ways)}"


def _way(pieces: Sequence[Words], whole: Words) -> str:
    for dim in range(whole.ndim):
        joined = np.concatenate(pieces, dim) if pieces[0].ndim == whole.ndim else whole[:0]
        if joined.shape == whole.shape and equal(joined, whole):
            return f"pass in dim {dim}"
    for kind in ("sum", "max", "min"):
        if pieces[0].shape == whole.shape and whole.dtype != np.bool_:
            if equal(reduce_pieces(pieces, kind), whole):
                return kind
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
