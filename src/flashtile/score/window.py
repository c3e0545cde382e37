"""Sliding windows: a row sees the keys within a distance of its own position."""

from __future__ import annotations

from typing import Any

from ..checks import integer
from ..errors import wrong
from .causal import anchor
from .mask import Mask


def window(left: int | None, right: int | None) -> Mask:
    """Key j is visible to row i iff -left <= j - (i + offset) <= right; None or -1 is open on that side.

    Raises: SpecError for distances below -1.
    """
    low, high = sides(left, right)

    def build(offset: Any) -> Any:
        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            ahead = j - (i + anchor(offset, b))
            if low is None:
                return True if high is None else ahead <= high
            return ahead >= low if high is None else (ahead >= low) & (ahead <= high)

        return visible

    return Mask(build, positional=True, name="window")


def sides(left: Any, right: Any) -> tuple[int | None, int | None]:
    """The least and the greatest j - (i + offset) that a window shows; None is open. Raises: SpecError."""
    distances = []
    for side, distance in (("left", left), ("right", right)):
        number = -1 if distance is None else integer(distance)
        if number is None or number < -1:
            raise wrong("window", f"{side} {distance!r}", "a distance >= 0, or None or -1 (open)")
        distances.append(None if number == -1 else number)
    low, high = distances
    return (None if low is None else -low), high
