"""register_rule: what a user's own primitive is, in the words of a factor rule."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gspmd._compat import bind
from gspmd.errors import RuleError
from gspmd.ir import NO_PARAMS, Op, Value
from gspmd.rules import proof
from gspmd.rules.cases import to_words
from gspmd.rules.factor import REDUCTIONS, RULES, FactorRule, OpRule, tensors_of

_OPTIONS = ("kinds", "sizes", "linear", "forward", "backward", "masked")
_OWN = ("params", "example", "check")
_KINDS = ("pass", *REDUCTIONS, "whole")


def register_rule(
    primitive: Any,
    text: str,
    *,
    params: Mapping[str, Any] | None = None,
    example: Sequence[Any] | None = None,
    check: bool = True,
    **options: Any,
) -> None:
    """Registers `text`, such as `"i k, k j -> i j"`, as the factor rule of a user's primitive.

    The rule is tried: the primitive is run on small operands, whole and in pieces. One that cannot
    be run yet, for want of its params say, is tried when its first op is planned; one that cannot
    be run at all gives a finding "unchecked-rule" there.

    Args:
      primitive: a `jax.extend.core.Primitive`, or its name.
      text: the factors of each operand and result; `...` is not supported, `_` is a whole dim.
      params: those of the primitive, to try it with.
      example: operands to try it on; by default they are drawn, of any small size.
      check: False leaves the trial to the first plan, where no JAX backend may start yet.
      options: `kinds={"k": "max"}` for reductions other than a sum, and `sizes` for compound dims.

    Raises:
      RuleError: the text is malformed or wrong, or the primitive has a rule already.
    """
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str) or not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RuleError(
            f"register_rule({primitive!r}, {text!r}): give a jax.extend.core.Primitive, or its "
            'name, and a text such as "i k, k j -> i j".'
        )
    here = f"register_rule({name!r})"
    known = RULES.get(name)
    if known is not None and not (isinstance(known.check, _Trial) and known.check.refuted):
        raise RuleError(
            f"{here}: this primitive has a rule already, and a rule is registered once; give a "
            "primitive of your own another name."
        )
    unknown = [option for option in options if option not in _OPTIONS]
    if unknown:
        raise RuleError(
            f"{here}: there is no option {unknown[0]!r}; there are {', '.join((*_OPTIONS, *_OWN))}."
        )
    _check_factors(name, text, options.get("kinds", {}), options.get("sizes", {}))
    _check_options(here, options, params, example)
    factors = _reader(name, text, options)
    trial = _Trial(here, text, factors)
    if check and not isinstance(primitive, str):
        trial.at_registration(primitive, params or NO_PARAMS, example, options.get("sizes", {}))
    RULES[name] = OpRule(factors, check=trial)


def _reader(name: str, text: str, options: Mapping[str, Any]) -> Callable[[Op], FactorRule]:
    """What reads `text` against the shapes of an op."""

    def factors(op: Op) -> FactorRule:
        where = f"{name} at {op.source}" if op.source else name
        try:
            made = FactorRule.parse(
                text, [x.shape for x in op.ins], [x.shape for x in op.outs], **options
            )
        except RuleError as error:
            raise RuleError(f"{where}: {error}") from error
        if any(i not in range(len(op.ins)) for group in made.linear for i in group):
            raise RuleError(
                f"{where}: linear={made.linear} names an operand that there is not: it has "
                f"{len(op.ins)}, numbered from 0."
            )
        return made

    return factors


# --- is it right?


@dataclasses.dataclass(slots=True, eq=False)
class _Trial:
    """Tries one rule until it has run once; `passed` says that it has, `refuted` that it is wrong.

    A refuted rule may be registered anew.
    """

    here: str
    text: str
    factors: Callable[[Op], FactorRule]
    passed: bool = False
    refuted: bool = False

    def at_registration(
        self, primitive: Any, params: Mapping[str, Any], example: Any, sizes: Mapping[str, int]
    ) -> None:
        """Tries the rule on `example`, or on drawn operands of the sizes that fit.

        Raises:
          RuleError: it is wrong, or does not fit the example.
        """
        call = bind(primitive)
        if example is not None:
            given = [jnp.asarray(x) for x in example]
            try:
                words = [np.asarray(to_words(x)) for x in given]
                self._try(_op(primitive.name, call, params, given), words)
            except proof.CannotRun as reason:
                raise RuleError(
                    f"{self.here}: the primitive does not run on example={_show(given)} with "
                    f"params={dict(params)}: {reason}."
                ) from reason
            return
        for words in _drawn(self.text, sizes):
            try:
                self._try(_op(primitive.name, call, params, words), words)
                return
            except proof.CannotRun:
                continue

    def __call__(self, op: Op) -> str:
        """Tries the rule on an op of a program; returns why it cannot be tried, or nothing.

        Raises:
          RuleError: it is wrong.
        """
        if self.passed:
            return ""
        rule = self.factors(op)
        sizes = [rule.sizes] if proof.entries(op) <= proof.SMALL else []
        sizes += [proof.shrunken(rule)]
        sizes += [rule.sizes] if proof.SMALL < proof.entries(op) <= proof.LARGEST else []
        said = ""
        for wanted in sizes:
            try:
                smaller = proof.at_sizes(op, rule, wanted)
                self._try(smaller, proof.draw(smaller, np.random.default_rng(0)))
                return ""
            except proof.CannotRun as reason:
                said = said or str(reason)
        return said

    def _try(self, op: Op, words: Sequence[Any]) -> None:
        fault = proof.refute(op, self.factors(op), words)
        if fault:
            self.refuted = True
            raise RuleError(f"{self.here}: the rule {self.text!r} is wrong: {fault}.")
        self.passed = True


def _op(name: str, call: Any, params: Mapping[str, Any], words: Sequence[Any]) -> Op:
    ins = tuple(Value(i, x.shape, x.dtype) for i, x in enumerate(words))
    return proof.with_results(Op(name, ins, (), dict(params), call=call))


def _drawn(text: str, given: Mapping[str, int]) -> Iterator[list[Any]]:
    """Operands for `text`: of different sizes and of equal ones, of floats and of integers."""
    tensors, _ = tensors_of(text)
    names = dict.fromkeys(f for dims in tensors for dim in dims for f in dim)
    step = 6 if len(names) <= 4 else 0  # else there would be very many entries
    for more in (step, 0) if step else (0,):
        sizes = {name: 6 + more * i for i, name in enumerate(names)}
        sizes |= {"_": 6, **given}
        shapes = [tuple(_size(dim, sizes) for dim in dims) for dims in tensors]
        if sum(map(_entries, shapes)) > proof.LARGEST:
            continue
        for dtype in (np.float32, np.int32):
            ins = tuple(Value(i, shape, np.dtype(dtype)) for i, shape in enumerate(shapes))
            yield proof.draw(Op("", ins, ()), np.random.default_rng(0))


def _size(dim: Sequence[str], sizes: Mapping[str, int]) -> int:
    return int(np.prod([sizes[f] for f in dim]))


def _entries(shape: Sequence[int]) -> int:
    return int(np.prod(shape))


def _show(words: Sequence[Any]) -> str:
    return f"({', '.join(f'{x.dtype}{list(x.shape)}' for x in words)})"


# --- do its parts fit each other?


def _check_factors(name: str, text: str, kinds: Any, sizes: Any) -> None:
    """Raises RuleError where the parts of a user's rule do not fit each other."""
    here = f"register_rule({name!r})"
    try:
        sides = tensors_of(text)
    except RuleError as error:
        raise RuleError(f"{here}: {error}") from error
    ins, outs = ([f for tensor in side for dim in tensor for f in dim] for side in sides)
    for factor in (*ins, *outs):
        if not factor.isidentifier():
            raise RuleError(
                f"{here}: {factor!r} in {text!r} is no factor; a factor is a name, or _ for a dim "
                "that stays whole."
            )
    for factor in outs:
        if factor != "_" and factor not in ins:
            raise RuleError(
                f"{here}: factor {factor!r} of {text!r} is in no operand, so that no piece of it "
                "can be computed; write _ there, for a dim that stays whole."
            )
    for option, given, kind in (("kinds", kinds, str), ("sizes", sizes, int)):
        if not isinstance(given, Mapping) or not all(
            isinstance(x, kind) for x in cast("Mapping[Any, Any]", given).values()
        ):
            example = 'kinds={"k": "max"}' if option == "kinds" else 'sizes={"k": 8}'
            raise RuleError(f"{here}: {option}={given!r} is not of the form {example}.")
        for factor in cast("Mapping[Any, Any]", given):
            if factor not in ins:
                raise RuleError(f"{here}: {option} names {factor!r}, which is not in {text!r}.")
    for factor, kind in cast("Mapping[str, str]", kinds).items():
        if kind not in _KINDS:
            raise RuleError(
                f"{here}: factor {factor!r} has kind {kind!r}; a kind is one of "
                f"{', '.join(_KINDS)}."
            )
    for factor, size in cast("Mapping[str, int]", sizes).items():
        if isinstance(size, bool) or size < 1:
            raise RuleError(f"{here}: factor {factor!r} has size {size!r}; a size is at least 1.")


def _check_options(here: str, options: Mapping[str, Any], params: Any, example: Any) -> None:
    """Raises RuleError where an option is not of its form."""
    if not _is_groups(linear := options.get("linear", ())):
        raise RuleError(
            f"{here}: linear={linear!r} is not of the form ((0, 1), (2,)): a tuple of operands by "
            "number for each group in which the op is linear."
        )
    for option in ("forward", "backward"):
        level = options.get(option, 0)
        if level not in (0, 1, 2, 3):
            raise RuleError(f"{here}: {option}={level!r} is no level of propagation, 0 to 3.")
    if options.get("masked", True) not in (True, False):
        raise RuleError(f"{here}: masked={options['masked']!r} is neither True nor False.")
    if params is not None and not isinstance(params, Mapping):
        raise RuleError(f'{here}: params={params!r} is not of the form params={{"axis": 0}}.')
    if example is None:
        return
    if not isinstance(example, (tuple, list)):
        raise RuleError(
            f"{here}: example is of type {type(example).__name__}; give a tuple of the operands, "
            "(x,) for one."
        )
    for i, x in enumerate(cast("Sequence[Any]", example)):
        if not isinstance(x, (bool, int, float, complex, np.generic, np.ndarray, jax.Array)):
            raise RuleError(
                f"{here}: entry {i} of example is of type {type(x).__name__}, and the primitive "
                "is run on it; give an array."
            )


def _is_groups(linear: Any) -> bool:
    """Whether it is like ((0, 1), (2,))."""
    return isinstance(linear, (tuple, list)) and all(
        isinstance(group, (tuple, list)) and all(isinstance(i, int) for i in cast("Any", group))
        for group in cast("Any", linear)
    )
