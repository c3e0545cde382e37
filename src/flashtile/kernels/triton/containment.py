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
    rows = _indicator(seen)
    nan = product(rows, _indicator(wide != wide), tl.float32, "ieee") > 0.0
    plus = product(rows, _indicator(wide == float("inf")), tl.float32, "ieee") > 0.0
    minus = product(rows, _indicator(wide == MINUS_INF), tl.float32, "ieee") > 0.0
    odd = tl.where(plus, float("inf"), MINUS_INF)
    odd = tl.where(nan | (plus & minus), float("nan"), odd)
    return tl.where(nan | plus | minus, clean + odd, clean)


@triton.jit
def _indicator(condition):
    """1 and 0, in the type that every tensor core takes: how often a row sees such a value is counted exactly."""
    return tl.where(condition, 1.0, 0.0).to(tl.float16)
