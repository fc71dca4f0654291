"""A Flax program that knows nothing of gspmd: `with_sharding_constraint`, `jit(in_shardings=...)`.

gspmd plans it and runs it as it stands. Everything it must know it reads from the program.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# ------------------------------------------------------------ the program: Flax, optax and JAX only


class Block(nnx.Module):
    """A residual MLP, its hidden activations split over both axes of the mesh."""

    def __init__(self, mesh: Mesh, rngs: nnx.Rngs):
        self.split = NamedSharding(mesh, P("data", "model"))
        self.up, self.down = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.gelu(self.up(x))
        return x + self.down(jax.lax.with_sharding_constraint(hidden, self.split))


def training(mesh: Mesh):
    """A jitted AdamW step, and arguments for it."""
    rngs = nnx.Rngs(0)
    graph, params = nnx.split(nnx.Sequential(Block(mesh, rngs), Block(mesh, rngs)))
    optimizer = optax.adamw(1e-2)

    def loss(params: nnx.State, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graph, params)(x) - y))

    batch = NamedSharding(mesh, P("data"))

    @functools.partial(jax.jit, in_shardings=(None, None, batch, batch))
    def step(params: nnx.State, moments: optax.OptState, x: jax.Array, y: jax.Array):
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, moments = optimizer.update(gradient, moments, params)
        return value, optax.apply_updates(params, updates), moments

    x, y = jax.random.normal(jax.random.key(1), (2, 512, 64))
    return step, (params, optimizer.init(params), x, y)


# ----------------------------------------------------------------------------------- gspmd reads it

if __name__ == "__main__":
    import gspmd

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    step, args = training(mesh)

    plan = gspmd.plan(step, *args, mesh=mesh)
    print(f"{len(plan.collectives)} collectives, {plan.wire_bytes:,.0f} bytes a device and step")
    for collective in plan.collectives:
        print(" ", collective)

    ours, theirs = plan.run(*args), step(*args)
    apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), ours, theirs)
    print(f"loss {ours[0]:.6f} here, {theirs[0]:.6f} by jax.jit")
    print(f"largest difference in any result: {max(jax.tree.leaves(apart)):.1e}")
