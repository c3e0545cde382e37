"""Elementary functions on vectors, emitted as polynomials: exp2, log2, tanh.

Each is emitted beside its error: exp2 is within 1 ulp (0.83 measured) for normal results, +0 below the
normal range, exact at integers, and keeps NaN whatever its payload.  They hold the guarantees that the
softmax leans on: exp2(0) == 1, exp2(-inf) == +0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

from flashtile.kernels.cpu.ir import Function, Value, element
from flashtile.kernels.cpu.isa import ISA


@dataclass(frozen=True)
class _Format:
    """What exp2 and log2 need to know of a floating-point format."""

    integer: str
    mantissa: int
    bias: int
    degree: int  # of the exp2 polynomial: the least whose error vanishes in the rounding


_FORMATS = {"float": _Format("i32", 23, 127, 6), "double": _Format("i64", 52, 1023, 11)}


@functools.cache
def exp2_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients, constant first, of p(f) = 1 + f q(f) ~ 2^f on [-1/2, 1/2].

    q interpolates (2^f - 1) / f at Chebyshev nodes, in 60-digit arithmetic; p(0) = 1 exactly.
    """
    with localcontext() as context:
        context.prec = 60
        ln2 = Decimal(2).ln()
        nodes = [Decimal(0.5 * math.cos(math.pi * (i + 0.5) / degree)) for i in range(degree)]
        divided = [((x * ln2).exp() - 1) / x if abs(x) > Decimal("1e-12") else ln2 for x in nodes]
        for j in range(1, degree):
            for i in range(degree - 1, j - 1, -1):
                divided[i] = (divided[i] - divided[i - 1]) / (nodes[i] - nodes[i - j])
        q = [divided[-1]]
        for i in range(degree - 2, -1, -1):  # q <- q (f - node) + divided difference
            q = [divided[i] - nodes[i] * q[0]] + [
                q[k - 1] - (nodes[i] * q[k] if k < len(q) else 0) for k in range(1, len(q) + 1)
            ]
    return (1.0, *map(float, q))


def exp2(f: Function, isa: ISA, x: Value, *, degree: int | None = None, nonpositive: bool = False) -> Value:
    """2^x lane by lane.  x = n + r with n the nearest integer: 2^n is made of exponent bits, 2^r is a polynomial.

    n is found by adding a number so large that the fraction falls off the mantissa; its low bits then hold
    n + bias, which a shift moves into the exponent field.  Multiplying by 2^n, rather than adding to the
    exponent, keeps every NaN a NaN.  From 2^bias on the result is inf; ``nonpositive`` leaves that test out.
    """
    form = _FORMATS[element(x.type)]
    magic = 1.5 * 2.0**form.mantissa + form.bias
    x = f.maximum(f.const(x.type, -float(form.bias)), x)  # 2^-bias is +0 below; operand order keeps NaN
    if not nonpositive:
        x = f.minimum(f.const(x.type, form.bias + 1.0), x)
    shifted = x + magic
    fraction = x - (shifted - magic)
    *lower, top = exp2_coefficients(degree or form.degree)
    poly = f.const(x.type, top)
    for c in reversed(lower):
        poly = isa.multiply_add(f, poly, fraction, f.const(x.type, c))
    power = f.bitcast(f.bitcast(shifted, form.integer) << form.mantissa, element(x.type))
    return poly * power


def log2(f: Function, isa: ISA, x: Value) -> Value:
    """log2 of positive normal x: the exponent as a guess, then Halley steps on exp2 (once a row, so plain).

    Each step cubes the error: three from 0.043 reach the last bit of either format.
    """
    form = _FORMATS[element(x.type)]
    bits = f.cast("sitofp", f.bitcast(x, form.integer), x.type)
    y = bits * 2.0**-form.mantissa - (form.bias - 0.043)
    for _ in range(3):
        r = x * exp2(f, isa, 0.0 - y)
        y = y + (r - 1.0) / (r + 1.0) * (2 / math.log(2))
    return y


def tanh(f: Function, isa: ISA, x: Value) -> Value:
    """tanh x = (e - 1) / (e + 1), e = exp(2x); near 0, where that cancels, an odd polynomial.

    NaN stays NaN; beyond +-20 the result is +-1 to the last bit.
    """
    bounded = f.select(x.isnan(), x, f.clamp(x, -20.0, 20.0))
    e = exp2(f, isa, bounded * (2 / math.log(2)))
    far = (e - 1.0) / (e + 1.0)
    square = bounded * bounded
    series = f.const(x.type, _TANH_SERIES[-1])
    for c in _TANH_SERIES[-2::-1]:
        series = isa.multiply_add(f, series, square, f.const(x.type, c))
    near = bounded * series
    small = 0.05 if element(x.type) == "double" else 0.25
    return f.select(square < small * small, near, far)


# Taylor coefficients of tanh(x) / x in x^2; the next term is below half an ulp on the ranges used.
_TANH_SERIES = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875)
