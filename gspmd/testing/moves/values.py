"""Steps that compute: pointwise ops, contractions, reductions, orders, other dtypes, randomness."""

import math

from gspmd.testing.drawing import SIZES, Drawing, Entry

_SMOOTH = (
    "jnp.tanh({x})", "jnp.sin({x})", "jax.nn.gelu({x})", "jax.nn.softplus({x})", "{x} * 0.5",
    "jnp.sqrt({x} * {x} + 1)", "jnp.exp(-jnp.abs({x}) - 1)", "lax.erf({x})", "lax.logistic({x})",
    "lax.integer_pow({x}, 2) / 8", "jnp.arctan2({x}, {x} * {x} + 1)",
)  # fmt: skip
_WHOLE = (
    "{x} * 2", "-{x}", "jnp.abs({x})", "jax.nn.relu({x})", "jnp.sign({x})", "jnp.floor({x} / 2)",
    "lax.clamp(-2.0, {x}, 3.0)", "jnp.square({x})", "lax.reduce_precision({x}, 8, 10)",
    "lax.stop_gradient({x})",
)  # fmt: skip


def unary(d: Drawing) -> None:
    x = d.floats()
    if x is not None:
        code = d.pick((*_WHOLE, *_SMOOTH) if x.exact else _SMOOTH)
        d.add(code.format(x=x.name), exact=x.exact and code in _WHOLE)


def binary(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is None:
        return
    shapes = (x.shape, x.shape[1:], (*x.shape[:-1], 1), ())
    y = d.find(lambda e: e.kind == "float" and e.shape in shapes)
    assert y is not None
    exact = x.exact and y.exact
    a, b = x.name, y.name
    jumps = [f"jnp.where({a} > {b}, {a}, {b})", f"jnp.maximum({a}, {b})", f"jnp.minimum({a}, {b})"]
    jumps += [f"lax.select_n({a} == {b}, {a}, {a} - 1)", f"jnp.fmod({a}, jnp.abs({b}) + 2)"]
    code = d.pick([f"{a} + {b}", f"{a} - {b}", f"{a} * {b}", *(jumps if exact else [])])
    d.add(code, exact=exact)


def quotient(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is not None:
        y = d.find(lambda e: e.kind == "float" and e.shape == x.shape)
        assert y is not None
        d.add(f"{x.name} / (jnp.abs({y.name}) + 1)")


def einsum(d: Drawing) -> None:
    x = d.floats(1, 3)
    if x is None:
        return
    letters = "abc"[: x.rank]
    roles = [d.pick(("contract", "batch", "free")) for _ in letters]
    right = [k for k, role in zip(letters, roles, strict=True) if role != "free"]
    right += ["n"] if d.flag() else []
    right = [right[k] for k in d.order(len(right))]
    sizes = dict(zip(letters, x.shape, strict=True)) | {"n": d.pick(SIZES)}
    y = d.parameter(tuple(sizes[k] for k in right))
    if y is None:
        return
    out = [k for k, role in zip(letters, roles, strict=True) if role != "contract"]
    out += ["n"] if "n" in right else []
    out = [out[k] for k in d.order(len(out))]
    text = f"{letters},{''.join(right)}->{''.join(out)}"
    d.add(f'jnp.einsum("{text}", {x.name}, {y.name})', exact=x.exact)


def reduction(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is None:
        return
    dims = d.pick([(k,) for k in range(x.rank)] + [tuple(range(x.rank)), (0, x.rank - 1)])
    how = f"axis={tuple(sorted(set(dims)))}, keepdims={d.flag()}"
    options = [f"jnp.mean({x.name}, {how})", f"jnp.var({x.name}, {how})"]
    options += [f"jax.nn.logsumexp({x.name}, {how})", f"jnp.linalg.norm({x.name} + 9, axis=0)"]
    whole = [f"jnp.sum({x.name}, {how})"]
    if x.exact:
        whole += [f"jnp.max({x.name}, {how})", f"jnp.min({x.name}, {how})"]
        whole += [f"jnp.prod(jnp.sign({x.name}), {how})"]
    code = d.pick((*whole, *options))
    d.add(code, exact=x.exact and code in whole)


def normalize(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is None:
        return
    dim = d.dim(x)
    # 1, lest rounding grow where all entries are alike
    layer_norm = f"""centered = {x.name} - jnp.mean({x.name}, {dim}, keepdims=True)
centered * lax.rsqrt(jnp.mean(centered**2, {dim}, keepdims=True) + 1)"""
    softmax = [f"jax.nn.softmax({x.name}, {dim})", f"jax.nn.log_softmax({x.name}, {dim})"]
    d.add(d.pick((*softmax, layer_norm)))


def ordered(d: Drawing) -> None:
    x = d.floats(low=1, exact=True)
    if x is None:
        return
    a, dim = x.name, d.dim(x)
    k = d.number(1, x.shape[dim])
    reverse = d.flag()
    d.add(
        d.pick(
            (
                f"jnp.sort({a}, axis={dim}, descending={reverse})",
                f"jnp.argmax({a}, axis={dim})",
                f"jnp.argmin({a}, axis={dim})",
                f"jnp.argsort({a}, axis={dim}, stable=True)",
                f"lax.top_k(jnp.moveaxis({a}, {dim}, -1), {k})[0]",
                f"lax.top_k(jnp.moveaxis({a}, {dim}, -1), {k})[1]",
                f"lax.sort(({a}, {a} * -2), dimension={dim}, num_keys=1)[1]",
                f"jnp.median({a}, axis={dim})",
            )
        ),
        exact=True,
    )


def cumulative(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is None:
        return
    a, how = x.name, f"axis={d.dim(x)}, reverse={d.flag()}"
    whole = [f"lax.cumsum({a}, {how})"]
    if x.exact:
        whole += [f"lax.cummax({a}, {how})", f"lax.cummin({a}, {how})"]
        whole += [f"lax.cumprod(jnp.sign({a}), {how})"]
    code = d.pick((*whole, f"lax.cumlogsumexp({a}, {how})"))
    d.add(code, exact=x.exact and code in whole)


def to_integers(d: Drawing) -> None:
    x = d.floats(exact=True)
    if x is not None:
        dtype = d.pick(("int32", "int8", "uint8", "int16"))
        d.add(f"({x.name} % {d.pick((2, 3, 5))}).astype(jnp.{dtype})")


def from_integers(d: Drawing) -> None:
    i = d.find(lambda e: e.kind in ("int", "bool"))
    if i is not None:
        d.add(f"{i.name}.astype(jnp.float32)", exact=True)


def arithmetic(d: Drawing) -> None:
    """Integers wrap, so that any order of sums gives the same."""
    i = d.integers(low=1)
    if i is None:
        return
    same = d.find(lambda e: e.kind == "int" and e.shape == i.shape and e.dtype == i.dtype)
    assert same is not None
    a, b, dim = i.name, same.name, d.dim(i)
    d.add(
        d.pick(
            (
                f"{a} + {b}", f"{a} * {b}", f"{a} - 1", f"{a} & {b}", f"{a} | {b}", f"{a} ^ {b}",
                f"{a} << 1", f"{a} >> 1", f"{a} % 3", f"{a} // 2", f"~{a}",
                f"jnp.maximum({a}, {b})", f"lax.population_count({a})", f"lax.clz({a})",
                f"jnp.sum({a}, axis={dim})", f"jnp.prod({a}, axis={dim})",
                f"jnp.max({a}, axis={dim})", f"jnp.bitwise_or.reduce({a}, axis={dim})",
                f"jnp.bitwise_and.reduce({a}, axis={dim})", f"jnp.cumsum({a}, axis={dim})",
                f"jnp.sort({a}, axis={dim})", f"jnp.argmin({a}, axis={dim})",
                f"jnp.einsum('...a,...a->...', {a}, {b})",
                f"{a}.astype(jnp.int32)",
            )
        )
    )  # fmt: skip


def truth(d: Drawing) -> None:
    """Booleans: made by comparisons, joined, reduced, and used to choose."""
    x = d.find(lambda e: e.rank > 0 and (e.kind == "bool" or (e.kind == "float" and e.exact)))
    if x is None:
        return
    a, dim = x.name, d.dim(x)
    if x.kind == "float":
        d.add(d.pick((f"{a} > 0", f"{a} == 1", f"jnp.isfinite({a})")))
        return
    y = d.find(lambda e: e.kind == "bool" and e.shape == x.shape)
    assert y is not None
    d.add(
        d.pick(
            (
                f"~{a}", f"{a} & {y.name}", f"{a} ^ {y.name}", f"jnp.any({a}, axis={dim})",
                f"jnp.all({a}, axis={dim})", f"jnp.sum({a}, axis={dim})",
                f"jnp.where({a}, 2, {y.name}.astype(jnp.int32))",
            )
        )
    )  # fmt: skip


def narrow(d: Drawing) -> None:
    """bfloat16 and float16, in which small whole numbers are exact."""
    x = d.find(lambda e: e.kind == "narrow" and e.exact)
    if x is None or d.flag():
        x = d.floats(exact=True)
        if x is not None:
            dtype = d.pick(("bfloat16", "float16"))
            d.add(f"{x.name}.astype(jnp.{dtype})", exact=True, grows=False)
        return
    a = x.name
    options = [f"{a} + 1", f"{a} * {a}", f"-{a}", f"jnp.maximum({a}, 2)", f"jnp.sign({a})"]
    options += [f"{a}.astype(jnp.float32)"] * 2
    if x.rank:
        dim = d.dim(x)
        options += [f"jnp.sum(jnp.sign({a}), axis={dim})", f"jnp.max({a}, axis={dim})"]
        # entries up to 9, and sums of their products, need the mantissa of float32
        wide = "preferred_element_type=jnp.float32"
        options.append(f"jnp.einsum('...a,...b->ab', {a}, {a}, {wide})")
    d.add(d.pick(options), exact=True)


def complex_numbers(d: Drawing) -> None:
    z = d.find(lambda e: e.kind == "complex" and e.rank > 0)
    if z is None or d.flag():
        x = d.floats(low=1)
        if x is not None:
            d.add(d.pick((f"lax.complex({x.name}, {x.name} * 0.5)", f"jnp.fft.fft({x.name}) / 4")))
        return
    a, dim = z.name, d.dim(z)
    real = [f"jnp.real({a})", f"jnp.imag({a})", f"jnp.real({a} * jnp.conj({a})) / 4"]
    more = [f"jnp.sum({a}, axis={dim}) / 4", f"jnp.fft.ifft({a}, axis={dim})", f"jnp.conj({a})"]
    d.add(d.pick((*real, *more)))


def transform(d: Drawing) -> None:
    x = d.floats(low=1)
    if x is None:
        return
    dim, n = d.dim(x), x.shape[-1]
    options = [f"jnp.real(jnp.fft.fft({x.name}, axis={dim})) / 4"]
    if n > 1:  # of a single entry, XLA's CPU compiler fails where a triangular solve comes next
        options.append(f"jnp.abs(jnp.fft.rfft({x.name}) + 20)")
        options.append(f"jnp.fft.irfft(jnp.fft.rfft({x.name}), {n})")
    d.add(d.pick(options))


def factorization(d: Drawing) -> None:
    """Linear algebra on well conditioned matrices, in batches."""
    x = d.floats(2, 4)
    if x is None:
        return
    n = x.shape[-1]
    bounded = f"x = jnp.tanh({x.name})"
    positive = f"{bounded}\na = jnp.einsum('...ik,...ij->...kj', x, x) + {2 * n} * jnp.eye({n})"
    d.add(
        d.pick(
            (
                f"{positive}\njnp.linalg.cholesky(a)",
                f"{positive}\njnp.linalg.solve(a, jnp.swapaxes(x, -1, -2))",
                f"{positive}\njnp.linalg.inv(a) * {2 * n}",
                f"{positive}\njnp.linalg.slogdet(a)[1]",
                f"{positive}\nlax.linalg.triangular_solve(jnp.tril(a), x, lower=True) * {n}",
                f"{bounded}\njnp.tril(x, -1) + jnp.triu(x, 1)",
            )
        )
    )


def noise(d: Drawing) -> None:
    x = d.floats()
    if x is None:
        return
    key = f"key = jax.random.fold_in(jax.random.key(0), {len(d.steps)})\n"
    a, drawn = x.name, f"jax.random.bernoulli(key, 0.5, {x.shape})"
    whole = [f"jnp.where({drawn}, {a}, 0)", f"jax.random.randint(key, {x.shape}, 0, 5)"]
    whole += [f"jax.random.permutation(key, {a})"] if x.rank else []
    keys = "jax.random.split(key, 3)"
    options = [f"{a} + jax.random.normal(key, {x.shape})", f"{a} * jax.random.uniform(key, ())"]
    options += [f"jax.vmap(jax.random.normal)({keys}) + jnp.sum({a}) / {math.prod(x.shape)}"]
    code = d.pick((*whole, *options))
    d.add(key + code, exact=x.exact and code in whole)


def grid(d: Drawing) -> Entry | None:
    """Numbers that count along dims: what attention masks are made of."""
    x = d.floats(low=2)
    if x is None:
        return None
    row, column = (f"lax.broadcasted_iota(jnp.int32, {x.shape}, {k})" for k in (0, x.rank - 1))
    return d.add(f"jnp.where({row} >= {column}, {x.name}, -1)", exact=x.exact)


VALUES = (
    unary, binary, quotient, einsum, reduction, normalize, ordered, cumulative, to_integers,
    from_integers, arithmetic, truth, narrow, complex_numbers, transform, factorization, noise,
    grid,
)  # fmt: skip
OFTEN = (einsum, binary, unary)
