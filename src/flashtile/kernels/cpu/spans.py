"""Sums in two levels: what a span of keys adds to a panel is formed apart, then joins the sums of earlier spans.

One key block after another is a chain of roundings as long as there are blocks; at 10^5 keys it would cost more
accuracy than all else. In two levels no chain is longer than the blocks of a span, for spans join with compensation.

Source: Castaldo, Whaley, Chronopoulos 2008, Reducing floating point error in dot product using the superblock family.
"""

from __future__ import annotations

import math

from flashtile.kernels.cpu.config import Config
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value

BLOCKS = 16  # key blocks of a span


def emit_join_span(module: Module, c: Config) -> str:
    """A function that moves the sums of a panel's span into its sums of earlier spans; its name.

    Arguments: state (maximum, sum) and outputs of the span, of earlier spans, and what those have lost to rounding;
    value columns, c_high, c_low. The span's maximum, which is not below the earlier one, becomes that of both; its sums
    become 0.
    """
    f = Function(module, "join_span", "void", ["ptr"] * 6 + ["i64", c.acc, c.acc], internal=True,
                 names=["state", "o", "earlier_state", "earlier_o", "lost_state", "lost_o", "columns", "high", "low"],
                 )  # fmt: skip
    state, o, earlier_state, earlier_o, lost_state, lost_o, columns, high, low = f.args
    zero = f.const(c.vector, 0.0)
    with f.range(0, c.line, c.register) as at:
        before, now = (f.load(c.vector, x + at, align=c.register) for x in (earlier_state, state))
        # A row that has seen no key yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
        difference = before - f.select(now.eq(-math.inf), zero, now)
        factor = vmath.weight_of(f, c.isa, difference, *(f.splat(x, c.lanes) for x in (high, low)))
        f.store(now, earlier_state + at, align=c.register)

        def join(*places: Value) -> None:
            """The sums of a span, at the first place, to the earlier ones at the second, whose loss is at the third."""
            added, sums, lost = (f.load(c.vector, place + at, align=c.register) for place in places)
            for number, place in zip((zero, *add_sum(f, c, sums, lost, factor, added)), places, strict=True):
                f.store(number, place + at, align=c.register)

        join(*(x + c.line for x in (state, earlier_state, lost_state)))
        with f.range(0, columns * c.line, c.line) as column:
            join(*(x + column for x in (o, earlier_o, lost_o)))
    f.ret()
    return f.name


def add_sum(f: Function, c: Config, before: Value, lost: Value, alpha: Value, added: Value) -> tuple[Value, Value]:
    """A sum times alpha with one more number, and what it has lost to rounding.

    Many light numbers beside a heavy one would all be rounded to the heavy one's last bit, in the same direction if
    they are alike: a thousand of them lose a thousand roundings. Here they lose one.
    Source: Kahan 1965, Further remarks on reducing truncation errors.
    """
    before, added = before * alpha, c.isa.multiply_add(f, lost, alpha, added)
    total = before + added
    lost = added - (total - before)
    return total, f.select(lost.isnan(), f.const(lost.type, 0.0), lost)  # an infinite sum has lost nothing
