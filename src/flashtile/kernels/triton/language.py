"""The few places where the interpreter and a GPU need different words: products and rounding of narrow types.

Triton's interpreter keeps bfloat16 as its 16 bits. Loads, stores and conversions to float32 are right; a product or
any arithmetic on it is meaningless, and the conversion back truncates. So under TRITON_INTERPRET=1, and only there,
operands are widened before a product, which changes no value, and rounding to nearest even is done by hand. And a
comparison of two scalars, when it meets a tile, is given the type of what was compared; so programs get no scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, summed in ACC: (m, k), (k, n) -> (m, n)."""
    if INTERPRETED:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def add_product(a, b, total, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, summed in ACC: (m, k), (k, n), (m, n) -> (m, n)."""
    if INTERPRETED:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """x rounded to nearest even in the type; NaN stays NaN."""
    if x.dtype == TYPE:
        return x
    elif INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(x != x, bits | 0x00400000, near)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(TYPE)


@triton.jit
def number(bits, TYPE: tl.constexpr):
    """The double whose bits came as an integer. A float argument would arrive as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(TYPE)


@triton.jit
def spread(x):
    """A scalar as programs take it: itself, or a tile of one element."""
    if INTERPRETED:
        return tl.broadcast_to(x, [1])
    else:
        return x


@triton.jit
def over(x, tile):
    """What a program gave, of fewer or shorter axes, in the shape of a tile."""
    if INTERPRETED:
        return x + tl.zeros(tile.shape, x.dtype)
    else:
        return tl.broadcast_to(x, tile.shape)
