"""FactorRule: one fact per op, from which propagation, partitioning and the op's tests all follow.

A rule names the *factors* of an op: the dims of its operands and results that must be split alike.
`"b i k, b k j -> b i j"` is a batched matrix product; `"(a b) -> a b"` a reshape that splits a dim,
whose major factor is `a`. A factor has a kind:

* `pass`: split it and the op runs on the pieces, which lie side by side in the results;
* `sum`, `max`, `min`, `prod`, `and`, `or`, `xor`: split it and each piece gives a partial result,
  to be combined by that reduction;
* `whole`: the op needs the entire dim.

A factor may be *exchanged*: its pieces need entries of each other (the halo of a window, the totals
of a prefix sum), and a `partition` function beside the rule says which.

(The same idea as Shardy's op sharding rules and einops' strings.)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gspmd.errors import RuleError
from gspmd.ir import Op, Operand, Value
from gspmd.sharding import Axes, Mesh, Sharding

if TYPE_CHECKING:
    from gspmd.rules.build import Builder

Dims = tuple[tuple[int, ...], ...]  # the factors of each dim of one tensor, major first

REDUCTIONS = ("sum", "max", "min", "prod", "and", "or", "xor")
KINDS = ("pass", *REDUCTIONS, "whole")


@dataclasses.dataclass(frozen=True, slots=True)
class FactorRule:
    """How the dims of an op correspond. Factors are numbered; `names` are for reading.

    `linear` lists the groups of operands in which the op is jointly linear: `add` has ((0, 1),),
    `mul` ((0,), (1,)). Sums that the operands of one group all owe may be paid after the op.
    `forward` and `backward` are the levels (0 to 3) from which propagation may carry an axis from
    operands to results and back: 0 pointwise and data movement, 1 contractions and the rest,
    2 and 3 broadcasts (GSPMD, section 3.5, iterative propagation with priorities).
    `masked` says that padding in a reduced factor must be neutralized before the op runs.
    `exchanged` lists the factors whose pieces need entries of each other. Dims that share one may
    differ in size, as the operand and the result of a slice do; the factor has the operand's.
    `copied` lists whole factors of which every device needs all, so that to gather them is no want
    of a better strategy: the updates of a scatter.
    """

    ins: tuple[Dims, ...]
    outs: tuple[Dims, ...]
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    names: tuple[str, ...]
    linear: tuple[tuple[int, ...], ...] = ()
    forward: int = 0
    backward: int = 0
    masked: bool = True
    exchanged: frozenset[int] = frozenset()
    copied: frozenset[int] = frozenset()

    @classmethod
    def parse(
        cls,
        text: str,
        ins: Sequence[tuple[int, ...]],
        outs: Sequence[tuple[int, ...]],
        kinds: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
        **options: Any,
    ) -> "FactorRule":
        """Reads `"b i k, b k j -> b i j"` against the operands' and results' shapes.

        `_` is a dim that must stay whole. Factors absent from the results are summed, unless
        `kinds` says otherwise. `sizes` gives the factors of compound dims, `(a b)`; one per dim may
        be left out.

        Raises:
          RuleError: the text does not fit the shapes.
        """
        return _Parser(text, ins, outs, dict(kinds or {}), dict(sizes or {})).rule(options)

    @property
    def free(self) -> bool:
        """No operand has a factor: results can be made anew under any sharding (iota, zeros)."""
        return not any(factors for dims in self.ins for factors in dims)

    @property
    def spread(self) -> frozenset[int]:
        """The factors of results along which what the operands hold is repeated (a broadcast)."""
        if not self.linear:
            return frozenset()
        given = {f for dims in self.ins for factors in dims for f in factors}
        made = {f for dims in self.outs for factors in dims for f in factors}
        return frozenset(f for f in made - given if self.kinds[f] == "pass")

    @property
    def elementwise(self) -> bool:
        """Each entry of the results is made of those at its place in the operands."""
        place = self.outs[0] if self.outs else ()
        return (
            bool(self.outs)
            and set(self.kinds) <= {"pass"}
            and not self.exchanged
            and all(len(factors) == 1 for factors in place)
            and all(dims == place for dims in self.outs)
            and all(len(dims) in (0, len(place)) for dims in self.ins)
            and all(f in ((), g) for dims in self.ins for f, g in zip(dims, place, strict=False))
        )

    def __str__(self) -> str:
        def tensor(dims: Dims) -> str:
            parts: list[str] = []
            for factors in dims:
                names = [self.names[f] for f in factors]
                parts.append(names[0] if len(names) == 1 else f"({' '.join(names)})")
            return " ".join(parts)

        sides = (", ".join(map(tensor, side)) for side in (self.ins, self.outs))
        kinds = [f"{n}: {k}" for n, k in zip(self.names, self.kinds, strict=True) if k != "pass"]
        kinds += [f"{self.names[f]}: exchanged" for f in sorted(self.exchanged)]
        return " -> ".join(sides) + (f"  ({', '.join(kinds)})" if kinds else "")


class Factors:
    """Collects the factors of one rule: `f.new(size)` for each, then `f.rule(ins, outs)`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.exchanged: set[int] = set()

    def new(self, size: int, kind: str = "pass", exchanged: bool = False) -> int:
        """A factor of `size`; returns its number."""
        self.sizes.append(size)
        self.kinds.append(kind)
        if exchanged:
            self.exchanged.add(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def dims(self, shape: Sequence[int], kind: str = "pass") -> Dims:
        """One new factor for each dim of `shape`."""
        return tuple((self.new(n, kind),) for n in shape)

    def rule(self, ins: Sequence[Dims], outs: Sequence[Dims], **options: Any) -> FactorRule:
        names = tuple(_name(i) for i in range(len(self.sizes)))
        return FactorRule(
            tuple(ins),
            tuple(outs),
            tuple(self.sizes),
            tuple(self.kinds),
            names,
            exchanged=frozenset(self.exchanged),
            **options,
        )


def _name(i: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[i] if i < 26 else f"f{i}"


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """One device's share of an op: how operands and results are split, and their local shapes.

    `axes[f]` are the mesh axes that split factor `f`. A result still owes the axes of the reduced
    factors.
    """

    mesh: Mesh
    axes: tuple[Axes, ...]
    ins: tuple[Sharding, ...]
    outs: tuple[Sharding, ...]
    in_shapes: tuple[tuple[int, ...], ...]
    out_shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        op: Op,
        mesh: Mesh,
        axes: tuple[Axes, ...],
        ins: tuple[Sharding, ...],
        outs: tuple[Sharding, ...],
    ) -> "Split":
        return cls(
            mesh,
            axes,
            ins,
            outs,
            tuple(s.local_shape(x.shape, mesh) for x, s in zip(op.ins, ins, strict=True)),
            tuple(s.local_shape(x.shape, mesh) for x, s in zip(op.outs, outs, strict=True)),
        )


Partition = Callable[["Builder", Op, Split, Sequence[Operand]], Sequence[Value] | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """The loop nest of a matrix product: `batch` products of an m x k by a k x n matrix."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        """Two for each multiplication and its addition."""
        return 2.0 * self.batch * self.m * self.n * self.k


@dataclasses.dataclass(frozen=True, slots=True)
class OpRule:
    """What the table holds for a primitive.

    `factors(op)` is its FactorRule. `params(op, split)` are the params of the op on local shapes,
    where they name shapes. `call(op, split)` replaces the primitive on local arrays, for ops that
    must know which shard they hold; inside, `jax.lax.axis_index` is available, and no collective
    may be used. `partition(builder, op, split, ins)` emits the op on the local operands where an
    exchanged factor is split, and returns the local results; None if that split is beyond it.
    `check(op)` tries a user's rule that has not been tried yet; it returns why it cannot.
    `picks`: of the summands of a result that come of a split factor, all but one are zero.
    `product(op)` is the matrix product that the op is, for those that are one: a convolution too.
    """

    factors: Callable[[Op], FactorRule]
    params: Callable[[Op, Split], dict[str, Any]] | None = None
    call: Callable[[Op, Split], Callable[..., Any]] | None = None
    partition: "Partition | None" = None
    check: Callable[[Op], str] | None = None
    picks: bool = False
    product: Callable[[Op], Product] | None = None


RULES: dict[str, OpRule] = {}


def rule(
    *primitives: str,
    params: Callable[[Op, Split], dict[str, Any]] | None = None,
    call: Callable[[Op, Split], Callable[..., Any]] | None = None,
    partition: Partition | None = None,
    picks: bool = False,
    product: Callable[[Op], Product] | None = None,
) -> Callable[[Callable[[Op], FactorRule]], Callable[[Op], FactorRule]]:
    """Registers the decorated function as the rule of `primitives`."""

    def register(factors: Callable[[Op], FactorRule]) -> Callable[[Op], FactorRule]:
        for primitive in primitives:
            if primitive in RULES:
                raise RuleError(f"primitive {primitive!r} already has a rule.")
            RULES[primitive] = OpRule(
                factors, params, call, partition, picks=picks, product=product
            )
        return factors

    return register


def gathered(op: Op) -> FactorRule:
    """The rule of an op that nobody knows: every dim of every operand and result stays whole."""
    f = Factors()
    return f.rule(
        [f.dims(x.shape, "whole") for x in op.ins], [f.dims(x.shape, "whole") for x in op.outs]
    )


def tensors_of(text: str) -> tuple[list[list[tuple[str, ...]]], list[list[tuple[str, ...]]]]:
    """The factor names of each dim of each operand and result in `text`."""
    if text.count("->") != 1:
        raise RuleError(f"a factor rule has one '->', got {text!r}.")
    sides: list[list[list[tuple[str, ...]]]] = []
    for side in text.split("->"):
        tensors: list[list[tuple[str, ...]]] = []
        for tensor in side.split(","):
            dims: list[tuple[str, ...]] = []
            group: list[str] | None = None
            for token in tensor.replace("(", " ( ").replace(")", " ) ").split():
                if token == "(" and group is None:
                    group = []
                elif token == ")" and group is not None:
                    dims.append(tuple(group))
                    group = None
                elif token in "()":
                    raise RuleError(f"unbalanced parentheses in the factor rule {text!r}.")
                elif group is not None:
                    group.append(token)
                else:
                    dims.append((token,))
            if group is not None:
                raise RuleError(f"unbalanced parentheses in the factor rule {text!r}.")
            tensors.append(dims)
        sides.append(tensors)
    return sides[0], sides[1]


class _Parser:
    def __init__(
        self,
        text: str,
        ins: Sequence[tuple[int, ...]],
        outs: Sequence[tuple[int, ...]],
        kinds: dict[str, str],
        sizes: dict[str, int],
    ) -> None:
        self.text, self.kinds, self.given = text, kinds, dict(sizes)
        self.tensors = tensors_of(text)
        self.shapes = (list(ins), list(outs))
        for what, tensors, shapes in zip(
            ("operands", "results"), self.tensors, self.shapes, strict=True
        ):
            if len(tensors) != len(shapes):
                raise RuleError(
                    f"factor rule {text!r} has {len(tensors)} {what}, the op has {len(shapes)}."
                )
            for i, (dims, shape) in enumerate(zip(tensors, shapes, strict=True)):
                if len(dims) != len(shape):
                    raise RuleError(
                        f"factor rule {text!r}: {what[:-1]} {i} has {len(dims)} dims, the op's has "
                        f"{len(shape)}, shape {shape}."
                    )
        for name, kind in kinds.items():
            if kind not in KINDS:
                raise RuleError(
                    f"factor rule {text!r}: factor {name!r} has kind {kind!r}; a kind is one of "
                    f"{', '.join(KINDS)}."
                )

    def rule(self, options: dict[str, Any]) -> FactorRule:
        sizes = self._sizes()
        kept = {name for tensor in self.tensors[1] for dim in tensor for name in dim}
        f = Factors()
        numbers: dict[str, int] = {}
        names: list[str] = []

        def number(name: str, size: int) -> int:
            if name == "_":
                names.append("_")
                return f.new(size, "whole")
            if name not in numbers:
                names.append(name)
                numbers[name] = f.new(
                    sizes[name], self.kinds.get(name, "pass" if name in kept else "sum")
                )
            return numbers[name]

        sides: list[list[Dims]] = []
        for tensors, shapes in zip(self.tensors, self.shapes, strict=True):
            sides.append(
                [
                    tuple(
                        tuple(number(name, n) for name in dim)
                        for dim, n in zip(tensor, shape, strict=True)
                    )
                    for tensor, shape in zip(tensors, shapes, strict=True)
                ]
            )
        made = f.rule(sides[0], sides[1], **options)
        return dataclasses.replace(made, names=tuple(names))

    def _sizes(self) -> dict[str, int]:
        sizes = dict(self.given)
        dims = [
            (dim, n)
            for tensors, shapes in zip(self.tensors, self.shapes, strict=True)
            for tensor, shape in zip(tensors, shapes, strict=True)
            for dim, n in zip(tensor, shape, strict=True)
        ]
        for dim, n in sorted(dims, key=lambda item: len(item[0])):
            known = 1
            unknown: list[str] = []
            for name in dim:
                if name == "_":
                    continue
                if name in sizes:
                    known *= sizes[name]
                else:
                    unknown.append(name)
            if len(unknown) > 1:
                raise RuleError(
                    f"factor rule {self.text!r}: the sizes of {unknown} in a dim of size {n} are "
                    "ambiguous; give them with `sizes`."
                )
            if unknown:
                if n % known:
                    raise RuleError(
                        f"factor rule {self.text!r}: {known} does not divide a dim of size {n}."
                    )
                sizes[unknown[0]] = n // known
            elif dim != ("_",) and known != n:
                raise RuleError(
                    f"factor rule {self.text!r}: ({' '.join(dim)}) has size {known}, but the dim "
                    f"has size {n}."
                )
        return sizes
