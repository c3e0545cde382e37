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
        if exact:
            return upper_halves(f, even, odd)
        if even.type[0] == "<":
            return isa.narrow_pairs(f, even, odd)
        low, high = (f.cast("zext", isa.narrow(f, x, "bfloat"), like(x.type, "i32")) for x in (even, odd))
        return low | (high << 16)


def upper_halves(f: Function, even: Value, odd: Value) -> Value:
    """Those of two floats as a word: a bf16 each, cut off."""
    return (f.bitcast(even, "i32") >> 16) | (f.bitcast(odd, "i32") & -(1 << 16))


PRODUCT = Pairs("pairs", depth=2, operand="bfloat")
PRODUCTS = (PRODUCT,)
