"""Steps with programs inside: loops, branches, rematerialization, custom derivatives."""

from gspmd.testing.drawing import Drawing


def scan(d: Drawing) -> None:
    x = d.floats(2, 3)
    if x is None:
        return
    w = d.parameter((x.shape[-1], x.shape[-1]))
    if w is None:
        return
    init = d.find(lambda e: e.kind == "float" and e.shape == x.shape[1:])
    start = f"jnp.zeros({x.shape[1:]})" if init is None or d.flag() else init.name
    body = "jax.checkpoint(body)" if d.flag() else "body"
    result = d.pick(("[0][0]", "[0][1]", "[1][0]", "[1][1]"))
    d.add(
        f"""def body(carry, x):
    h = jnp.tanh(carry[0] @ {w.name} * 0.3 + x)
    return (h, carry[1] + jnp.sum(h) * 0.1), (h * x, jnp.sum(x, axis=-1))
lax.scan({body}, ({start}, jnp.float32(0)), {x.name}, reverse={d.flag()}){result}"""
    )


def accumulate(d: Drawing) -> None:
    """A scan whose carry is a sum over what may be split: gradient accumulation."""
    x = d.floats(3, 3)
    if x is None:
        return
    y = d.find(lambda e: e.kind == "float" and e.rank == 3 and e.shape[:2] == x.shape[:2])
    assert y is not None
    d.add(
        f"""def body(total, xy):
    return total + jnp.einsum("bm,bn->mn", *xy), None
lax.scan(body, jnp.zeros({(x.shape[2], y.shape[2])}), ({x.name}, {y.name}))[0]""",
        exact=x.exact and y.exact,
    )


def prefix(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is not None:
        how = f"reverse={d.flag()}, axis={d.dim(x)}"
        d.add(f"lax.associative_scan(jnp.add, {x.name}, {how})", exact=x.exact)


def loop(d: Drawing) -> None:
    x = d.floats(low=2, exact=True)
    if x is None:
        return
    run = d.pick(("run", "jax.vmap(run)"))  # for all at once, or each row as often as it needs
    d.add(
        f"""def test(state):
    return (state[0] < 4) & (jnp.sum(jnp.abs(state[1])) > 3)
def body(state):
    return state[0] + 1, jnp.floor(state[1] / 2)
def run(x):
    return lax.while_loop(test, body, (jnp.int32(0), x))[1]
{run}({x.name})""",
        exact=True,
    )


def count(d: Drawing) -> None:
    """A loop with a known number of rounds, and a carry that is written in place."""
    x = d.floats(low=1)
    if x is not None:
        rounds = min(3, x.shape[0])
        d.add(
            f"""def body(i, x):
    return x.at[i].add(jnp.sum(x[i]) * 0.5)
lax.fori_loop(0, {rounds}, body, {x.name})"""
        )


def branch(d: Drawing) -> None:
    x = d.floats(low=1)
    p = d.find(lambda e: e.exact and e.kind in ("float", "int"))
    if x is None or p is None:
        return
    d.add(
        f"""branches = [
    lambda x: x * 2,
    lambda x: x - jnp.max(x, axis=0, keepdims=True),
    lambda x: jnp.cumsum(x, axis=-1),
]
lax.switch(jnp.sum({p.name}).astype(jnp.int32) % 3, branches, {x.name})""",
        exact=x.exact,
    )


def remat(d: Drawing) -> None:
    x = d.floats(low=2)
    if x is None:
        return
    w = d.parameter((x.shape[-1], d.pick((2, 4, 6))))
    if w is not None:
        policy = d.pick(("None", "jax.checkpoint_policies.dots_saveable"))
        d.add(
            f"""block = lambda x, w: jnp.tanh(x @ w * 0.3) @ w.T
jax.checkpoint(block, policy={policy})({x.name}, {w.name})"""
        )


def custom(d: Drawing) -> None:
    """A function with a derivative of its own."""
    x = d.floats()
    if x is None:
        return
    forward = f"""@jax.custom_vjp
def scaled(x):
    return jnp.tanh(x)
scaled.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * jnp.cos(x),))
scaled({x.name})"""
    tangent = f"""@jax.custom_jvp
def scaled(x):
    return jnp.sin(x)
scaled.defjvp(lambda x, t: (jnp.sin(x[0]), t[0] * 0.5))
scaled({x.name})"""
    d.add(d.pick((forward, tangent)))


def nested(d: Drawing) -> None:
    """A jitted function, and one that maps over a dim."""
    x = d.floats(low=2)
    if x is None:
        return
    jitted = f"jax.jit(lambda x: x + jnp.sum(x, axis=0))({x.name})"
    mapped = f"jax.vmap(lambda x: x * 2 - jnp.sum(x), in_axes=1, out_axes=-1)({x.name})"
    d.add(d.pick((jitted, mapped)), exact=x.exact)


FLOW = (scan, accumulate, prefix, loop, count, branch, remat, custom, nested)
NOT_SMOOTH = (loop,)  # no reverse-mode derivative
