"""Steps that look at windows: convolutions and pooling."""

from gspmd.testing.drawing import Drawing


def convolution(d: Drawing) -> None:
    """In one dim, of (batch, length, channels)."""
    x = d.floats(3, 3)
    if x is None:
        return
    _, length, channels = x.shape
    groups = d.pick([g for g in (1, 2, 3) if channels % g == 0])
    width, stride = d.number(1, 3), d.number(1, 2)
    dilations = d.number(1, 2), d.number(1, 2)
    padding = d.number(0, 2), d.number(0, 2)
    if (length - 1) * dilations[0] + sum(padding) < (width - 1) * dilations[1]:
        return
    w = d.parameter((width, channels // groups, groups * d.pick((1, 2))))
    if w is None:
        return
    code = (
        f"lax.conv_general_dilated({x.name}, {w.name}, ({stride},), ({padding},), "
        f'({dilations[0]},), ({dilations[1]},), ("NWC", "WIO", "NWC"), {groups})'
    )
    d.add(code, exact=x.exact)


def image(d: Drawing) -> None:
    """A convolution in two dims, of (batch, channels, height, width)."""
    x = d.floats(4, 4)
    if x is None:
        return
    w = d.parameter((d.pick((1, 2, 4)), x.shape[1], d.number(1, 3), d.number(1, 3)))
    if w is not None:
        stride = d.number(1, 2), d.number(1, 2)
        d.add(f'lax.conv({x.name}, {w.name}, {stride}, "SAME")', exact=x.exact)


def pool(d: Drawing) -> None:
    x = d.floats(1, 4)
    if x is None:
        return
    dim = d.dim(x)
    window, strides = [1] * x.rank, [1] * x.rank
    window[dim], strides[dim] = d.number(1, 3), d.number(1, 2)
    how = f'{tuple(window)}, {tuple(strides)}, "SAME"'
    total = f"lax.reduce_window({x.name}, 0.0, lax.add, {how})"
    largest = f"lax.reduce_window({x.name}, -jnp.inf, lax.max, {how})"
    d.add(d.pick((total, largest) if x.exact else (total,)), exact=x.exact)


WINDOWS = (convolution, image, pool)
