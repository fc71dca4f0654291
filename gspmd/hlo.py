"""What a program compiled by XLA sends: its collectives, counted in the text of the optimized HLO.

The rules are those of `plan.wire_bytes`: bytes that one device sends, a loop's by its trip count,
and those of all branches. A reduce-scatter that the TPU compiler hides in an `all-reduce-scatter`
fusion counts as one; a permute in which every device sends to itself sends nothing.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Sent:
    """One collective of a compiled program: `bytes` are what a device sends in one execution."""

    kind: str
    group: int
    bytes: float
    trips: int
    line: str


def collectives(text: str) -> list[Sent]:
    """The collectives of an HLO module's text, with how often each runs."""
    bodies, entry = _computations(text)
    partitions = re.search(r"^HloModule .*num_partitions=(\d+)", text)
    return list(_walk(entry, 1, bodies, int(partitions[1]) if partitions else 0))


def gigabytes(text: str) -> dict[str, float]:
    """GB that one device sends, by kind, and under "together" in all."""
    total: dict[str, float] = collections.defaultdict(float)
    for sent in collectives(text):
        total[sent.kind] += sent.bytes * sent.trips / 1e9
    return {**total, "together": sum(total.values())}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith("HloModule"):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _walk(
    name: str, trips: int, bodies: Mapping[str, list[str]], partitions: int
) -> Iterator[Sent]:
    for line in bodies.get(name, ()):
        if found := _COLLECTIVE.search(line):
            scattered = name.startswith("all-reduce-scatter")
            yield _sent(line, found, trips, partitions, scattered)
        elif " while(" in line:
            parts = re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)
            inside = [sent for part in parts for sent in _walk(part, 1, bodies, partitions)]
            if inside:  # else nobody asks how often it runs
                times = trips * _trip_count(line, bodies)
                yield from (dataclasses.replace(s, trips=s.trips * times) for s in inside)
        elif re.search(r" (fusion|call|call-start|conditional|async-start|custom-call)\(", line):
            branches = ", ".join(_BRANCHES.findall(line))
            for called in _CALLED.findall(line) + re.findall(r"[\w.\-]+", branches):
                yield from _walk(called, trips, bodies, partitions)


def _trip_count(line: str, bodies: Mapping[str, list[str]]) -> int:
    """As XLA notes it, else the one constant that the loop's condition compares with."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition, line
    bounds = _BOUND.findall("\n".join(bodies[condition[1]]))
    if len(bounds) != 1:
        raise ValueError(f"the loop's trip count is not to be seen: {line.strip()[:200]}")
    return int(bounds[0])


def _sent(line: str, found: re.Match[str], trips: int, partitions: int, scattered: bool) -> Sent:
    kind, n = found[2], _group(line, partitions)
    arrays = [_bytes(dtype, dims) for dtype, dims in ARRAY.findall(found[1])]
    if found[3] and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
        arrays = arrays[1:2]
    result = sum(arrays)
    if kind == "all-reduce" and scattered:
        return Sent("reduce-scatter", n, (n - 1) / n * result, trips, line)
    factor = {
        "all-gather": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1,
        "all-to-all": (n - 1) / n,
        "collective-permute": n - 1,
        "collective-broadcast": 1,
    }[kind]
    return Sent(kind, n, factor * result, trips, line)


def _group(line: str, partitions: int) -> int:
    """How many devices take part: the groups are listed, counted, all, or axes of a named mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        sends = (source != target for source, target in re.findall(r"(\d+),(\d+)", pairs[1]))
        return 2 if any(sends) else 1
    if partitions and "replica_groups={}" in line:
        return partitions
    raise ValueError(f"the devices that take part are not to be seen: {line.strip()[:300]}")


def _bytes(dtype: str, dims: str) -> float:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits / 8
