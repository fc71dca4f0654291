"""Control flow: which values of an op and of its bodies are one and the same, dim by dim.

A `Tie` says that an operand, inputs and outputs of the bodies, and a result must be sharded alike:
a scan's carry is one tie of all four. Propagation treats a tie like a pointwise op; the partitioner
gives all its values one sharding. What is in no tie (a predicate, a branch index) is replicated.
"""

import dataclasses
from collections.abc import Callable

from gspmd.ir import Op, Operand
from gspmd.rules.factor import Dims, FactorRule, Factors


@dataclasses.dataclass(frozen=True, slots=True)
class Tie:
    """One value on its way through an op with bodies; `role` is what a reader calls it.

    `inputs` and `outputs` are (body, position) pairs. The first `lead` dims of the operand and of
    the result (a scan's length) exist outside the bodies only.
    """

    role: str
    operand: int | None = None
    inputs: tuple[tuple[int, int], ...] = ()
    outputs: tuple[tuple[int, int], ...] = ()
    result: int | None = None
    lead: int = 0

    def ins(self, op: Op) -> tuple[Operand, ...]:
        """What feeds the tie: the operand and the bodies' outputs."""
        operand = () if self.operand is None else (op.ins[self.operand],)
        return (*operand, *(op.bodies[b].outs[i] for b, i in self.outputs))

    def outs(self, op: Op) -> tuple[Operand, ...]:
        """What the tie feeds: the bodies' inputs and the result."""
        result = () if self.result is None else (op.outs[self.result],)
        return (*(op.bodies[b].ins[i] for b, i in self.inputs), *result)

    def rule(self, op: Op) -> FactorRule:
        """The pointwise factor rule of the tie; leading dims outside the bodies are whole."""
        f = Factors()
        inner = self.inputs or self.outputs
        body, i = inner[0]
        side = op.bodies[body].ins if self.inputs else op.bodies[body].outs
        shared = f.dims(side[i].shape)

        def outer(x: Operand) -> Dims:
            return f.dims(x.shape[: self.lead], "whole") + shared

        ins = [shared] * len(self.outputs)
        outs = [shared] * len(self.inputs)
        if self.operand is not None:
            ins.insert(0, outer(op.ins[self.operand]))
        if self.result is not None:
            outs.append(outer(op.outs[self.result]))
        return f.rule(ins, outs)


def _scan(op: Op) -> list[Tie]:
    (body,) = op.bodies
    consts, carry = op.params["num_consts"], op.params["num_carry"]
    ties: list[Tie] = []
    for i in range(len(body.ins)):
        k = i - consts
        if k < 0:
            ties.append(Tie(f"const {i}", i, ((0, i),)))
        elif k < carry:
            ties.append(Tie(f"carry {k}", i, ((0, i),), ((0, k),), k))
        else:
            ties.append(Tie(f"xs {k - carry}", i, ((0, i),), lead=1))
    ys = range(carry, len(op.outs))
    return ties + [Tie(f"ys {k - carry}", outputs=((0, k),), result=k, lead=1) for k in ys]


def _while(op: Op) -> list[Tie]:
    test, body = op.params["cond_nconsts"], op.params["body_nconsts"]
    ties = [Tie(f"condition's const {i}", i, ((0, i),)) for i in range(test)]
    ties += [Tie(f"const {i}", test + i, ((1, i),)) for i in range(body)]
    for k in range(len(op.outs)):
        ties.append(
            Tie(f"carry {k}", test + body + k, ((1, body + k), (0, test + k)), ((1, k),), k)
        )
    return ties


def _cond(op: Op) -> list[Tie]:
    branches = range(len(op.bodies))
    ties = [
        Tie(f"operand {i}", i + 1, tuple((b, i) for b in branches)) for i in range(len(op.ins) - 1)
    ]
    return ties + [
        Tie(f"result {k}", outputs=tuple((b, k) for b in branches), result=k)
        for k in range(len(op.outs))
    ]


def _remat(op: Op) -> list[Tie]:
    ties = [Tie(f"operand {i}", i, ((0, i),)) for i in range(len(op.ins))]
    return ties + [Tie(f"result {k}", outputs=((0, k),), result=k) for k in range(len(op.outs))]


CONTROL: dict[str, Callable[[Op], list[Tie]]] = {
    "scan": _scan, "while": _while, "cond": _cond, "remat": _remat,
}  # fmt: skip


def ties(op: Op) -> list[Tie]:
    """The ties of a control-flow op."""
    return CONTROL[op.name](op)
