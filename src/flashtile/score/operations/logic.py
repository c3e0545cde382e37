"""Comparisons, logic on bools, and bit operations on int32.

A comparison with NaN is false, except ``!=``. A shift by less than 0 or more than 31 shifts everything out:
0, or -1 for the right shift (which keeps the sign) of a negative number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..expr import INT_MAX, INT_MIN, Expr, promote
from ..interval import Interval, either, truth
from .base import Operation, is_const

if TYPE_CHECKING:
    from ...llvm.ir import Value
    from ..emit import Emission


class _Comparison(Operation):
    def types(self, *args: str) -> tuple[tuple[str, ...], str]:
        return (promote(*args),) * 2, "bool"


class Less(_Comparison):
    name, triton = "lt", "({0} < {1})"

    def value(self, x: Any, y: Any) -> Any:
        return x < y

    def interval(self, x: Interval, y: Interval) -> Interval:
        return truth((x.hi < y.lo) & ~np.asarray(either(x.nan, y.nan)), x.lo < y.hi)

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x < y


class LessEqual(_Comparison):
    name, triton = "le", "({0} <= {1})"

    def value(self, x: Any, y: Any) -> Any:
        return x <= y

    def interval(self, x: Interval, y: Interval) -> Interval:
        return truth((x.hi <= y.lo) & ~np.asarray(either(x.nan, y.nan)), x.lo <= y.hi)

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x <= y


class Equal(_Comparison):
    name, triton = "eq", "({0} == {1})"

    def value(self, x: Any, y: Any) -> Any:
        return x == y

    def interval(self, x: Interval, y: Interval) -> Interval:
        return truth(x.single & y.single & (x.lo == y.lo), (x.lo <= y.hi) & (y.lo <= x.hi))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x.eq(y)


class NotEqual(_Comparison):
    name, triton = "ne", "({0} != {1})"

    def value(self, x: Any, y: Any) -> Any:
        return x != y

    def interval(self, x: Interval, y: Interval) -> Interval:
        same = x.single & y.single & (x.lo == y.lo)
        return truth((x.lo > y.hi) | (y.lo > x.hi), ~same)

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x.ne(y)


class _Bits(Operation):
    """Logic on two bools; on anything else, the bits of integers."""

    def types(self, *args: str) -> tuple[tuple[str, ...], str]:
        common = "bool" if set(args) == {"bool"} else "int"
        return (common,) * len(args), common


def _logical(x: Interval) -> bool:
    return np.asarray(x.lo).dtype == np.uint8


def _ones(x: np.ndarray) -> np.ndarray:
    """The least 2^k - 1 that is not below a non-negative x: what or-ing numbers up to x can reach."""
    for shift in (1, 2, 4, 8, 16):
        x = x | (x >> shift)
    return x


class And(_Bits):
    name, triton = "and", "({0} & {1})"

    def simplify(self, x: Expr, y: Expr) -> Expr | None:
        if x is y:
            return x
        for a, b in ((x, y), (y, x)):
            if a.type == "bool" and is_const(a):
                return b if a.data else a
        return None

    def value(self, x: Any, y: Any) -> Any:
        return x & y

    def interval(self, x: Interval, y: Interval) -> Interval:
        if _logical(x):
            return truth(x.lo & y.lo, x.hi & y.hi)
        hi = np.where(x.lo >= 0, np.where(y.lo >= 0, np.minimum(x.hi, y.hi), x.hi), np.where(y.lo >= 0, y.hi, INT_MAX))
        return Interval(np.where((x.lo >= 0) | (y.lo >= 0), 0, INT_MIN), hi)

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x & y


class Or(_Bits):
    name, triton = "or", "({0} | {1})"

    def simplify(self, x: Expr, y: Expr) -> Expr | None:
        if x is y:
            return x
        for a, b in ((x, y), (y, x)):
            if a.type == "bool" and is_const(a):
                return a if a.data else b
        return None

    def value(self, x: Any, y: Any) -> Any:
        return x | y

    def interval(self, x: Interval, y: Interval) -> Interval:
        if _logical(x):
            return truth(x.lo | y.lo, x.hi | y.hi)
        positive = (x.lo >= 0) & (y.lo >= 0)
        lo = np.where(positive, np.maximum(x.lo, y.lo), INT_MIN)
        return Interval(lo, np.where(positive, _ones(np.maximum(x.hi, y.hi)), INT_MAX))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x | y


class Xor(_Bits):
    name, triton = "xor", "({0} ^ {1})"

    def value(self, x: Any, y: Any) -> Any:
        return x ^ y

    def interval(self, x: Interval, y: Interval) -> Interval:
        if _logical(x):
            known = (x.lo == x.hi) & (y.lo == y.hi)
            return truth(known & (x.lo != y.lo), ~known | (x.lo != y.lo))
        positive = (x.lo >= 0) & (y.lo >= 0)
        hi = np.where(positive, _ones(np.maximum(x.hi, y.hi)), INT_MAX)
        return Interval(np.where(positive, 0, INT_MIN), hi)

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x ^ y


class Invert(_Bits):
    name, triton = "invert", "(~{0})"

    def simplify(self, x: Expr) -> Expr | None:
        return x.args[0] if x.operation is self else None

    def value(self, x: Any) -> Any:
        return ~x

    def interval(self, x: Interval) -> Interval:
        return truth(1 - x.hi, 1 - x.lo) if _logical(x) else Interval(~x.hi, ~x.lo)

    def llvm(self, at: Emission, x: Value) -> Value:
        return x ^ at.f.const(x.type, -1)


class _Shift(Operation):
    def types(self, *args: str) -> tuple[tuple[str, ...], str]:
        return ("int", "int"), "int"


class ShiftLeft(_Shift):
    name, triton = "shl", "shift_left({0}, {1})"

    def value(self, x: Any, y: Any) -> Any:
        good = (y >= 0) & (y < 32)
        wide = np.left_shift(np.asarray(x, np.int64), np.where(good, y, 0).astype(np.int64))
        return np.where(good, wide, 0).astype(np.int32)

    def interval(self, x: Interval, y: Interval) -> Interval:
        known = (y.lo == y.hi) & (y.lo >= 0) & (y.lo < 32)
        by = np.where(known, y.lo, 0)
        lo, hi = x.lo << by, x.hi << by
        fits = known & (lo >= INT_MIN) & (hi <= INT_MAX)
        return Interval(np.where(fits, lo, INT_MIN), np.where(fits, hi, INT_MAX))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return at.f.select(y.ult(32), x << (y & 31), 0)


class ShiftRight(_Shift):
    name, triton = "shr", "shift_right({0}, {1})"

    def value(self, x: Any, y: Any) -> Any:
        return np.right_shift(x, np.where((y >= 0) & (y < 32), y, 31).astype(np.int32))

    def interval(self, x: Interval, y: Interval) -> Interval:
        far = (y.lo < 0) | (y.hi > 31)  # some shift moves everything out
        least, most = np.where(far, 0, np.clip(y.lo, 0, 31)), np.where(far, 31, np.clip(y.hi, 0, 31))
        lo = np.minimum(x.lo >> least, x.lo >> most)
        return Interval(lo, np.maximum(x.hi >> least, x.hi >> most))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x.ashr(at.f.select(y.ult(32), y, 31))
