"""Which numbers the parts of a product hold: what is done about all others is in unheld.py."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.llvm.ir import Function, Value
from flashtile.llvm.routines import Operand
from flashtile.llvm.types import lanes


@dataclass(frozen=True)
class Range(Operand):
    """What is held: 0, and magnitudes from ``least`` to ``most``, as bits of fp32, whose order is the numbers'."""

    WORDS: ClassVar = {"least": "i32", "most": "i32"}
    least: Value
    most: Value

    @classmethod
    def of_values(cls, f: Function, c: Config) -> Range:
        """Of V. A weight may be small, or on tiles that add to their sums 2^RISE (softmax.py), and its product with a
        value is added to a hundred thousand others."""
        least = 2.0**-80 if c.product.parts > 1 else 2.0**-100
        most = bits_of(2.0**90) if c.tiles_add else LARGEST
        return cls(f.const("i32", bits_of(least)), f.const("i32", most))

    @classmethod
    def of_slopes(cls, f: Function, name: str) -> Range:
        """Of V ("v") and dO ("do") where they make dP, whose products by weights are split again: these stay so large
        that their parts do not vanish. Gradients are often tiny, values seldom."""
        least = {"v": 2.0**-32, "do": 2.0**-64}[name]
        return cls(f.const("i32", bits_of(least)), f.const("i32", _MOST))

    @classmethod
    def finite(cls, f: Function) -> Range:
        """What is finite as bf16: enough where a tiny share of a sum may be lost."""
        return cls(f.const("i32", 0), f.const("i32", LARGEST))

    @classmethod
    def of_scores(cls, f: Function, least: Value) -> Range:
        """Of Q and K: no sum of products overflows, nor do its parts in opposite directions."""
        return cls(f.cast("trunc", least, "i32"), f.const("i32", _MOST))

    def holds(self, x: Value) -> Value:
        """Of a number or a register of them."""
        f = self.function
        least, steps = self.least, self.most - self.least + 1
        if x.type[0] == "<":
            least, steps = (f.splat(y, lanes(x.type)) for y in (least, steps))
        magnitude = f.bitcast(x, "i32") & 0x7FFFFFFF
        return (magnitude - least).ult(steps) | magnitude.eq(0)

    def beyond(self, x: Value) -> Value:
        """Whether a number is finite and larger."""
        magnitude = self.function.bitcast(x, "i32") & 0x7FFFFFFF
        return (magnitude > self.most) & (magnitude < INFINITE)

    def holds_halves(self, x: Value) -> Value:
        """Of a register of bf16, where the bounds are constants: two numbers at once."""
        least, most = self.least.number, self.most.number
        assert least is not None and most is not None and least % (1 << 16) == 0
        magnitude = x & 0x7FFF
        inside = (magnitude - (least >> 16)).ult((most >> 16) - (least >> 16) + 1)
        return inside | magnitude.eq(0) if least else inside

    def or_zero(self, x: Value) -> Value:
        """What is held, 0 in the place of all else."""
        return self.function.select(self.holds(x), x, 0.0)


def bits_of(x: float) -> int:
    return int(struct.unpack("i", struct.pack("f", x))[0])


_MOST = bits_of(2.0**56)  # so that no sum of products of two overflows
LARGEST = 0x7F7F7FFF  # beyond it a number rounded to bf16 is infinite
INFINITE = bits_of(math.inf)


def least_of_scores(c: Config, scale: float) -> int:
    """The least magnitude of Q and K that is held, as bits of fp32. What is lost of a tiny element counts only where
    scores are made much larger afterwards: by the scale, or for all one knows by a score program."""
    return bits_of(2.0**-50) if c.scored or abs(scale) > 2.0**20 else 0


def any_lane(f: Function, condition: Value) -> Value:
    """Whether a condition holds in any lane."""
    return f.cast("bitcast", condition, f"i{lanes(condition.type)}").ne(0)
