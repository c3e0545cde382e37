"""What a call is given, checked: integers, flags, names."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any, get_args

from flashtile.errors import described, wrong
from flashtile.signature import Alignment

ALIGNMENTS: tuple[str, ...] = get_args(Alignment)


def integer(value: object) -> int | None:
    """The value as an int if it is an integer other than a bool, else None."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return None


def finite(value: object) -> float | None:
    """The value as a float if it is a real number other than a bool, and float64 holds it, else None."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:  # of an int, or a fraction
        return None
    return found if math.isfinite(found) else None


def elements(argument: str, value: Any, expected: str) -> Iterator[Any]:
    """What the value holds, one by one. Raises: SpecError for what holds nothing, as an array without axes."""
    try:
        return iter(value)
    except TypeError as cause:
        raise wrong(argument, described(value), expected) from cause


def check_flag(argument: str, value: object) -> None:
    """Raise SpecError unless the value is a bool: "no" and 0 are more likely a mistake than a choice."""
    if type(value).__name__ not in ("bool", "bool_"):  # bool_ is NumPy 1's
        raise wrong(argument, repr(value), "True or False")
