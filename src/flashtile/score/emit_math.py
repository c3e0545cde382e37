"""Floating-point functions in LLVM, beyond those of the softmax: every input has the value NumPy gives it.

They use only operations that every target has in its vector unit; none becomes a call.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..llvm import math as kernel_math
from ..llvm.types import element, mangle

if TYPE_CHECKING:
    from ..llvm.ir import Function, Value
    from ..llvm.machines import ISA

_MANTISSA = {"float": 23, "double": 52}
_INTEGER = {"float": "i32", "double": "i64"}
_SIGN = {"float": -(1 << 31), "double": -(1 << 63)}
_TINY = {"float": 2.0**-126, "double": 2.0**-1022}  # the least normal number
_SQRT2_BITS = {"float": 0x3F3504F3, "double": 0x3FE6A09E667F3BCD}  # sqrt(1/2)
_ATANH_TERMS = {"float": 5, "double": 11}
# exp saturates beyond: inf above, 0 below.
_EXP_RANGE = {"float": (-104.0, 89.0), "double": (-746.0, 710.0)}
# ln 2 in two parts: the first has few enough bits that whole multiples of it are exact.
_LN2 = {
    "float": (0.693145751953125, 1.42860682030941723212e-6),
    "double": (0.69314718036912381649, 1.90821492927058770002e-10),
}


def absolute(f: Function, x: Value) -> Value:
    """NumPy: abs(x).  Clears the sign bit."""
    scalar = element(x.type)
    return f.bitcast(f.bitcast(x, _INTEGER[scalar]) & (-1 - _SIGN[scalar]), scalar)


def _with_sign(f: Function, magnitude: Value, sign: Value) -> Value:
    """A non-negative magnitude with the sign of another number."""
    scalar, bits = element(sign.type), _INTEGER[element(sign.type)]
    return f.bitcast(f.bitcast(magnitude, bits) | (f.bitcast(sign, bits) & _SIGN[scalar]), scalar)


def nearest(f: Function, x: Value) -> Value:
    """NumPy: rint(x).  Adding 2^mantissa leaves no bit for the fraction; larger numbers have none."""
    size = absolute(f, x)
    limit = 2.0 ** _MANTISSA[element(x.type)]
    return f.select(size < limit, _with_sign(f, (size + limit) - limit, x), x)


def floor(f: Function, x: Value) -> Value:
    """NumPy: floor(x)."""
    whole = nearest(f, x)
    return f.select(whole > x, whole - 1.0, whole)


def sqrt(f: Function, x: Value) -> Value:
    """NumPy: sqrt(x)."""
    return f.intrinsic(f"llvm.sqrt.{mangle(x.type)}", x.type, [x])


def exp2(f: Function, isa: ISA, x: Value) -> Value:
    """NumPy: exp2(x), results below the normal range 0.  Within 1 ulp."""
    return kernel_math.exp2(f, isa, x)


def exp(f: Function, isa: ISA, x: Value) -> Value:
    """NumPy: exp(x), results below the normal range 0.  Within 4 ulp.

    x = n ln 2 + r with n whole: rounding x log2(e) itself would cost as many ulp as the exponent has bits.
    """
    low, high = _EXP_RANGE[element(x.type)]
    x = f.minimum(f.const(x.type, high), f.maximum(f.const(x.type, low), x))  # the operand order keeps NaN
    n = nearest(f, x * (1 / math.log(2)))
    ln2_high, ln2_low = _LN2[element(x.type)]
    r = (x - n * ln2_high) - n * ln2_low
    # Halved and doubled, lest 2^n overflow where exp(x) does not.
    return kernel_math.exp2(f, isa, n - 1.0) * (2.0 * kernel_math.exp2(f, isa, r * (1 / math.log(2))))


def log(f: Function, isa: ISA, x: Value, base2: bool = False) -> Value:
    """NumPy: log(x), or log2(x).  Within 4 ulp, subnormals included; -inf at 0, NaN below.

    x = 2^e m with sqrt(1/2) <= m < sqrt(2); log m = 2 atanh(t), t = (m - 1) / (m + 1), by its series.
    """
    scalar = element(x.type)
    bits, mantissa = _INTEGER[scalar], _MANTISSA[scalar]
    small = x < _TINY[scalar]
    word = f.bitcast(f.select(small, x * 2.0**mantissa, x), bits)
    shifted = word - _SQRT2_BITS[scalar]
    exponent = _whole_to_float(f, shifted.ashr(mantissa), x.type, mantissa)
    m = f.bitcast(word - (shifted.ashr(mantissa) << mantissa), scalar)
    e = exponent - f.select(small, f.const(x.type, float(mantissa)), 0.0)
    t = (m - 1.0) / (m + 1.0)
    square = t * t
    series = f.const(x.type, 2 / (2 * _ATANH_TERMS[scalar] + 1))
    for k in range(_ATANH_TERMS[scalar] - 1, 0, -1):
        series = isa.multiply_add(f, series, square, f.const(x.type, 2 / (2 * k + 1)))
    log_m = t * 2.0 + t * square * series
    ln2_high, ln2_low = _LN2[scalar]
    result = e + log_m * (1 / math.log(2)) if base2 else e * ln2_high + (log_m + e * ln2_low)
    result = f.select(x < math.inf, result, x)  # inf and NaN
    edge = f.select(x.eq(0.0), f.const(x.type, -math.inf), f.const(x.type, math.nan))
    return f.select(x > 0.0, result, f.select(x.isnan(), x, edge))


def _whole_to_float(f: Function, n: Value, type_: str, mantissa: int) -> Value:
    """Small integers to floats of the same width.  AVX2 has no conversion from i64: go by the mantissa bits."""
    if mantissa == 23:
        return f.cast("sitofp", n, type_)
    magic = 1.5 * 2.0**mantissa
    image = f.bitcast(f.const(type_, magic), "i64")
    return f.bitcast(n + image, "double") - magic


def tanh(f: Function, isa: ISA, x: Value) -> Value:
    """NumPy: tanh(x)."""
    return kernel_math.tanh(f, isa, x)
