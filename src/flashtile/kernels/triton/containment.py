"""NaN containment: a key that is hidden from a row never changes that row, whatever its value holds.

A hidden key's weight is 0, but 0 * NaN is NaN. The kernels multiply anyway, and look at their sums when they are done:
if all are finite, as always but for broken data, nothing was lost, and clean data paid nothing for it. Otherwise the
tile is computed once more with `add_contained` as the product: what is not finite is taken out of the values, so rows
that do not see those keys get the bits they would have had, and put into just the rows that see it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.language import MINUS_INF, add_product, product


@triton.jit
def any_not_finite(x):
    """Whether a tile holds NaN or an infinity, as an integer."""
    odd = tl.where(tl.abs(x) < float("inf"), 0, 1)
    return tl.max(tl.max(odd, 1), 0)


@triton.jit
def add_contained(weight, value, seen, total, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """total + weight @ value, where a key counts for the rows that see it alone.

    Shapes: weight (m, n), value (n, d), seen bool (m, n), total (m, d).
    A weight is positive wherever the key is seen, so NaN and infinities enter unweighted; both infinities make NaN.
    """
    wide = value.to(ACC)
    finite = tl.abs(wide) < float("inf")
    clean = add_product(weight, tl.where(finite, value, tl.zeros_like(value)), total, ACC, PRECISION)
    kind = tl.where(wide == MINUS_INF, 256.0, 0.0)
    kind = tl.where(wide == float("inf"), 1.0, kind)
    kind = tl.where(wide != wide, 1.0 / 256, kind)
    return _with_counted(clean, _count(seen, kind))


@triton.jit
def add_signed(weight, value, sign, seen, total, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """`add_contained` of weights that may be negative, which turns an infinity, or 0, which makes NaN of it.

    Shapes: sign as weight, whose sign it has: a small weight may have been rounded to 0.
    """
    wide = value.to(ACC)
    finite = tl.abs(wide) < float("inf")
    clean = add_product(weight, tl.where(finite, value, tl.zeros_like(value)), total, ACC, PRECISION)
    nan = tl.where(wide != wide, 1.0 / 256, 0.0)
    same = tl.where(wide == float("inf"), 1.0, tl.where(wide == MINUS_INF, 256.0, nan))
    turned = tl.where(wide == float("inf"), 256.0, tl.where(wide == MINUS_INF, 1.0, nan))
    count = _count(seen & (sign > 0), same) + _count(seen & (sign < 0), turned)
    return _with_counted(clean, count + _count(seen & (sign == 0), tl.where(finite, 0.0, 1.0 / 256)))


@triton.jit
def _count(chosen, kind):
    """How much of each kind every row meets: one product counts all three, exactly, since a tile has fewer than 256
    keys, and an fp32 sum 24 bits."""
    return product(tl.where(chosen, 1.0, 0.0).to(tl.float16), kind.to(tl.float16), tl.float32, "ieee")


@triton.jit
def _with_counted(clean, count):
    """The sum with what was counted in: -inf (256 each), +inf (1), NaN (1 / 256)."""
    minus = tl.floor(count / 256)
    plus = tl.floor(count - 256 * minus)
    nan = count - 256 * minus - plus
    odd = tl.where(plus > 0, float("inf"), MINUS_INF)
    odd = tl.where((nan > 0) | ((plus > 0) & (minus > 0)), float("nan"), odd)
    return tl.where(count > 0, clean + odd, clean)
