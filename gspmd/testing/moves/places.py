"""Steps that move entries: reshapes, slices, joins, gathers and scatters, and annotations."""

import math

from gspmd.specs import show_spec
from gspmd.testing.drawing import Drawing, Entry


def reshape(d: Drawing) -> None:
    x = d.find(lambda e: math.prod(e.shape) > 1)
    if x is None:
        return
    shape, total = x.shape, math.prod(x.shape)
    options: list[tuple[int, ...]] = [(total,)]
    for k, n in enumerate(shape):
        options += [(*shape[:k], a, n // a, *shape[k + 1 :]) for a in range(2, n) if n % a == 0]
        if k:
            options.append((*shape[: k - 1], shape[k - 1] * n, *shape[k + 1 :]))
        if k > 1:
            a, b, c = shape[k - 2 : k + 1]
            options.append((*shape[: k - 2], b, a * c, *shape[k + 1 :]))
    options += [(a, total // a) for a in (2, 3, 4, 6, 8) if total % a == 0]
    d.add(f"{x.name}.reshape({d.pick(options)})", exact=x.exact, grows=False)


def arrange(d: Drawing) -> None:
    """Another order of dims or of entries along a dim, or copies of them."""
    x = d.find(lambda e: e.rank > 0)
    if x is None:
        return
    a, dim = x.name, d.dim(x)
    k = d.number(0, x.shape[dim] - 1)
    code = d.pick(
        (
            f"{a}.transpose({d.order(x.rank)})",
            f"jnp.flip({a}, {dim})",
            f"jnp.roll({a}, {k}, {dim})",
            f"jnp.expand_dims({a}, {dim})",
            f"jnp.broadcast_to({a}, {(d.pick((2, 3, 4)), *x.shape)})",
            f"jnp.repeat({a}, 2, {dim})",
            f"jnp.tile({a}, 2)",
            f"lax.optimization_barrier({a})",
        )
    )
    d.add(code, exact=x.exact, grows=False)


def cut(d: Drawing) -> None:
    x = d.find(lambda e: e.rank > 0)
    if x is None:
        return
    a, dim = x.name, d.dim(x)
    n = x.shape[dim]
    start = d.number(0, n - 1)
    stop = d.number(start + 1, n)
    code = d.pick(
        (
            f"lax.slice_in_dim({a}, {start}, {stop}, axis={dim})",
            f"lax.slice_in_dim({a}, {start}, {n}, 2, {dim})",
            f"lax.index_in_dim({a}, {start}, {dim}, keepdims=False)",
            f"jnp.array_split({a}, 2, {dim})[0]",
        )
    )
    d.add(code, exact=x.exact, grows=False)


def pad(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is None:
        return
    widths: list[tuple[int, ...]] = [(0, 0, 0)] * x.rank
    dim = d.dim(x)
    widths[dim] = (d.number(-1, 2), d.number(-1, 2), d.number(0, 1))
    if x.shape[dim] + sum(widths[dim][:2]) > 0:
        d.add(f"lax.pad({x.name}, 1.0, {tuple(widths)})", exact=x.exact, grows=False)


def join(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is None:
        return
    dim = d.dim(x)

    def fits(e: Entry) -> bool:
        rest = (*e.shape[:dim], *e.shape[dim + 1 :])
        return (
            e.kind == "float" and e.rank == x.rank and rest == (*x.shape[:dim], *x.shape[dim + 1 :])
        )

    y = d.find(fits)
    assert y is not None
    exact = x.exact and y.exact
    how = "stack" if y.shape == x.shape and d.flag() else "concatenate"
    d.add(f"jnp.{how}([{x.name}, {y.name}], {dim})", exact=exact, grows=False)


def take(d: Drawing) -> None:
    """Rows of a table, with indices that may be out of bounds."""
    i = d.integers(high=2)
    table = d.floats(low=1)
    if i is None or table is None:
        return
    mode = d.pick(('"clip"', '"wrap"', '"fill", fill_value=0'))  # else NaN, which no step expects
    dim = d.dim(table)
    code = f"jnp.take({table.name}, {i.name}, axis={dim}, mode={mode})"
    d.add(code, exact=table.exact, grows=False)


def along(d: Drawing) -> None:
    """A gather with a batch."""
    i = d.integers(low=1)
    if i is None:
        return
    x = d.find(lambda e: e.kind == "float" and e.rank > 0 and e.shape[:-1] == i.shape[:-1])
    if x is not None:
        index = f"jnp.abs({i.name}.astype(jnp.int32) % {x.shape[-1]})"
        d.add(f"jnp.take_along_axis({x.name}, {index}, axis=-1)", exact=x.exact, grows=False)


def scatter(d: Drawing) -> None:
    i = d.integers(1, 1)
    if i is None:
        return
    x = d.find(lambda e: e.kind == "float" and e.rank > 0 and e.shape[0] == i.shape[0])
    if x is None:
        return
    shape = (d.pick((3, 4, 6)), *x.shape[1:])
    how = d.pick(("add", "max", "min") if x.exact and not d.smooth else ("add",))
    mode = d.pick(("drop", "clip"))
    code = f'jnp.ones({shape}).at[{i.name}].{how}({x.name}, mode="{mode}")'
    d.add(code, exact=x.exact)


def dynamic(d: Drawing) -> None:
    """Slices whose start is data; starts out of bounds are clamped."""
    x = d.floats(low=1)
    if x is None:
        return
    dim = d.dim(x)
    n = x.shape[dim]
    size, start = d.number(1, n), d.number(-1, n + 1)
    i = d.integers(high=0)
    at = f"jnp.int32({start})" if i is None else f"{i.name}.astype(jnp.int32) + {start - 1}"
    if d.flag():
        code = f"lax.dynamic_slice_in_dim({x.name}, {at}, {size}, {dim})"
    else:
        # Not made of `x`: where that is cheap to compute, XLA:CPU writes the update over `x` while
        # it still reads from it, in the whole program too (jaxlib 0.10.2, on a squared cumsum).
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        update = f"lax.full_like({x.name}, 2, shape={shape})"
        code = f"lax.dynamic_update_slice_in_dim({x.name}, {update}, {at}, {dim})"
    d.add(code, exact=x.exact)


def one_hot(d: Drawing) -> None:
    i = d.integers(high=2)
    if i is not None:
        d.add(f"jax.nn.one_hot({i.name}, {d.pick((3, 4, 6))})", exact=True, grows=False)


def annotation(d: Drawing) -> None:
    x = d.find(lambda e: e.rank > 0)
    if x is not None:
        spec = show_spec(d.spec(x.shape))
        d.add(f"gspmd.annotate({x.name}, {spec})", exact=x.exact, grows=False)


PLACES = (
    reshape, reshape, arrange, arrange, cut, pad, join, take, along, scatter, dynamic, one_hot,
)  # fmt: skip
