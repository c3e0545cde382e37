"""Softcap: scores are squeezed smoothly into (-cap, cap)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checks import finite
from ..errors import wrong
from .mask import Score

# fp32 holds a cap between these and its inverse. Caps beyond them say the same as these of every score below 2^100 in
# size: nothing is capped, or everything is to 2^-100 and counts as 0.
LEAST, MOST = 2.0**-100, 2.0**120


def softcap(cap: float) -> Score:
    """cap * tanh(s / cap), for a finite cap > 0; one below 2^-100 or above 2^120 counts as this bound.

    Raises: SpecError for anything else.
    Source: Gemma 2, section 2.
    """
    cap = check_cap(cap)
    inverse = 1.0 / cap  # a division costs a kernel as much as the rest of tanh
    return Score(lambda offset: lambda s, b, h, i, j: cap * np.tanh(s * inverse), name="softcap")


def check_cap(cap: Any) -> float:
    """The cap as a float within the bounds. Raises: SpecError unless it is a finite number > 0."""
    number = finite(cap) if _is_number(cap) else None
    if number is None or number <= 0:
        raise wrong("softcap", repr(cap), "a finite number > 0 (None or 0: off)")
    return min(max(number, LEAST), MOST)


def is_off(cap: Any) -> bool:
    return cap is None or (_is_number(cap) and bool(cap == 0))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
