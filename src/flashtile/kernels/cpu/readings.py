"""How the gradients of captured arrays are added up: each load of a wanted array, by what its indices are.

An accumulator is an array of the captured one's shape, laid out for lanes: the axis along which neighbouring lanes
read neighbouring elements lies innermost, with room for a register of lanes at both ends. Where every row and lane has
an element of its own and rows lie innermost, they stay there: a tile is transposed through registers, as dense.py does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtile.score.affine import Affine, affine
from flashtile.score.operations import variable

if TYPE_CHECKING:
    from collections.abc import Collection

    from flashtile.score.code import Code
    from flashtile.score.derivative import ArrayGradient

# Where what a block gives to an array is added:
TILES = "tiles"  # squares of rows and lanes, transposed: bias[i, j]
LANES = "lanes"  # a line to neighbouring elements, other ones for each row: x[j, i], table[i - j]
COLUMN = "column"  # the sum over rows, a line, to neighbouring elements: x[i]
ROW = "row"  # the sum over lanes to one element a row: x[j]
TOTAL = "total"  # the sum over both to one element: slopes[h]
GATHER = "gather"  # lane by lane, wherever it is


@dataclass(frozen=True)
class Reading:
    """A load of a wanted array.

    axes        its indices in affine form, None for those that have none
    innermost   the axis that has to lie innermost in the accumulator: along which neighbouring lanes, or rows, move
                one by one; None if none has to
    """

    gradient: ArrayGradient
    axes: tuple[Affine | None, ...]
    how: str
    innermost: int | None = None

    @property
    def slot(self) -> int:
        return self.gradient.slot.number


def readings(code: Code | None, wanted: Collection[int]) -> tuple[Reading, ...]:
    """The loads whose gradients go to the slots that are wanted. The first load of an array that says how its
    accumulator has to lie decides; others that would have it lie otherwise gather."""
    innermost: dict[int, int] = {}
    found = []
    for gradient in code.array_gradients if code else ():
        number = gradient.slot.number
        if number not in wanted:
            continue
        axes = tuple(affine(x) for x in gradient.index)
        how, axis = _tiles(gradient) or _how(axes)
        if axis is not None and innermost.setdefault(number, axis) != axis:
            how, axis = GATHER, None
        found.append(Reading(gradient, axes, how, axis))
    return tuple(found)


def _tiles(gradient: ArrayGradient) -> tuple[str, int] | None:
    """An element for each row and lane, rows along the last axis."""
    *others, last = gradient.index or (None,)
    rest = [x for x in others if x is not variable("i")]
    dense = last is variable("j") and others.count(variable("i")) == 1 and all(x.variables <= {"b", "h"} for x in rest)
    return (TILES, len(others)) if dense and gradient.certain else None


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


def tiles(code: Code | None, wanted: Collection[int]) -> int:
    """How many tiles of scratch memory these loads take."""
    return sum(x.how == TILES for x in readings(code, wanted))
