"""A training loop: optimizer, step, checkpoints. It knows neither a model nor a mesh.

`train` is passed a loss, fresh parameters, a batch for each step, and `compile_step`, which makes
the step fast: `jax.jit`, or `gspmd.partition` for a mesh. All that the next step depends on is in
the state and in the number of the step: a resumed run repeats an uninterrupted one exactly.

Several processes may run it together (`gspmd.distributed`): each draws the same batches, and each
saves what its devices hold.
"""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gspmd.errors import GspmdError

State = dict[str, Any]
"""`params`, `opt` (the optimizer's own state) and `step`: how many steps were taken."""

Batch = Mapping[str, Any]
Metrics = dict[str, Any]
Loss = Callable[[Any, Batch, jax.Array], jax.Array]
"""(params, batch, key) -> the mean loss; the key is for dropout."""

TrainStep = Callable[[State, Batch], tuple[State, Metrics]]


class CheckpointError(GspmdError, ValueError):
    """A folder of checkpoints does not fit what is asked of it."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, and where checkpoints go."""

    steps: int = 300
    seed: int = 0
    learning_rate: float = 1e-3
    b1: float = 0.9  # of Adam: how much of the mean gradient is that before the step
    warmup: int = 20  # steps over which the learning rate rises
    decay: int = 0  # steps over which it falls to 0 at the end
    weight_decay: float = 0.01
    checkpoints: pathlib.Path | None = None  # a folder; None keeps none
    save_every: int = 50  # steps
    keep: int = 2  # checkpoints, the latest


@dataclasses.dataclass(frozen=True)
class Record:
    """What one step did. `step` counts from 1; the first one's `seconds` include compilation.

    `targets` is how many the loss is a mean over: tokens, or images.
    """

    step: int
    loss: float
    targets: int
    seconds: float


def targets_per_second(records: Sequence[Record]) -> float:
    """The median over the steps, the first left out if there are others."""
    timed = records[1:] or records
    return statistics.median(record.targets / record.seconds for record in timed)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW whose learning rate rises linearly, stays, and falls linearly.

    Its epsilon is larger than usual: with 1e-8, a gradient that is zero but for rounding moves its
    parameter by a whole learning rate, and two runs that round differently soon part.
    """
    warmup = max(config.warmup, 1)
    rate = optax.warmup_constant_schedule(
        config.learning_rate / warmup, config.learning_rate, warmup - 1
    )
    if config.decay:
        fall = optax.linear_schedule(config.learning_rate, 0.0, config.decay)
        rate = optax.join_schedules([rate, fall], [config.steps - config.decay])
    return optax.adamw(rate, b1=config.b1, b2=0.95, eps=1e-6, weight_decay=config.weight_decay)


def init_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, seed: int
) -> State:
    """The state before the first step; `jax.eval_shape` of it allocates nothing."""
    params = init(jax.random.fold_in(jax.random.key(seed), 0))
    return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def make_step(loss: Loss, optimizer: optax.GradientTransformation, seed: int) -> TrainStep:
    """The pure function from a state and a batch to the next state and `{"loss": ...}`.

    The dropout key follows from `seed` and the number of the step.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        step = state["step"] + 1
        key = jax.random.fold_in(jax.random.key(seed), step)
        value, gradients = jax.value_and_grad(loss)(state["params"], batch, key)
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "step": step}, {"loss": value}

    return train_step


_jit: Callable[[TrainStep], TrainStep] = functools.partial(jax.jit, donate_argnums=0)


def train(
    config: TrainConfig,
    init: Callable[[jax.Array], Any],
    loss: Loss,
    batch: Callable[[int], Batch],
    *,
    compile_step: Callable[[TrainStep], TrainStep] = _jit,
    resume: bool = False,
    on_step: Callable[[Record], None] = lambda record: None,
) -> State:
    """The state after `config.steps` steps; `on_step` hears of each.

    Args:
      init: parameters from a key.
      batch: the batch for a step from the number of steps taken before it; has "targets".
      compile_step: makes the pure step fast. It may donate the state.
      resume: go on from the latest checkpoint in `config.checkpoints`.

    Raises:
      CheckpointError: nothing to resume from, a checkpoint of another model, or a folder in use.
      KeyboardInterrupt: passed on, once the last finished step is saved. Several processes raise it
        after the same step, when any of them is sent SIGTERM.
    """
    optimizer = make_optimizer(config)
    step = compile_step(make_step(loss, optimizer, config.seed))
    fresh = functools.partial(init_state, init, optimizer, config.seed)
    with _open(config, resume) as checkpoints:
        state = checkpoints.restore(jax.eval_shape(fresh)) if resume else jax.jit(fresh)()
        for done in range(steps_done(state), config.steps):
            try:
                with _uninterrupted():
                    began = time.perf_counter()
                    now = batch(done)
                    state, metrics = step(state, now)
                    value = float(metrics["loss"])  # waits for the step to end
                    seconds = time.perf_counter() - began
                    on_step(Record(done + 1, value, int(np.size(now["targets"])), seconds))
            except KeyboardInterrupt:
                # A step cut short may have taken the state's buffers, and one process of several
                # cannot save it alone: then the last save stands.
                if jax.process_count() == 1:
                    with contextlib.suppress(RuntimeError):
                        checkpoints.save(state)
                raise
            if multihost_utils.reached_preemption_sync_point(done + 1):
                checkpoints.save(state)
                raise KeyboardInterrupt
            if (done + 1) % config.save_every == 0 or done + 1 == config.steps:
                checkpoints.save(state)
    return state


@contextlib.contextmanager
def _uninterrupted() -> Generator[None]:
    """Holds Ctrl-C back until the block has ended; a second one takes effect at once.

    A step that donates its state leaves none to save when it is cut short.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # signals go elsewhere, or are ignored
        return
    pressed: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if pressed:
            handler(signum, frame)
        pressed.append(signum)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(signal.SIGINT, None)


def check_checkpoints(config: TrainConfig, resume: bool) -> None:
    """Raises CheckpointError where `train` could not start: better before compiling than after."""
    with _open(config, resume) as checkpoints:
        if resume:
            checkpoints.latest()


def steps_done(state: State) -> int:
    """How many steps led to `state`."""
    return int(np.asarray(state["step"]))


def to_host(tree: Any) -> Any:
    """`tree` with NumPy arrays for leaves, whatever devices they are split over.

    Where those belong to several processes, all of these must call it.
    """
    return jax.tree.map(lambda leaf: np.asarray(_gathered(leaf)), tree)


def _gathered(leaf: Any) -> Any:
    if _in_one_process(leaf):
        return leaf
    return multihost_utils.process_allgather(jnp.asarray(leaf), tiled=True)


def _in_one_process(leaf: Any) -> bool:
    """Whether this process can read all of `leaf`; asked of `gspmd.Uneven`, too."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is None or sharding.is_fully_addressable


# ------------------------------------------------------------------------------------ checkpoints


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """A folder of states by step, or none. A save is there whole or not at all."""

    manager: ocp.CheckpointManager | None

    def save(self, state: State) -> None:
        """Returns once `state` is on disk."""
        step = steps_done(state)
        if self.manager is not None and step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(jax.tree.map(_to_save, state)))

    def restore(self, like: State) -> State:
        """The latest state, as NumPy arrays; `like` has its structure, shapes and dtypes."""
        manager, step = self.latest()
        _check_same_model(manager, step, like)
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        return dict(manager.restore(step, args=ocp.args.StandardRestore(target)))

    def latest(self) -> tuple[ocp.CheckpointManager, int]:
        """Who keeps the latest state, and its step."""
        if self.manager is None:
            raise CheckpointError("resume needs a folder of checkpoints: set `checkpoints`.")
        step = self.manager.latest_step()
        if step is None:
            raise CheckpointError(
                f"{self.manager.directory} holds no checkpoint to resume from; "
                f"start without resume."
            )
        return self.manager, step


def _to_save(leaf: Any) -> np.ndarray | jax.Array:
    """`leaf` on the host; split over several processes, of which each writes its own part."""
    return np.asarray(leaf) if _in_one_process(leaf) else jnp.asarray(leaf)


def _check_same_model(manager: ocp.CheckpointManager, step: int, like: State) -> None:
    saved = _shapes(manager.item_metadata(step)["params"])
    wanted = _shapes(like["params"])
    for path in sorted(saved.keys() | wanted.keys()):
        if saved.get(path) != wanted.get(path):
            raise CheckpointError(
                f"{manager.directory / str(step)} was saved by another model: params/{path} has "
                f"shape {saved.get(path, 'none')} there, {wanted.get(path, 'none')} here. Resume "
                f"with the model it was saved by, or start anew in another folder."
            )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree.flatten_with_path(params)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def _open(config: TrainConfig, resume: bool) -> Generator[Checkpoints]:
    """The folder that `config` names, created if need be; none if it names none."""
    if config.checkpoints is None:
        yield Checkpoints(None)
        return
    folder = config.checkpoints.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be a folder of checkpoints: {error.strerror}; name another one."
        ) from error
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    with ocp.CheckpointManager(
        folder,
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    ) as manager:
        if not resume and manager.latest_step():  # a run of no steps yet may begin again
            raise CheckpointError(
                f"{manager.directory} holds a run of {manager.latest_step()} steps already; "
                f"resume it, or name another folder."
            )
        yield Checkpoints(manager)
