"""Causal masking: a row sees the keys up to its own position."""

from __future__ import annotations

from typing import Any

from .mask import Mask


def causal() -> Mask:
    """Key j is visible to row i iff j <= i + offset.

    >>> causal().name
    'causal'
    """

    def build(offset: Any) -> Any:
        return lambda b, h, i, j: j <= i + anchor(offset, b)

    return Mask(build, positional=True, name="causal")


def anchor(offset: Any, b: Any) -> Any:
    """The offset of batch b: one number for all, or an array (B,)."""
    return offset if isinstance(offset, int) or not hasattr(offset, "__getitem__") else offset[b]
