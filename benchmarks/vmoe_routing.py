"""Which expert reads which digit, and what if experts have few places? A V-MoE that learns first.

The picture, if one is asked for: how the tokens of each class spread over the experts, and how many
digits are read right when experts have fewer places, taken in the order of tokens or by priority.

    python examples/vmoe_routing.py [picture.png]
"""

import dataclasses
import functools
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np

from gspmd.models import images, vmoe
from gspmd.models.training import TrainConfig, train

CONFIG = dataclasses.replace(
    vmoe.CONFIGS["digits"], image=8, patch=2, layers=2, sparse=1, model_dim=32, hidden_dim=64,
    heads=2, router=dataclasses.replace(vmoe.CONFIGS["digits"].router, multiple=1),
)  # fmt: skip
STEPS, CAPACITIES = 250, (0.125, 0.25, 0.5, 1.0)
# Here compiling is the work, not running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def learn(data: images.Images) -> vmoe.Params:
    return train(
        TrainConfig(steps=STEPS, learning_rate=1e-2, decay=STEPS - 20),
        functools.partial(vmoe.init, CONFIG),
        functools.partial(vmoe.loss, CONFIG),
        lambda step: images.batch(data, seed=0, step=step, batch_size=64, shift=0),
        compile_step=functools.partial(jit, donate_argnums=0),
    )["params"]


def shares(params: vmoe.Params, data: images.Images) -> np.ndarray:
    """For each class, how its tokens spread over the experts of the last sparse layer."""
    taken_BSE = jit(functools.partial(vmoe.taken, CONFIG))(params, data.held_out)[-1]
    tokens_BE = np.sum(taken_BSE, axis=1)
    counts = np.stack([tokens_BE[data.held_out_labels == c].sum(0) for c in range(10)])
    return counts / counts.sum(-1, keepdims=True)


def read_right(params: vmoe.Params, data: images.Images, capacity: float, priority: bool) -> float:
    changes = {"capacity_factor": capacity, "batch_priority": priority}
    router = dataclasses.replace(CONFIG.router, **changes)
    apply = jit(functools.partial(vmoe.apply, CONFIG, params, router=router))
    return images.accuracy(apply, data.held_out, data.held_out_labels)


def draw(path: str, share: np.ndarray, right: dict[str, list[float]]) -> None:
    figure, (left, curves) = plt.subplots(1, 2, figsize=(10, 4), layout="tight")
    shown = left.imshow(share, cmap="Blues")
    left.set(xlabel="expert", ylabel="digit", yticks=range(10))
    figure.colorbar(shown, label="share of the digit's tokens")
    for name, values in right.items():
        curves.plot(CAPACITIES, values, "o-", label=name)
    curves.set(xlabel="capacity factor", ylabel="digits read right", xscale="log")
    curves.set_xticks(CAPACITIES, [str(c) for c in CAPACITIES])
    curves.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    data = images.digits(CONFIG.image)
    params = learn(data)
    share = shares(params, data)
    for digit, of_digit in enumerate(share):
        expert = of_digit.argmax()
        print(f"{of_digit[expert]:.0%} of the tokens of a {digit} go to expert {expert}")
    print(f"capacity factor  {'  '.join(f'{c:>6}' for c in CAPACITIES)}")
    right = {}
    for name, priority in (("in order", False), ("by priority", True)):
        right[name] = [read_right(params, data, c, priority) for c in CAPACITIES]
        print(f"{name:<16} {'  '.join(f'{r:>6.1%}' for r in right[name])}  read right")
    if len(sys.argv) > 1:
        draw(sys.argv[1], share, right)
