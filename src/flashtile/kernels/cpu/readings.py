"""How the gradients of captured arrays are added up: each load of a wanted array, by what its indices are.

An accumulator is an array of the captured one's shape, laid out for lanes: the axis along which neighbouring lanes
read neighbouring elements lies innermost, with room for a register of lanes at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtile.score.affine import Affine, affine

if TYPE_CHECKING:
    from collections.abc import Collection

    from flashtile.score.code import Code
    from flashtile.score.derivative import ArrayGradient

# Where what a block gives to an array is added:
LANES = "lanes"  # a line to neighbouring elements, other ones for each row: bias[i, j], table[i - j]
COLUMN = "column"  # the sum over rows, a line, to neighbouring elements: x[i]
ROW = "row"  # the sum over lanes to one element a row: x[j]
TOTAL = "total"  # the sum over both to one element: slopes[h]
GATHER = "gather"  # lane by lane, wherever it is


@dataclass(frozen=True)
class Reading:
    """A load of a wanted array.

    axes     its indices in affine form, None for those that have none
    lanes    the axis that neighbouring lanes move along, None if none or if they do not do so one by one
    """

    gradient: ArrayGradient
    axes: tuple[Affine | None, ...]
    how: str
    lanes: int | None = None

    @property
    def slot(self) -> int:
        return self.gradient.slot.number


def readings(code: Code | None, wanted: Collection[int]) -> tuple[Reading, ...]:
    """The loads whose gradients go to the slots that are wanted. The first load of an array that lanes move along
    decides how its accumulator lies; others that move along another axis gather."""
    innermost: dict[int, int] = {}
    found = []
    for gradient in code.array_gradients if code else ():
        number = gradient.slot.number
        if number not in wanted:
            continue
        axes = tuple(affine(x) for x in gradient.index)
        how, lanes = _how(axes)
        if lanes is not None and innermost.setdefault(number, lanes) != lanes:
            how, lanes = GATHER, None
        found.append(Reading(gradient, axes, how, lanes))
    return tuple(found)


def _how(axes: tuple[Affine | None, ...]) -> tuple[str, int | None]:
    moving = [n for n, x in enumerate(axes) if x is None or x.i]
    if not moving:
        rows = [x for x in axes if x is not None and x.j]
        return (ROW if rows else TOTAL), None
    axis = axes[moving[0]]
    if len(moving) > 1 or axis is None or abs(axis.i) != 1:
        return GATHER, None
    still = not any(x is not None and x.j for x in axes)
    return (COLUMN if still else LANES), moving[0]
