"""Training partitioned is training: the loss of every step equals the unpartitioned run's."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import gspmd
from gspmd import P
from gspmd.models import text, training, transformer

STEPS = 5
TINY = dataclasses.replace(
    transformer.CONFIGS["tiny"], model_dim=32, hidden_dim=64, heads=4, head_dim=8, seq=32
)
CONFIGS = {
    "plain": TINY,
    "dropout": dataclasses.replace(TINY, dropout=0.2),
    "remat": dataclasses.replace(TINY, dropout=0.2, remat=True),
}


@functools.cache
def tokens() -> np.ndarray:
    return text.standard_library().train


def losses(config: transformer.Config, compile_step) -> list[float]:
    """The losses of a short run whose steps `compile_step` makes fast."""
    seen: list[float] = []
    training.train(
        training.TrainConfig(steps=STEPS),
        functools.partial(transformer.init, config),
        lambda params, batch, key: transformer.loss(
            config, params, batch, key if config.dropout else None
        ),
        lambda step: text.batch(tokens(), seed=0, step=step, batch_size=8, seq=config.seq),
        compile_step=compile_step,
        on_step=lambda record: seen.append(record.loss),
    )
    return seen


@functools.cache
def unpartitioned(name: str) -> list[float]:
    return losses(CONFIGS[name], functools.partial(jax.jit, donate_argnums=0))


@pytest.mark.parametrize(
    ("mesh", "strategy", "config"),
    [
        # More devices than heads.
        pytest.param("data=1,model=8", "2d", "plain", marks=pytest.mark.exhaustive),
        pytest.param("data=8,model=1", "fsdp", "plain", marks=pytest.mark.exhaustive),
        ("data=2,model=4", "2d", "plain"),
        pytest.param("data=2,model=4", "tensor", "dropout", marks=pytest.mark.exhaustive),
        pytest.param("data=2,fsdp=2,model=2", "2d", "plain", marks=pytest.mark.exhaustive),
        ("data=3,model=2", "2d", "plain"),  # 8 sequences over 3, and 32 dims over 3
        ("data=3,model=2", "2d", "remat"),
    ],
)
def test_losses_equal_the_unpartitioned_run(mesh: str, strategy: str, config: str) -> None:
    axes = [part.split("=")[0] for part in mesh.split(",")]
    partition = functools.partial(
        gspmd.partition,
        mesh=mesh,
        rules=transformer.rules_for(strategy, axes),
        in_specs=(None, P("batch")),
        donate_argnums=0,
    )
    np.testing.assert_allclose(losses(CONFIGS[config], partition), unpartitioned(config), rtol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param("data=8,model=8", marks=pytest.mark.exhaustive), "data=4,fsdp=4,model=4"],
)
def test_a_step_on_64_simulated_devices(mesh: str) -> None:
    """One device plays 64: the whole state after a step is that of the unpartitioned step."""
    optimizer = training.make_optimizer(training.TrainConfig())
    step = training.make_step(
        lambda params, batch, key: transformer.loss(TINY, params, batch), optimizer, seed=0
    )
    state = training.init_state(functools.partial(transformer.init, TINY), optimizer, seed=0)
    batch = text.batch(tokens(), seed=0, step=0, batch_size=16, seq=TINY.seq)
    rules = transformer.rules_for("2d", [part.split("=")[0] for part in mesh.split(",")])
    plan = gspmd.plan(step, state, batch, mesh=mesh, rules=rules, in_specs=(None, P("batch")))
    assert plan.mesh.devices == 64
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        plan.simulate(state, batch),
        jax.jit(step)(state, batch),
    )
