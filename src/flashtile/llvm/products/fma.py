"""The multiply-add of accumulators: a word is an element."""

from __future__ import annotations

from collections.abc import Sequence

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.products.base import Product


class MultiplyAdd(Product):
    """One element at a time, in the accumulator's type; every machine has it."""

    def multiply_add(self, f: Function, isa: ISA, total: Value, left: Value, right: Value) -> Value:
        return isa.multiply_add(f, left, right, total)

    def join(self, f: Function, isa: ISA, elements: Sequence[Value], *, exact: bool = False) -> Value:
        (element,) = elements
        return element


PRODUCT = MultiplyAdd("fma")
PRODUCTS = (PRODUCT,)
