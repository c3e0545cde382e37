"""What changes a score before the softmax: masks, biases and score functions, one small language."""

from __future__ import annotations

from .alibi import alibi
from .bias import bias
from .causal import causal
from .coverage import EMPTY, FULL, PARTIAL, Coverage, coverage
from .document import document
from .frozen import FrozenMask, FrozenScore, freeze, thaw
from .keep import dropout_keep
from .mask import Mask, Score, dense
from .padding import padding
from .prefix import prefix
from .program import Program
from .relative import relative
from .softcap import softcap
from .varlen import varlen
from .window import window

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Coverage",
    "FrozenMask",
    "FrozenScore",
    "Mask",
    "Program",
    "Score",
    "alibi",
    "bias",
    "causal",
    "coverage",
    "dense",
    "document",
    "dropout_keep",
    "freeze",
    "padding",
    "prefix",
    "relative",
    "softcap",
    "thaw",
    "varlen",
    "window",
]
__dir__ = __all__.copy  # the public names, and not what stands beside them
