"""The rule table: every rule holds for every split, and says what it is expected to say."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives

from gspmd.errors import RuleError
from gspmd.ir import Op, Value
from gspmd.rules import RULES, factor_rule
from gspmd.rules.cases import Case, Sample, case_of
from gspmd.rules.check import check, main
from gspmd.rules.control import CONTROL
from gspmd.rules.factor import FactorRule, OpRule, gathered, rule
from gspmd.rules.random import flat_positions
from gspmd.rules.register import register_rule
from gspmd.rules.samples import floats, ints, samples

GROUPS = 8


@functools.cache
def sampled() -> tuple[Sample | Case, ...]:
    return tuple(samples())


# --- the law


@pytest.mark.parametrize("group", range(GROUPS))
def test_pieces_make_the_whole(group: int) -> None:
    """Split any factor, run the pieces, put them together: the result of the whole op."""
    rows = list(check(sampled()[group::GROUPS], exhaustive=False))
    assert [str(row) for row in rows if row.wrong] == []
    assert [str(row) for row in rows if row.missing] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("group", range(GROUPS))
def test_pieces_make_the_whole_however_split(group: int) -> None:
    assert [str(row) for row in check(sampled()[group::GROUPS]) if row.wrong or row.missing] == []


def test_every_rule_has_a_sample() -> None:
    some = {  # of the releases of JAX that work have
        "log2", "one_minus_square", "philox2x32", "philox4x32", "polynomial", "shard_alike",
        "threefry4x32",
    }  # fmt: skip
    # What other tests register by text has its function in `register`; collectives run on a mesh.
    others = ("gspmd.rules.register", "gspmd.rules.manual")
    ours = {name for name, r in RULES.items() if r.factors.__module__ not in others}
    assert len(ours) > 150
    assert ours - {sample.primitive for sample in sampled()} - some == set()


def test_every_documented_primitive_is_known() -> None:
    """What has no rule is listed here, by reason."""
    documented = {getattr(primitives, name).name for name in dir(primitives) if name.endswith("_p")}
    collectives = {
        "all_gather", "all_to_all", "axis_index", "pmax", "pmin", "ppermute", "psum",
        "ragged_all_to_all",
    }  # fmt: skip
    inlined = {"call", "closed_call", "custom_jvp_call", "custom_vjp_call", "eval_jaxpr", "jit"}
    bodies = {*CONTROL, "remat2", "custom_linear_solve"}
    effects = {"after_all", "create_token", "get", "swap"}
    annotations = {"sharding_constraint", "custom_lin"}
    ruled = {*RULES, *collectives, *inlined, *bodies, *effects, *annotations}
    assert documented - ruled == set()


# --- the checker catches what it is there to catch


def wrong_rule(factors: Callable[[Op], FactorRule], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The row of `cumsum`, were its rule `factors`."""
    monkeypatch.setitem(RULES, "cumsum", OpRule(factors))
    (row,) = check([Sample("cumsum", lax.cumsum, (floats(4, 5),))])
    return row


def test_checker_finds_a_wrong_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    row = wrong_rule(lambda op: FactorRule.parse("a b -> a b", [(4, 5)], [(4, 5)]), monkeypatch)
    assert row.wrong == tuple(f"a of 4 in {k}: results [0] differ" for k in (2, 3))


def test_checker_finds_a_missing_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "cumsum", OpRule(gathered))
    (row,) = check([Sample("cumsum", lax.cumsum, (floats(5, 4),))])
    assert (row.wrong, row.missing) == ((), ("b passes in dim 1",))


def test_checker_finds_a_false_linear_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def factors(op: Op) -> FactorRule:
        return FactorRule.parse("_ b -> _ b", [(4, 5)], [(4, 5)], linear=((0,),))

    assert wrong_rule(factors, monkeypatch).wrong == ()
    monkeypatch.setitem(RULES, "abs", OpRule(factors))
    (row,) = check([Sample("abs", lax.abs, (floats(4, 5),))])
    assert row.wrong == ("linear in operands (0,): results [0] differ",)


def test_checker_finds_padding_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(op: Op) -> FactorRule:
        return FactorRule.parse("a -> ", [(5,)], [()], masked=False)

    monkeypatch.setitem(RULES, "reduce_sum", OpRule(unmasked))
    (row,) = check([Sample("reduce_sum", jnp.sum, (floats(5),))])
    assert row.wrong == tuple(f"a of 5 in {k}: results [0] differ" for k in (2, 3, 4))


def test_command_line_prints_a_row_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transpose", "top_k"]) == 0
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "transpose 9 tried ok a b c -> c a b",
        "top_k 8 tried ok a b c -> a b d, a b d (d: whole, c: exchanged)",
        "top_k 8 tried ok a b c -> a d c, a d c (d: whole, b: exchanged)",
        "top_k 3 tried ok a -> b, b (b: whole, a: exchanged)",
    ]


# --- what rules say

F = floats
RULE_TEXTS: list[tuple[str, Callable[..., Any], tuple[Any, ...], str]] = [
    ("add", lambda x: x + 1, (F(4, 5),), "a b,  -> a b"),
    ("dot_general", jnp.matmul, (F(4, 5), F(5, 3)), "a c, c b -> a b  (c: sum)"),
    (
        "dot_general", lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k),
        (F(2, 4, 3, 8), F(2, 5, 3, 8)),
        "a c b e, a d b e -> a b c d  (e: sum)",
    ),
    ("reduce_max", lambda x: x.max(1), (F(4, 5),), "a b -> a  (b: max)"),
    ("argmax", lambda x: x.argmax(1), (F(4, 5),), "a b -> a  (b: exchanged)"),
    ("broadcast_in_dim", lambda x: jnp.broadcast_to(x, (3, 4, 5)), (F(4, 5),), "b c -> a b c"),
    ("reshape", lambda x: x.reshape(4, 6), (F(24),), "(a b) -> a b"),
    ("reshape", lambda x: x.reshape(12, 2, 1, 5), (F(2, 12, 5),), "a (b c) d -> (a b) c () d"),
    ("reshape", lambda x: lax.reshape(x, (4, 2, 3), (1, 0)), (F(6, 4),), "(b c) a -> a b c"),
    ("reshape", lambda x: x.reshape(2, 3), (F(3, 2),),
     "a d -> b c  (a: whole, b: whole, c: whole, d: whole)"),
    ("slice", lambda x: x[:, ::2], (F(3, 8),), "a b -> a b  (b: exchanged)"),
    ("slice", lambda x: x[:, 2:4], (F(3, 8),), "a b -> a c  (b: sum, c: whole)"),
    ("concatenate", lambda x: jnp.concatenate([x, x], 1), (F(3, 4),),
     "a b, a b -> a b  (b: exchanged)"),
    ("iota", lambda: lax.iota("int32", 5), (), " -> a"),
    ("random_bits", lambda k: jax.random.bits(k, (4, 5)), (jax.random.key(0),), " -> a b"),
    ("gather", lambda x, i: x[i], (F(7, 4), ints(2, 3)), "c d, a b e -> a b d  (c: sum, e: whole)"),
    ("scatter-add", lambda x, i, y: x.at[i].add(y), (F(7, 4), ints(3), F(3, 4)),
     "b c, a d, a c -> b c  (a: sum, d: whole)"),
    ("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 5)), (F(8, 5), np.int32(1)),
     "a c, ,  -> b c  (a: sum)"),
    ("dynamic_update_slice", lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 0)),
     (F(8, 5), F(1, 5), np.int32(1)), "a b, c b, ,  -> a b  (c: whole)"),
    ("conv_general_dilated", lambda x, y: lax.conv(x, y, (1, 1), "SAME"),
     (F(2, 3, 8, 8), F(4, 3, 3, 3)),
     "a b d f, c b e g -> a c d f  (b: sum, e: whole, g: whole, d: exchanged, f: exchanged)"),
    ("ragged_dot_general", lax.ragged_dot, (F(6, 4), F(3, 4, 5), ints(3)),
     "a d, c d b, e -> a b  (a: whole, c: whole, d: sum, e: whole)"),
    ("sort", lambda x: lax.sort(x, dimension=1), (F(3, 4),), "a b -> a b  (b: exchanged)"),
    ("cholesky", lambda x: lax.linalg.cholesky(x, symmetrize_input=False), (F(3, 4, 4),),
     "a b c -> a d e  (b: whole, c: whole, d: whole, e: whole)"),
]  # fmt: skip


@pytest.mark.parametrize(("primitive", "fn", "args", "text"), RULE_TEXTS)
def test_text(primitive: str, fn: Callable[..., Any], args: tuple[Any, ...], text: str) -> None:
    assert str(case_of(Sample(primitive, fn, args)).rule) == text


LEVELS = {
    "add": (0, 0),
    "transpose": (0, 0),
    "dot_general": (1, 1),
    "broadcast_in_dim": (3, 2),
    "concatenate": (0, 1),
    "dynamic_slice": (0, 1),
    "dynamic_update_slice": (0, 1),
}


def test_levels() -> None:
    found = {
        sample.primitive: (case_of(sample).rule.forward, case_of(sample).rule.backward)
        for sample in sampled()
        if sample.primitive in LEVELS and isinstance(sample, Sample)
    }
    assert found == LEVELS


def test_an_unknown_op_is_whole() -> None:
    x, y = (Value(i, (2, 3), np.dtype("float32")) for i in range(2))
    assert str(factor_rule(Op("mystery", (x,), (y,)))) == (
        "a b -> c d  (a: whole, b: whole, c: whole, d: whole)"
    )


def test_random_counters_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The position in an array of 2^43 elements, by two 32-bit words."""
    shape, local = (2**13, 3, 2**30 + 7), (2, 3, 2)
    run = functools.partial(flat_positions, shape, local, (("x",), (), ("y",)))
    devices = (2**12, 2**29 + 4)
    monkeypatch.setattr(
        lax, "axis_index", lambda names: jnp.int32(devices["xy".index(names[0])] - 1)
    )
    high, low = (np.asarray(x, np.uint64) for x in run())
    first = ((devices[0] - 1) * 2, 0, (devices[1] - 1) * 2)
    i, j, k = np.meshgrid(*(np.arange(n) + start for n, start in zip(local, first, strict=True)),
                          indexing="ij")  # fmt: skip
    expected = (i * shape[1] + j) * shape[2] + k
    np.testing.assert_array_equal(high << np.uint64(32) | low, expected.astype(np.uint64))


# --- texts and the registry


def test_parse_reads_compound_dims() -> None:
    made = FactorRule.parse("(a b) _ -> a b", [(6, 5)], [(2, 3)], linear=((0,),))
    assert (made.ins, made.outs) == (((((0, 1), (2,)),)), (((0,), (1,)),))
    assert (made.sizes, made.kinds, made.linear) == ((2, 3, 5), ("pass", "pass", "whole"), ((0,),))
    assert str(made) == "(a b) _ -> a b  (_: whole)"


def test_parse_sums_what_the_results_lack() -> None:
    made = FactorRule.parse("i k, k j -> i j", [(2, 3), (3, 4)], [(2, 4)])
    assert str(made) == "i k, k j -> i j  (k: sum)"
    assert str(FactorRule.parse("i k -> i", [(2, 3)], [(2,)], {"k": "max"})) == "i k -> i  (k: max)"


@pytest.mark.parametrize(
    ("text", "ins", "outs", "options", "message"),
    [
        ("a b", [(2, 3)], [], {}, "a factor rule has one '->', got 'a b'."),
        ("(a b -> a", [(2,)], [(2,)], {}, "unbalanced parentheses in the factor rule '(a b -> a'."),
        ("a) -> a", [(2,)], [(2,)], {}, "unbalanced parentheses in the factor rule 'a) -> a'."),
        ("a -> a", [(2,), (2,)], [(2,)], {},
         "factor rule 'a -> a' has 1 operands, the op has 2."),
        ("a b -> a", [(2,)], [(2,)], {},
         "factor rule 'a b -> a': operand 0 has 2 dims, the op's has 1, shape (2,)."),
        ("a -> a", [(2,)], [(3,)], {},
         "factor rule 'a -> a': (a) has size 2, but the dim has size 3."),
        ("(a b) -> (b a)", [(6,)], [(6,)], {},
         "factor rule '(a b) -> (b a)': the sizes of ['a', 'b'] in a dim of size 6 are ambiguous; "
         "give them with `sizes`."),
        ("(a b) -> (b a)", [(6,)], [(6,)], {"sizes": {"a": 4}},
         "factor rule '(a b) -> (b a)': 4 does not divide a dim of size 6."),
        ("a b -> a", [(2, 3)], [(2,)], {"kinds": {"b": "mean"}},
         "factor rule 'a b -> a': factor 'b' has kind 'mean'; a kind is one of pass, sum, max, "
         "min, prod, and, or, xor, whole."),
    ],
)  # fmt: skip
def test_parse_says_what_does_not_fit(
    text: str, ins: Any, outs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuleError) as error:
        FactorRule.parse(text, ins, outs, **options)
    assert str(error.value) == message


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table as it is, restored after the test."""
    for name in ("swirl",):
        monkeypatch.setitem(RULES, name, OpRule(gathered))
        monkeypatch.delitem(RULES, name)


@pytest.mark.usefixtures("table")
def test_register_rule() -> None:
    register_rule("swirl", "i k, k j -> i j", kinds={"k": "max"})
    shapes = [(2, 3), (3, 4), (2, 4)]
    x, y, z = (Value(i, shape, np.dtype("float32")) for i, shape in enumerate(shapes))
    assert str(factor_rule(Op("swirl", (x, y), (z,)))) == "i k, k j -> i j  (k: max)"
    with pytest.raises(RuleError, match="this primitive has a rule already"):
        register_rule("swirl", "i k, k j -> i j")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("i k", {}, "has one '->', got 'i k'"),
        ("(i -> i", {}, "unbalanced parentheses"),
        ("i -> i", {"kind": {"i": "sum"}}, "no option 'kind'"),
    ],
)
@pytest.mark.usefixtures("table")
def test_register_rule_refuses(text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        register_rule("swirl", text, **options)
    assert "swirl" not in RULES


def test_a_rule_is_registered_once() -> None:
    with pytest.raises(RuleError, match="primitive 'add' already has a rule"):
        rule("add")(gathered)
