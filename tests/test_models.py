"""What holds of every reference model: few annotations, tables of all roles, the same functions."""

import ast
import functools
import inspect
from types import ModuleType

import jax
import pytest

import gspmd
from gspmd.models import catalog

SMALL = {"transformer": "tiny", "glam": "tiny", "vmoe": "digits", "nest": "digits",
         "nest_gan": "digits"}  # fmt: skip


def parts(module: ModuleType) -> set[ModuleType]:
    """A model's module, and those of `gspmd.models` that it is made of."""
    used = {inspect.getmodule(thing) for thing in vars(module).values()} - {module, None}
    models = [m for m in used if m is not None and m.__name__.startswith("gspmd.models.")]
    return {module}.union(*map(parts, models))


def annotations(module: ModuleType) -> int:
    """How many calls of `annotate` there are in the module."""
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)]
    return sum(isinstance(call.func, ast.Name) and call.func.id == "annotate" for call in calls)


@pytest.mark.parametrize(
    ("model", "count"),
    [("transformer", 9), ("glam", 9), ("vmoe", 3), ("nest", 4), ("nest_gan", 4)],
)
def test_a_model_is_annotated_in_fewer_than_ten_places(model: str, count: int) -> None:
    """The calls of the model's file and of those that it is made of.

    The image models share `vision`, whose convolution V-MoE does not use and which is counted.
    """
    assert sum(map(annotations, parts(catalog.model(model)))) == count < 10


@pytest.mark.parametrize(
    "model",
    [
        name if name in ("glam", "vmoe") else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in catalog.MODELS
    ],
)
def test_a_step_of_every_model_is_planned_by_its_name(model: str) -> None:
    """Parameters keep their specs from one step to the next."""
    module = catalog.model(model)
    strategy = next(iter(module.RULES))
    step = catalog.step(model, SMALL[model], ("data",), batch_size=64, strategy=strategy)
    plan = gspmd.plan(step.fn, *step.args, mesh="data=4", effort=0, **step.options)
    assert not plan.findings
    state, _ = plan.in_specs
    assert plan.out_specs[0]["params"] == state["params"]


@pytest.mark.parametrize("model", catalog.MODELS)
def test_a_batch_is_described_as_the_loss_takes_it(model: str) -> None:
    module, config = catalog.model(model), catalog.config(model, SMALL[model])
    fresh = jax.eval_shape(functools.partial(module.init, config), jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss = jax.eval_shape(
        functools.partial(module.loss, config), fresh, module.batch_shapes(config, 16), key
    )
    assert loss.shape == ()


def test_a_model_size_or_optimizer_that_there_is_not_is_refused() -> None:
    for args, how, message in (
        (("nets", "digits"), {}, "'nets' is not a model; did you mean 'nest'?"),
        (("nest", "bb"), {}, "'bb' is not a configuration of nest"),
        (("nest", "t"), {"optimizer": "adam"}, "'adam' is not an optimizer; did you mean 'adamw'"),
    ):
        with pytest.raises(catalog.CatalogError, match=message.replace("?", r"\?")):
            catalog.step(*args, ("data",), batch_size=8, **how)
