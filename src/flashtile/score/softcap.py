"""Softcap: scores are squeezed smoothly into (-cap, cap)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import SpecError
from .mask import Score


def softcap(cap: float) -> Score:
    """cap * tanh(s / cap), for a finite cap > 0.

    Raises: SpecError for anything else.
    Source: Gemma 2, section 2.
    """
    cap = check_cap(cap)
    inverse = 1.0 / cap  # a division costs a kernel as much as the rest of tanh
    return Score(lambda offset: lambda s, b, h, i, j: cap * np.tanh(s * inverse), name="softcap")


def check_cap(cap: Any) -> float:
    """The cap as a float. Raises: SpecError unless it is a finite number > 0."""
    if not _is_number(cap) or not (cap > 0 and math.isfinite(cap)):
        raise SpecError(f"softcap: got {cap!r}, expected a finite number > 0 (None or 0: off)")
    return float(cap)


def is_off(cap: Any) -> bool:
    return cap is None or (_is_number(cap) and bool(cap == 0))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
