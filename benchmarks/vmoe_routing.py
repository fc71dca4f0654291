"""Which expert reads which digit, and what if experts have few places? A V-MoE learns, then tells.

The paper's figures, on the digits, after some minutes: how the class tokens of each digit spread
over the experts of each sparse layer, and how many digits are read right when experts have fewer
places (capacity), with one expert for each token or two, taken in the order of tokens or by Batch
Priority Routing. The model is not trained again: only its router changes.

    python benchmarks/vmoe_routing.py [picture.png]
"""

import dataclasses
import functools
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np
from learning import learn

from gspmd.models import images, vmoe
from gspmd.models.tasks import image_task
from gspmd.models.training import TrainConfig

CONFIG = vmoe.CONFIGS["digits"]
SCHEDULE = TrainConfig(steps=600, learning_rate=3e-3, decay=580)
CAPACITIES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
ORDERS = {"in order": False, "by priority": True}
# Here compiling is the work, not running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shares(params: vmoe.Params, data: images.Images) -> np.ndarray:
    """For each sparse layer and class, how its class tokens spread over the experts."""
    taken_LBSE = np.asarray(jit(functools.partial(vmoe.taken, CONFIG))(params, data.held_out))
    token_LBE = taken_LBSE[:, :, 0]
    of_class = [token_LBE[:, data.held_out_labels == c].sum(1) for c in range(CONFIG.classes)]
    count_LCE = np.stack(of_class, axis=1)
    return count_LCE / np.maximum(count_LCE.sum(-1, keepdims=True), 1)


def read_right(params: vmoe.Params, data: images.Images, **changes: object) -> float:
    router = dataclasses.replace(CONFIG.router, multiple=1, **changes)
    apply = jit(functools.partial(vmoe.apply, CONFIG, params, router=router))
    return images.accuracy(apply, data.held_out, data.held_out_labels)


def draw(path: str, share_LCE: np.ndarray, right: dict[str, list[float]]) -> None:
    count = len(share_LCE)
    widths = [*[3] * count, 5]
    figure, (*maps, curves) = plt.subplots(
        1, count + 1, figsize=(sum(widths), 3.6), width_ratios=widths, layout="constrained"
    )
    for i, (axes, share_CE) in enumerate(zip(maps, share_LCE, strict=True)):
        axes.imshow(share_CE, cmap="Blues", vmin=0, vmax=share_LCE.max())
        axes.set(title=f"sparse layer {i + 1}", xlabel="expert", ylabel="digit")
        axes.set(xticks=range(CONFIG.experts), yticks=range(CONFIG.classes))
    figure.colorbar(maps[0].images[0], ax=maps, label="share of class tokens")
    for i, (name, values) in enumerate(right.items()):
        line = "o-" if name.endswith("priority") else "s--"
        curves.plot(CAPACITIES, values, line, label=name, color=f"C{i // 2}")
    curves.set(xlabel="capacity factor", ylabel="digits read right")
    curves.set_xscale("log", base=2)
    curves.set_xticks(CAPACITIES, [str(c) for c in CAPACITIES])
    curves.grid(alpha=0.3)
    curves.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def main(*path: str) -> None:
    data = images.digits(CONFIG.image)
    params = learn(image_task("vmoe", CONFIG, seed=0, batch_size=128), SCHEDULE)
    share_LCE = shares(params, data)
    for digit, share_E in enumerate(share_LCE[-1]):
        print(
            f"{share_E.max():.0%} of the class tokens of a {digit} go to expert {share_E.argmax()}"
        )
    print(f"{'capacity factor':<20}" + "".join(f"{c:>8}" for c in CAPACITIES))
    right: dict[str, list[float]] = {}
    for k in (1, 2):
        for order, priority in ORDERS.items():
            name = f"k={k}, {order}"
            right[name] = [
                read_right(params, data, k=k, capacity_factor=c, batch_priority=priority)
                for c in CAPACITIES
            ]
            print(f"{name:<20}" + "".join(f"{r:>8.1%}" for r in right[name]))
    if path:
        draw(path[0], share_LCE, right)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
