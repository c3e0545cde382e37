"""Floor division of int32 in LLVM: never traps (x86's idiv does, on 0 and on INT_MIN / -1), by 0 gives 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..llvm.ir import Function, Value


class Integers:
    """Emits into one function."""

    def __init__(self, f: Function):
        self.f = f

    def floor_divide(self, x: Value, y: Value, literal: int | None = None) -> Value:
        """NumPy: where(y == 0, 0, x // y), wrapping.  `literal` is y where it is known."""
        f = self.f
        if literal == 0:
            return x & 0
        if literal == -1:
            return 0 - x
        if literal is not None and literal > 0 and literal & (literal - 1) == 0:
            return x.ashr(literal.bit_length() - 1)
        if literal is not None:
            return self._floored(x, y)
        safe = f.select(y.eq(0) | y.eq(-1), 1, y)
        quotient = self._by_double(x, safe) if x.type[0] == "<" else self._floored(x, safe)
        return f.select(y.eq(0), 0, f.select(y.eq(-1), 0 - x, quotient))

    def floor_modulo(self, x: Value, y: Value, literal: int | None = None) -> Value:
        """NumPy: where(y == 0, 0, x % y)."""
        if literal is not None and literal > 0 and literal & (literal - 1) == 0:
            return x & (literal - 1)
        rest = x - self.floor_divide(x, y, literal) * y
        return self.f.select(y.eq(0), 0, rest) if literal is None or literal == 0 else rest

    def _floored(self, x: Value, y: Value) -> Value:
        """The hardware's quotient, which truncates, less 1 where the remainder's sign is not the divisor's."""
        quotient = x // y
        rest = x - quotient * y
        below = rest.ne(0) & ((rest ^ y) < 0)
        return quotient - self.f.cast("zext", below, x.type)

    def _by_double(self, x: Value, y: Value) -> Value:
        """Vectors have no integer division.  In fp64 the quotient of two int32 is exact enough for its floor:
        it is at least 1 / |y| away from the next integer, and rounding moves it by less than 2^-22 / |y|."""
        f = self.f
        wide = x.type.replace("i32", "double")
        quotient = f.cast("sitofp", x, wide) / f.cast("sitofp", y, wide)
        whole = f.cast("fptosi", quotient, x.type)
        return whole - f.cast("zext", f.cast("sitofp", whole, wide) > quotient, x.type)
