"""Real text without a download: the source files of the installed Python's standard library.

Tokens are bytes, so the vocabulary has 256 entries. What is drawn depends on nothing but the
installed Python, the seed and the step: a run that is resumed sees what it would have seen.
"""

import dataclasses
import pathlib
import sysconfig

import numpy as np
import numpy.typing as npt

from gspmd.errors import GspmdError

Tokens = npt.NDArray[np.uint8]

HELD_OUT_EVERY = 20  # every 20th file is kept from training


class TextError(GspmdError, ValueError):
    """The text at hand is missing, or too short for what is asked of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The bytes to train on, and those of the files held out."""

    train: Tokens
    held_out: Tokens


def standard_library() -> Text:
    """The `*.py` files at the top of the standard library, in the order of their names."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"), key=lambda file: file.name)
    if len(files) < HELD_OUT_EVERY:
        raise TextError(
            f"{folder} holds {len(files)} source files, too few for a text to train on; "
            f"use a Python that is installed with its standard library as files."
        )
    held_out = files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return Text(_read([file for file in files if file not in held_out]), _read(held_out))


def _read(files: list[pathlib.Path]) -> Tokens:
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def batch(
    tokens: Tokens, *, seed: int, step: int, batch_size: int, seq: int
) -> dict[str, npt.NDArray[np.int32]]:
    """Step `step`'s batch: `inputs` and `targets`, [batch_size, seq] each, targets one byte on."""
    if tokens.size <= seq:
        raise TextError(f"sequences of {seq} bytes need a text of {seq + 1}, got {tokens.size}.")
    starts = np.random.default_rng((seed, step)).integers(tokens.size - seq, size=batch_size)
    windows = tokens[starts[:, None] + np.arange(seq + 1)].astype(np.int32)
    return {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


def encode(text: str) -> npt.NDArray[np.int32]:
    """The tokens of `text`."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: npt.ArrayLike) -> str:
    """The text of `tokens`; bytes that are no UTF-8 show as the replacement character."""
    return np.asarray(tokens).astype(np.uint8).tobytes().decode(errors="replace")
