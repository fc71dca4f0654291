"""The errors of gspmd: each is one sentence that names what, where, the numbers and the way out."""

import difflib
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
    """The end of a sentence about an unknown `name`: the known one it resembles, if any."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."
