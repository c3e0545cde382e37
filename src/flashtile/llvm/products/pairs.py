"""The dot of bf16 pairs: a word is 32 bits, two elements."""

from __future__ import annotations

from collections.abc import Sequence

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.products.base import Product
from flashtile.llvm.types import like


class Pairs(Product):
    """Products of two bf16 each, accumulated in fp32 without a rounding between."""

    def unavailable(self, isa: ISA) -> str | None:
        return None if isa.bf16_dot else f"{isa.name} has no dot of bf16 pairs"

    def word(self, accumulator: str) -> str:
        return "i32"

    def multiply_add(self, f: Function, isa: ISA, total: Value, left: Value, right: Value) -> Value:
        return isa.dot_pairs(f, total, left, right)

    def join(self, f: Function, isa: ISA, elements: Sequence[Value], *, exact: bool = False) -> Value:
        even, odd = elements
        if even.type[0] == "<" and not exact:
            return isa.narrow_pairs(f, even, odd)
        low, high = (f.cast("zext", isa.narrow(f, x, "bfloat"), like(x.type, "i32")) for x in (even, odd))
        return low | (high << 16)


PRODUCT = Pairs("pairs", depth=2, operand="bfloat")
PRODUCTS = (PRODUCT,)
