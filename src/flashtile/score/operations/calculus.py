"""Functions of calculus on floats: exp, exp2, log, log2, sqrt, tanh, sigmoid, floor.

Kernels approximate the first six to a few units in the last place; `_ULPS` bounds that with room to spare, so
that coverage agrees with what kernels compute.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..expr import Expr
from ..interval import Interval, either, monotone
from .arithmetic import scaled
from .base import Operation, apply, const

if TYPE_CHECKING:
    from ...llvm.ir import Value
    from ..emit import Emission

_ULPS = 64


class _Function(Operation):
    def types(self, *args: str) -> tuple[tuple[str, ...], str]:
        return ("float",), "float"

    def interval(self, x: Interval) -> Interval:
        return monotone(self.value, x, ulps=_ULPS)

    def slope(self, x: Expr) -> Expr:
        """Derivative at the node x with respect to its argument."""
        raise NotImplementedError(self.name)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        return scaled(d[0], self.slope(x)) if d[0] is not None else None


class Exp(_Function):
    name, triton = "exp", "exp({0})"

    def value(self, x: Any) -> Any:
        return np.exp(x)

    def slope(self, x: Expr) -> Expr:
        return x

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.exp(x)


class Exp2(_Function):
    name, triton = "exp2", "exp2({0})"

    def value(self, x: Any) -> Any:
        return np.exp2(x)

    def slope(self, x: Expr) -> Expr:
        return apply("mul", x, const(math.log(2)))

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.exp2(x)


class _Logarithm(_Function):
    """-inf at 0, NaN below."""

    def interval(self, x: Interval) -> Interval:
        wide = monotone(self.value, x, ulps=_ULPS)
        return wide._replace(nan=either(wide.nan, x.lo < 0))


class Log(_Logarithm):
    """Natural logarithm."""

    name, triton = "log", "log({0})"

    def value(self, x: Any) -> Any:
        return np.log(x)

    def slope(self, x: Expr) -> Expr:
        return apply("div", const(1.0), x.args[0])

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.log(x)


class Log2(_Logarithm):
    name, triton = "log2", "log2({0})"

    def value(self, x: Any) -> Any:
        return np.log2(x)

    def slope(self, x: Expr) -> Expr:
        return apply("div", const(1 / math.log(2)), x.args[0])

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.log2(x)


class Sqrt(_Function):
    name, triton = "sqrt", "sqrt({0})"

    def value(self, x: Any) -> Any:
        return np.sqrt(x)

    def interval(self, x: Interval) -> Interval:
        exact = monotone(np.sqrt, x)  # rounded exactly, everywhere
        return exact._replace(nan=either(exact.nan, x.lo < 0))

    def slope(self, x: Expr) -> Expr:
        return apply("div", const(0.5), x)

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.sqrt(x)


class Tanh(_Function):
    name, triton = "tanh", "tanh({0})"

    def value(self, x: Any) -> Any:
        return np.tanh(x)

    def slope(self, x: Expr) -> Expr:
        return apply("sub", const(1.0), apply("mul", x, x))

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.tanh(x)


class Sigmoid(_Function):
    """1 / (1 + exp(-x))."""

    name, triton = "sigmoid", "sigmoid({0})"

    def value(self, x: Any) -> Any:
        e = np.exp(-np.abs(x))  # in (0, 1]: neither side overflows
        return np.where(x >= 0, 1 / (1 + e), e / (1 + e))

    def slope(self, x: Expr) -> Expr:
        return apply("mul", x, apply("sub", const(1.0), x))

    def llvm(self, at: Emission, x: Value) -> Value:
        e = at.exp(at.f.emit(x.type, f"fneg {at.absolute(x)}"))
        return at.f.select(x >= 0.0, 1.0 / (e + 1.0), e / (e + 1.0))


class Floor(_Function):
    """The largest whole number not above x, as a float; the derivative is 0."""

    name, triton = "floor", "tl.floor({0})"

    def value(self, x: Any) -> Any:
        return np.floor(x)

    def interval(self, x: Interval) -> Interval:
        return monotone(np.floor, x)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        return None

    def llvm(self, at: Emission, x: Value) -> Value:
        return at.floor(x)
