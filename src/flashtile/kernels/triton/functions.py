"""What the score language's node kinds call in Triton, each with the value that its NumPy form gives.

Arithmetic is exactly rounded, so that coverage's intervals hold: Triton's own `/` and `sqrt` on float32 are not.
Functions of calculus on float32 are within a few units in the last place, where the GPU's own are not: its `ex2` and
`lg2` are good near the middle of their range only. On float64 they are the vendor's library functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.language import LOG2E

INT_MIN = tl.constexpr(-(1 << 31))
INT_MAX = tl.constexpr((1 << 31) - 1)
# ln 2 in two parts: the first has so few bits that whole multiples of it, up to 2^8, are exact.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693145751953125), tl.constexpr(1.42860682030941723212e-6)
LN2_HIGH_64, LN2_LOW_64 = tl.constexpr(0.69314718036912381649), tl.constexpr(1.90821492927058770002e-10)


# -- arithmetic --------------------------------------------------------------------------------------


@triton.jit
def negate(x):
    """-x; int32 wraps, and the sign of 0.0 turns."""
    if x.dtype.is_int():
        return tl.sub(tl.zeros_like(x), x, sanitize_overflow=False)
    else:
        return x * -1.0


@triton.jit
def divide(x, y):
    """x / y of floats, exactly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def floor_divide(x, y):
    """x // y: floored; by 0, integers give 0."""
    if x.dtype.is_int():
        whole = x // _divisor(y)  # Triton truncates
        rest = tl.sub(x, tl.mul(whole, y, sanitize_overflow=False), sanitize_overflow=False)
        whole = tl.where((rest != 0) & ((rest ^ y) < 0), whole - 1, whole)
        return tl.where(y == 0, 0, tl.where(y == -1, negate(x), whole))
    else:
        return tl.floor(divide(x, y))


@triton.jit
def floor_modulo(x, y):
    """x % y: of the sign of y; by 0, integers give 0. Of floats x - floor(x / y) * y."""
    if x.dtype.is_int():
        rest = x % _divisor(y)  # of the sign of x
        rest = tl.where((rest != 0) & ((rest ^ y) < 0), rest + y, rest)
        return tl.where((y == 0) | (y == -1), 0, rest)
    else:
        return x - tl.floor(divide(x, y)) * y


@triton.jit
def _divisor(y):
    """A divisor that the hardware can take: 0, and -1 below the least int32, are undefined."""
    return tl.where((y == 0) | (y == -1), 1, y)


@triton.jit
def shift_left(x, y):
    """x << y; beyond 31 bits, or backwards, nothing is left."""
    good = (y >= 0) & (y < 32)
    return tl.where(good, x << tl.where(good, y, 0), 0)


@triton.jit
def shift_right(x, y):
    """x >> y, which keeps the sign; beyond 31 bits, or backwards, only the sign is left."""
    return x >> tl.where((y >= 0) & (y < 32), y, 31)


@triton.jit
def to_int(x):
    """Float to int32: towards 0, saturated, NaN to 0. The hardware's own conversion only sees what fits."""
    fits = (x < 2147483648.0) & (x >= -2147483648.0)
    whole = tl.where(fits, x, 0.0).to(tl.int32)
    return tl.where(x >= 2147483648.0, INT_MAX, tl.where(x < -2147483648.0, INT_MIN, whole))


@triton.jit
def nearest(i, length):
    """The index itself in bounds, else the nearest that is; 0 where there is no element."""
    return tl.maximum(tl.minimum(i, length - 1), 0)


@triton.jit
def counted(place, at, length, box, AXIS: tl.constexpr):
    """The number of an element along one axis more: in the whole array, or in a box of it, of which `box` has the first
    index and the length along each axis."""
    if box is None:
        return place * length + at
    else:
        return place * box[2 * AXIS + 1] + (at - box[2 * AXIS])


# -- calculus ----------------------------------------------------------------------------------------


@triton.jit
def sqrt(x):
    """Exactly rounded; NaN below 0."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def exp(x):
    """e^x.

    On float32, x = n ln 2 + r with n whole: rounding x log2(e) itself would cost as many units in the last place as the
    exponent has bits. 2^n is made of two factors, neither of which leaves the normal range where e^x does not.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.minimum(x, 89.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
        n, r = _halves(x)
        half = tl.floor(n * 0.5)
        return tl.exp2(half) * (tl.exp2(n - half) * tl.exp2(r * LOG2E))


@triton.jit
def exp_of_difference(a, b, part: tl.constexpr):
    """e^(part (a - b)) for a <= b, part a power of two; exactly 1 where they are equal.

    What the rounding of the difference leaves counts: it costs as many units in the last place as the difference is
    large, and a sink far above a row's scores would hand them to all of its keys.
    Source: Knuth, The Art of Computer Programming 2, section 4.2.2.
    """
    difference = a - b
    back = difference - a
    rest = (a - (difference - back)) - (b + back)
    rest = tl.where(tl.abs(difference) < 1e4, rest, 0.0)  # of -inf it would be NaN
    return exp(difference * part) * (1.0 + rest * part)


@triton.jit
def exp2(x):
    """2^x: the hardware's own unit is good to two units in the last place."""
    return tl.exp2(x)


@triton.jit
def log(x):
    """Natural logarithm; -inf at 0, NaN below."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        exponent, log_m = _exponent_and_log(x)
        return _edges(x, exponent * LN2_HIGH + (log_m + exponent * LN2_LOW))


@triton.jit
def log2(x):
    """Logarithm to base 2; -inf at 0, NaN below."""
    if x.dtype == tl.float64:
        return tl.log2(x)
    else:
        exponent, log_m = _exponent_and_log(x)
        return _edges(x, exponent + log_m * LOG2E)


@triton.jit
def tanh(x):
    """tanh x = e / (e + 2) with e = exp(2 |x|) - 1, and the sign of x; beyond 20 it is 1 to the last bit.

    2 |x| = n ln 2 + r, so e is 2^n (exp(r) - 1) + (2^n - 1), and exp(r) - 1 is a series without a constant term: small
    x lose nothing.
    """
    z = 2.0 * tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)
    n, r = _halves(z)
    series = tl.full((), 1.0, x.dtype)
    if x.dtype == tl.float64:
        for k in tl.static_range(13, 0, -1):
            series = 1.0 + series * r * (1.0 / (k + 1))
    else:
        for k in tl.static_range(7, 0, -1):
            series = 1.0 + series * r * (1.0 / (k + 1))
    power = tl.exp2(n)
    e = series * r * power + (power - 1.0)
    size = e / (e + 2.0)
    return tl.where(x == 0.0, x, tl.where(x < 0.0, -size, size))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), neither side of which overflows."""
    e = exp(-tl.abs(x))
    return tl.where(x >= 0.0, tl.full((), 1.0, x.dtype), e) / (1.0 + e)


@triton.jit
def _halves(x):
    """(n, r): x = n ln 2 + r with n whole and |r| at most about ln(2) / 2."""
    n = tl.floor(x * LOG2E + 0.5)
    if x.dtype == tl.float64:
        return n, (x - n * LN2_HIGH_64) - n * LN2_LOW_64
    else:
        return n, (x - n * LN2_HIGH) - n * LN2_LOW


@triton.jit
def _exponent_and_log(x):
    """(e, log m) of a positive float32 x = 2^e m with sqrt(1/2) <= m < sqrt(2); log m = 2 atanh((m - 1) / (m + 1))."""
    small = x < 1.1754943508222875e-38  # below the normal range
    word = tl.where(small, x * 8388608.0, x).to(tl.int32, bitcast=True)
    shift = (word - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    m = (word - (shift << 23)).to(tl.float32, bitcast=True)
    t = (m - 1.0) / (m + 1.0)
    square = t * t
    series = square * (2.0 / 11.0) + 2.0 / 9.0
    for k in tl.static_range(3, 0, -1):
        series = series * square + 2.0 / (2 * k + 1)
    return shift.to(tl.float32) - tl.where(small, 23.0, 0.0), t * 2.0 + t * square * series


@triton.jit
def _edges(x, value):
    """A logarithm's value at inf, NaN, 0 and below."""
    infinity = tl.full((), float("inf"), x.dtype)
    value = tl.where(x < infinity, value, x)
    beyond = tl.where(x == 0.0, -infinity, tl.full((), float("nan"), x.dtype))
    return tl.where(x > 0.0, value, tl.where(x != x, x, beyond))
