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
    # One product counts all three for every row, exactly: fewer than 256 keys a tile, and 24 bits of an fp32 sum.
    count = product(tl.where(seen, 1.0, 0.0).to(tl.float16), kind.to(tl.float16), tl.float32, "ieee")
    minus = tl.floor(count / 256)
    plus = tl.floor(count - 256 * minus)
    nan = count - 256 * minus - plus
    odd = tl.where(plus > 0, float("inf"), MINUS_INF)
    odd = tl.where((nan > 0) | ((plus > 0) & (minus > 0)), float("nan"), odd)
    return tl.where(count > 0, clean + odd, clean)
