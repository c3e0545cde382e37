"""Leaves and what is close to them: constants, variables, captured scalars, loads, casts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from ..capture import Access, ArrayCapture, ScalarCapture, Slot
from ..expr import INT_MAX, INT_MIN, VARIABLES, Expr, check_int32, node
from ..interval import Interval, truth
from .base import OPERATIONS, Operation, const

if TYPE_CHECKING:
    from ...llvm.ir import Value
    from ..emit import Emission
    from ..triton_source import Writer


def point(number: np.ndarray) -> Interval:
    """A known value, in the array types of intervals."""
    wide = number.astype({"b": np.uint8, "i": np.int64}.get(number.dtype.kind, number.dtype))
    return Interval(wide, wide, np.isnan(wide) if wide.dtype.kind == "f" and np.isnan(wide).any() else False)


class Const(Operation):
    name = "const"

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any:
        return np.asarray(x.data, {"bool": np.dtype(bool), "int": np.dtype(np.int32), "float": at.float_type}[x.type])

    def bound(self, x: Expr, at: Any, args: list[Interval]) -> Interval:
        return point(self.evaluate(x, at, []))

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        return at.const(x)

    def write(self, x: Expr, at: Writer, args: list[str]) -> str:
        return at.const(x)


class Var(Operation):
    """s, b, h, i or j; Triton names them so too."""

    name = "var"

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any:
        return at.variables[x.data]

    def bound(self, x: Expr, at: Any, args: list[Interval]) -> Interval:
        return at.variables[x.data]

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        return at.variable(x.data)

    def write(self, x: Expr, at: Writer, args: list[str]) -> str:
        return str(x.data)


class Scalar(Operation):
    """A captured number: a run-time parameter."""

    name = "scalar"

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any:
        return np.asarray(at.capture(x.data).value, np.int32 if x.type == "int" else at.float_type)

    def bound(self, x: Expr, at: Any, args: list[Interval]) -> Interval:
        return point(self.evaluate(x, at, []))

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        return at.scalar_capture(x)

    def write(self, x: Expr, at: Writer, args: list[str]) -> str:
        return at.scalar_capture(x)


class Load(Operation):
    """An element of a captured array; an index out of bounds reads the nearest element (see `Inside`)."""

    name = "load"

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any:
        source = at.capture(x.data.source)
        if not source.array.size:  # nothing to read: only where no element exists, or none is used
            shape = np.broadcast_shapes(*(np.shape(i) for i in args))
            return source.widen(np.zeros(shape, source.array.dtype), at.float_type)
        index = tuple(np.clip(i, 0, n - 1) for i, n in zip(args, source.array.shape, strict=True))
        return source.widen(np.asarray(source.array[index]), at.float_type)

    def bound(self, x: Expr, at: Any, args: list[Interval]) -> Interval:
        return at.extremes(x, args)

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        return at.load(x, args)

    def write(self, x: Expr, at: Writer, args: list[str]) -> str:
        return at.load(x, args)


class Inside(Operation):
    """Whether all indices of a load are in bounds: where not, the gradient does not reach the array."""

    name = "inside"

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any:
        shape = at.capture(x.data.source).array.shape
        within = ((i >= 0) & (i < n) for i, n in zip(args, shape, strict=True))
        return np.asarray(functools.reduce(np.logical_and, within, np.True_))

    def bound(self, x: Expr, at: Any, args: list[Interval]) -> Interval:
        shape = at.capture(x.data.source).array.shape
        certain = [(i.lo >= 0) & (i.hi < n) for i, n in zip(args, shape, strict=True)]
        possible = [(i.hi >= 0) & (i.lo < n) for i, n in zip(args, shape, strict=True)]
        return truth(np.logical_and.reduce(certain), np.logical_and.reduce(possible))

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        return at.inside(x, args)

    def write(self, x: Expr, at: Writer, args: list[str]) -> str:
        return at.inside(x, args)


class Cast(Operation):
    """Change of type: see `base.cast`."""

    name = "cast"

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any:
        (value,) = args
        if x.type == "bool":
            return value != 0
        if x.type == "float":
            return np.asarray(value).astype(at.float_type)
        return to_int(value) if value.dtype.kind == "f" else value.astype(np.int32)

    def bound(self, x: Expr, at: Any, args: list[Interval]) -> Interval:
        (v,) = args
        if x.type == "bool":
            zero = v.single & (v.lo == 0)
            return truth((v.lo > 0) | (v.hi < 0), ~zero)
        if x.type == "float":
            return Interval(v.lo.astype(at.float_type), v.hi.astype(at.float_type))
        if v.lo.dtype.kind != "f":
            return Interval(v.lo.astype(np.int64), v.hi.astype(np.int64))
        lo, hi = (np.asarray(to_int(end)).astype(np.int64) for end in v[:2])
        nan = np.asarray(v.nan)
        return Interval(np.where(nan, np.minimum(lo, 0), lo), np.where(nan, np.maximum(hi, 0), hi))

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        return None  # only from bool or int, which have no derivative, or to one

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        return at.cast(args[0], x.args[0].type, x.type)

    def write(self, x: Expr, at: Writer, args: list[str]) -> str:
        return at.cast(args[0], x.args[0].type, x.type)


def to_int(value: Any) -> Any:
    """Truncated towards 0, saturated to int32; NaN gives 0."""
    wide = np.trunc(np.nan_to_num(np.asarray(value, np.float64), nan=0.0))
    return np.clip(wide, INT_MIN, INT_MAX).astype(np.int64).astype(np.int32)


@functools.cache
def variable(name: str) -> Expr:
    return node(OPERATIONS["var"], (), VARIABLES[name], name)


def scalar(source: ScalarCapture | Slot) -> Expr:
    if isinstance(source, ScalarCapture) and source.type == "int":
        check_int32(int(source.value), "captured integer")
    return node(OPERATIONS["scalar"], (), source.type, source)


def load(source: ArrayCapture | Slot, index: tuple[Expr, ...], clamp: tuple[bool, ...] | None = None) -> Expr:
    """source[index]: one integer expression an axis."""
    return node(OPERATIONS["load"], index, source.type, Access(source, clamp or (True,) * len(index)))


def inside(x: Expr) -> Expr:
    """Whether the indices of the load x are in bounds."""
    if not any(x.data.clamp):
        return const(True)
    return node(OPERATIONS["inside"], x.args, "bool", x.data)
