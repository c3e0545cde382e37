"""ALiBi: scores fall linearly with distance, at a slope of the head's own."""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from .capture import ArrayCapture, capture
from .causal import anchor
from .mask import Score


def alibi(slopes: Any) -> Score:
    """s - slope[h] * abs(i + offset - j); slopes (H,) or (B, H), of any float dtype.

    Raises: SpecError for other ranks and dtypes.
    Source: Press, Smith, Lewis 2022, Train Short, Test Long.
    """
    found = capture(slopes, "alibi_slopes")
    if found.rank not in (1, 2) or found.type != "float":
        got = f"{found.dtype} of shape {found.array.shape}"
        raise SpecError(f"alibi_slopes: got {got}, expected floats of shape (H,) or (B, H)")

    def build(offset: Any) -> Any:
        def biased(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            slope = slopes[b, h] if len(slopes.shape) == 2 else slopes[h]
            return s - slope * abs(i + anchor(offset, b) - j)

        return biased

    return Score(build, positional=True, name="alibi_slopes", fits=lambda shape: check_slopes(slopes, shape))


def check_slopes(slopes: Any, shape: tuple[int, int, int, int]) -> ArrayCapture:
    """The slopes, captured. Raises: SpecError unless there is one for each head of a call, (H,) or (B, H)."""
    batch, heads = shape[:2]
    found = capture(slopes, "alibi_slopes")
    got = found.array.shape
    if got not in ((heads,), (batch, heads)):
        raise SpecError(f"alibi_slopes: got shape {got}, expected (H,) = ({heads},) or (B, H) = ({batch}, {heads})")
    return found
