"""What does not fit into a pipeline is said, with both numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import SCHEDULES, array

import gspmd
from gspmd import PipelineError


def piped(w: Any = None, x: Any = None, fn: Any = None, **options: Any) -> Any:
    w = array(2, 8, 8) if w is None else w
    x = array(4, 3, 8) if x is None else x
    fn = fn or (lambda w, x, *more: (jnp.tanh(x @ w), *more) if more else jnp.tanh(x @ w))
    return gspmd.pipeline(fn, w, x, **{"stages": 2, **options})


def in_layers(fn: Any, count: int = 4, keeps: int = 0, **options: Any) -> Any:
    w = gspmd.stack_stages(array(count, 8, 8), 2)
    return piped(w, fn=gspmd.run_layers(fn, keeps), **options)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "stages": (
        lambda: piped(array(3, 8, 8)),
        r"^stage_params has 3 entries in dim 0, but there are 2 stages: give one for each; "
        r"gspmd.stack_stages deals out layers to stages\.$",
    ),
    "rounds": (
        lambda: piped(array(2, 3, 8, 8), schedule="circular", repeats=4),
        r"^stage_params has 3 entries in dim 1, but there are 4 repeats: give one for each; ",
    ),
    "no dim of rounds": (
        lambda: piped(array(2), schedule="circular", repeats=4),
        r"^stage_params has shape \(2,\): it needs a dim 1\.$",
    ),
    "parameters that differ": (
        lambda: piped({"a": array(2, 8), "b": array(3, 8)}),
        r"^stage_params\['a'\] has 2 entries in dim 0, stage_params\['b'\] has 3; they must be ",
    ),
    "sides": (
        lambda: piped(sides=array(3, 8)),
        r"^sides has 3 entries in dim 0, but there are 4 microbatches: give one for each\.$",
    ),
    "cache": (
        lambda: piped(cache=array(2, 3, 8)),
        r"^cache has 3 entries in dim 1, but there are 4 microbatches: give one for each\.$",
    ),
    "state": (
        lambda: piped(state=array(3, 8)),
        r"^state has 3 entries in dim 0, but there are 2 stages: give one for each; ",
    ),
    "no microbatch": (
        lambda: piped(x=array(0, 3, 8)),
        r"^microbatches holds none: give arrays with an entry for each\.$",
    ),
    "nothing at all": (
        lambda: piped(x={}),
        r"^microbatches holds none: give arrays with an entry for each\.$",
    ),
    "another shape": (
        lambda: piped(fn=lambda w, x: (x @ w)[:, :5]),
        r"^stage_fn returns float32\[3, 5\] for its input of float32\[3, 8\]; every stage's output "
        r"is another's input\. Put what changes the shape, such as embedding and softmax, before ",
    ),
    "another dtype": (
        lambda: piped(fn=lambda w, x: (x @ w).astype(jnp.bfloat16)),
        r"^stage_fn returns bfloat16\[3, 8\] for its input of float32\[3, 8\]; ",
    ),
    "another structure": (
        lambda: piped(fn=lambda w, x: {"y": x}),
        r"^stage_fn returns PyTreeDef\(\{'y': \*\}\) for its input of structure PyTreeDef\(\*\); ",
    ),
    "no state": (
        lambda: piped(fn=lambda w, x, s: x, state=array(2, 8)),
        r"^stage_fn must return \(y, state\), since the pipeline has a state\.$",
    ),
    "one of two": (
        lambda: piped(fn=lambda w, x, c, s: (x, c), state=array(2, 8), cache=array(2, 4, 8)),
        r"^stage_fn must return \(y, cache, state\), since the pipeline has a cache and a state\.$",
    ),
    "another state": (
        lambda: piped(fn=lambda w, x, s: (x, s[:3]), state=array(2, 8)),
        r"^stage_fn returns float32\[3\] for the state of float32\[8\]; ",
    ),
    "schedule": (
        lambda: piped(schedule="1f1b"),
        r"^schedule='1f1b': it is 'gpipe' or 'circular'\.$",
    ),
    "repeats of gpipe": (
        lambda: piped(repeats=2),
        r"^repeats=2 is for schedule='circular'; 'gpipe' goes round once\.$",
    ),
    "no stage": (lambda: piped(stages=0), r"^stages=0: it is a whole number, at least 1\.$"),
    "half a round": (
        lambda: piped(schedule="circular", repeats=1.5),
        r"^repeats=1.5: it is a whole number, at least 1\.$",
    ),
    "too few rows": (
        lambda: gspmd.to_microbatches({"x": array(3, 2)}, 4),
        r"^a batch of 3 rows does not go into 4 microbatches: ask for 1 to 3\.$",
    ),
    "rows that differ": (
        lambda: gspmd.to_microbatches([array(3, 2), array(4, 2)], 2),
        r"^batch\[0\] has 3 entries in dim 0, batch\[1\] has 4; they must be alike\.$",
    ),
    "other rows": (
        lambda: gspmd.from_microbatches(array(4, 2, 3), 9),
        r"^9 rows are not what microbatches of shape \(4, 2, 3\) were cut from: that begins with ",
    ),
    "a count that is no whole number": (
        lambda: gspmd.to_microbatches(array(8, 2), 4.0),
        r"^count=4.0: it is a whole number, at least 1\.$",
    ),
    "a count that is a bool": (
        lambda: gspmd.to_microbatches(array(8, 2), True),
        r"^count=True: it is a whole number, at least 1\.$",
    ),
    "rows that are no whole number": (
        lambda: gspmd.from_microbatches(array(4, 2, 3), 8.0),
        r"^rows=8.0: it is a whole number, at least 1\.$",
    ),
    "layers for no stage": (
        lambda: gspmd.stack_stages(array(4, 8), 2, 0),
        r"^repeats=0: it is a whole number, at least 1\.$",
    ),
    "an empty batch": (
        lambda: gspmd.to_microbatches(None, 1),
        r"^batch holds none: give arrays with an entry for each\.$",
    ),
    "remat by name": (
        lambda: piped(remat="none"),
        r"^remat='none': it is True, False, or a policy, such as jax\.checkpoint_policies\.",
    ),
    "keys": (
        lambda: piped(x={"key": jax.random.split(jax.random.key(0), 4)}),
        r"^microbatches\['key'\] holds random keys, which are .*: pass them as `sides`\.$",
    ),
    "a state of another dtype": (
        lambda: piped(fn=lambda w, x, s: (x, {"n": s["n"] > 0}), state={"n": array(2)}),
        r"^stage_fn returns bool\[\] for the state\['n'\] of float32\[\]; what it returns takes "
        r"the place of what it was given: cast it back\.$",
    ),
    "a side that the stage does not take": (
        lambda: piped(fn=lambda w, x: x @ w, sides=array(4), state=array(2)),
        r"^stage_fn is called with \(params, x, side, state\), which it does not take: too many",
    ),
    "a side that the layer does not take": (
        lambda: in_layers(lambda w, x: x @ w, sides=array(4)),
        r"^layer_fn is called with \(params, x, side\), which it does not take: too many",
    ),
    "no repeats": (
        lambda: piped(array(2, 1, 8, 8), schedule="circular"),
        r"^stage_fn returns float32\[1, 3, 8\] for .*; the stage was given float32\[1, 8, 8\], "
        r"repeats=1\.$",
    ),
    "a layer that changes the shape": (
        lambda: in_layers(lambda w, x: (x @ w)[:, :1], 3),
        r"^layer_fn returns float32\[3, 1\] for its input of float32\[3, 8\]; every layer's output "
        r"is another's input\. The layer was given float32\[8, 8\]\.$",
    ),
    "a layer that changes the dtype": (
        lambda: in_layers(lambda w, x: x.astype(jnp.bfloat16), 3),
        r"^layer_fn returns bfloat16\[3, 8\] for its input of float32\[3, 8\]; .*: cast it back\.$",
    ),
    "keeps forgotten": (
        lambda: in_layers(lambda w, x, s: (x, s), state=array(2, 2)),
        r"^layer_fn returns y and 1 more, but keeps=0: say run_layers\(layer_fn, keeps=...\) of ",
    ),
    "keeps what there is not": (
        lambda: in_layers(lambda w, x, s: (x, s), keeps=2, state=array(2, 2)),
        r"^keeps=2: .*, and of sides, cache and state there are 1\.$",
    ),
    "a state of more layers": (
        lambda: in_layers(lambda w, x, s: (x, s), keeps=1, state=array(2, 3)),
        r"^what a stage keeps has 3 entries for its 2 layers: after the dims of stages and ",
    ),
    "bare weights for layers": (
        lambda: piped(fn=gspmd.run_layers(lambda w, x: x @ w)),
        r"^the stages of run_layers take as stage_params what gspmd.stack_stages returns, .*; a "
        r"stage was given float32\[8, 8\]\.$",
    ),
    "rounds that the pipeline does not know": (
        lambda: piped(
            gspmd.stack_stages(array(3, 8, 8), 2, 2), fn=gspmd.run_layers(lambda w, x: x @ w)
        ),
        r"^the stages of run_layers take .* was given float32\[2, 1, 8, 8\], bool\[2, 1\]\.$",
    ),
    "no layer": (
        lambda: gspmd.stack_stages({}, 2),
        r"^layer_params holds none: give arrays with an entry for each\.$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(PipelineError, match=f"(?m){message}") as raised:
        call()
    assert len(str(raised.value).splitlines()) == 1


def test_counts_may_be_numpys() -> None:
    expected = piped()
    np.testing.assert_array_equal(piped(stages=np.int64(2)), expected)


def test_an_axis_that_the_mesh_lacks() -> None:
    message = r"annotate at \S+test_pipeline_misuse.py:\d+.* 'stage'.*data"
    with pytest.raises(gspmd.SpecError, match=message):
        gspmd.plan(lambda w, x: piped(w, x), array(2, 8, 8), array(4, 3, 8), mesh="data=2")


@pytest.mark.parametrize(
    ("p", "m", "v", "found"),
    [
        (4, 3, 1, "3 microbatches for 4 stages: each stage works in 3 of 6 ticks, and 50 % is"),
        (4, 2, 2, "2 microbatches for 4 stages: each stage works in 4 of 9 ticks, and 56 % is"),
        (4, 4, 1, ""),
    ],
)
def test_a_bubble_that_could_be_smaller_is_a_finding(p: int, m: int, v: int, found: str) -> None:
    w = array(p, v, 8, 8) if v > 1 else array(p, 8, 8)
    fn = lambda w, x: piped(w, x, stages=p, schedule=SCHEDULES[v], repeats=v)  # noqa: E731
    plan = gspmd.plan(fn, w, array(m, 3, 8), mesh={"stage": p})
    assert [finding.code for finding in plan.findings] == ["pipeline-bubble"] * bool(found)
    assert all(found in finding.message for finding in plan.findings)


@pytest.mark.parametrize(("stages", "places"), [(2, 4), (6, 8), (8, 8)])
def test_stages_that_do_not_go_into_the_axis_are_a_finding(stages: int, places: int) -> None:
    w, x = array(stages, 8, 8), array(8, 3, 8)
    plan = gspmd.plan(lambda w, x: piped(w, x, stages=stages), w, x, mesh="stage=4")
    if stages == places:
        assert not plan.findings
        return
    (finding,) = plan.findings
    assert finding.code == "pipeline-padding"
    assert f"has {stages} stages, which do not go into the 4 devices along" in finding.message
    assert f": {places - stages} of {places} places stay empty, and" in finding.message
    assert finding.bytes == sum(c.wire_bytes * c.trips for c in plan.collectives) > 0


@pytest.mark.parametrize(("count", "share"), [(3, 25), (4, 0), (5, 17)])
def test_layers_that_are_not_there_are_a_finding(count: int, share: int) -> None:
    fn = lambda w, x: piped(  # noqa: E731
        gspmd.stack_stages(w, 2), x, gspmd.run_layers(lambda w, x: jnp.tanh(x @ w))
    )
    plan = gspmd.plan(fn, array(count, 8, 8), array(4, 3, 8), mesh="stage=2")
    assert [finding.code for finding in plan.findings] == ["pipeline-padding"] * bool(share)
    for finding in plan.findings:
        assert f"the {count} layers dealt out at " in finding.message
        assert f"and {share} % of what these compute is dropped" in finding.message


def test_a_bubble_that_no_axis_splits_says_so() -> None:
    w, x = array(4, 8, 8), array(2, 3, 8)
    fn = lambda w, x: piped(w, x, stages=4)  # noqa: E731
    (finding,) = gspmd.plan(fn, w, x, mesh="data=2", rules={"stage": None}).findings
    assert "60 % is bubble; no axis splits the stages, so each device works in" in finding.message
