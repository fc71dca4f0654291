"""Exchange: which device sends what to whom, where each wants another stretch of a split dim.

One primitive for all that XLA calls halo exchange (GSPMD, section 4.3): windows, slices, padding,
rolls, concatenation and reversal differ only in the stretch that each device wants. A dim is a line
of positions; `Runs` says which run of them each device of a group has, or wants. Where the runs
meet, entries move: in as few rounds as there are partners, each one a permutation of the devices.
"""

import collections
import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.local import as_words
from gspmd.sharding import Axes

Pairs = tuple[tuple[int, int], ...]  # (sender, receiver), by the combined index in the group


@dataclasses.dataclass(frozen=True, slots=True)
class Runs:
    """Per device of a group, in order: positions `start` to `stop`, the first at index `at`.

    Both `start` and `stop` rise, or both fall, from device to device. An empty run has
    `stop <= start`.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    at: tuple[int, ...]

    @classmethod
    def of(cls, start: Any, stop: Any, at: Any = 0) -> "Runs":
        """Runs from arrays, or scalars where all devices are alike."""
        start, stop, at = np.broadcast_arrays(start, stop, at)
        return cls(*(tuple(int(i) for i in x.ravel()) for x in (start, stop, at)))

    @classmethod
    def blocks(cls, n: int, group: int) -> "Runs":
        """A dim of size n as it lies on a group: ceil(n / group) entries each, the last ones less.

        >>> Runs.blocks(5, 3)
        Runs(start=(0, 2, 4), stop=(2, 4, 5), at=(0, 0, 0))
        """
        block = -(-n // group)
        start = np.minimum(np.arange(group) * block, n)
        return cls.of(start, np.minimum(start + block, n))

    @property
    def group(self) -> int:
        return len(self.start)


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """One move of entries: `pairs` of devices, or none where each takes its own.

    Sender s cuts `size` entries from its index `cut[s]` on. Receiver r puts them at its index
    `put[r]`, which may lie outside, and keeps those that land in `first[r]` to `last[r]`.
    """

    pairs: Pairs
    size: int
    cut: tuple[int, ...]
    put: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]

    @classmethod
    def empty(cls, group: int, size: int) -> "Round":
        """The round in which nobody gets anything."""
        zeros = (0,) * group
        return cls((), size, zeros, zeros, zeros, zeros)

    def fills(self, size: int) -> bool:
        """Whether what arrives is all of a dim of `size`, on every device that gets something."""
        return self.size == size and not any(self.put)


@dataclasses.dataclass(frozen=True, slots=True)
class _Move:
    """One stretch that `receiver` wants and `sender` has: `size` entries, from `cut` to `put`."""

    sender: int
    receiver: int
    cut: int
    put: int
    size: int


@functools.lru_cache(maxsize=4096)
def rounds(have: Runs, wants: tuple[Runs, ...], block: int) -> tuple[Round, ...]:
    """The rounds after which every device has all that it wants, as far as anybody has it.

    `block` is the size of a shard, beyond which nobody can cut. The rounds are those with the
    fewest entries sent, of three ways to sort the moves into permutations.
    """
    moves = [move for want in wants for move in _moves(have, want)]
    own = [move for move in moves if move.sender == move.receiver]
    rest = [move for move in moves if move.sender != move.receiver]
    ways = [_by_distance(rest, have.group), _in_turn(rest), _first_fit(rest)]
    best = min((way for way in ways if way is not None), key=_price)
    return tuple(
        _round(part, have.group, block, own=part[0].sender == part[0].receiver)
        for part in (*_own_rounds(own), *best)
    )


def _moves(have: Runs, want: Runs) -> Iterator[_Move]:
    starts, stops = np.asarray(have.start), np.asarray(have.stop)
    held = np.flatnonzero(stops > starts)
    held = held[np.argsort(starts[held])]
    starts, stops = starts[held], stops[held]
    for receiver, (start, stop, at) in enumerate(zip(want.start, want.stop, want.at, strict=True)):
        if stop <= start:
            continue
        first = int(np.searchsorted(stops, start, "right"))
        last = int(np.searchsorted(starts, stop, "left"))
        for i in range(first, last):
            sender = int(held[i])
            low, high = max(start, int(starts[i])), min(stop, int(stops[i]))
            cut = have.at[sender] + low - int(starts[i])
            yield _Move(sender, receiver, cut, at + low - start, high - low)


def _price(way: Sequence[Sequence[_Move]]) -> tuple[int, int]:
    return sum(max(move.size for move in part) for part in way), len(way)


def _by_distance(moves: Sequence[_Move], group: int) -> list[list[_Move]] | None:
    """Moves over one distance together: what is asked of a regular pattern."""
    return _grouped(moves, [((m.receiver - m.sender) % group, m.put - m.cut) for m in moves])


def _in_turn(moves: Sequence[_Move]) -> list[list[_Move]] | None:
    """The i-th move in round i modulo the number of partners, which is the fewest possible.

    Runs rise or fall, so that the moves of one device, as sender or receiver, follow each other.
    """
    senders = collections.Counter(move.sender for move in moves)
    receivers = collections.Counter(move.receiver for move in moves)
    partners = max((*senders.values(), *receivers.values()), default=1)
    return _grouped(moves, [i % partners for i in range(len(moves))])


def _first_fit(moves: Sequence[_Move]) -> list[list[_Move]]:
    """Each move in the first round in which neither of the two is busy; always possible."""
    found: list[list[_Move]] = []
    busy: list[tuple[set[int], set[int]]] = []
    for move in sorted(moves, key=lambda m: -m.size):
        free = (
            i
            for i, (senders, receivers) in enumerate(busy)
            if move.sender not in senders and move.receiver not in receivers
        )
        i = next(free, len(found))
        if i == len(found):
            found.append([])
            busy.append((set(), set()))
        found[i].append(move)
        busy[i][0].add(move.sender)
        busy[i][1].add(move.receiver)
    return found


def _grouped(moves: Sequence[_Move], keys: Sequence[Hashable]) -> list[list[_Move]] | None:
    """The moves by key, or None if some device were to send or receive twice in a round."""
    parts: dict[Hashable, list[_Move]] = {}
    for move, key in zip(moves, keys, strict=True):
        parts.setdefault(key, []).append(move)
    for part in parts.values():
        if len({move.sender for move in part}) < len(part):
            return None
        if len({move.receiver for move in part}) < len(part):
            return None
    return list(parts.values())


def _own_rounds(moves: Sequence[_Move]) -> list[list[_Move]]:
    """What devices take from themselves: the first stretch of each, then the second, ..."""
    found: list[list[_Move]] = []
    count: collections.Counter[int] = collections.Counter()
    for move in moves:
        if count[move.receiver] == len(found):
            found.append([])
        found[count[move.receiver]].append(move)
        count[move.receiver] += 1
    return found


def _round(moves: Sequence[_Move], group: int, block: int, own: bool) -> Round:
    size = max(move.size for move in moves)
    cut, put, first, last = ([0] * group for _ in range(4))
    alike = len({(min(m.cut, block - size), m.put - m.cut) for m in moves}) == 1
    for i in range(group if alike else 0):  # the idle devices do as the others, which costs nothing
        cut[i] = min(moves[0].cut, block - size)
        put[i] = moves[0].put - (moves[0].cut - cut[i])
    for move in moves:
        # A cut may not pass the end of the shard: it begins earlier, and lands earlier.
        cut[move.sender] = min(move.cut, block - size)
        put[move.receiver] = move.put - (move.cut - cut[move.sender])
        first[move.receiver], last[move.receiver] = move.put, move.put + move.size
    pairs = () if own else tuple((move.sender, move.receiver) for move in moves)
    return Round(pairs, size, *(tuple(x) for x in (cut, put, first, last)))


# --- on a device


def cut(x: jax.Array, *, axes: Axes, dim: int, at: tuple[int, ...], size: int) -> jax.Array:
    """This device's `size` entries of a dim from its index `at[device]` on."""
    x, restore = as_words(x)
    start = mine(at, axes)
    if isinstance(start, int):
        return restore(lax.slice_in_dim(x, start, start + size, axis=dim))
    return restore(lax.dynamic_slice_in_dim(x, start, size, dim))


def assemble(
    *operands: jax.Array, axes: Axes, dim: int, size: int, rounds: tuple[Round, ...]
) -> jax.Array:
    """A dim of `size` made of the pieces that came in each round, and of a filler in between.

    The filler is a scalar after the pieces; zero, if there is none.
    """
    words = [as_words(x)[0] for x in operands]
    pieces, fillers = words[: len(rounds)], words[len(rounds) :]
    shape = list(pieces[0].shape)
    shape[dim] = size
    out = jnp.broadcast_to(fillers[0] if fillers else np.zeros((), pieces[0].dtype), shape)
    position = lax.broadcasted_iota(np.int32, shape, dim)
    for piece, this in zip(pieces, rounds, strict=True):
        placed = _placed(piece, mine(this.put, axes), dim, size)
        first, last = mine(this.first, axes), mine(this.last, axes)
        if isinstance(first, int) and isinstance(last, int) and first <= 0 and last >= size:
            out = placed
        else:
            out = jnp.where((position >= first) & (position < last), placed, out)
    return as_words(operands[0])[1](out)


def _placed(x: jax.Array, put: Any, dim: int, size: int) -> jax.Array:
    """A dim of `size` in which the entries of `x` begin at index `put`, zeros around them."""
    zero = np.zeros((), x.dtype)
    widths = [(0, 0, 0)] * x.ndim
    if isinstance(put, int):
        widths[dim] = (put, size - put - x.shape[dim], 0)
        return lax.pad(x, zero, widths)
    widths[dim] = (size, size, 0)
    return lax.dynamic_slice_in_dim(lax.pad(x, zero, widths), size - put, size, dim)


def mine(table: Sequence[int], axes: Axes) -> Any:
    """This device's entry of a table over the group: a number if all are the same."""
    if len(set(table)) == 1:
        return table[0]
    return jnp.asarray(np.asarray(table, np.int32))[lax.axis_index(axes)]
