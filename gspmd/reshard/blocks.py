"""Blocks: which device hands which part of its shard to whom, where a tensor is split anew.

A shard is a block of the tensor: a stretch in each dim. Where the blocks that devices hold meet the
blocks that they want, pieces move, in rounds: in each, every device sends and receives one piece at
most. `exchange` does the same for one dim along which devices want any stretch.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.exchange import Pairs, mine
from gspmd.local import as_words
from gspmd.sharding import Axes, Mesh, Sharding

Shape = tuple[int, ...]
Table = tuple[tuple[int, ...], ...]  # per dim an index, per device of the group


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """One move of pieces of `size`: by `pairs` of devices, or none where each takes its own.

    Sender s cuts its piece from index `cut[dim][s]` on. Receiver r puts it at `put[dim][r]`, which
    may lie outside, and keeps the entries from `first[dim][r]` to `last[dim][r]`.
    """

    pairs: Pairs
    size: Shape
    cut: Table
    put: Table
    first: Table
    last: Table


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """What `receiver` wants of `sender`: per dim `size` entries, from index `cut` to `put`."""

    sender: int
    receiver: int
    cut: Shape
    put: Shape
    size: Shape


def group_axes(mesh: Mesh, src: Sharding, dst: Sharding) -> Axes:
    """The axes along which devices hold or want different blocks, in the order of the mesh."""
    changed = {axis for a, b in zip(src.dims, dst.dims, strict=True) if a != b for axis in (*a, *b)}
    return tuple(axis for axis in mesh.names if axis in changed)


def aligned(shape: Shape, mesh: Mesh, src: Sharding, dst: Sharding) -> bool:
    """Whether no dim is padded, and in each the larger blocks are made of whole smaller ones."""
    for n, a, b in zip(shape, src.dims, dst.dims, strict=True):
        few, many = sorted((mesh.size(a), mesh.size(b)))
        if n % many or many % few:
            return False
    return True


def partners(mesh: Mesh, src: Sharding, dst: Sharding) -> int:
    """Of how many blocks of `src` a block of `dst` is made, where they are aligned."""
    sides = zip(src.dims, dst.dims, strict=True)
    return math.prod(max(1, mesh.size(a) // mesh.size(b)) for a, b in sides)


@functools.lru_cache(maxsize=1024)
def rounds(shape: Shape, mesh: Mesh, src: Sharding, dst: Sharding) -> tuple[Round, ...]:
    """The rounds from `src` to `dst` within each group of devices along `group_axes`.

    As few as a device has partners; where blocks are uneven, more if so fewer bytes are sent.
    """
    held, wanted = src.local_shape(shape, mesh), dst.local_shape(shape, mesh)
    if aligned(shape, mesh, src, dst):
        return tuple(_by_cells(mesh, src, dst, held, wanted))
    group = mesh.size(group_axes(mesh, src, dst))
    parts = _matched(_pieces(shape, mesh, src, dst))
    return tuple(_round(part, group, held, wanted) for part in parts)


def _by_cells(
    mesh: Mesh, src: Sharding, dst: Sharding, held: Shape, wanted: Shape
) -> Iterator[Round]:
    """The rounds between aligned blocks.

    Cells as large as the larger blocks fall apart: their J blocks of `src` lie on F devices each,
    and J * F devices want a part of all J. In round k, the device number i of these takes its part
    of block i // F + k from the holder number i % F. A device that is among both has one number.
    """
    have, want = (_indices(mesh, src, dst, side) for side in (src, dst))
    large = np.maximum(held, wanted)
    cells = collections.defaultdict[Shape, tuple[list[int], list[int]]](lambda: ([], []))
    for side, (index, size) in enumerate(((have, held), (want, wanted))):
        for device, cell in enumerate((np.asarray(index) * size // large).tolist()):
            cells[tuple(cell)][side].append(device)
    count = partners(mesh, src, dst)
    senders = np.zeros((count, len(have)), int)  # by round and receiver
    for holders, receivers in cells.values():
        holders.sort(key=lambda device: have[device])  # those of a block follow each other
        others = iter(sorted(set(receivers).difference(holders)))
        both = set(receivers).intersection(holders)
        numbered = [device if device in both else next(others) for device in holders]
        for k in range(count):
            shift = k * (len(holders) // count)
            senders[k, numbered] = [*holders[shift:], *holders[:shift]]
    size = np.minimum(held, wanted)
    cuts, puts = np.asarray(want) * wanted % held, np.asarray(have) * held % wanted
    for sender in senders:
        cut = np.empty_like(cuts)
        cut[sender] = cuts
        put = puts[sender]
        pairs = list(zip(sender.tolist(), range(len(sender)), strict=True))
        own = all(s == r for s, r in pairs)
        tables = (tuple(map(tuple, table.T.tolist())) for table in (cut, put, put, put + size))
        yield Round(() if own else tuple(sorted(pairs)), tuple(size.tolist()), *tables)


def _matched(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Uneven blocks by round; what devices have themselves comes first."""
    own = [piece for piece in pieces if piece.sender == piece.receiver]
    rest = [piece for piece in pieces if piece.sender != piece.receiver]
    rest.sort(key=lambda piece: -math.prod(piece.size))
    best = min((_colored(rest), _first_fit(rest)), key=_price)
    return [own, *best] if own else best


def _pieces(shape: Shape, mesh: Mesh, src: Sharding, dst: Sharding) -> list[_Piece]:
    """Every device's wants: of its own shard where it can, else of all that hold it in turn."""
    have, want = (_indices(mesh, src, dst, side) for side in (src, dst))
    held, wanted = src.local_shape(shape, mesh), dst.local_shape(shape, mesh)
    holders: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for device, index in enumerate(have):
        holders[index].append(device)
    turns: dict[tuple[int, ...], int] = collections.defaultdict(int)
    found: list[_Piece] = []
    for receiver, index in enumerate(want):
        meets = (_meets(n, s, w, i) for n, s, w, i in zip(shape, held, wanted, index, strict=True))
        for stretches in itertools.product(*meets):
            source = tuple(block for block, *_ in stretches)
            if source == have[receiver]:
                sender = receiver
            else:
                able = holders[source]
                sender = able[turns[source] % len(able)]
                turns[source] += 1
            cut, put, size = zip(*(stretch[1:] for stretch in stretches), strict=True)
            found.append(_Piece(sender, receiver, cut, put, size))
    return found


def pieces_at_most(shape: Shape, mesh: Mesh, src: Sharding, dst: Sharding) -> int:
    """How many pieces a group of devices may have to move."""
    sides = zip(src.local_shape(shape, mesh), dst.local_shape(shape, mesh), strict=True)
    most = math.prod(-(-want // max(have, 1)) + (want != have) for have, want in sides)
    return mesh.size(group_axes(mesh, src, dst)) * most


def _indices(mesh: Mesh, src: Sharding, dst: Sharding, side: Sharding) -> list[tuple[int, ...]]:
    """Which block per dim each device of the group has under `side`; 0 in dims that stay."""
    axes = group_axes(mesh, src, dst)
    sizes = [mesh.size((axis,)) for axis in axes]
    at = dict(zip(axes, np.indices(sizes).reshape(len(axes), -1), strict=True))
    columns: list[np.ndarray] = []
    for a, b, own in zip(src.dims, dst.dims, side.dims, strict=True):
        index = np.zeros(math.prod(sizes), int)
        for axis in own if a != b else ():
            index = index * mesh.size((axis,)) + at[axis]
        columns.append(index)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _meets(n: int, held: int, wanted: int, index: int) -> list[tuple[int, int, int, int]]:
    """The blocks of `held` entries that meet block `index` of `wanted`: (which, cut, put, size)."""
    start, stop = index * wanted, min((index + 1) * wanted, n)
    found: list[tuple[int, int, int, int]] = []
    for block in range(start // held, -(-stop // held)) if stop > start else ():
        low, high = max(start, block * held), min(stop, (block + 1) * held)
        found.append((block, low - block * held, low - start, high - low))
    return found


def _price(way: Sequence[Sequence[_Piece]]) -> tuple[int, int]:
    return sum(math.prod(_largest(part)) for part in way), len(way)


def _largest(part: Sequence[_Piece]) -> Shape:
    return tuple(map(max, zip(*(piece.size for piece in part), strict=True)))


def _first_fit(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Each piece in the first round in which neither of the two is busy."""
    found: list[list[_Piece]] = []
    busy: set[tuple[int, str, int]] = set()
    for piece in pieces:
        i = 0
        while (i, "sends", piece.sender) in busy or (i, "receives", piece.receiver) in busy:
            i += 1
        busy |= {(i, "sends", piece.sender), (i, "receives", piece.receiver)}
        if i == len(found):
            found.append([])
        found[i].append(piece)
    return found


def _colored(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """As few rounds as the busiest device has pieces to send or to receive (König's theorem)."""
    degree = collections.Counter[tuple[str, int]]()
    for piece in pieces:
        degree.update((("sends", piece.sender), ("receives", piece.receiver)))
    count = max(degree.values(), default=0)
    # Per end of a piece and round: the piece that keeps it busy.
    busy: dict[tuple[str, int], dict[int, int]] = collections.defaultdict(dict)
    ends = [(("sends", p.sender), ("receives", p.receiver)) for p in pieces]
    color: list[int] = [-1] * len(pieces)
    for i, (sender, receiver) in enumerate(ends):
        a = next(c for c in range(count) if c not in busy[sender])
        b = next(c for c in range(count) if c not in busy[receiver])
        if a != b:  # a is taken at the receiver: swap a and b along the path that begins there
            path: list[int] = []
            at, c = receiver, a
            while c in busy[at]:
                j = busy[at][c]
                path.append(j)
                at = ends[j][1] if ends[j][0] == at else ends[j][0]
                c = b if c == a else a
            for j in path:
                for end in ends[j]:
                    del busy[end][color[j]]
            for j in path:
                color[j] = b if color[j] == a else a
                for end in ends[j]:
                    busy[end][color[j]] = j
        color[i] = a
        busy[sender][a] = busy[receiver][a] = i
    return [[p for p, c in zip(pieces, color, strict=True) if c == k] for k in range(count)]


def _round(part: Sequence[_Piece], group: int, held: Shape, wanted: Shape) -> Round:
    size = _largest(part)
    zeros = lambda: [[0] * group for _ in size]  # noqa: E731
    cut, put, first, last = zeros(), zeros(), zeros(), zeros()
    for piece in part:
        for dim in range(len(size)):
            # A cut may not pass the end of the shard: it begins earlier, and lands earlier.
            start = min(piece.cut[dim], held[dim] - size[dim])
            cut[dim][piece.sender] = start
            put[dim][piece.receiver] = piece.put[dim] - (piece.cut[dim] - start)
            first[dim][piece.receiver] = piece.put[dim]
            last[dim][piece.receiver] = piece.put[dim] + piece.size[dim]
    own = all(piece.sender == piece.receiver for piece in part)
    pairs = () if own else tuple(sorted((piece.sender, piece.receiver) for piece in part))
    return Round(pairs, size, *(tuple(map(tuple, table)) for table in (cut, put, first, last)))


# --- on a device


def cut_block(x: jax.Array, *, axes: Axes, at: Table, size: Shape) -> jax.Array:
    """This device's piece of `size`, from its index `at[dim][device]` on in each dim."""
    x, restore = as_words(x)
    starts = [mine(table, axes) for table in at]
    trailing = x.shape[len(size) :]  # the words of a PRNG key
    starts += [0] * len(trailing)
    return restore(lax.dynamic_slice(x, starts, (*size, *trailing)))


def join_blocks(
    *operands: jax.Array, axes: Axes, size: Shape, rounds: tuple[Round, ...]
) -> jax.Array:
    """The block of `size` made of the pieces that came in each round."""
    words, restore = zip(*map(as_words, operands), strict=True)
    trailing = words[0].shape[len(size) :]
    # What lands outside lands in a margin.
    low = [max([0, *(-min(r.put[d]) for r in rounds)]) for d in range(len(size))]
    high = [max([n, *(max(r.put[d]) + r.size[d] for r in rounds)]) for d, n in enumerate(size)]
    margins = map(int.__add__, low, high)
    out = jnp.zeros((*margins, *trailing), words[0].dtype)
    for piece, this in zip(words, rounds, strict=False):
        starts: list[Any] = [mine(t, axes) + a for t, a in zip(this.put, low, strict=True)]
        starts += [0] * len(trailing)
        for d, n in enumerate(this.size):
            ends = tuple(start + n for start in this.put[d])
            if this.first[d] == this.put[d] and this.last[d] == ends:
                continue  # all that arrives is wanted
            position = lax.broadcasted_iota(np.int32, piece.shape, d) + starts[d] - low[d]
            keep = (position >= mine(this.first[d], axes)) & (position < mine(this.last[d], axes))
            piece = jnp.where(keep, piece, lax.dynamic_slice(out, starts, piece.shape))
        out = lax.dynamic_update_slice(out, piece, starts)
    cut = [slice(a, a + n) for a, n in zip(low, size, strict=True)]
    return restore[0](out[tuple(cut)])
