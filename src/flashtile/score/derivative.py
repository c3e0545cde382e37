"""Derivatives of a score expression, as expressions: with respect to s and to every load of a float array.

Forward mode, one pass a seed: a selection then selects among tangents, and a branch that is not taken never
meets a multiplication, however infinite its derivative is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .capture import Slot
from .expr import Expr, postorder
from .operations import apply, const, inside, is_const


@dataclass(frozen=True)
class ArrayGradient:
    """d score / d load: add `value` times the score's gradient at `index` of the captured array `slot`.

    Where an index is out of bounds the value is 0 (the load read a neighbour, which is not its variable).
    """

    slot: Slot
    index: tuple[Expr, ...]
    value: Expr
    clamp: tuple[bool, ...]  # for each index whether it may be out of bounds

    @property
    def certain(self) -> bool:
        """Whether every index is in bounds."""
        return not any(self.clamp)


def derivative(score: Expr, seed: Expr) -> Expr:
    """d score / d seed, where seed is a leaf (a variable, or a load); the literal 0.0 if there is no path."""
    tangents: dict[Expr, Expr | None] = {}
    for x in postorder([score]):
        if x is seed:
            tangents[x] = const(1.0)
            continue
        d = tuple(tangents[a] for a in x.args)
        known = x.operation.tangent(x, d) if any(t is not None for t in d) and x.type == "float" else None
        tangents[x] = None if known is None or is_const(known, 0.0) else known
    return tangents[score] or const(0.0)


def array_gradients(score: Expr) -> tuple[ArrayGradient, ...]:
    """The gradients to captured float arrays, one a distinct load, in the program's order."""
    found = []
    for x in postorder([score]):
        if x.operation.name == "load" and x.type == "float":
            value = derivative(score, x)
            if not is_const(value, 0.0):
                within = apply("where", inside(x), value, const(0.0))
                found.append(ArrayGradient(x.data.source, x.args, within, x.data.clamp))
    return tuple(found)
