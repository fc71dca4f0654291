"""The training loop and its text: the same run gives the same losses, interrupted or not."""

import dataclasses
import functools
import pathlib
import shutil
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspmd.models import text, training
from gspmd.models.training import CheckpointError, Record, TrainConfig

# ------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def library() -> text.Text:
    return text.standard_library()


def test_the_standard_library_is_split_into_text_to_train_on_and_held_out(library: text.Text):
    assert library.train.size > 10 * library.held_out.size > 100_000
    again = text.standard_library()
    np.testing.assert_array_equal(library.train, again.train)
    np.testing.assert_array_equal(library.held_out, again.held_out)
    assert text.decode(library.held_out[:2000]) not in text.decode(library.train)


def test_a_batch_follows_from_seed_and_step_and_its_targets_are_one_on(library: text.Text):
    draw = functools.partial(text.batch, library.train, batch_size=3, seq=16)
    first = draw(seed=0, step=7)
    assert first["inputs"].shape == first["targets"].shape == (3, 16)
    np.testing.assert_array_equal(first["inputs"][:, 1:], first["targets"][:, :-1])
    np.testing.assert_array_equal(first["inputs"], draw(seed=0, step=7)["inputs"])
    assert not np.array_equal(first["inputs"], draw(seed=0, step=8)["inputs"])
    assert not np.array_equal(first["inputs"], draw(seed=1, step=7)["inputs"])


def test_text_becomes_tokens_and_text_again():
    assert text.decode(text.encode("def ƒ(x):\n")) == "def ƒ(x):\n"


def test_a_text_shorter_than_a_sequence_is_refused():
    with pytest.raises(text.TextError, match="sequences of 16 bytes need a text of 17, got 16"):
        text.batch(np.zeros(16, np.uint8), seed=0, step=0, batch_size=1, seq=16)


# --------------------------------------------------------------------------------------- training

WIDTH = 5


def init(key: jax.Array, width: int = WIDTH) -> dict[str, jax.Array]:
    return {"w": jnp.linspace(-1, 1, width)}


def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    """A linear fit under dropout, so that a wrong key shows."""
    x = batch["inputs"] * jax.random.bernoulli(key, 0.8, batch["inputs"].shape)
    return jnp.mean((x @ params["w"] - batch["targets"]) ** 2)


def batch(step: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(step).normal(size=(8, WIDTH)).astype(np.float32)
    return {"inputs": x, "targets": x.sum(axis=1)}


def run(config: TrainConfig, **options: Any) -> tuple[list[float], training.State]:
    records: list[Record] = []
    state = training.train(config, init, loss, batch, on_step=records.append, **options)
    assert [r.step for r in records] == list(
        range(config.steps - len(records) + 1, config.steps + 1)
    )
    return [record.loss for record in records], state


def interrupt_at(step: int) -> Callable[[Record], None]:
    def on_step(record: Record) -> None:
        if record.step == step:
            signal.raise_signal(signal.SIGINT)  # what Ctrl-C does

    return on_step


@pytest.fixture
def config(tmp_path: pathlib.Path) -> TrainConfig:
    return TrainConfig(steps=8, warmup=3, save_every=3, checkpoints=tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted() -> list[float]:
    return run(TrainConfig(steps=8, warmup=3))[0]


def test_a_run_repeats_itself_and_depends_on_its_seed(uninterrupted: list[float]):
    assert run(TrainConfig(steps=8, warmup=3))[0] == uninterrupted
    assert run(TrainConfig(steps=8, warmup=3, seed=1))[0] != uninterrupted


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(config, uninterrupted):
    first, _ = run(dataclasses.replace(config, steps=5))
    second, state = run(config, resume=True)
    assert first + second == uninterrupted
    assert training.steps_done(state) == 8


def test_a_run_interrupted_after_a_step_saves_that_step(config, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        training.train(config, init, loss, batch, on_step=interrupt_at(5))
    assert run(config, resume=True)[0] == uninterrupted[5:]


def test_a_run_interrupted_before_its_first_step_is_resumed_or_begun_anew(config, uninterrupted):
    def compile_step(fn: training.TrainStep) -> training.TrainStep:
        def interrupted(state: training.State, now: Any) -> Any:
            raise KeyboardInterrupt

        return interrupted

    with pytest.raises(KeyboardInterrupt):
        training.train(config, init, loss, batch, compile_step=compile_step)
    assert run(dataclasses.replace(config, steps=2))[0] == uninterrupted[:2]
    assert run(config, resume=True)[0] == uninterrupted[2:]


def test_ctrl_c_within_a_step_waits_for_its_end_and_saves_it(config, uninterrupted):
    def compile_step(fn: training.TrainStep) -> training.TrainStep:
        step = jax.jit(fn, donate_argnums=0)

        def interrupted(state: training.State, now: Any) -> Any:
            if training.steps_done(state) == 4:
                signal.raise_signal(signal.SIGINT)
            return step(state, now)

        return interrupted

    with pytest.raises(KeyboardInterrupt):
        training.train(config, init, loss, batch, compile_step=compile_step)
    assert run(config, resume=True)[0] == uninterrupted[5:]


def test_a_run_interrupted_within_a_step_leaves_the_last_save(config, uninterrupted):
    def compile_step(fn: training.TrainStep) -> training.TrainStep:
        step = jax.jit(fn, donate_argnums=0)

        def interrupted(state: training.State, now: Any):
            done = training.steps_done(state)
            out = step(state, now)  # takes the state's buffers
            if done == 4:
                raise KeyboardInterrupt
            return out

        return interrupted

    with pytest.raises(KeyboardInterrupt):
        training.train(config, init, loss, batch, compile_step=compile_step)
    assert run(config, resume=True)[0] == uninterrupted[3:]


def test_what_a_killed_save_left_behind_is_passed_over(config, uninterrupted):
    run(dataclasses.replace(config, steps=3))
    left = config.checkpoints / "6.orbax-checkpoint-tmp-0"  # renamed once it is whole
    shutil.copytree(config.checkpoints / "3", left)
    (left / "commit_success.txt").unlink()
    assert run(config, resume=True)[0] == uninterrupted[3:]
    assert sorted(folder.name for folder in config.checkpoints.iterdir()) == ["6", "8"]


class Split:
    """An array in pieces, as an uneven shard is: an array only to those who ask for one."""

    def __init__(self, array: jax.Array):
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.array, dtype)


def test_states_of_other_arrays_than_jax_knows_are_saved(config, uninterrupted):
    def compile_step(fn: training.TrainStep) -> training.TrainStep:
        step = jax.jit(fn)

        def split(state: training.State, now: Any):
            state, metrics = step(training.to_host(state), now)
            return jax.tree.map(Split, state), metrics

        return split

    first, _ = run(dataclasses.replace(config, steps=5), compile_step=compile_step)
    second, _ = run(config, resume=True, compile_step=compile_step)
    assert first + second == pytest.approx(uninterrupted, rel=1e-6)


def test_only_the_latest_checkpoints_are_kept(config):
    run(config)
    assert sorted(int(folder.name) for folder in config.checkpoints.iterdir()) == [6, 8]


def test_a_folder_in_use_is_not_overwritten(config):
    run(config)
    with pytest.raises(CheckpointError, match="holds a run of 8 steps already; resume it, or name"):
        run(config)


def test_resuming_from_nothing_is_refused(config):
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from; start without"):
        run(config, resume=True)
    with pytest.raises(CheckpointError, match="resume needs a folder of checkpoints"):
        run(dataclasses.replace(config, checkpoints=None), resume=True)


def test_resuming_another_model_names_the_parameter_and_both_shapes(config):
    run(config)
    other = functools.partial(init, width=WIDTH + 1)
    with pytest.raises(CheckpointError, match=r"params/w has shape \(5,\) there, \(6,\) here"):
        training.train(config, other, loss, batch, resume=True)


def test_throughput_leaves_compilation_out():
    records = [Record(1, 0.0, 100, 50.0), Record(2, 0.0, 100, 0.5), Record(3, 0.0, 100, 0.5)]
    assert training.targets_per_second(records) == 200
    assert training.targets_per_second(records[:1]) == 2
