"""Misuse of the library: each is one error, whose text says what, where, and what to do."""

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.sharding import AxisType, NamedSharding

import gspmd
from gspmd import ArgumentError, GspmdError, MeshError, P, RuleError, SpecError, TraceError
from gspmd.arguments import OPTIONS
from gspmd.testing import assert_equivalent

MESH = "x=2,y=4"
A, B = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
ONES = np.ones((8, 16), np.float32)
Pair = namedtuple("Pair", "w b")


def product(a: Any, b: Any) -> Any:
    return a @ b


def double(a: Any) -> Any:
    return a * 2


def plan(fn: Callable[..., Any], *args: Any, **options: Any) -> gspmd.Plan:
    return gspmd.plan(fn, *args, **{"mesh": MESH, **options})


@functools.cache
def planned() -> gspmd.Plan:
    def layer(params: Any, x: Any) -> Any:
        return x @ params["w"]

    specs = ({"w": P("x")}, P(None, "x"))
    return plan(layer, {"w": B}, A, in_specs=specs)


def devices(**axes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def fails_with(error: Exception) -> Callable[[Any], Any]:
    def layer(a: Any) -> Any:
        raise error

    return layer


def new_primitive() -> Primitive:
    made = Primitive(f"mine_{next(_NUMBERS)}")
    made.def_abstract_eval(lambda a, b: jax.core.ShapedArray((a.shape[0], b.shape[1]), a.dtype))
    return made


_NUMBERS = iter(range(1000))


def with_rule(text: Any, **options: Any) -> gspmd.Plan:
    primitive = new_primitive()
    gspmd.register_rule(primitive, text, **options)
    return plan(lambda a, b: primitive.bind(a, b), A, B, in_specs=(P("x"), P(None, "y")))


def refused(misuse: Callable[[], Any], error: type[GspmdError], fragments: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        misuse()
    text = str(caught.value)
    for fragment in fragments:
        assert fragment in text
    assert text.endswith((".", "?"))
    assert "\n" not in text, "one sentence"
    assert "gspmd/" not in text, "no word of our own files"


Case = tuple[Callable[[], Any], tuple[str, ...]]

SPECS: dict[str, Case] = {
    "too long": (
        lambda: plan(product, A, B, in_specs=(P("x", None, "y"), None)),
        ("in_specs for a", "has 3 entries", "2 dims", "drop 1"),
    ),
    "an axis twice": (
        lambda: plan(product, A, B, in_specs=(P("x", "x"), None)),
        ("in_specs for a", "dim 0 and dim 1", "mesh axis 'x'", "drop it from one"),
    ),
    "an axis twice in a dim": (
        lambda: plan(product, A, B, in_specs=(P(("x", "x")), None)),
        ("dim 0", "'x' twice"),
    ),
    "an axis twice through rules": (
        lambda: plan(
            product, A, B, in_specs=(P("b", "e"), None), rules={"b": "x", "e": ("y", "x")}
        ),
        ("dim 0 (as 'b') and dim 1 (as 'e')", "mesh axis 'x'"),
    ),
    "unknown axis": (
        lambda: plan(product, A, B, in_specs=(None, P(None, "z"))),
        ("in_specs for b", "dim 1", "'z'", "x=2, y=4", "there are no rules"),
    ),
    "unknown logical name": (
        lambda: plan(product, A, B, in_specs=(P("btch"), None), rules={"batch": "x"}),
        ("'btch'", "the rules know batch", "did you mean 'batch'?"),
    ),
    "too few": (
        lambda: plan(product, A, B, in_specs=(P("x"),)),
        ("a tuple of 1 specs", "2 positional arguments (a, b)"),
    ),
    "of the fields of the only argument": (
        lambda: plan(lambda pair: pair.w, Pair(A, A), in_specs=Pair(P("x"), None)),
        ("a Pair of 2 specs", "1 positional arguments (pair)"),
    ),
    "a typo in the tree": (
        lambda: plan(lambda p: p["w"], {"w": A}, in_specs=({"v": P("x")},)),
        ("in_specs for 'p'", "lacks w", "has v"),
    ),
    "no spec at all": (
        lambda: plan(product, A, B, in_specs="x"),
        ("got 'x' of type str", "write P('data')"),
    ),
    "owed sums going in": (
        lambda: plan(product, A, B, in_specs=(P("x", unreduced={"y"}), None)),
        ("in_specs for a: P('x', unreduced={'y'})", "drop unreduced"),
    ),
    "owed sums coming out": (
        lambda: plan(product, A, B, out_specs=P("x", unreduced={"y"})),
        ("out_specs for out", "drop unreduced"),
    ),
    "results of another tree": (
        lambda: plan(product, A, B, out_specs=(P("x"), P("y"))),
        ("out_specs", "a tuple of 2 specs", "one array here"),
    ),
    "another mesh": (
        lambda: plan(product, A, B, in_specs=(NamedSharding(devices(x=4, y=2), P("x")), None)),
        ("in_specs for a", "x=4, y=2", "x=2, y=4", "use one mesh"),
    ),
    "a scalar that is split": (
        lambda: plan(lambda s: s, 2.0, in_specs=(P("x"),)),
        ("in_specs for s", "has 1 entries", "0 dims"),
    ),
    "rules for an axis that there is not": (
        lambda: plan(product, A, B, rules={"batch": "z"}),
        ("rules['batch']", "'z'", "x=2, y=4"),
    ),
    "rules that are no table": (
        lambda: plan(product, A, B, rules=[("batch", "x")]),
        ("rules must map", "of type list", "write {"),
    ),
    "a rule of a number": (
        lambda: plan(product, A, B, rules={"batch": 3}),
        ("rules['batch'] is 3 of type int", "write a mesh axis"),
    ),
    "a rule of a table": (
        lambda: plan(product, A, B, rules={"batch": {"x": 2}}),
        ("rules['batch'] is {'x': 2} of type dict",),
    ),
    "annotate with a list": (
        lambda: gspmd.annotate(ONES, ["x"]),
        ("annotate at ", "test_errors.py:", "['x'] of type list", "write P("),
    ),
    "annotate too long": (
        lambda: gspmd.annotate(ONES, P("x", None, None)),
        ("annotate at ", "has 3 entries", "(8, 16) has 2 dims", "drop 1"),
    ),
    "annotate owed sums": (
        lambda: gspmd.annotate(ONES, P(unreduced={"x"})),
        ("annotate at ", "P(unreduced={'x'})", "drop unreduced"),
    ),
    "annotate a tree": (
        lambda: gspmd.annotate({"w": ONES}, P("x")),
        ("annotate at ", "of type dict", "one by one"),
    ),
    "annotate without a rule": (
        lambda: plan(lambda a: gspmd.annotate(a, P("batch", "mlp")), A, rules={"batch": "x"}),
        ("annotate at ", "dim 1", "'mlp'", "the rules know batch"),
    ),
    "annotate on another mesh": (
        lambda: plan(lambda a: gspmd.annotate(a, NamedSharding(devices(x=8), P("x"))), A),
        ("annotate at ", "x=8", "x=2, y=4"),
    ),
    "with_sharding_constraint on another mesh": (
        lambda: plan(
            lambda a: jax.lax.with_sharding_constraint(a, NamedSharding(devices(z=8), P("z"))), A
        ),
        ("with_sharding_constraint at ", "z=8", "x=2, y=4"),
    ),
    "effort": (lambda: plan(product, A, B, effort=7), ("effort=7", "0, 1 or 2")),
    "options": (
        lambda: plan(product, A, B, options={"target": "tpu"}),
        ("options={'target': 'tpu'}", "gspmd.Options(...)"),
    ),
    "target": (
        lambda: plan(product, A, B, options=gspmd.Options(target="npu")),  # pyright: ignore[reportArgumentType]
        ("target='npu'", "None, tpu, gpu or cpu"),
    ),
    "overlap": (
        lambda: plan(product, A, B, options=gspmd.Options(overlap="yes")),  # pyright: ignore[reportArgumentType]
        ("overlap='yes'", "none, auto or always"),
    ),
    "reduction": (
        lambda: plan(product, A, B, options=gspmd.Options(reduction="bf16")),  # pyright: ignore[reportArgumentType]
        ("reduction='bf16'", "as written or narrow"),
    ),
    "room": (
        lambda: plan(product, A, B, options=gspmd.Options(room=-1)),
        ("room=-1", "a number of bytes, 0 or more, or None"),
    ),
    "room in words": (
        lambda: plan(product, A, B, options=gspmd.Options(room="1GB")),  # pyright: ignore[reportArgumentType]
        ("room='1GB'", "a number of bytes, 0 or more, or None"),
    ),
    "shard_update": (
        lambda: plan(product, A, B, options=gspmd.Options(shard_update=1)),  # pyright: ignore[reportArgumentType]
        ("shard_update=1", "True or False"),
    ),
}

MESHES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "empty": ("", ("'' is not NAME=SIZE",)),
    "no size": ("x", ("'x' is not NAME=SIZE", 'write "data=256,model=8"')),
    "no number": ("x=a", ("'x=a' is not NAME=SIZE",)),
    "size zero": ("x=0", ("mesh axis 'x' has size 0",)),
    "negative": ({"x": -2}, ("mesh axis 'x' has size -2",)),
    "size of text": ({"x": "2"}, ("mesh axis 'x' has size '2'",)),
    "twice": ("x=2,x=4", ("distinct names",)),
    "a part of an axis": ("x:0=2", ("'x:0' is not a name",)),
    "no axes": ({}, ("no axes",)),
    "a number": (8, ("got 8 of type int",)),
    "none": (None, ("got None",)),
    "too many devices": ("x=1000000000000", ("1000000000000 devices", "2147483647")),
}

TRACES: dict[str, Case] = {
    "python if": (
        lambda: plan(lambda a: a if a.sum() > 0 else -a, A),
        ("does not trace at ", "test_errors.py:", "jax.lax.cond"),
    ),
    "numpy on a tracer": (
        lambda: plan(lambda a: np.sin(a), A),
        ("does not trace at ", "jax.numpy in place of numpy"),
    ),
    "shapes that do not match": (
        lambda: plan(product, A, A),
        ("product does not trace at ", "(16,) and (8,)"),
    ),
    "too few arguments": (
        lambda: plan(product, A),
        ("product(a: Any, b: Any)", "1 positional", "'b'"),
    ),
    "an option misspelt": (
        lambda: plan(product, A, B, in_spec=P("x")),
        ("'in_spec'", "did you mean 'in_specs'?"),
    ),
    "a string comes out": (
        lambda: plan(lambda a: {"loss": a, "name": "mlp"}, A),
        ("returns at out/name something of type str",),
    ),
    "a string goes in": (
        lambda: plan(lambda a, s: a, A, "gelu"),
        ("'s' is 'gelu' of type str", "static_argnums"),
    ),
    "KeyError": (
        lambda: plan(fails_with(KeyError("layer")), A),
        ("layer does not trace at ", "test_errors.py:", "KeyError: 'layer'"),
    ),
    "AssertionError": (
        lambda: plan(fails_with(AssertionError()), A),
        ("layer does not trace at ", "AssertionError."),
    ),
    "ValueError": (lambda: plan(fails_with(ValueError("heads")), A), ("does not trace", "heads.")),
    "no function": (lambda: plan(3, A), ("takes a function", "got 3 of type int")),
    "no function to partition": (lambda: gspmd.partition(MESH, product), ("takes a function",)),
    "static argument out of range": (
        lambda: plan(product, A, B, static_argnums=5),
        ("static_argnums names argument 5 of product", "-2 to 1"),
    ),
    "static argument by name": (
        lambda: plan(product, A, B, static_argnums="b"),
        ("static_argnums='b'", "such as 0 or (0, 1)"),
    ),
    "donated argument by a float": (
        lambda: plan(product, A, B, donate_argnums=(1.0,)),
        ("donate_argnums=(1.0,)",),
    ),
    "static argument without a hash": (
        lambda: gspmd.partition(lambda a, n: a * n[0], MESH, static_argnums=1)(ONES, [3]),
        ("cannot be hashed", "Make it a tuple"),
    ),
    "a value of another trace": (lambda: leaked(), ("escaped", "return it")),
    "shard_map inside": (
        lambda: plan(
            lambda a: jax.shard_map(
                double, mesh=devices(x=4, y=2), in_specs=P("x"), out_specs=P("x")
            )(a),
            A,
        ),
        ("the shard_map at ", "test_errors.py:", "the mesh x=4, y=2", "call it outside"),
    ),
    "partition inside": (
        lambda: plan(gspmd.partition(double, {"z": 2}), A),
        ("the mesh z=2, and the plan is for", "call it outside"),
    ),
    "forward mode": (
        lambda: jax.jvp(gspmd.partition(double, MESH), (ONES,), (ONES,)),
        ("no forward-mode derivative", "differentiate first"),
    ),
}


def leaked() -> gspmd.Plan:
    kept: list[Any] = []

    def keep(a: Any) -> Any:
        kept.append(a)
        return a

    plan(keep, A)
    return plan(lambda a: a + kept[0], A)


def donating(*args: Any) -> Any:
    add = gspmd.partition(lambda a, b: (a + 1, b + 1), MESH, donate_argnums=(0, 1))
    return add(*args)


def twice(x: Any, mesh: Any) -> Any:
    """The second call with an argument that the first one was given."""
    add = gspmd.partition(lambda a: a + 1, mesh, in_specs=P("x"), donate_argnums=0)
    x = add(x)
    add(x)
    return add(x)


def static(*args: Any) -> Any:
    return plan(lambda a, n: a * n, A, 3, static_argnums=1).simulate(*args)


CALLS: dict[str, Case] = {
    "another shape": (
        lambda: planned().run({"w": ONES}, ONES),
        ("layer: argument params/w", "(16, 32)", "(8, 16)", "plan again"),
    ),
    "another dtype": (
        lambda: planned().simulate({"w": np.ones((16, 32), np.int32)}, ONES),
        ("argument params/w", "f32[16,32]", "i32[16,32]", "convert it"),
    ),
    "another tree": (
        lambda: planned().run({"v": ONES}, ONES),
        ("lacks params/w and adds params/v", "plan again"),
    ),
    "too few": (lambda: planned().run({"w": ONES}), ("lacks x",)),
    "by keyword": (lambda: planned().run({"w": ONES}, x=ONES), ("by keyword",)),
    "a list of numbers": (
        lambda: planned().run({"w": ONES}, ONES.tolist()),
        ("lacks x and adds x/0/0", "and 124 more"),
    ),
    "a shape only": (lambda: planned().run({"w": B}, A), ("params/w", "holds no numbers")),
    "a string": (lambda: planned().run({"w": "w"}, ONES), ("params/w", "of type str")),
    "an array of objects": (
        lambda: planned().run({"w": np.full((16, 32), None)}, ONES),
        ("params/w", "object[16,32]"),
    ),
    "a scalar that does not fit": (
        lambda: plan(lambda n: n + 1, 2).run(2.7),
        ("argument n", "i32[]", "2.7"),
    ),
    "a scalar that is too large": (
        lambda: plan(lambda n: n + 1, 2).simulate(2**40),
        ("i32[]", "1099511627776"),
    ),
    "another static argument": (
        lambda: static(ONES, 4),
        ("static argument at position 1", "planned as 3", "called with 4"),
    ),
    "no static argument": (lambda: static(ONES), ("planned as 3", "called without it")),
    "a donated array": (lambda: twice(ONES, MESH), ("argument a has been deleted", "donate")),
    "a donated uneven array": (
        lambda: twice(np.ones(7, np.float32), "x=3"),
        ("argument a has been deleted", "donate"),
    ),
    "one array donated twice": (
        lambda: donating(*[jnp.ones((8, 16))] * 2),
        ("arguments a and b are the same array", "jnp.copy"),
    ),
    "shapes where values are compared": (
        lambda: assert_equivalent(double, A, mesh=MESH),
        ("argument a", "holds no numbers"),
    ),
}

PLACES: dict[str, Case] = {
    "a device outside the mesh": (
        lambda: plan(double, A, mesh="x=2").run(jax.device_put(ONES, jax.devices()[5])),
        ("argument a lies on cpu:5", "cpu:0, cpu:1", "jax.device_put"),
    ),
    "too few devices": (
        lambda: plan(double, A, mesh="x=16", in_specs=P("x")).run(ONES),
        ("needs 16 devices", "has 8", "plan.simulate"),
    ),
    "another mesh to compile for": (
        lambda: plan(double, A).compile(devices(x=4, y=2)),
        ("x=2,y=4", "x=4,y=2"),
    ),
    "no mesh to compile for": (
        lambda: plan(double, A).compile(("v5e", "2x4")),
        ("('v5e', '2x4') of type tuple", "jax.experimental.topologies", '"tpu-v5e:2x4"'),
    ),
}

QUESTIONS: dict[str, Case] = {
    "why 0": (lambda: planned().why(0), ("no collective #0", "has 1", "from 1")),
    "why 9999": (lambda: planned().why(9999), ("no collective #9999", "has 1")),
    "why a line": (lambda: planned().why("nosuch.py:3"), ("'nosuch.py:3'", "print(plan)")),
    "why a typo": (lambda: planned().why("params/v"), ("did you mean 'params/w'?",)),
    "why None": (lambda: planned().why(None), ("None of type NoneType", "params/wi")),
    "sharding of a typo": (lambda: planned().sharding("parms/w"), ("did you mean 'params/w'?",)),
    "sharding of a number": (lambda: planned().sharding(1), ("1 of type int",)),
}

RULES: dict[str, Case] = {
    "no arrow": (lambda: with_rule("i k, k j"), ("one '->'",)),
    "parentheses": (lambda: with_rule("(i k, k j -> i j"), ("unbalanced parentheses",)),
    "operands": (
        lambda: with_rule("i k, k j, j -> i j"),
        (" at ", "test_errors.py:", "3 operands, the op has 2"),
    ),
    "dims": (lambda: with_rule("i, k j -> i j"), ("operand 0 has 1 dims", "(8, 16)")),
    "sizes": (lambda: with_rule("i k, i j -> i j"), ("(i) has size 8", "size 16")),
    "from nowhere": (lambda: with_rule("i k, k j -> i z"), ("'z'", "in no operand")),
    "dots": (lambda: with_rule("... k, k j -> ... j"), ("'...'", "is no factor")),
    "no text": (lambda: with_rule(3), ("register_rule(", "i k, k j -> i j")),
    "no primitive": (lambda: gspmd.register_rule(3, "i -> i"), ("register_rule(3,",)),
    "a second rule": (
        lambda: gspmd.register_rule("dot_general", "i k, k j -> i j"),
        ("register_rule('dot_general')", "has a rule already"),
    ),
    "kinds": (
        lambda: with_rule("i k, k j -> i j", kinds={"k": "sume"}),
        ("'sume'", "sum, max"),
    ),
    "kinds of another factor": (
        lambda: with_rule("i k, k j -> i j", kinds={"q": "max"}),
        ("kinds names 'q'",),
    ),
    "an option": (lambda: with_rule("i k, k j -> i j", kind={}), ("no option 'kind'", "kinds")),
    "linear": (lambda: with_rule("i k, k j -> i j", linear=((5,),)), ("it has 2",)),
}


def cases(table: dict[str, Case]) -> Any:
    return pytest.mark.parametrize(("misuse", "fragments"), list(table.values()), ids=list(table))


@cases(SPECS)
def test_specs_and_rules(misuse: Callable[[], Any], fragments: tuple[str, ...]) -> None:
    refused(misuse, SpecError, fragments)


@pytest.mark.parametrize(("mesh", "fragments"), list(MESHES.values()), ids=list(MESHES))
def test_meshes(mesh: Any, fragments: tuple[str, ...]) -> None:
    refused(lambda: plan(product, A, B, mesh=mesh), MeshError, fragments)


@cases(TRACES)
def test_functions(misuse: Callable[[], Any], fragments: tuple[str, ...]) -> None:
    refused(misuse, TraceError, fragments)


@cases(CALLS)
def test_calls(misuse: Callable[[], Any], fragments: tuple[str, ...]) -> None:
    refused(misuse, ArgumentError, fragments)


@cases(PLACES)
def test_places(misuse: Callable[[], Any], fragments: tuple[str, ...]) -> None:
    refused(misuse, MeshError, fragments)


@cases(QUESTIONS)
def test_questions(misuse: Callable[[], Any], fragments: tuple[str, ...]) -> None:
    refused(misuse, GspmdError, fragments)


@cases(RULES)
def test_factor_rules(misuse: Callable[[], Any], fragments: tuple[str, ...]) -> None:
    refused(misuse, RuleError, fragments)


def test_the_own_exception_of_a_function_is_the_cause() -> None:
    own = KeyError("layer")
    with pytest.raises(TraceError) as caught:
        plan(fails_with(own), A)
    assert caught.value.__cause__ is own


def test_options_are_those_of_plan() -> None:
    for fn in (gspmd.plan, gspmd.partition):
        parameters = inspect.signature(fn).parameters.values()
        keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert keywords | {"mesh"} == set(OPTIONS)


# ---- unusual, and fine ----

DTYPES = (
    "bool", "int8", "uint8", "int16", "uint32", "float16", "bfloat16", "float8_e4m3fn",
    "float8_e5m2", "complex64",
)  # fmt: skip
FLOATS = np.arange(128, dtype=np.float32).reshape(8, 16)
X, Y = P("x"), P("y")

FINE: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any, Any]] = {
    "no elements": (lambda a: (a * 2, a.sum(0)), (FLOATS[:0],), X, None),
    "a contraction over nothing": (product, (FLOATS[:, :0], FLOATS[:0]), (X, Y), None),
    "an empty tree": (lambda t, a: (t, a + 1), ({}, FLOATS), (None, X), None),
    "None in and out": (lambda t, a: (a, None, {"q": None}), (None, FLOATS), (None, X), None),
    "no arguments": (lambda: jnp.ones(4), (), None, None),
    "no results": (lambda a: None, (FLOATS,), X, None),
    "the input": (lambda a: a, (FLOATS,), X, Y),
    "the input twice": (lambda a: (a, a), (FLOATS,), X, (X, Y)),
    "a constant": (lambda a: jnp.arange(8), (FLOATS,), None, X),
    "Python's numbers": (lambda i, f: (i + 1, f * 2, 1, 2.0, True), (1, 2.0), None, None),
    "a typed key": (lambda k: jax.random.normal(k, (8, 16)), (jax.random.key(0),), None, X),
    "a raw key": (lambda k: jax.random.normal(k, (8, 16)), (jax.random.PRNGKey(0),), None, X),
    "keys out": (lambda k: jax.random.split(k, 8), (jax.random.key(0),), None, X),
    "an argument by its defaults": (lambda a, b=3.0: a + b, (FLOATS,), X, None),
    "any number of arguments": (lambda *xs: sum(xs), (FLOATS, FLOATS), (X, Y), None),
    "a namedtuple": (
        lambda p: Pair(p.w, p.b + 1), (Pair(FLOATS, FLOATS),), (Pair(X, Y),), Pair(Y, X),
    ),
    "a deep tree": (
        lambda t: functools.reduce(lambda t, _: t["k"][0], range(100), t) + 1,
        (functools.reduce(lambda t, _: {"k": [t]}, range(100), FLOATS),), X, Y,
    ),
    "more devices than rows": (lambda a: a.max(0), (FLOATS[:1],), Y, None),
    **{
        kind: (lambda a: (a, a.T, a[:7]), (FLOATS.astype(jnp.dtype(kind)),), X, (P(), X, Y))
        for kind in DTYPES
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "args", "in_specs", "out_specs"), list(FINE.values()), ids=list(FINE)
)
def test_unusual_and_fine(
    fn: Callable[..., Any], args: tuple[Any, ...], in_specs: Any, out_specs: Any
) -> None:
    made = plan(fn, *args, in_specs=in_specs, out_specs=out_specs)
    expected = fn(*args)
    for found in (made.simulate(*args), made.run(*args)):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(_plain(mine), _plain(theirs))


def _plain(x: Any) -> np.ndarray:
    x = jnp.asarray(x)
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def test_keywords() -> None:
    made = plan(lambda a, *, b: a - b["c"], ONES, b={"c": ONES}, in_specs=X)
    assert not made.run(ONES, b={"c": ONES}).any()
