"""Misuse of rules, `gspmd.testing`, `strict` and regions: one clear error, and nothing lost."""

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType

import gspmd
from gspmd import GspmdError, P, StrictError
from gspmd.rules.factor import RULES
from gspmd.testing import assert_equivalent, assert_equivalent_shrunk, meshes, programs, specs

MESH = "x=2,y=4"
MATMUL = "i k, k j -> i j"
_NUMBERS = itertools.count()


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def double(x: Any) -> Any:
    return x * 2


def product(a: Any, b: Any) -> Any:
    return a @ b


def primitive_of(fn: Callable[..., Any]) -> Primitive:
    """A new primitive that computes `fn`."""
    made = Primitive(f"misused_{next(_NUMBERS)}")

    def shape_of(*avals: Any, **params: Any) -> Any:
        found = jax.eval_shape(functools.partial(fn, **params), *avals)
        return ShapedArray(found.shape, found.dtype)

    made.def_abstract_eval(shape_of)
    mlir.register_lowering(made, mlir.lower_fun(fn, multiple_results=False))
    return made


def rule(text: Any, fn: Callable[..., Any] = jnp.matmul, **options: Any) -> None:
    gspmd.register_rule(primitive_of(fn), text, **options)


def shrunk(fn: Callable[..., Any] = double, **options: Any) -> Any:
    return assert_equivalent_shrunk(fn, floats(64), mesh="x=8", in_specs=P("x"), **options)


def region(inside: Callable[..., Any], in_specs: Any = None, **axes: int) -> Any:
    """`inside` on every device of a mesh, as a planned function would hold it."""
    axes = axes or {"x": 2, "y": 4}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))
    fn = jax.shard_map(inside, mesh=mesh, in_specs=in_specs or P("x"), out_specs=P())
    return lambda x: fn(x)


def planned(fn: Callable[..., Any], x: Any, spec: Any = None, **options: Any) -> gspmd.Plan:
    options = {"mesh": MESH, "in_specs": (spec,), **options}
    return gspmd.plan(fn, x, **options)


pytestmark = pytest.mark.usefixtures("rule_table")


Case = tuple[Callable[[], Any], str]  # the misuse, and what its error says, as a pattern

RULE: dict[str, Case] = {
    "no primitive": (lambda: gspmd.register_rule(jnp.sin, "i -> i"), r"give a .*Primitive"),
    "a rule of JAX's": (lambda: gspmd.register_rule("add", "i, i -> i"), r"another name"),
    "no text": (lambda: rule(""), r"misused_\d+'\): a factor rule has one '->', got ''"),
    "unbalanced": (lambda: rule("(i -> i"), r"misused_\d+'\): unbalanced parentheses .*'\(i -> i'"),
    "an ellipsis": (lambda: rule("... -> ..."), r"'\.\.\.' .* is no factor"),
    "out of nothing": (lambda: rule("i k -> i j"), r"factor 'j' .* is in no operand.* write _"),
    "rank": (lambda: rule("i k l, k j -> i j"), r"result 0 has 2 dims, the op's has 3"),
    "results": (lambda: rule(MATMUL + ", i"), r"has 2 results, the op has 1"),
    "the wrong dim": (lambda: rule("i k, k j -> j i"), r"\(j\) has size 18, .* has size 6"),
    "a mean": (
        lambda: rule("k i -> i", lambda x: x.mean(0)),
        r"factor 'k' is reduced by sum.* split in 2: result 0 is \S+ at .*, and \S+ whole; give",
    ),
    "neighbors": (
        lambda: rule("i -> i", lambda x: x + jnp.roll(x, 1)),
        r"factor 'i' passes.* result 0 is \S+ at .* from its pieces, and \S+ whole; .* write _",
    ),
    "one name for two dims": (
        lambda: rule("i i -> i i", lambda x: x + x.T),
        r"factor 'i' .*on a piece it does not run: .*\(3, 6\), \(6, 3\); .* write _",
    ),
    "unknown kind": (lambda: rule(MATMUL, kinds={"k": "mean"}), r"'k' has kind 'mean'; .* sum, "),
    "kind of an unknown factor": (lambda: rule(MATMUL, kinds={"q": "max"}), r"'q', which is not"),
    "kinds in a list": (lambda: rule(MATMUL, kinds=[("k", "max")]), r'of the form kinds=\{"k": '),
    "no size": (lambda: rule(MATMUL, sizes={"k": 0}), r"'k' has size 0; a size is at least 1"),
    "a negative size": (lambda: rule(MATMUL, sizes={"k": -4}), r"'k' has size -4"),
    "ambiguous sizes": (lambda: rule("(a b) -> (a b)", double), r"\['a', 'b'\].* `sizes`"),
    "unknown option": (lambda: rule(MATMUL, kind={"k": "sum"}), r"no option 'kind'; .* kinds, "),
    "linear, no groups": (lambda: rule(MATMUL, linear=(0,)), r"linear=\(0,\) .* form \(\(0, 1\)"),
    "linear, a number": (lambda: rule(MATMUL, linear=0), r"linear=0 is not of the form"),
    "linear in what is not there": (lambda: rule(MATMUL, linear=((7,),)), r"it has 2, numbered"),
    "not linear": (
        lambda: rule("i -> i", lambda x: x * x, linear=((0,),)),
        r"linear=\(0,\) says .* result 0 is \S+ at .* and \S+ on their sum",
    ),
    "level": (lambda: rule(MATMUL, forward=9), r"forward=9 is no level of propagation, 0 to 3"),
    "masked": (lambda: rule(MATMUL, masked="no"), r"masked='no' is neither True nor False"),
    "params": (lambda: rule(MATMUL, params=3), r"params=3 is not of the form"),
    "an array for an example": (
        lambda: rule("i -> i", double, example=np.ones(6)),
        r"example is of type ndarray; give a tuple of the operands, \(x,\) for one",
    ),
    "a shape for an example": (
        lambda: rule(MATMUL, example=(floats(6, 6), floats(6, 6))),
        r"entry 0 of example is of type ShapeDtypeStruct.*; give an array",
    ),
    "an example that does not fit": (
        lambda: rule(MATMUL, example=(array(6, 5), array(6, 5))),
        r"does not run on example=\(float32\[6, 5\], float32\[6, 5\]\).*\(5,\) and \(6,\)",
    ),
}  # fmt: skip

TESTING: dict[str, Case] = {
    "where": (lambda: assert_equivalent(double, array(8), mesh=MESH, on="gpu"), r"on='gpu': it is"),  # pyright: ignore[reportArgumentType]
    "mesh": (lambda: assert_equivalent(double, array(8), mesh="x"), r"'x' is not NAME=SIZE; write"),
    "more devices than there are": (
        lambda: assert_equivalent(double, array(32), mesh="x=32", on="devices"),
        r"needs 32 devices, this process has 8; use plan.simulate, or",
    ),
    "arguments swapped": (
        lambda: assert_equivalent(array(8, 8), double, mesh=MESH),  # pyright: ignore[reportArgumentType]
        r"takes a function to partition first, got an object of type ndarray",
    ),
    "a plan": (
        lambda: assert_equivalent(planned(double, floats(8)), array(8), mesh=MESH),  # pyright: ignore[reportArgumentType]
        r"takes a function to partition first, got .* of type Plan",
    ),
    "a shape where a value is needed": (
        lambda: assert_equivalent(lambda p: p["w"], {"w": floats(8)}, mesh=MESH),
        r"argument p/w is a ShapeDtypeStruct.* pass an array",
    ),
    "no array": (
        lambda: assert_equivalent(double, "hello", mesh=MESH),
        r"'x' is 'hello' of type str, which is no array; .*close over it",
    ),
    "a spec too long": (
        lambda: assert_equivalent(double, array(8), mesh=MESH, in_specs=P("x", "y")),
        r"in_specs for x: .* has 2 entries, but the tensor has 1 dims; drop 1",
    ),
    "too few specs": (
        lambda: assert_equivalent(product, array(8, 8), array(8, 8), mesh=MESH, in_specs=(P(),)),
        r"a tuple of 1 specs, but there are 2 positional arguments",
    ),
    "no such gradient": (
        lambda: assert_equivalent(
            lambda x: lax.while_loop(lambda c: c.sum() > 1, lambda c: c / 2, x), array(8), mesh=MESH
        ),
        r"Reverse-mode differentiation does not work",
    ),
    "a tolerance as text": (
        lambda: assert_equivalent(double, array(8), mesh=MESH, rtol="1e-3"),  # pyright: ignore[reportArgumentType]
        r"rtol='1e-3': a tolerance is a number",
    ),
    "a negative tolerance": (
        lambda: assert_equivalent(double, array(8), mesh=MESH, atol=-1.0),
        r"atol=-1.0: .* 0 or more",
    ),
    "small_args: an array": (lambda: shrunk(small_args=array(8)), r"type ndarray; give a tuple"),
    "small_args: a shape": (lambda: shrunk(small_args=floats(8)), r"ShapeDtypeStruct; give a tup"),
    "small_args: too many": (
        lambda: shrunk(small_args=(floats(8), floats(8))),
        r"shrunken arguments f32\[8\], f32\[8\] on x=2 .*2 were given\); give small_args",
    ),
    "small_args: of another rank": (
        lambda: shrunk(small_args=(3.0,)),
        r"in_specs for x: .* has 1 entries, but the tensor has 0 dims.* give small_args",
    ),
    "small_args: of another tree": (
        lambda: assert_equivalent_shrunk(
            lambda p: p["w"], {"w": floats(64)}, mesh="x=8", small_args=({"v": floats(8)},)
        ),
        r"KeyError\('w'\)\); give small_args",
    ),
    "small_fn: no function": (lambda: shrunk(small_fn=3), r"small_fn is of type int, .*no func"),
    "small_mesh: other axes": (lambda: shrunk(small_mesh="z=2"), r"has axes z, the mesh x; give"),
    "small_mesh: larger": (lambda: shrunk(small_mesh="x=16"), r"is x=16, and the mesh x=8; give"),
    "sizes in the function": (
        lambda: shrunk(lambda x: x.reshape(8, 8)), r"\(size 6\).*\(size 64\).* give small_fn",
    ),
    "nowhere finite": (lambda: shrunk(lambda x: jnp.log(-x)), r"is nowhere finite.*small_args"),
    "no axes": (lambda: meshes(max_axes=0), r"max_axes=0\): a mesh has 1 to 4 axes"),
    "too many axes": (lambda: meshes(max_axes=5), r"max_axes=5\): a mesh has 1 to 4 axes"),
    "devices as text": (lambda: meshes("8"), r"a mesh has .* 1 device or more"),  # pyright: ignore[reportArgumentType]
    "specs of a number": (lambda: specs(8, MESH), r"specs\(8, .* a shape is a tuple of sizes"),  # pyright: ignore[reportArgumentType]
    "specs of a negative size": (lambda: specs((8, -1), MESH), r"\(8, -1\), .* such as \(8, 16\)"),
    "specs on no mesh": (lambda: specs((8,), meshes()), r"mesh must be a"),  # pyright: ignore[reportArgumentType]
    "no steps": (lambda: programs(steps=0), r"steps=0\): a program has 1 step or more"),
    "programs on no devices": (lambda: programs(mesh={"x": 0}), r"axis 'x' has size 0"),
}  # fmt: skip

ROW = floats(32)

PROGRAMS: dict[str, Case] = {
    "a region on another mesh": (
        lambda: planned(region(lambda x: lax.psum(x, "x"), x=4, y=2), ROW),
        r"shard_map at \S+ is written for the mesh x=4, y=2, and the plan is for x=2, y=4; give",
    ),
    "a region with its axes in another order": (
        lambda: planned(region(lambda x: lax.psum(x, "x"), y=4, x=2), ROW),
        r"for the mesh y=4, x=2, and the plan is for x=2, y=4; give both the same",
    ),
    "a region that its axes do not divide": (
        lambda: planned(region(lambda x: lax.psum(x, "x")), floats(33)),
        r"does not trace at \S+: .*axis 0 \(of size 33\).* axis 'x' \(of size 2\)",
    ),
    "a region with a spec too long": (
        lambda: planned(region(lambda x: lax.psum(x, "x"), P("x", "y")), ROW),
        r"P\('x', 'y'\) which has length 2, .* has rank 1",
    ),
    "an annotation over a manual axis": (
        lambda: planned(region(lambda x: lax.psum(gspmd.annotate(x, P("x")), "x")), ROW),
        r"annotate at \S+: axis 'x' is manual in the shard_map around it.* name other axes",
    ),
    "a collective outside of a region": (
        lambda: planned(lambda x: lax.psum(x, "x"), ROW), r"at \S+: .* x.* under `jax.shard_map`",
    ),
    "a partitioned function of another mesh": (
        lambda: planned(lambda x: gspmd.partition(double, "x=8")(x), ROW),
        r"at \S+ is written for the mesh x=8, and the plan is for x=2, y=4; give",
    ),
    "a carry that changes its type": (
        lambda: planned(lambda x: lax.scan(lambda c, _: (c[1:], None), x, None, 2)[0], ROW, P("x")),
        r"at \S+: .*but they differ: .*float32\[32\].*float32\[31\]",
    ),
    "padding that takes more than there is": (
        lambda: planned(lambda x: lax.pad(x, 0.0, [(-20, -20, 0)]), ROW, P("x")),
        r"at \S+: .*result shape \(-8,\).*operand shape \(32,\)",
    ),
    "top_k of too few": (
        lambda: planned(lambda x: lax.top_k(x, 40), ROW, P("x")), r"at \S+: .*k=40 .*\[32\]",
    ),
    "a slice that is too long": (
        lambda: planned(lambda x, i=0: lax.dynamic_slice(x, (i,), (40,)), ROW, P("x")),
        r"at \S+: .*\(40,\) for operand shape \(32,\)",
    ),
    "an annotation of a scalar": (
        lambda: planned(lambda x: gspmd.annotate(x.sum(), P("x")), ROW),
        r"annotate at \S+: P\('x'\) has 1 entries, .* has 0 dims; drop 1",
    ),
    "a result spec of a dim that is gone": (
        lambda: planned(lambda x: x[0], ROW, P("x"), out_specs=P("y")),
        r"out_specs for out: P\('y'\) has 1 entries, but the tensor has 0 dims; drop 1",
    ),
}  # fmt: skip

ALL = {
    f"{group}: {name}": case
    for group, table in (("rule", RULE), ("testing", TESTING), ("program", PROGRAMS))
    for name, case in table.items()
}


@pytest.mark.parametrize(("misuse", "says"), list(ALL.values()), ids=list(ALL))
def test_misuse_is_one_sentence(misuse: Callable[[], Any], says: str) -> None:
    before = dict(RULES)
    with pytest.raises(GspmdError) as caught:
        misuse()
    text = str(caught.value)
    assert re.search(says, text), text
    assert text.endswith(".")
    assert "\n" not in text
    assert "gspmd/" not in text, "no word of our own files"
    assert before == RULES, "what is refused is not registered"


def test_a_name_is_free_after_its_rule_was_refused() -> None:
    primitive = primitive_of(jnp.matmul)
    with pytest.raises(GspmdError, match="'k' is reduced by max"):
        gspmd.register_rule(primitive, MATMUL, kinds={"k": "max"})
    gspmd.register_rule(primitive, MATMUL)
    split = (P(None, "x"), P("x"))
    made = gspmd.plan(primitive.bind, floats(8, 8), floats(8, 8), mesh=MESH, in_specs=split)
    assert [c.kind for c in made.collectives] == ["all_reduce"]


def test_a_rule_that_the_first_plan_refutes_may_be_mended() -> None:
    primitive = primitive_of(lambda x: x.mean(0))
    gspmd.register_rule(primitive, "k i -> i", check=False)
    for _ in range(2):  # it stays refused until then
        with pytest.raises(GspmdError, match="'k' is reduced by sum"):
            planned(primitive.bind, floats(8, 8), P("x"))
    gspmd.register_rule(primitive, "_ i -> i")
    x = array(8, 8)
    np.testing.assert_allclose(planned(primitive.bind, x, P("x")).run(x), x.mean(0), rtol=1e-4)
    with pytest.raises(GspmdError, match="has a rule already"):
        gspmd.register_rule(primitive, "_ i -> i")


def test_strict_names_each_op_with_its_line_and_bytes() -> None:
    def ordered(a: Any) -> Any:
        lower = jnp.linalg.cholesky(a)
        return lower + jnp.linalg.eigvalsh(a + 1)

    options: dict[str, Any] = {"mesh": "x=8", "in_specs": P("x"), "out_specs": P("x")}
    with pytest.raises(StrictError) as caught:
        gspmd.plan(ordered, floats(64, 64), strict=True, **options)
    first = ordered.__code__.co_firstlineno
    head, *ops, way_out = str(caught.value).splitlines()
    assert head == "strict=True, but 2 ops can only run on gathered operands:"
    for op, name, line in zip(ops, ("cholesky", "eigh"), (first + 1, first + 2), strict=True):
        where = rf"{re.escape(Path(__file__).name)}:{line}"
        assert re.fullmatch(rf"  {name} at \S*{where} needs .* split over x: 14,336 bytes .*", op)
    assert way_out.endswith("or drop strict.")

    made = gspmd.plan(ordered, floats(64, 64), **options)  # and without strict they are findings
    assert [finding.code for finding in made.findings] == ["gathered", "gathered"]
