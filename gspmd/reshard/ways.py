"""Ways: the sequences of collectives that lead from one sharding of a tensor to another.

* Where all dims nest, a turn is the way (`turns`). A sum is paid on the smallest pieces: sliced
  along spare axes too, over which the tensor is replicated, if gathering them again costs less.
* Where a dim does not, some device holds nothing of its target, and blocks change devices: by one
  permute if they can be made alike, then gathered; else by a permute per partner (`blocks`).

Ways on which no device holds more than the larger of source and target come first (arXiv
2112.01075), then those with the fewest wire bytes, then with the fewest collectives.
"""

import collections
import math
from collections.abc import Iterator

from gspmd.collectives import wire_bytes
from gspmd.reshard import blocks
from gspmd.reshard.turns import Digits, Move, Step, Tensor, Way, common, digits, nests, owing, turn
from gspmd.sharding import Axes, Sharding

MOST_PERMUTES = 16  # in a row: beyond it, other collectives are taken at more bytes
MOST_WASTE = 1.25  # of the bytes of an uneven dim, padding included, to those without
MOST_PIECES = 4096  # of uneven blocks: to match more of them takes long


def cheapest(tensor: Tensor, src: Sharding, dst: Sharding, limit: float) -> Way:
    """The way with the fewest wire bytes, then collectives, of those that hold at most `limit`.

    Of all ways, if every one holds more.
    """

    def price(way: Way) -> tuple[bool, bool, float, int, int]:
        permutes = max((len(step.moves) for step in way), default=0)
        wire = sum(step.wire_bytes for step in way)
        return (
            tensor.peak(src, way) > limit,
            permutes > MOST_PERMUTES,
            float(f"{wire:.10g}"),  # what differs in the last digits alone is a tie
            sum(step.collectives for step in way),
            len(way),
        )

    return min(_ways(tensor, src, dst), key=price)


def _ways(tensor: Tensor, src: Sharding, dst: Sharding) -> Iterator[Way]:
    if src.partial != dst.partial:
        yield from _reductions(tensor, src, dst)
    elif tensor.nested(src, dst):
        yield turn(tensor, src, dst)
        if src != dst and _wasteful(tensor, src, dst):  # pieces carry no padding
            yield from _exchanged(tensor, src, dst, dst)
    else:
        yield from _crossings(tensor, src, dst)


def _wasteful(tensor: Tensor, *states: Sharding) -> bool:
    """Whether a dim takes much more than its size in one of the states."""
    dims = (pair for state in states for pair in enumerate(state.dims))
    return any(tensor.waste(i, axes) > MOST_WASTE for i, axes in dims)


def _reductions(tensor: Tensor, src: Sharding, dst: Sharding) -> Iterator[Way]:
    """Pays what `src` owes and `dst` does not, on pieces as small as there is use for."""
    spare = tensor.free(src)
    owed = [axis for axis in src.partial if axis not in dst.partial]
    if tensor.nested(src, dst):
        dims = digits(src, dst, ((),) * len(src.dims))
        count = collections.Counter(axis for axes in dims for axis in axes)

        def in_the_way(i: int) -> tuple[bool, int]:
            """Least where the dim is gathered anyway, most where an axis of it changes dims."""
            more = len(dst.dims[i]) - len(src.dims[i])
            return any(count[axis] > 1 for axis in dims[i]), max(-1, min(more, 1))

        order = sorted(range(len(dims)), key=in_the_way)
        pools = ([axis for axis in pool if not count[axis]] for pool in (owed, spare, spare + owed))
        extras = [((),) * len(dims), *(_placed(tensor, dims, pool, order) for pool in pools)]
        yield from (turn(tensor, src, dst, extra) for extra in dict.fromkeys(extras))
        if not _wasteful(tensor, src, dst):
            return
    for pool in (owed, spare + owed):
        dims = tuple(
            _longest(tensor, i, a, b, pool)
            for i, (a, b) in enumerate(zip(src.dims, dst.dims, strict=True))
        )
        taken = {axis for axes in dims for axis in axes}
        order = sorted(range(len(dims)), key=lambda i: -_ratio(tensor, i, dims[i], dst.dims[i]))
        rest = [axis for axis in pool if axis not in taken]
        more = _placed(tensor, dims, rest, order)
        mid = owing(tuple(map(tuple.__add__, dims, more)), src, dst.partial)
        first = turn(tensor, src, mid)
        yield from (first + then for then in _ways(tensor, mid, dst))
    paid = owing(src.dims, src, dst.partial)
    first = turn(tensor, src, paid)
    yield from (first + then for then in _ways(tensor, paid, dst))


def _longest(tensor: Tensor, i: int, have: Axes, want: Axes, pool: list[str]) -> Axes:
    """`have` and what follows it in `want`, as far as that is in the pool."""
    if want[: len(have)] != have:
        return have
    end = len(have)
    while end < len(want) and want[end] in pool:
        end += 1
    nests_in = nests(tensor.shape[i], want[:end], have, tensor.mesh)
    return want[:end] if nests_in else have


def _ratio(tensor: Tensor, i: int, have: Axes, want: Axes) -> float:
    """How much larger the blocks over `have` are than those over `want`."""
    return tensor.mesh.size(want) / tensor.mesh.size(have)


def _placed(tensor: Tensor, dims: Digits, axes: list[str], order: list[int]) -> Digits:
    """Per dim those of `axes` along which it can be split further, the first dim in `order`."""
    more: list[Axes] = [()] * len(dims)
    for axis in axes if dims else ():
        waste = {i: tensor.waste(i, dims[i] + more[i] + (axis,), dims[i]) for i in order}
        best = min(waste, key=lambda i: waste[i])
        if waste[best] <= MOST_WASTE:
            more[best] += (axis,)
    return tuple(more)


# --------------------------------------------------------------------------- where they do not


def _crossings(tensor: Tensor, src: Sharding, dst: Sharding) -> Iterator[Way]:
    """Hands blocks to other devices, then joins them; nothing is owed that `dst` does not owe."""
    mid = _refined(tensor, dst, src)
    yield from _handed(tensor, src, mid, dst)
    if not blocks.aligned(tensor.shape, tensor.mesh, src, dst):
        yield from _uneven(tensor, src, dst)
    elif blocks.partners(tensor.mesh, src, mid) > MOST_PERMUTES:
        # Axes that split other dims in the end may first split this one: an all_to_all moves them.
        short = list(dst.dims)
        for i, have in enumerate(src.dims):
            while short[i] and tensor.mesh.size(short[i]) > tensor.mesh.size(have):
                short[i] = short[i][:-1]
        coarse = Sharding(tuple(short), dst.partial, dst.reduction)
        yield from _handed(tensor, src, _refined(tensor, coarse, src), dst)
    yield _gathered(tensor, src, dst)


def _refined(tensor: Tensor, state: Sharding, like: Sharding) -> Sharding:
    """`state`, split further along free axes until its blocks are none larger than `like`'s."""
    dims = list(state.dims)
    pool = tensor.free(state)
    for i, (n, other) in enumerate(zip(tensor.shape, like.dims, strict=True)):
        for axis in list(pool):
            longer = (*dims[i], axis)
            k = tensor.mesh.size(longer)
            if n % k == 0 and tensor.mesh.size(other) % k == 0:
                dims[i] = longer
                pool.remove(axis)
    return Sharding(tuple(dims), state.partial, state.reduction)


def _alike(tensor: Tensor, a: Sharding, b: Sharding) -> bool:
    size = tensor.mesh.size
    return all(size(x) == size(y) for x, y in zip(a.dims, b.dims, strict=True))


def _handed(tensor: Tensor, src: Sharding, mid: Sharding, dst: Sharding) -> Iterator[Way]:
    """By permutes to `mid`, from where `dst` nests."""
    fine = _refined(tensor, src, mid)
    if not tensor.nested(mid, dst):
        return
    if _alike(tensor, fine, mid):
        union = tuple(dict.fromkeys((*fine.axes, *mid.axes)))
        sent = wire_bytes("collective_permute", tensor.mesh.size(union), tensor.bytes(fine))
        permute = Step((Move("collective_permute", union, sent),), fine, mid)
        yield (*turn(tensor, src, fine), permute, *turn(tensor, mid, dst))
        return
    yield from _exchanged(tensor, src, mid, dst)


def _exchanged(tensor: Tensor, src: Sharding, mid: Sharding, dst: Sharding) -> Iterator[Way]:
    """By a permute for each partner that a device has on the way to `mid`."""
    group = blocks.group_axes(tensor.mesh, src, mid)
    if blocks.aligned(tensor.shape, tensor.mesh, src, mid):
        count = blocks.partners(tensor.mesh, src, mid)
        if count > max(MOST_PERMUTES, tensor.mesh.size(group)):
            return
        piece = tensor.bytes(mid) / count
        moves = (Move("collective_permute", group, piece),) * count
    elif blocks.pieces_at_most(tensor.shape, tensor.mesh, src, mid) <= MOST_PIECES:
        moves = tuple(
            Move("collective_permute", group, math.prod(this.size) * tensor.size)
            for this in blocks.rounds(tensor.shape, tensor.mesh, src, mid)
            if this.pairs
        )
    else:
        return
    yield (Step(moves, src, mid), *turn(tensor, mid, dst))


def _uneven(tensor: Tensor, src: Sharding, dst: Sharding) -> Iterator[Way]:
    """Exchanges whole targets, or only the dims that do not nest, before or after the others."""
    yield from _handed(tensor, src, dst, dst)
    pairs = list(zip(tensor.shape, src.dims, dst.dims, strict=True))
    apart = [not tensor.nested_dim(*pair) for pair in pairs]
    for early in (True, False):
        dims = tuple(
            b if cross == early else a for (_, a, b), cross in zip(pairs, apart, strict=True)
        )
        mid = Sharding(dims, dst.partial, dst.reduction)
        if mid in (src, dst) or len(set(mid.axes)) < len(mid.axes):
            continue
        if early:
            yield from _handed(tensor, src, mid, dst)
        elif tensor.nested(src, mid):
            yield from (turn(tensor, src, mid) + way for way in _handed(tensor, mid, dst, dst))


def _gathered(tensor: Tensor, src: Sharding, dst: Sharding) -> Way:
    """The last resort: the dims that do not nest are gathered and cut anew."""
    dims: list[Axes] = []
    for n, a, b in zip(tensor.shape, src.dims, dst.dims, strict=True):
        kept = a[: common(a, b)]
        nest = tensor.nested_dim(n, a, kept) and tensor.nested_dim(n, b, kept)
        dims.append(kept if nest else ())
    mid = Sharding(tuple(dims), dst.partial, dst.reduction)
    return turn(tensor, src, mid) + turn(tensor, mid, dst)
