"""Sliding windows: a row sees the keys within a distance of its own position."""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from .causal import anchor
from .mask import Mask


def window(left: int | None, right: int | None) -> Mask:
    """Key j is visible to row i iff -left <= j - (i + offset) <= right; None or -1 is open on that side.

    Raises: SpecError for distances below -1.
    """
    for side, distance in (("left", left), ("right", right)):
        if distance is not None and (isinstance(distance, bool) or not isinstance(distance, int) or distance < -1):
            raise SpecError(f"window: got {side} {distance!r}, expected a distance >= 0, or None or -1 (open)")
    before, after = (None if distance == -1 else distance for distance in (left, right))

    def build(offset: Any) -> Any:
        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            ahead = j - (i + anchor(offset, b))
            if before is None:
                return True if after is None else ahead <= after
            return ahead >= -before if after is None else (ahead >= -before) & (ahead <= after)

        return visible

    return Mask(build, positional=True, name="window")
