"""Arithmetic: + - * / // % neg abs min max, on int32 (wrapping) and floats.

``//`` and ``%`` floor as in Python. By zero, integers give 0 for both (hardware would trap), floats what IEEE
says; ``x % y`` of floats is x - floor(x / y) * y. min and max give NaN if an operand is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..expr import Expr, promote
from ..interval import Interval, anything, corners, either, holds_zero, hull, infinite, monotone, unless, wrap
from .base import Operation, apply, const, is_const

if TYPE_CHECKING:
    from ...llvm.ir import Value
    from ..emit import Emission


def is_int(x: Interval) -> bool:
    return np.asarray(x.lo).dtype.kind == "i"


def scaled(tangent: Expr | None, factor: Expr) -> Expr | None:
    """tangent * factor, moved into the branches of a selection: a branch that is not taken is never multiplied.

    ``where(c, t, 0) * inf`` would be NaN where c is false.
    """
    if tangent is None or is_const(tangent, 0.0):
        return None
    if tangent.operation.name == "where":
        condition, yes, no = tangent.args
        zero = const(0.0)
        return apply("where", condition, scaled(yes, factor) or zero, scaled(no, factor) or zero)
    return apply("mul", tangent, factor)


def total(*tangents: Expr | None) -> Expr | None:
    """Sum of tangents, None being zero."""
    result: Expr | None = None
    for t in tangents:
        result = t if result is None else result if t is None else apply("add", result, t)
    return result


def literal(x: Expr) -> int | None:
    """The number of an integer literal: division by a known number is cheap."""
    return x.data if is_const(x) else None


class Add(Operation):
    name, triton = "add", "tl.add({0}, {1}, sanitize_overflow=False)"

    def simplify(self, x: Expr, y: Expr) -> Expr | None:
        if x.type == "int" and is_const(x, 0):
            return y
        return x if x.type == "int" and is_const(y, 0) else None

    def value(self, x: Any, y: Any) -> Any:
        return x + y

    def interval(self, x: Interval, y: Interval) -> Interval:
        lo, hi = x.lo + y.lo, x.hi + y.hi
        if is_int(x):
            return wrap(lo, hi)
        clash = (np.isposinf(x.hi) & np.isneginf(y.lo)) | (np.isneginf(x.lo) & np.isposinf(y.hi))
        return unless(Interval(lo, hi, either(x.nan, y.nan)), clash)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        return total(*d)

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x + y


class Sub(Operation):
    name, triton = "sub", "tl.sub({0}, {1}, sanitize_overflow=False)"

    def simplify(self, x: Expr, y: Expr) -> Expr | None:
        return x if x.type == "int" and is_const(y, 0) else None

    def value(self, x: Any, y: Any) -> Any:
        return x - y

    def interval(self, x: Interval, y: Interval) -> Interval:
        if is_int(x):
            return wrap(x.lo - y.hi, x.hi - y.lo)
        return Add().interval(x, Interval(-y.hi, -y.lo, y.nan))

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        return total(d[0], apply("neg", d[1]) if d[1] is not None else None)

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x - y


class Mul(Operation):
    name, triton = "mul", "tl.mul({0}, {1}, sanitize_overflow=False)"

    def simplify(self, x: Expr, y: Expr) -> Expr | None:
        if is_const(x, 1):
            return y
        return x if is_const(y, 1) else None

    def value(self, x: Any, y: Any) -> Any:
        return x * y

    def interval(self, x: Interval, y: Interval) -> Interval:
        lo, hi = corners(np.multiply, x, y)
        if is_int(x):
            return wrap(lo, hi)
        nan = (holds_zero(x) & infinite(y)) | (holds_zero(y) & infinite(x))
        return Interval(lo, hi, either(either(x.nan, y.nan), nan))

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        return total(scaled(d[0], x.args[1]), scaled(d[1], x.args[0]))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x * y


class Div(Operation):
    name, triton = "div", "divide({0}, {1})"

    def types(self, *args: str) -> tuple[tuple[str, ...], str]:
        return ("float", "float"), "float"

    def simplify(self, x: Expr, y: Expr) -> Expr | None:
        return x if is_const(y, 1) else None

    def value(self, x: Any, y: Any) -> Any:
        return x / y

    def interval(self, x: Interval, y: Interval) -> Interval:
        lo, hi = corners(np.divide, x, y)
        known = Interval(lo, hi, either(either(x.nan, y.nan), infinite(x) & infinite(y)))
        return unless(known, holds_zero(y))

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        inverse = apply("div", const(1.0), x.args[1])
        return total(scaled(d[0], inverse), scaled(d[1], apply("neg", apply("mul", x, inverse))))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        return x / y


class FloorDiv(Operation):
    """Floor division; the derivative is 0."""

    name, triton = "floordiv", "floor_divide({0}, {1})"

    def simplify(self, x: Expr, y: Expr) -> Expr | None:
        return x if x.type == "int" and is_const(y, 1) else None

    def value(self, x: Any, y: Any) -> Any:
        if np.asarray(x).dtype.kind == "f":
            return np.floor(x / y)
        bad = y == 0
        return np.where(bad, np.int32(0), np.floor_divide(x, np.where(bad, np.int32(1), y))).astype(np.int32)

    def interval(self, x: Interval, y: Interval) -> Interval:
        if not is_int(x):
            return monotone(np.floor, Div().interval(x, y))
        some = np.where(y.lo == 0, 1, y.lo), np.where(y.hi == 0, 1, y.hi)
        lo, hi = corners(np.floor_divide, x, Interval(*some))
        reach = np.maximum(np.maximum(abs(x.lo), abs(x.hi)), 1)
        zero = holds_zero(y)
        return wrap(np.where(zero, -reach, lo), np.where(zero, reach, hi))

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        a, b = at.together(args)
        return at.floor(a / b) if a.is_float else at.integers.floor_divide(a, b, literal(x.args[1]))


class Mod(Operation):
    name, triton = "mod", "floor_modulo({0}, {1})"

    def value(self, x: Any, y: Any) -> Any:
        if np.asarray(x).dtype.kind == "f":
            return x - np.floor(x / y) * y
        bad = y == 0
        return np.where(bad, np.int32(0), np.remainder(x, np.where(bad, np.int32(1), y))).astype(np.int32)

    def interval(self, x: Interval, y: Interval) -> Interval:
        if not is_int(x):
            return anything(x.lo + y.lo)
        lo, hi = np.minimum(y.lo + 1, 0), np.maximum(y.hi - 1, 0)  # any dividend
        divisor = np.where(y.lo == 0, 1, y.lo)
        first = np.floor_divide(x.lo, divisor)
        period = (y.lo == y.hi) & (y.lo != 0) & (first == np.floor_divide(x.hi, divisor))  # no wrap-around in [lo, hi]
        start = first * divisor
        small = (x.lo >= 0) & (x.hi < y.lo)  # smaller than the divisor: unchanged
        lo = np.where(period, x.lo - start, np.where(small, x.lo, lo))
        hi = np.where(period, x.hi - start, np.where(small, x.hi, hi))
        return Interval(lo, hi)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        turns = apply("floordiv", *x.args)
        return total(d[0], scaled(d[1], apply("neg", turns)))

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        a, b = at.together(args)
        return a - at.floor(a / b) * b if a.is_float else at.integers.floor_modulo(a, b, literal(x.args[1]))


class Neg(Operation):
    name, triton = "neg", "negate({0})"

    def value(self, x: Any) -> Any:
        return -x

    def interval(self, x: Interval) -> Interval:
        return wrap(-x.hi, -x.lo) if is_int(x) else Interval(-x.hi, -x.lo, x.nan)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        return apply("neg", d[0]) if d[0] is not None else None

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.f.emit(x.type, f"fneg {x}") if x.is_float else 0 - x


class Abs(Operation):
    """|x|; |INT_MIN| wraps to INT_MIN; the derivative at 0 is 0."""

    name, triton = "abs", "tl.abs({0})"

    def value(self, x: Any) -> Any:
        return np.abs(x)

    def interval(self, x: Interval) -> Interval:
        lo = np.where(holds_zero(x), np.zeros_like(x.lo), np.minimum(abs(x.lo), abs(x.hi)))
        hi = np.maximum(abs(x.lo), abs(x.hi))
        return wrap(lo, hi) if is_int(x) else Interval(lo, hi, x.nan)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        zero, one = const(0.0), const(1.0)
        below = apply("where", apply("lt", x.args[0], zero), const(-1.0), zero)
        return scaled(d[0], apply("where", apply("lt", zero, x.args[0]), one, below))

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.absolute(x)


class _Extremum(Operation):
    larger: bool

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        """Of the operand taken; the first where they are equal."""
        if d == (None, None):
            return None
        a, b = x.args
        da, db = (t if t is not None else const(0.0) for t in d)
        second = apply("lt", a, b) if self.larger else apply("lt", b, a)
        return apply("where", second, db, da)


class Minimum(_Extremum):
    name, larger = "minimum", False
    triton = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"

    def value(self, x: Any, y: Any) -> Any:
        return np.minimum(x, y)

    def interval(self, x: Interval, y: Interval) -> Interval:
        return Interval(np.minimum(x.lo, y.lo), np.minimum(x.hi, y.hi), either(x.nan, y.nan))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        take = (x < y) | x.isnan() if x.is_float else x < y
        return at.f.select(take, x, y)


class Maximum(_Extremum):
    name, larger = "maximum", True
    triton = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"

    def value(self, x: Any, y: Any) -> Any:
        return np.maximum(x, y)

    def interval(self, x: Interval, y: Interval) -> Interval:
        return Interval(np.maximum(x.lo, y.lo), np.maximum(x.hi, y.hi), either(x.nan, y.nan))

    def llvm(self, at: Emission, x: Value, y: Value) -> Value:
        take = (x > y) | x.isnan() if x.is_float else x > y
        return at.f.select(take, x, y)


class Where(Operation):
    """A choice. Its derivative chooses too: the branch not taken may be infinite or NaN and does not matter."""

    name, triton = "where", "tl.where({0}, {1}, {2})"

    def types(self, *args: str) -> tuple[tuple[str, ...], str]:
        common = "bool" if args[1:] == ("bool", "bool") else promote(*args[1:])
        return ("bool", common, common), common

    def simplify(self, c: Expr, x: Expr, y: Expr) -> Expr | None:
        if is_const(c):
            return x if c.data else y
        return x if x is y else None

    def value(self, c: Any, x: Any, y: Any) -> Any:
        return np.where(c, x, y)

    def interval(self, c: Interval, x: Interval, y: Interval) -> Interval:
        both = hull(x, y)
        lo, hi, nan = (np.where(c.lo == 1, a, np.where(c.hi == 0, b, m)) for a, b, m in zip(x, y, both, strict=True))
        return Interval(lo, hi, nan if nan.any() else False)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        if d[1] is None and d[2] is None:
            return None
        zero = const(0.0)
        return apply("where", x.args[0], d[1] or zero, d[2] or zero)

    def llvm(self, at: Emission, c: Value, x: Value, y: Value) -> Value:
        return at.f.select(c, x, y)
