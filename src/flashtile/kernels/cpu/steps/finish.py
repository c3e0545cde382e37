"""The end of a panel: sums divided by the sum of weights and transposed back, lse in nats; and the way in of what
such a panel left off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.pack import write
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Rows, State, Sums
from flashtile.llvm.routines import Routine


def emit_load_state(module: Module, c: Config) -> Routine:
    """A carried lse becomes the softmax state of a panel. The carried output is normalised, so its sum of weights is
    1 at a maximum of lse; no key yet: -inf and 0. ``nats`` is the factor from raw scores to nats."""
    f = Routine(module, "load_state", state=State.of(c.line), lse="ptr", count="i64", nats=c.acc)
    state, lse, count, nats = f.parameters
    with f.range(0, count) as lane:
        value = f.load(c.acc, lse + lane * c.size, align=1)
        total = f.select(value.eq(-math.inf), f.const(c.acc, 0.0), f.const(c.acc, 1.0))
        f.store(value / nats, state.at + lane * c.size)
        f.store(total, state.at + (c.line.bytes + lane * c.size))
    f.ret()
    return f


def emit_finish(module: Module, c: Config) -> Routine:
    """A panel's normalised outputs as rows, and its lse where it is not null. ``sink`` is a logit that joins the sum of
    weights only; -inf: none. ``share`` of the weights is what dropout keeps, on average; 1: all."""
    kinds: dict[str, Any] = {"sums": Sums.of(c.line), "state": State.of(c.line), "out": Rows.kind()}
    f = Routine(module, "finish", **kinds, lse="ptr", nats=c.acc, sink=c.acc, share=c.acc)
    sums, state, out, lse, nats, sink, share = f.parameters
    _reciprocal_and_lse(f, c, sums, out.size, state, nats, sink, share)  # state now holds what divides, then lse
    n = c.lanes
    # Squares of lanes x lanes go through registers; the columns that are left over go one by one.
    whole_columns = f.select(out.adjacent(c.element), out.size // n * n, f.const("i64", 0))
    with f.range(0, out.count, n) as lane:
        factor = state.lane(lane).load(0)
        with f.range(0, whole_columns, n) as column:
            corner = sums.moved(column * c.line.bytes + lane * c.size)
            square = [corner.load(t) * factor for t in range(n)]
            target = out.at + (lane * out.stride + column * c.element)
            for r, row in enumerate(f.transpose(square)):
                with f.when(lane + r < out.count):
                    write(f, c, row, target + out.stride * r)
    with f.range(0, out.count) as lane:
        factor = f.load(c.acc, state.lane(lane).at)
        with f.range(whole_columns, out.size) as column:
            value = f.load(c.acc, sums.at + (column * c.line.bytes + lane * c.size)) * factor
            write(f, c, value, out.at + (lane * out.stride + column * out.step))
    with f.when(f.is_null(lse).eq(0)), f.range(0, out.count) as lane:
        f.store(f.load(c.acc, state.at + (c.line.bytes + lane * c.size)), lse + lane * c.size, align=1)
    f.ret()
    return f


@dataclass(frozen=True)
class Whole:
    """What divides a row's sums when all its keys and its sink are counted, lane by lane: they are multiplied by
    ``half``, then by ``inverse``. Its lse is reference + log(total).

    A sink above the maximum scales the row by its weight's reciprocal, which may be small beyond the format while the
    scaled outputs are not: one half of its exponent goes to the outputs, the other into the reciprocal. Without a sink
    ``half`` is 1.
    """

    half: Value
    inverse: Value
    total: Value
    reference: Value

    @classmethod
    def of(cls, f: Function, c: Config, top: Value, total: Value, sink: Value, share: Value | None = None) -> Whole:
        """From a row's maximum in nats, its sum of weights beside that, a sink, one for all lanes, -inf for none, and
        the share of the weights that dropout keeps.

        Without a sink the larger maximum is the row's own, its weight exp(0) is exactly 1, and nothing changes: both
        exponentials, which take longer than a short row's softmax, are left out. The sum compares unequal to 0 when it
        is NaN, so a poisoned row stays NaN.
        """
        there, sink = sink.ne(-math.inf), f.splat(sink, c.lanes)
        highest = f.maximum(sink, top)
        reference = f.select(highest.eq(-math.inf), f.const(c.vector, 0.0), highest)
        half = f.value_when(
            there, lambda: vmath.exp_of_difference(f, c.isa, top, reference, 0.5), f.const(c.vector, 1.0)
        )
        own = total

        def beside() -> Value:
            return c.isa.multiply_add(f, own * half, half, vmath.exp_of_difference(f, c.isa, sink, reference))

        total = f.value_when(there, beside, own)
        kept = total if share is None else total * share
        inverse = f.select(total.ne(0.0), half / kept, f.const(c.vector, 0.0))
        return cls(half, inverse, total, reference)

    def lse(self, f: Function, c: Config) -> Value:
        """-inf for a row that saw no key and has no sink."""
        seen = self.total.ne(0.0)
        log = vmath.log2(f, c.isa, f.select(seen, self.total, f.const(c.vector, 1.0))) * math.log(2)
        return f.select(seen, self.reference + log, f.const(c.vector, -math.inf))


def _reciprocal_and_lse(
    f: Function, c: Config, sums: Sums, columns: Value, state: State, nats: Value, sink: Value, share: Value
) -> None:
    """(maximum, sum) in place to (1 / (sum share), lse); a row that saw no key: (0, -inf), or (0, sink)."""
    shares = f.splat(share, c.lanes)
    with f.range(0, c.line.bytes, c.register) as at:
        top, total = state.load(0, at=at) * f.splat(nats, c.lanes), state.load(1, at=at)
        whole = Whole.of(f, c, top, total, sink, shares)
        with f.when(sink.ne(-math.inf)), f.range(0, columns) as column:
            sums.store(sums.load(column, at=at) * whole.half, column, at=at)
        state.store(whole.inverse, 0, at=at)
        state.store(whole.lse(f, c), 1, at=at)
