"""Programs drawn by hypothesis: small jax.numpy functions, strung together, with meshes and specs.

Values are `exact` while they are small whole numbers, whose sums are the same in any order; what
jumps (comparisons, argmax, sort, top_k) is done to these only. The others are compared with a
tolerance.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import gspmd
from gspmd import P

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12)
LARGEST = 600  # elements of a value


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a value while a program is drawn."""

    shape: tuple[int, ...]
    dtype: Any
    exact: bool

    @property
    def kind(self) -> str:
        return np.dtype(self.dtype).kind


@dataclasses.dataclass(frozen=True)
class Step:
    """`fn(values so far)` gives the next value; `text` says what it does."""

    text: str
    fn: Callable[[Sequence[Any]], Any]
    exact: bool


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Drawn:
    """A program with its arguments and the way it is to be partitioned."""

    args: tuple[np.ndarray, ...]
    steps: tuple[Step, ...]
    outs: tuple[int, ...]
    exact: tuple[bool, ...]
    mesh: dict[str, int]
    in_specs: tuple[P | None, ...]
    out_specs: tuple[P | None, ...]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        values = list(args)
        for step in self.steps:
            values.append(step.fn(values))
        return tuple(values[i] for i in self.outs)

    def __repr__(self) -> str:
        lines = [f"mesh {self.mesh}"]
        lines += [
            f"v{i} = {x.dtype}{x.shape} {spec}"
            for i, (x, spec) in enumerate(zip(self.args, self.in_specs, strict=True))
        ]
        lines += [f"v{i} = {s.text}" for i, s in enumerate(self.steps, start=len(self.args))]
        outs = ", ".join(f"v{i} {s}" for i, s in zip(self.outs, self.out_specs, strict=True))
        return "\n" + "\n".join(lines) + f"\nreturn {outs}\n"


# --- drawing


class Drawing:
    """A program under construction."""

    def __init__(self, draw: Any, mesh: dict[str, int]) -> None:
        self.draw, self.mesh = draw, mesh
        self.entries: list[Entry] = []
        self.args: list[np.ndarray] = []
        self.steps: list[Step] = []

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def find(self, wanted: Callable[[Entry], bool]) -> int | None:
        """One of the values that are `wanted`, the newest with preference."""
        found = [i for i, e in enumerate(self.entries) if wanted(e)]
        if not found:
            return None
        return found[-1] if self.flag() else self.pick(found)

    def of_shape(self, shape: tuple[int, ...], exact: bool) -> int | None:
        return self.find(lambda e: e.shape == shape and e.kind == "f" and (e.exact or not exact))

    def add(self, text: str, fn: Callable[..., Any], exact: bool, *operands: int) -> bool:
        """Appends `fn(*operands)` if it is small enough; whole numbers are kept small."""
        names = [f"v{i}" for i in operands]

        def run(values: Sequence[Any]) -> Any:
            y = fn(*(values[i] for i in operands))
            return jnp.clip(y, -9, 9) if exact and y.dtype == jnp.float32 else y

        avals = [jax.ShapeDtypeStruct(e.shape, e.dtype) for e in self.entries]
        made = jax.eval_shape(lambda *xs: run(xs), *avals)
        if not 0 < math.prod(made.shape) <= LARGEST or len(made.shape) > 4:
            return False
        self.steps.append(Step(f"{text}({', '.join(names)}) {made.shape}", run, exact))
        self.entries.append(Entry(made.shape, made.dtype, exact))
        return True

    def spec(self, shape: Sequence[int], loose: bool = True) -> P:
        """A spec for `shape`: each axis on one dim at most; dims may be too small, or uneven."""
        free = list(self.mesh)
        dims: list[Any] = []
        for _ in shape:
            what = self.number(0, 5)
            if what <= 2 and free:
                dims.append(free.pop(self.number(0, len(free) - 1)))
            elif what == 3 and len(free) > 1:
                first = free.pop(self.number(0, len(free) - 1))
                dims.append((first, free.pop(self.number(0, len(free) - 1))))
            else:
                dims.append(P.UNCONSTRAINED if loose and what == 4 else None)
        return P(*dims)


def shapes(d: Drawing, low: int = 1, high: int = 3) -> tuple[int, ...]:
    shape = tuple(d.pick(SIZES) for _ in range(d.number(low, high)))
    return shape if math.prod(shape) <= 200 else shape[:2]


def parameter(d: Drawing, shape: tuple[int, ...]) -> int | None:
    """A value of `shape`, a new constant if there is none yet."""
    found = d.of_shape(shape, exact=True)
    if found is not None:
        return found
    array = np.random.default_rng(math.prod(shape) + len(d.steps)).integers(-2, 3, shape)
    ok = d.add(f"const{shape}", lambda: jnp.asarray(array, jnp.float32), True)
    return len(d.entries) - 1 if ok else None


# --- the moves: each appends a step, or does nothing where no value fits


def unary(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f")
    if i is None:
        return
    exact = d.entries[i].exact
    smooth = {"tanh": jnp.tanh, "gelu": jax.nn.gelu, "sin": jnp.sin, "half": lambda x: x * 0.5}
    jumps = {"relu": jax.nn.relu, "abs": jnp.abs, "neg": jnp.negative, "double": lambda x: x * 2}
    table = smooth | jumps if exact else smooth
    name = d.pick(table)
    d.add(name, table[name], exact and name in jumps, i)


def binary(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and len(e.shape) > 0)
    if i is None:
        return
    shape = d.entries[i].shape
    j = d.find(lambda e: e.kind == "f" and e.shape in (shape, shape[1:], (*shape[:-1], 1), ()))
    assert j is not None
    exact = d.entries[i].exact and d.entries[j].exact
    table: dict[str, Any] = {"add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply}
    if exact:
        table["where"] = lambda x, y: jnp.where(x > y, x, y)
        table["max"] = jnp.maximum
    name = d.pick(table)
    d.add(name, table[name], exact, i, j)


def einsum(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and 1 <= len(e.shape) <= 3)
    if i is None:
        return
    left = d.entries[i]
    letters = "abc"[: len(left.shape)]
    roles = [d.pick(("contract", "contract", "batch", "free")) for _ in letters]
    shared = [x for x, role in zip(letters, roles, strict=True) if role != "free"]
    right = [*shared, *(["n"] if d.flag() else [])]
    right = [right[k] for k in d.draw(st.permutations(range(len(right))))]
    sizes = dict(zip(letters, left.shape, strict=True)) | {"n": d.pick(SIZES)}
    j = parameter(d, tuple(sizes[x] for x in right))
    if j is None:
        return
    out = [x for x, role in zip(letters, roles, strict=True) if role != "contract"]
    out += ["n"] if "n" in right else []
    out = [out[k] for k in d.draw(st.permutations(range(len(out))))]
    text = f"{letters},{''.join(right)}->{''.join(out)}"
    exact = left.exact and d.entries[j].exact
    d.add(f"einsum[{text}]", lambda x, y: jnp.einsum(text, x, y), exact, i, j)


def reduction(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and len(e.shape) > 0)
    if i is None:
        return
    rank, exact = len(d.entries[i].shape), d.entries[i].exact
    dims = d.pick([(k,) for k in range(rank)] + [tuple(range(rank)), (0, rank - 1)])
    dims, keep = tuple(sorted(set(dims))), d.flag()
    table: dict[str, Any] = {"sum": jnp.sum, "mean": jnp.mean, "logsumexp": jax.nn.logsumexp}
    table["var"] = jnp.var
    if exact:
        table |= {"max": jnp.max, "min": jnp.min, "prod": lambda x, **k: jnp.prod(jnp.sign(x), **k)}
    name = d.pick(table)
    whole = exact and name in ("sum", "max", "min", "prod")
    d.add(f"{name}[{dims},{keep}]", lambda x: table[name](x, axis=dims, keepdims=keep), whole, i)


def normalize(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and len(e.shape) > 0)
    if i is None:
        return
    axis = d.number(0, len(d.entries[i].shape) - 1)

    def layer_norm(x: Any, axis: int) -> Any:  # 1, lest rounding grow where all entries are alike
        centered = x - jnp.mean(x, axis, keepdims=True)
        return centered * lax.rsqrt(jnp.mean(centered**2, axis, keepdims=True) + 1)

    table = {"softmax": jax.nn.softmax, "log_softmax": jax.nn.log_softmax, "norm": layer_norm}
    name = d.pick(table)
    d.add(f"{name}[{axis}]", lambda x: table[name](x, axis=axis), False, i)


def ordered(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and e.exact and len(e.shape) > 0)
    if i is None:
        return
    axis = d.number(0, len(d.entries[i].shape) - 1)
    n = d.entries[i].shape[axis]
    k = d.number(1, n)
    table: dict[str, Any] = {
        "sort": lambda x: jnp.sort(x, axis=axis),
        "argmax": lambda x: jnp.argmax(x, axis=axis),
        "argsort": lambda x: jnp.argsort(x, axis=axis),
        "top_k": lambda x: lax.top_k(jnp.moveaxis(x, axis, -1), k)[0],
        "top_k_index": lambda x: lax.top_k(jnp.moveaxis(x, axis, -1), k)[1],
        "cumsum": lambda x: jnp.cumsum(x, axis=axis),
        "cummax": lambda x: lax.cummax(x, axis=axis, reverse=True),
    }
    name = d.pick(table)
    d.add(f"{name}[{axis},{k}]", table[name], True, i)


def to_integers(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and e.exact)
    if i is not None:
        n = d.pick((2, 3, 5))
        d.add(f"int[{n}]", lambda x: jnp.abs(x).astype(jnp.int32) % n, True, i)


def from_integers(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "i" and len(e.shape) <= 2)
    if i is None:
        return
    n = d.pick((2, 3, 5, 8))
    table: dict[str, Any] = {
        "one_hot": lambda x: jax.nn.one_hot(x, n),
        "float": lambda x: x.astype(jnp.float32),
        "positions": lambda x: (x == jnp.arange(x.shape[-1] if x.ndim else 3)).astype(jnp.float32),
        "isum": lambda x: jnp.sum(x, axis=0) if x.ndim else x + 1,
        "iany": lambda x: jnp.any(x > 1, axis=-1) if x.ndim else x > 1,
    }
    name = d.pick(table)
    d.add(f"{name}[{n}]", table[name], True, i)


def choose(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "b")
    if i is None:
        return
    j = d.of_shape(d.entries[i].shape, exact=False)
    if j is not None:
        d.add("where", lambda p, x: jnp.where(p, x, -x * 2), d.entries[j].exact, i, j)


def embedding(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "i" and len(e.shape) <= 2)
    if i is None:
        return
    table = d.find(lambda e: e.kind == "f" and len(e.shape) == 2)
    if table is None:
        return
    mode = d.pick(("fill", "clip", "wrap"))
    exact = d.entries[table].exact
    if mode == "fill":  # NaN out of bounds, which no other step is to see
        mode_fn = lambda t, x: jnp.take(t, x, axis=0, mode="fill", fill_value=0)  # noqa: E731
    else:
        mode_fn = lambda t, x: jnp.take(t, x, axis=0, mode=mode)  # noqa: E731
    d.add(f"take[{mode}]", mode_fn, exact, table, i)


def scatter(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "i" and len(e.shape) == 1)
    if i is None:
        return
    n = d.entries[i].shape[0]
    j = d.find(lambda e: e.kind == "f" and len(e.shape) > 0 and e.shape[0] == n)
    if j is None:
        return
    rows = d.pick((3, 4, 6))
    kind = d.pick(("add", "max") if d.entries[j].exact else ("add",))

    def run(ids: Any, x: Any) -> Any:
        zeros = jnp.zeros((rows, *x.shape[1:]), x.dtype)
        return getattr(zeros.at[ids], kind)(x)

    d.add(f"scatter_{kind}[{rows}]", run, d.entries[j].exact, i, j)


def along(d: Drawing) -> None:
    """take_along_axis: a gather with a batch."""
    i = d.find(lambda e: e.kind == "i" and len(e.shape) > 0)
    if i is None:
        return
    shape = d.entries[i].shape
    j = d.find(lambda e: e.kind == "f" and e.shape[:-1] == shape[:-1] and len(e.shape) > 0)
    if j is not None:
        d.add(
            "take_along_axis",
            lambda x, at: jnp.take_along_axis(x, at % x.shape[-1], axis=-1),
            d.entries[j].exact,
            j,
            i,
        )


def reshape(d: Drawing) -> None:
    i = d.find(lambda e: math.prod(e.shape) > 1)
    if i is None:
        return
    shape, exact = d.entries[i].shape, d.entries[i].exact
    options: list[tuple[int, ...]] = [(math.prod(shape),)]
    for k, n in enumerate(shape):
        options += [(*shape[:k], a, n // a, *shape[k + 1 :]) for a in range(2, n) if n % a == 0]
        if k:
            options.append((*shape[: k - 1], shape[k - 1] * n, *shape[k + 1 :]))
        if k > 1:
            a, b, c = shape[k - 2 : k + 1]
            options.append((*shape[: k - 2], b, a * c, *shape[k + 1 :]))
    total = math.prod(shape)
    options += [(a, total // a) for a in (2, 3, 4, 6, 8) if total % a == 0]
    new = d.pick(options)
    d.add(f"reshape[{new}]", lambda x: x.reshape(new), exact, i)


def move(d: Drawing) -> None:
    i = d.find(lambda e: len(e.shape) > 0)
    if i is None:
        return
    e = d.entries[i]
    rank = len(e.shape)
    order = tuple(d.draw(st.permutations(range(rank))))
    axis = d.number(0, rank - 1)
    n = e.shape[axis]
    start = d.number(0, n - 1)
    stop = d.number(start + 1, n)
    table: dict[str, Any] = {
        f"transpose[{order}]": lambda x: x.transpose(order),
        f"slice[{axis},{start}:{stop}]": lambda x: lax.slice_in_dim(x, start, stop, axis=axis),
        f"strided[{axis}]": lambda x: lax.slice_in_dim(x, 0, n, 2, axis),
        f"flip[{axis}]": lambda x: jnp.flip(x, axis),
        f"roll[{axis},{start}]": lambda x: jnp.roll(x, start, axis),
        f"expand[{axis}]": lambda x: jnp.expand_dims(x, axis),
        f"broadcast[{axis}]": lambda x: jnp.broadcast_to(x, (d_size, *x.shape)),
        f"repeat[{axis}]": lambda x: jnp.repeat(x, 2, axis),
    }
    d_size = d.pick((2, 3, 4))
    if e.kind == "f":
        low = d.number(0, 2)
        width = [(low, 1) if k == axis else (0, 0) for k in range(rank)]
        table[f"pad[{width}]"] = lambda x: jnp.pad(x, width, constant_values=1)
    name = d.pick(table)
    d.add(name, table[name], e.exact, i)


def join(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and len(e.shape) > 0)
    if i is None:
        return
    e = d.entries[i]
    axis = d.number(0, len(e.shape) - 1)

    def fits(o: Entry) -> bool:
        return (
            o.kind == "f"
            and len(o.shape) == len(e.shape)
            and all(
                a == b for k, (a, b) in enumerate(zip(e.shape, o.shape, strict=True)) if k != axis
            )
        )

    j = d.find(fits)
    assert j is not None
    exact = e.exact and d.entries[j].exact
    if d.entries[j].shape == e.shape and d.flag():
        d.add(f"stack[{axis}]", lambda x, y: jnp.stack([x, y], axis), exact, i, j)
    else:
        d.add(f"concat[{axis}]", lambda x, y: jnp.concatenate([x, y], axis), exact, i, j)


def dynamic(d: Drawing) -> None:
    """Slices whose start is data; out of bounds starts are clamped."""
    i = d.find(lambda e: e.kind == "f" and len(e.shape) > 0)
    if i is None:
        return
    e = d.entries[i]
    axis = d.number(0, len(e.shape) - 1)
    n = e.shape[axis]
    size, start = d.number(1, n), d.number(-1, n + 1)
    at = d.find(lambda e: e.kind == "i" and e.shape == ())
    operands = (i,) if at is None else (i, at)

    def begin(rest: tuple[Any, ...]) -> Any:
        return jnp.int32(start) if not rest else rest[0] + start - 1

    def take(x: Any, *rest: Any) -> Any:
        return lax.dynamic_slice_in_dim(x, begin(rest), size, axis)

    def put(x: Any, *rest: Any) -> Any:
        update = lax.slice_in_dim(x, 0, size, axis=axis) * 2
        return lax.dynamic_update_slice_in_dim(x, update, begin(rest), axis)

    name = d.pick(("take", "put"))
    run = {"take": take, "put": put}[name]
    d.add(f"dynamic_{name}[{axis},{start},{size}]", run, e.exact, *operands)


def noise(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f")
    if i is None:
        return
    e = d.entries[i]
    table: dict[str, tuple[bool, Any]] = {
        "normal": (False, lambda k, x: x + jax.random.normal(k, x.shape)),
        "dropout": (e.exact, lambda k, x: jnp.where(jax.random.bernoulli(k, 0.5, x.shape), x, 0)),
        "uniform": (False, lambda k, x: x * jax.random.uniform(k, x.shape)),
        "randint": (True, lambda k, x: jax.random.randint(k, x.shape, 0, 5)),
        "split": (
            False,
            lambda k, x: jnp.zeros(3) + jax.vmap(jax.random.normal)(jax.random.split(k, 3)),
        ),
    }
    name = d.pick(table)
    exact, run = table[name]
    number = len(d.steps)
    d.add(name, lambda x: run(jax.random.fold_in(jax.random.key(0), number), x), exact, i)


def scan(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and 2 <= len(e.shape) <= 3)
    if i is None:
        return
    shape = d.entries[i].shape
    w = parameter(d, (shape[-1], shape[-1]))
    if w is None:
        return
    init = d.of_shape(shape[1:], exact=False)
    operands = (i, w) if init is None else (i, w, init)
    reverse, remat = d.flag(), d.flag()
    result = d.pick(("carry", "ys", "sums", "total"))

    def run(xs: Any, w: Any, *rest: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            h, total = carry
            h = jnp.tanh(h @ w * 0.3 + x)
            return (h, total + jnp.sum(h) * 0.1), (h * x, jnp.sum(x, axis=-1))

        start = rest[0] if rest else jnp.zeros(xs.shape[1:], xs.dtype)
        one = jax.checkpoint(body) if remat else body
        (h, total), (ys, sums) = lax.scan(one, (start, jnp.float32(0)), xs, reverse=reverse)
        return {"carry": h, "ys": ys, "sums": sums, "total": total}[result]

    d.add(f"scan[{result},reverse={reverse},remat={remat}]", run, False, *operands)


def accumulate(d: Drawing) -> None:
    """A scan whose carry is a sum over what may be split: gradient accumulation."""
    i = d.find(lambda e: e.kind == "f" and len(e.shape) == 3)
    if i is None:
        return
    shape = d.entries[i].shape
    j = d.find(lambda e: e.kind == "f" and len(e.shape) == 3 and e.shape[:2] == shape[:2])
    assert j is not None

    def run(xs: Any, ys: Any) -> Any:
        def body(total: Any, xy: Any) -> Any:
            return total + jnp.einsum("bm,bn->mn", *xy), None

        return lax.scan(body, jnp.zeros((xs.shape[2], ys.shape[2])), (xs, ys))[0]

    d.add("accumulate", run, d.entries[i].exact and d.entries[j].exact, i, j)


def loop(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and e.exact and len(e.shape) > 1)
    if i is None:
        return

    def run(x: Any) -> Any:
        def test(state: Any) -> Any:
            k, y = state
            return (k < 4) & (jnp.sum(jnp.abs(y)) > 3)

        def body(state: Any) -> Any:
            k, y = state
            return k + 1, jnp.floor(y / 2) + jnp.sum(jnp.sign(x), axis=-1, keepdims=True) * 0

        return lax.while_loop(test, body, (jnp.int32(0), x))[1]

    rows = d.flag()  # a loop for each row
    d.add(f"while[{rows}]", jax.vmap(run) if rows else run, True, i)


def branch(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and len(e.shape) > 0)
    p = d.find(lambda e: e.exact and e.kind in "fi")
    if i is None or p is None:
        return

    def run(p: Any, x: Any) -> Any:
        branches = [
            lambda x: x * 2,
            lambda x: x - jnp.max(x, axis=0, keepdims=True),
            lambda x: jnp.cumsum(x, axis=-1),
        ]
        return lax.switch(jnp.sum(p).astype(jnp.int32) % 3, branches, x)

    d.add("switch", run, d.entries[i].exact, p, i)


def remat(d: Drawing) -> None:
    i = d.find(lambda e: e.kind == "f" and len(e.shape) >= 2)
    if i is None:
        return
    n = d.entries[i].shape[-1]
    w = parameter(d, (n, d.pick((2, 4, 6))))
    if w is not None:
        block = jax.checkpoint(lambda x, w: jnp.tanh(x @ w * 0.3) @ w.T)
        d.add("remat", block, False, i, w)


def annotation(d: Drawing) -> None:
    i = d.find(lambda e: len(e.shape) > 0)
    if i is None:
        return
    e = d.entries[i]
    spec = d.spec(e.shape)
    d.add(f"annotate[{spec}]", lambda x: gspmd.annotate(x, spec), e.exact, i)


MOVES = (
    unary, binary, einsum, reduction, normalize, ordered, to_integers, from_integers, choose,
    embedding, scatter, along, reshape, move, join, dynamic, noise, scan, accumulate, loop, branch,
    remat,
)  # fmt: skip
ALSO = (einsum, einsum, reshape, binary, annotation, annotation)  # more often than the others
MESHES = (
    {"x": 2}, {"x": 3}, {"x": 4}, {"x": 2, "y": 2}, {"x": 2, "y": 3}, {"x": 4, "y": 2},
    {"x": 1, "y": 4}, {"x": 2, "y": 2, "z": 2}, {"x": 2, "y": 1, "z": 3}, {"x": 3, "y": 4},
)  # fmt: skip


@st.composite
def programs(draw: Any, steps: int = 8, smooth: bool = False, annotated: bool = True) -> Drawn:
    """A drawn program; `smooth` ones have a reverse-mode derivative."""
    d = Drawing(draw, draw(st.sampled_from(MESHES)))
    for k in range(d.number(1, 3)):
        shape = shapes(d)
        d.args.append(np.random.default_rng(k).integers(-3, 4, shape).astype(np.float32))
        d.entries.append(Entry(shape, np.dtype(np.float32), True))
    if not smooth and d.flag():
        shape = shapes(d, 1, 2)
        d.args.append(np.random.default_rng(9).integers(0, 5, shape).astype(np.int32))
        d.entries.append(Entry(shape, np.dtype(np.int32), True))
    moves = [
        move
        for move in (*MOVES, *ALSO)
        if (annotated or move is not annotation) and not (smooth and move is loop)
    ]
    for _ in range(d.number(2, steps)):
        d.pick(moves)(d)
    count = len(d.args)
    outs = tuple(range(count, len(d.entries)))[-3:] or (0,)
    return Drawn(
        tuple(d.args),
        tuple(d.steps),
        outs,
        tuple(d.entries[i].exact for i in outs),
        d.mesh,
        tuple(None if d.flag() else d.spec(x.shape) for x in d.args),
        tuple(None if d.flag() else d.spec(d.entries[i].shape) for i in outs),
    )
