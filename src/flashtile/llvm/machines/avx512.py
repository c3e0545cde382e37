"""AVX-512, without and with the bf16 dot: 32 registers of 64 bytes hold a tile of 8 rows by 3 vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.types import element, lanes, vector


@dataclass(frozen=True)
class AVX512(ISA):
    """AVX-512's own primitives: an estimate of the reciprocal to 14 bits, and a permutation of a whole register."""

    def look_up(self, f: Function, table: Value, index: Value) -> Value:
        kind = {"i32": "si", "i64": "di"}[element(table.type)]
        return f.intrinsic(f"llvm.x86.avx512.permvar.{kind}.{8 * self.vector_bytes}", table.type, [table, index])

    def fraction(self, f: Function, x: Value) -> Value:
        return self._whole_register(f, "reduce", x, f.const("i32", 9))  # against no bits after the point, rounded down

    def scale(self, f: Function, x: Value, power: Value) -> Value:
        return self._whole_register(f, "scalef", x, power)

    def _whole_register(self, f: Function, name: str, *operands: Value) -> Value:
        """An instruction on all lanes of a register of floats, rounding as the float unit is set to."""
        type_ = self.vector_of("float")
        others = [f.const(type_, 0.0), f.const("i16", -1), f.const("i32", 4)]
        return f.intrinsic(f"llvm.x86.avx512.mask.{name}.ps.512", type_, [*operands, *others])

    def divide(self, f: Function, a: Value, b: Value) -> Value:
        """A quotient to 14 bits, corrected by what it leaves of a: half the time of the division of 16 lanes."""
        if a.type != self.vector_of("float"):
            return a / b
        lanes_ = [f.const(a.type, 0.0), f.const("i16", -1)]
        inverse = f.intrinsic(f"llvm.x86.avx512.rcp14.ps.{8 * self.vector_bytes}", a.type, [b, *lanes_])
        quotient = a * inverse
        return f.fma(f.fma(f.const(a.type, -0.0) - b, quotient, a), inverse, quotient)


@dataclass(frozen=True)
class BF16Dot(AVX512):
    """AVX512_BF16: a dot of bf16 pairs, and the rounding of two fp32 registers into one of bf16."""

    def dot_pairs(self, f: Function, acc: Value, a: Value, b: Value) -> Value:
        n = lanes(acc.type)
        a, b = (f.cast("bitcast", x, vector(2 * n, "bfloat")) for x in (a, b))
        return f.intrinsic(f"llvm.x86.avx512bf16.dpbf16ps.{32 * n}", acc.type, [acc, a, b])

    def narrow_pairs(self, f: Function, even: Value, odd: Value) -> Value:
        n = lanes(even.type)
        packed = self._pack(f, even, odd)
        order = [lane for t in range(n) for lane in (t, n + t)]
        return f.cast("bitcast", f.shuffle(packed, packed, order), vector(n, "i32"))

    def narrow_both(self, f: Function, low: Value, high: Value) -> Value:
        return f.bitcast(self._pack(f, low, high), "i16")

    def _pack(self, f: Function, low: Value, high: Value) -> Value:
        n = lanes(low.type)
        return f.intrinsic(f"llvm.x86.avx512bf16.cvtne2ps2bf16.{32 * n}", vector(2 * n, "bfloat"), [high, low])


NEEDS = frozenset(("x86_64", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "fma", "f16c", "bmi2"))


def machine(kind: type[AVX512], **fields: Any) -> AVX512:
    """What all of them have in common, and these fields."""
    return kind(cpu="x86-64-v4", vector_bytes=64, vectors=3, rows=8, fused=True, half=True, permutes=True, **fields)


_PLAIN = machine(AVX512, name="avx512", rank=30, needs=NEEDS)
_BF16 = machine(
    BF16Dot, name="avx512_bf16", rank=40, features="+avx512bf16", needs=NEEDS | {"avx512bf16"}, bf16_dot=True
)
MACHINES = (_PLAIN, _BF16, replace(_PLAIN, name="avx512_bf16_emulated", rank=0, bf16_dot=True))
