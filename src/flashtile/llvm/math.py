"""Elementary functions on vectors, emitted as polynomials: exp2, log2, tanh.

Each is emitted beside its error, in ulp of the exact result, which the tests measure on every instruction set; the
larger number is for machines without a fused multiply-add.  All keep NaN, whatever its payload.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.machines import ISA
from flashtile.llvm.types import SIZES, element, like


@dataclass(frozen=True)
class _Format:
    """What exp2 and log2 need to know of a floating-point format."""

    integer: str
    mantissa: int
    bias: int
    degree: int  # of the exp2 polynomial: the least whose error vanishes in the rounding
    table_bits: int  # log2 of the lanes of 64 bytes: a table of as many powers leaves 1 / lanes to the polynomial
    table_degree: int  # which then needs no more than this
    negligible: float  # exponent of weights that are taken for 0


_FORMATS = {
    "float": _Format("i32", 23, 127, 6, 4, 3, -100.0),
    "double": _Format("i64", 52, 1023, 11, 3, 8, -960.0),
}


@functools.cache
def exp2_coefficients(degree: int, width: int = 1) -> tuple[float, ...]:
    """Coefficients, constant first, of p(f) = 1 + f q(f) ~ 2^f on [-1/2, 1/2] / width.

    q interpolates (2^f - 1) / f at Chebyshev nodes, in 60-digit arithmetic; p(0) = 1 exactly.
    """
    with localcontext() as context:
        context.prec = 60
        ln2 = Decimal(2).ln()
        nodes = [Decimal(0.5 / width * math.cos(math.pi * (i + 0.5) / degree)) for i in range(degree)]
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


def exp2(f: Function, isa: ISA, x: Value) -> Value:
    """2^x lane by lane, within 1 ulp (1.2), exact at integers; +0 where the result is not normal, inf from 2^bias on.

    x = n + r with n the nearest integer: 2^n is made of exponent bits, 2^r is a polynomial.
    """
    form = _FORMATS[element(x.type)]
    x = f.maximum(f.const(x.type, -float(form.bias)), x)  # 2^-bias is +0 below; operand order keeps NaN
    # 2^n is inf at n = bias + 1, where 2^x need not be: take the half, of which 2^n is finite.
    x = f.minimum(f.const(x.type, form.bias + 1.0), x)
    above = x > 1.0
    doubled = f.select(above, f.const(x.type, 2.0), 1.0)
    return _exp2(f, isa, x - f.select(above, f.const(x.type, 1.0), 0.0), form.degree) * doubled


def weight(f: Function, isa: ISA, x: Value, *, coarse: bool = False) -> Value:
    """2^x for x <= 0, as a softmax needs it: 1 at 0, +0 at -inf, NaN at NaN, otherwise within 1 ulp (1.2), exact at
    integers; ``coarse`` within 2^-17 and exact at 0, for weights that are then rounded to bf16.

    Weights below 2^-100 (2^-960 in fp64) are 0.  Beside the row's largest, which is 1, they are nothing; but a
    sum of products with them can fall into the subnormal range, where some machines take a hundred times as long.
    """
    if coarse and isa.scales and x.type == isa.vector_of("float"):
        return _adapted_weight(f, isa, x + _BEHIND)
    form = _FORMATS[element(x.type)]
    tiny = x < form.negligible
    if isa.permutes:
        value = _exp2_by_table(f, isa, x, 2 if coarse else form.table_degree)
    else:
        value = _exp2(f, isa, x, 4 if coarse else form.degree)
    return f.select(tiny, f.const(x.type, 0.0), value)


def weight_of(f: Function, isa: ISA, difference: Value, high: Value, low: Value, *, coarse: bool = False) -> Value:
    """The weight of a score by its difference to the maximum, times high + low (params.split_scale).

    The difference comes first, so that the largest weight is exactly 1. Without ``low`` a weight of 2^-100 is off by
    2^-17, which a ``coarse`` one may be: left out where what surrounds it is as cheap as that.
    """
    if coarse and isa.scales:
        return _adapted_weight(f, isa, isa.multiply_add(f, difference, high, f.const(difference.type, _BEHIND)))
    return weight(f, isa, isa.multiply_add(f, difference, high, difference * low), coarse=coarse)


# 2^(r - 0.799), 0 <= r < 1, is 2^-7 ((y + r + c) y + d) with y = (r + a) r + b, within 2^-18.4. So far behind a whole
# number the leading coefficient of the best quartic is a power of 2, and needs no multiplication; of such a, b, c and d
# these give 128 at r = 0.799, in fp32 to the last bit.
_BEHIND = -6.201000213623047
_ADAPTED = 1.4091695547103882, 30.729665756225586, -47.087528228759766, 576.2395629882812


def _adapted_weight(f: Function, isa: ISA, x: Value) -> Value:
    """The coarse weight 2^(x - _BEHIND), on machines that scale.

    Beside matrix registers their multiplications, maxima and these two instructions have one port, additions two; so a
    quartic of 2 multiplications and 3 additions stands here for one of 4 multiplications.
    Source: Knuth, The Art of Computer Programming 2, section 4.6.4, on adapted coefficients.
    """
    a, b, c, d = (f.const(x.type, number) for number in _ADAPTED)
    r = isa.fraction(f, x)
    y = isa.multiply_add(f, r + a, r, b)
    value = isa.scale(f, isa.multiply_add(f, (y + r) + c, y, d), x)
    return f.select(x < _FORMATS["float"].negligible + _BEHIND, f.const(x.type, 0.0), value)


def exp_of_difference(f: Function, isa: ISA, a: Value, b: Value, part: float = 1.0) -> Value:
    """e^(part (a - b)) for a <= b within 2 ulp where it is normal, +0 below, exactly 1 at 0; NaN stays NaN.

    part is a power of two. x = n ln 2 + r: the rounding of a difference x, or of x / ln 2, as in the weights of
    scores, would cost |x| units in the last place. There the scores that matter are near the maximum; a sink may be
    far above it, and every key of the row would share the error.
    Source:  Knuth, The Art of Computer Programming 2, section 4.2.2, for what the difference's rounding leaves.
    """
    form, (high, low) = _FORMATS[element(a.type)], _LN2[element(a.type)]
    per_octave = 1 / math.log(2)
    difference = a - b
    back = difference - a
    rest = (a - (difference - back)) - (b + back)
    x = difference * part
    lowest = f.const(a.type, -form.bias * math.log(2))  # of numbers that are normal, and an octave
    rest = f.select(x > lowest, rest * part, f.const(a.type, 0.0))  # of -inf it would be NaN
    bounded = f.maximum(lowest, x)  # -inf is a weight of 0; the order keeps NaN
    magic = 1.5 * 2.0**form.mantissa  # so large that the fraction falls off
    whole = (bounded * per_octave + magic) - magic
    r = (bounded - whole * high) - whole * low + rest
    return exp2(f, isa, r * per_octave) * exp2(f, isa, whole)


def _exp2(f: Function, isa: ISA, x: Value, degree: int) -> Value:
    """2^x where 2^n, n the integer nearest to x, is normal or 0; unspecified elsewhere, but NaN at NaN."""
    whole, power = _nearest(f, x)
    return _polynomial(f, isa, exp2_coefficients(degree), x - whole) * power


def _exp2_by_table(f: Function, isa: ISA, x: Value, degree: int) -> Value:
    """2^x where it is well within the normal range; unspecified elsewhere, but NaN at NaN.

    x = n + j / size + r: a register holds 2^(j / size), and what is left to the polynomial is so small that half of
    its terms do.  These are what a kernel spends beside its two products.
    Source:  Tang 1989, Table-driven implementation of the exponential function in IEEE floating-point arithmetic.
    """
    form, integers = _FORMATS[element(x.type)], like(x.type, _FORMATS[element(x.type)].integer)
    size = 1 << form.table_bits
    magic = 1.5 * 2.0 ** (form.mantissa - form.table_bits)
    shifted = x + magic  # its low bits are n size + j
    r = x - (shifted - magic)
    low = f.bitcast(shifted, form.integer)
    # Shifted to the exponent, n size + j leaves j in the mantissa: the table is less by as much.
    up = form.mantissa - form.table_bits
    table = f.integers(integers, (_bits(2.0 ** (j / size), element(x.type)) - (j << up) for j in range(size)))
    power = f.bitcast(isa.look_up(f, table, low) + (low << up), element(x.type))
    _, *rest = exp2_coefficients(degree, size)
    return isa.multiply_add(f, power, _polynomial(f, isa, rest, r) * r, power)


def _bits(number: float, type_: str) -> int:
    """A number's bits in a floating-point format, as an integer."""
    real, integer = ("f", "i") if type_ == "float" else ("d", "q")
    return int(struct.unpack(integer, struct.pack(real, number))[0])


def _nearest(f: Function, x: Value, more: int = 0) -> tuple[Value, Value]:
    """(n, 2^(n + more)) with n the integer nearest to x, -bias <= n + more <= bias.

    n is found by adding a number so large that the fraction falls off the mantissa; its low bits then hold
    n + more + bias, which a shift moves into the exponent field.
    """
    form = _FORMATS[element(x.type)]
    magic = 1.5 * 2.0**form.mantissa + form.bias + more
    shifted = x + magic
    return shifted - magic, f.bitcast(f.bitcast(shifted, form.integer) << form.mantissa, element(x.type))


def _polynomial(f: Function, isa: ISA, coefficients: Sequence[float], x: Value) -> Value:
    """Horner's rule, constant first."""
    *lower, top = coefficients
    value = f.const(x.type, top)
    for c in reversed(lower):
        value = isa.multiply_add(f, value, x, f.const(x.type, c))
    return value


def log2(f: Function, isa: ISA, x: Value) -> Value:
    """log2 of normal x below 2^(bias - 1), within 2 epsilon of 1 or of the result if larger; exact at powers of two.

    The bits of x, read as an integer, are a piecewise linear guess, exact at powers of two.  Halley steps on exp2
    (once a row, so plain) each cube the error: three from 0.086 reach the last bit of either format.
    """
    form = _FORMATS[element(x.type)]
    bits = f.cast("sitofp", f.bitcast(x, form.integer), x.type)
    y = bits * 2.0**-form.mantissa - form.bias
    for _ in range(3):
        r = x * exp2(f, isa, 0.0 - y)
        y = y + (r - 1.0) / (r + 1.0) * (2 / math.log(2))
    return y


def tanh(f: Function, isa: ISA, x: Value) -> Value:
    """tanh x = h / (h + 1) with h = (exp(2x) - 1) / 2, within 3 ulp; odd to the last bit.

    2x = n ln 2 + r, so h is (exp(r) - 1) 2^(n - 1) + (2^(n - 1) - 1/2); the polynomial for exp(r) - 1 has no constant
    term left to cancel, so small x need no series of their own.  Beyond 20 the result is 1 to the last bit.
    """
    form = _FORMATS[element(x.type)]
    bits = f.bitcast(x, form.integer)
    sign_bit = -(1 << (8 * SIZES[form.integer] - 1))
    magnitude = f.bitcast(bits & (-1 - sign_bit), element(x.type))
    magnitude = f.minimum(f.const(x.type, 20.0), magnitude)  # operand order keeps NaN
    doubled = magnitude + magnitude
    whole, half_power = _nearest(f, doubled * (1 / math.log(2)), -1)
    if isa.fused:  # n is small and what its product loses of ln 2 is nothing where n is not
        r = isa.multiply_add(f, whole, f.const(x.type, -math.log(2)), doubled)
    else:
        high, low = _LN2[element(x.type)]
        r = (doubled - whole * high) - whole * low
    # exp(r) - 1 = r + r^2 q(r): a power of ln 2 scales the first coefficient of exp2 to 1.
    _, _, *rest = (c / math.log(2) ** k for k, c in enumerate(exp2_coefficients(form.degree)))
    grown = isa.multiply_add(f, _polynomial(f, isa, rest, r), r * r, r)
    h = isa.multiply_add(f, grown, half_power, half_power - 0.5)
    result = isa.divide(f, h, h + 1.0)
    return f.bitcast(f.bitcast(result, form.integer) | (bits & sign_bit), element(x.type))


# ln 2 in two parts: the first has so few bits that whole multiples of it, up to 2^6, are exact.
_LN2 = {
    "float": (0.693145751953125, 1.42860682030941723212e-6),
    "double": (0.69314718036912381649, 1.90821492927058770002e-10),
}
