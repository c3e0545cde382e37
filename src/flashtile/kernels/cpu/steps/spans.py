"""Sums in two levels: what a span of blocks adds to a panel is accumulated separately, then joins the sums of earlier
spans.

One block after another is a chain of roundings as long as there are blocks; at 10^5 keys it would cost more accuracy
than all else. In two levels no chain is longer than the blocks of a span, for spans join with compensation.

Source: Castaldo, Whaley, Chronopoulos 2008, Reducing floating point error in dot product using the superblock family.
"""

from __future__ import annotations

import math
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, State, Sums
from flashtile.llvm.routines import Routine

BLOCKS = 16  # blocks of a span
PANELS = 16  # panels of a span of the backward, whose sums of rows are apart from those of their block
LEVELS = ("", "earlier_", "lost_")  # of sums: the span at hand, earlier spans, what these have lost to rounding


def emit_join_span(module: Module, c: Config) -> Routine:
    """The sums of a panel's span move into its sums of earlier spans. The span's maximum, which is not below the
    earlier one, becomes that of both; its sums become 0."""
    kinds: dict[str, Any] = {
        f"{level}{name}": kind.of(c.line) for level in LEVELS for name, kind in (("state", State), ("sums", Sums))
    }
    f = Routine(module, "join_span", **kinds, columns="i64", factors=Factors.of(c))
    state, sums, earlier_state, earlier_sums, lost_state, lost_sums, columns, factors = f.parameters
    zero = f.const(c.vector, 0.0)
    with f.range(0, c.line.bytes, c.register) as at:
        before, now = (x.load(0, at=at) for x in (earlier_state, state))
        # A lane that has seen nothing yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
        difference = before - f.select(now.eq(-math.inf), zero, now)
        factor = factors.weights(c)(difference)
        earlier_state.store(now, 0, at=at)

        def join(*lines: Lines) -> None:
            """The sums of a span, in the first line, to the earlier ones in the second, whose loss is in the third."""
            added, total, lost = (line.load(0, at=at) for line in lines)
            for number, line in zip((zero, *add_sum(f, c, total, lost, factor, added)), lines, strict=True):
                line.store(number, 0, at=at)

        join(*(x.totals for x in (state, earlier_state, lost_state)))
        with f.range(0, columns * c.line.bytes, c.line.bytes) as column:
            join(*(x.moved(column) for x in (sums, earlier_sums, lost_sums)))
    f.ret()
    return f


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
