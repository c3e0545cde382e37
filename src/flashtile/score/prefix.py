"""Prefix masking: the first keys are visible to every row. ``causal() | prefix(n)`` is a prefix LM."""

from __future__ import annotations

from typing import Any

from .causal import anchor
from .mask import Mask
from .padding import check_per_batch, per_batch


def prefix(length: Any) -> Mask:
    """Key j is visible iff j < length: one integer, or an integer array (B,), one a sequence."""
    length = per_batch(length, "prefix")
    return Mask(
        lambda offset: lambda b, h, i, j: j < anchor(length, b),
        name="prefix",
        fits=lambda shape: check_per_batch(length, shape, "prefix"),
    )
