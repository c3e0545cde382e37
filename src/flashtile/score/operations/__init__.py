"""Node kinds, one class each with all its forms; importing the folder registers them."""

from __future__ import annotations

from . import arithmetic, calculus, leaves, logic
from .base import OPERATIONS, Operation, apply, cast, const, is_const
from .leaves import inside, load, scalar, variable

__all__ = [
    "OPERATIONS",
    "Operation",
    "apply",
    "arithmetic",
    "calculus",
    "cast",
    "const",
    "inside",
    "is_const",
    "leaves",
    "load",
    "logic",
    "scalar",
    "variable",
]
