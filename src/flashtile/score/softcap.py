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
    if isinstance(cap, bool) or not isinstance(cap, (int, float, np.number)) or not (cap > 0 and math.isfinite(cap)):
        raise SpecError(f"softcap: got {cap!r}, expected a finite number > 0 (None or 0: off)")
    cap, inverse = float(cap), 1.0 / float(cap)  # a division costs a kernel as much as the rest of tanh
    return Score(lambda offset: lambda s, b, h, i, j: cap * np.tanh(s * inverse), name="softcap")


def is_off(cap: Any) -> bool:
    return cap is None or (isinstance(cap, (int, float)) and not isinstance(cap, bool) and cap == 0)
