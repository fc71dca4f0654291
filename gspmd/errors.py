"""The errors of gspmd: each is one sentence that names what, where, the numbers and the way out."""

import difflib
import re
from collections.abc import Iterable


class GspmdError(Exception):
    """Base of every error that gspmd raises on purpose."""


class SpecError(GspmdError, ValueError):
    """A spec, an annotation or a rule table does not fit its tensor or its mesh."""


class MeshError(GspmdError, ValueError):
    """A mesh is malformed, or it does not match the devices or the arrays at hand."""


class TraceError(GspmdError, TypeError):
    """A function cannot be turned into a program."""


class ArgumentError(GspmdError, TypeError):
    """A plan was called with arguments other than those it was made for."""


class RuleError(GspmdError, ValueError):
    """A factor rule is malformed, or contradicts the op that it describes."""


class StrictError(GspmdError):
    """`strict=True` and the program holds ops which can only run gathered."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`: the known one it resembles, if any.

    That is the closest in any case, else one that has `name` for a word: "v4" is of "tpu-v4".
    """
    by_folded = {one.casefold(): one for one in known}
    folded = name.casefold()
    close = difflib.get_close_matches(folded, by_folded, n=1)
    close += [one for one in by_folded if folded in re.split(r"[\W_]+", one)] if folded else []
    return f"; did you mean {by_folded[close[0]]!r}?" if close else "."
