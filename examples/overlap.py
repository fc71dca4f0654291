"""A layer split over 8 devices that sends while it multiplies: same bytes, in steps that hide.

Run it: python examples/overlap.py
"""

import jax
import jax.numpy as jnp

import gspmd
from gspmd import P


def layer(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Rows are gathered for the first product, and those of the second scattered again."""
    hidden = jax.nn.relu(gspmd.annotate(x, P("model", None)) @ up)
    return gspmd.annotate(hidden @ down, P("model", None))


def main() -> None:
    shapes = [(16_384, 8192), (8192, 65_536), (65_536, 8192)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    for overlap in ("none", "auto"):
        plan = gspmd.plan(
            layer,
            *args,
            mesh={"model": 8},
            in_specs=(P("model", None), P(None, "model"), P("model", None)),
            options=gspmd.Options(overlap=overlap, target="tpu"),
        )
        kinds = sorted({one.kind for one in plan.collectives})
        count = sum(one.trips for one in plan.collectives)
        print(f'overlap="{overlap}": {count} x {", ".join(kinds)}: {plan.wire_bytes / 1e6:.1f} MB')


if __name__ == "__main__":
    main()
