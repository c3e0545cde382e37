"""The end of a panel: outputs divided by the sum of weights and transposed back, lse in nats."""

from __future__ import annotations

import math

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.pack import write
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import SIZES, Function, Module, Value


def emit_load_state(module: Module, c: Config) -> str:
    """A function that turns a carried lse into the softmax state of a panel; its name.

    Arguments: state (out: maximum, sum), lse in memory, rows there are, factor from raw scores to nats.  The
    carried output is normalised, so its sum of weights is 1 at a maximum of lse; no key yet: -inf and 0.
    """
    f = Function(module, "load_state", "void", ["ptr", "ptr", "i64", c.acc], internal=True,
                 names=["state", "lse", "rows", "nats"])  # fmt: skip
    state, lse, rows, nats = f.args
    with f.range(0, rows) as lane:
        value = f.load(c.acc, lse + lane * c.size, align=1)
        total = f.select(value.eq(-math.inf), f.const(c.acc, 0.0), f.const(c.acc, 1.0))
        f.store(value / nats, state + lane * c.size)
        f.store(total, state + (c.line + lane * c.size))
    f.ret()
    return f.name


def emit_store_outputs(module: Module, c: Config) -> str:
    """A function that writes a panel's normalised outputs, row-major, and its lse; its name.

    Arguments: outputs (transposed, not normalised), state (maximum, sum), outputs in memory, bytes between rows,
    bytes between elements, rows there are, elements, lse in memory (or null), factor from raw scores to nats,
    sink (a logit that joins the sum only; -inf: none).
    """
    f = Function(module, "store_outputs", "void",
                 ["ptr", "ptr", "ptr", "i64", "i64", "i64", "i64", "ptr", c.acc, c.acc], internal=True,
                 names=["o", "state", "out", "stride", "step", "rows", "size", "lse", "nats", "sink"])  # fmt: skip
    o, state, out, stride, step, rows, size, lse, nats, sink = f.args
    _reciprocal_and_lse(f, c, o, size, state, nats, sink)  # state now holds what divides, then lse
    n = c.lanes
    # Squares of lanes x lanes go through registers; the columns that are left over go one by one.
    whole_columns = f.select(step.eq(SIZES[c.memory]), size // n * n, f.const("i64", 0))
    with f.range(0, rows, n) as lane:
        factor = f.load(c.vector, state + lane * c.size, align=c.register)
        with f.range(0, whole_columns, n) as column:
            corner = o + (column * c.line + lane * c.size)
            square = [f.load(c.vector, corner + t * c.line, align=c.register) * factor for t in range(n)]
            target = out + (lane * stride + column * SIZES[c.memory])
            for r, row in enumerate(f.transpose(square)):
                with f.when(lane + r < rows):
                    write(f, c, row, target + stride * r)
    with f.range(0, rows) as lane:
        factor = f.load(c.acc, state + lane * c.size)
        with f.range(whole_columns, size) as column:
            value = f.load(c.acc, o + (column * c.line + lane * c.size)) * factor
            write(f, c, value, out + (lane * stride + column * step))
    with f.when(f.is_null(lse).eq(0)), f.range(0, rows) as lane:
        f.store(f.load(c.acc, state + (c.line + lane * c.size)), lse + lane * c.size, align=1)
    f.ret()
    return f.name


def _reciprocal_and_lse(f: Function, c: Config, o: Value, size: Value, state: Value, nats: Value, sink: Value) -> None:
    """(maximum, sum) in place to (1 / sum, lse); a row that saw no key: (0, -inf), or (0, sink).

    The sum compares unequal to 0 when it is NaN, so a poisoned row stays NaN.  Without a sink the larger
    maximum is the row's own, its weight exp(0) is exactly 1, and nothing changes.

    A sink above the maximum scales the row by that weight, which may be small beyond the format while the scaled
    outputs are not: one half of its exponent goes to the outputs, the other into the reciprocal.
    """
    nothing, sinks = f.const(c.vector, -math.inf), f.splat(sink, c.lanes)

    with f.range(0, c.panel * c.size, c.register) as at:
        top = f.load(c.vector, state + at, align=c.register) * f.splat(nats, c.lanes)
        total = f.load(c.vector, state + (at + c.line), align=c.register)
        highest = f.maximum(sinks, top)
        reference = f.select(highest.eq(-math.inf), f.const(c.vector, 0.0), highest)
        half = _exp(f, c, top, reference, 0.5)
        total = c.isa.multiply_add(f, total * half, half, _exp(f, c, sinks, reference))
        seen = total.ne(0.0)
        inverse = f.select(seen, half / total, f.const(c.vector, 0.0))
        with f.when(sink.ne(-math.inf)), f.range(0, size) as column:
            place = o + (column * c.line + at)
            f.store(f.load(c.vector, place, align=c.register) * half, place, align=c.register)
        log = vmath.log2(f, c.isa, f.select(seen, total, f.const(c.vector, 1.0))) * math.log(2)
        f.store(inverse, state + at, align=c.register)
        f.store(f.select(seen, reference + log, nothing), state + (at + c.line), align=c.register)


# Of the accumulator's type: bits of its mantissa, exponent below which numbers are not normal, and ln 2 in two parts,
# of which the first has so few bits that its multiples down to that exponent are exact.
_FORMATS = {
    "float": (23, -126, 0.693145751953125, 1.42860682030941723212e-6),
    "double": (52, -1022, 0.69314718036912381649, 1.90821492927058770002e-10),
}


def _exp(f: Function, c: Config, a: Value, b: Value, part: float = 1.0) -> Value:
    """e^(part (a - b)) for a <= b within 2 ulp where it is normal, +0 below, exactly 1 at 0; NaN stays NaN.

    part is a power of two. x = n ln 2 + r: the rounding of a difference x, or of x / ln 2, as in the weights of
    scores, would cost |x| units in the last place. There the scores that matter are near the maximum; a sink may be
    far above it, and every key of the row would share the error.
    Source:  Knuth, The Art of Computer Programming 2, section 4.2.2, for what the difference's rounding leaves.
    """
    mantissa, least, high, low = _FORMATS[c.acc]
    per_octave = 1 / math.log(2)
    difference = a - b
    back = difference - a
    rest = (a - (difference - back)) - (b + back)
    x = difference * part
    lowest = f.const(c.vector, (least - 1) * math.log(2))
    rest = f.select(x > lowest, rest * part, f.const(c.vector, 0.0))  # of -inf it would be NaN
    bounded = f.maximum(lowest, x)  # -inf is a weight of 0; the order keeps NaN
    magic = 1.5 * 2.0**mantissa  # so large that the fraction falls off
    whole = (bounded * per_octave + magic) - magic
    r = (bounded - whole * high) - whole * low + rest
    return vmath.exp2(f, c.isa, r * per_octave) * vmath.exp2(f, c.isa, whole)
