"""The online softmax of one panel: lines of scores to weights in place, and the factor for what was summed before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Scores, State
from flashtile.llvm.routines import Kind, Operand, Routine

# Weights accumulated separately before they join the lane's sum: a short chain of roundings, then another.
SUM_LINES = 16


@dataclass(frozen=True)
class Factors(Operand):
    """What differences of scores are multiplied by, high + low, to become exponents of 2 (block.split_scale)."""

    WORDS: ClassVar = {"high": "", "low": ""}
    high: Value
    low: Value

    @classmethod
    def of(cls, c: Config) -> Kind:
        return cls.kind({"high": c.acc, "low": c.acc})

    def weights(self, c: Config) -> Callable[..., Value]:
        """(difference to the maximum, coarse=False) -> weight, for registers; math.weight_of."""
        f = self.function
        high, low = (f.splat(x, c.lanes) for x in (self.high, self.low))
        return lambda difference, **how: vmath.weight_of(f, c.isa, difference, high, low, **how)


def words_seen(f: Function, c: Config, reach: Value, count: Value) -> Value:
    """The words that a register may see, of those that hold ``count`` lines: the first ``reach`` lines, if so many."""
    return (f.clamp(reach, 0, count) + (c.per_word - 1)) // c.per_word


def emit_softmax(module: Module, c: Config, width: int) -> Routine:
    """The softmax of one block. Block maxima are consumed (left at -inf), ``alpha`` is written; of ``count`` lines
    (whole words) the first register of lanes may see ``reach``, as in accumulate.py. Scores that may be seen become
    weights exp2((s - m) c); where a product's words hold several, they share a word, at as many fewer lines.

    One register of lanes at a time, one word a step: more at once do not fit 16 registers beside the polynomial, and
    the machine overlaps the steps by itself.
    """
    line = c.line
    kinds: dict[str, Any] = {
        "state": State.of(line),
        "tops": Lines.of(line),
        "alpha": Lines.of(line),
        "scores": Scores.of(line),
    }
    f = Routine(module, f"softmax_{width}", **kinds, count="i64", reach="i64", factors=Factors.of(c))
    state, tops, alpha, scores, lines, reach, factors = f.parameters
    weight = factors.weights(c)
    with f.range(0, width * c.register, c.register) as at:
        count = f.minimum(words_seen(f, c, reach + at // c.size, lines) * c.per_word, lines)
        old = state.load(0, at=at)
        new = f.maximum(tops.load(0, at=at), old)
        # A lane that has seen nothing yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
        safe = f.select(new.eq(-math.inf), f.const(c.vector, 0.0), new)
        state.store(new, 0, at=at)
        alpha.store(weight(old - safe), 0, at=at)  # to the last bit: it multiplies all sums

        def one_word(first: Value, carry: list[Value]) -> list[Value]:
            differences = [scores.load(first + u, at=at) - safe for u in range(c.per_word)]
            weights = [weight(x, coarse=c.product.coarse) for x in differences]
            place = scores.at + (first * (line.bytes // c.per_word) + at)
            for n, word in enumerate(c.product.split(f, c.isa, weights, cut=True)):
                f.store(word, place + n * c.weights_part, align=c.register)
            return [sum(weights, carry[0])]

        # In memory: one more value in registers is one too many for 16.
        tops.store(f.const(c.vector, 0.0), 0, at=at)
        with f.range(0, count, SUM_LINES) as first:
            stop = f.minimum(first + SUM_LINES, count)
            (part,) = f.fold(first, stop, c.per_word, [f.const(c.vector, 0.0)], one_word)
            tops.store(tops.load(0, at=at) + part, 0, at=at)
        before, rescale, block = state.load(1, at=at), alpha.load(0, at=at), tops.load(0, at=at)
        state.store(c.isa.multiply_add(f, before, rescale, block), 1, at=at)
        tops.store(f.const(c.vector, -math.inf), 0, at=at)
    f.ret()
    return f
