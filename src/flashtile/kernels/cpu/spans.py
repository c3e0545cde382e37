"""Sums in two levels: what a span of keys adds to a panel is formed apart, then joins the sums of earlier spans.

One key block after another is a chain of roundings as long as there are blocks; at 10^5 keys it would cost more
accuracy than all else. In two levels no chain is longer than the blocks of a span or the number of spans.

Source: Castaldo, Whaley, Chronopoulos 2008, Reducing floating point error in dot product using the superblock family.
"""

from __future__ import annotations

import math

from flashtile.kernels.cpu import math as vmath
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.ir import Function, Module, Value

BLOCKS = 32  # key blocks of a span


def emit_join_span(module: Module, c: Config) -> str:
    """A function that moves the sums of a panel's span into its sums of earlier spans; its name.

    Arguments: state of the span (maximum, sum) and its outputs, state and outputs of earlier spans, value columns,
    c_high, c_low. The span's maximum, which is not below the earlier one, becomes that of both; its sums become 0.
    """
    f = Function(module, "join_span", "void", ["ptr", "ptr", "ptr", "ptr", "i64", c.acc, c.acc], internal=True,
                 names=["state", "o", "earlier_state", "earlier_o", "columns", "high", "low"])  # fmt: skip
    state, o, earlier_state, earlier_o, columns, high, low = f.args
    zero = f.const(c.vector, 0.0)
    with f.range(0, c.line, c.register) as at:
        before, now = (f.load(c.vector, x + at, align=c.register) for x in (earlier_state, state))
        # A row that has seen no key yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
        difference = before - f.select(now.eq(-math.inf), zero, now)
        scaled = c.isa.multiply_add(f, difference, f.splat(high, c.lanes), difference * f.splat(low, c.lanes))
        factor = vmath.weight(f, c.isa, scaled)
        f.store(now, earlier_state + at, align=c.register)

        def join(to: Value, source: Value) -> None:
            sums, added = (f.load(c.vector, x + at, align=c.register) for x in (to, source))
            f.store(c.isa.multiply_add(f, sums, factor, added), to + at, align=c.register)
            f.store(zero, source + at, align=c.register)

        join(earlier_state + c.line, state + c.line)
        with f.range(0, columns * c.line, c.line) as column:
            join(earlier_o + column, o + column)
    f.ret()
    return f.name
