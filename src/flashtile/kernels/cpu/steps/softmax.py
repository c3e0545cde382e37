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
# Octaves by which scores may rise above a row's maximum before it is raised, on tiles that add to their sums.
RISE = 16.0


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
    f = Routine(module, f"softmax_{width}", **softmax_kinds(c), count="i64", reach="i64", factors=Factors.of(c))
    state, tops, alpha, scores, lines, reach, factors = f.parameters
    steps = Softmax(f, c, state, tops, alpha, scores, factors)
    with f.range(0, width * c.register, c.register) as at:
        count = f.minimum(words_seen(f, c, reach + at // c.size, lines) * c.per_word, lines)
        safe = steps.begin(at)
        with f.range(0, count, SUM_LINES) as first:
            steps.weigh(safe, at, first, f.minimum(first + SUM_LINES, count))
        steps.end(at)
    f.ret()
    return f


def softmax_kinds(c: Config) -> dict[str, Any]:
    """What every function of the softmax takes first."""
    line = c.line
    return {"state": State.of(line), "tops": Lines.of(line), "alpha": Lines.of(line), "scores": Scores.of(line)}


class Softmax:
    """What the softmax does with one register of lanes, ``at`` so many bytes of a line."""

    def __init__(
        self, f: Function, c: Config, state: State, tops: Lines, alpha: Lines, scores: Scores, factors: Factors
    ) -> None:
        self.f, self.c, self.state, self.tops, self.alpha, self.scores = f, c, state, tops, alpha, scores
        self.weight = factors.weights(c)
        self.high = factors.high

    def begin(self, at: Value) -> Value:
        """The new maximum, or where there is none 0, and what older sums are to be multiplied by.

        On tiles that add to their sums a maximum stays where a block rises above it by no more than RISE octaves:
        weights are then larger than 1, the sums seldom need a pass of their own to be multiplied by alpha, and most
        blocks are weighed without looking for a maximum (`go_on`).
        """
        f, c = self.f, self.c
        old = self.state.load(0, at=at)
        new = f.maximum(self.tops.load(0, at=at), old)
        if c.tiles_add:  # where nothing was seen before, or what was is infinite, rise is infinite or NaN
            rise = (new - old) * f.splat(self.high, c.lanes)
            new = f.select(rise <= RISE, old, new)
        safe = self.bounded(new)
        self.state.store(new, 0, at=at)
        self.alpha.store(self.weight(old - safe), 0, at=at)  # to the last bit: it multiplies all sums
        # In memory: one more value in registers is one too many for 16.
        self.tops.store(f.const(c.vector, 0.0), 0, at=at)
        return safe

    def go_on(self, at: Value) -> None:
        """As `begin` where lanes have seen a key, if no score rises beyond RISE. `exceeded` says whether one does."""
        f, c = self.f, self.c
        self.alpha.store(f.const(c.vector, 1.0), 0, at=at)
        self.tops.store(f.const(c.vector, 0.0), 0, at=at)

    def exceeded(self, at: Value) -> Value:
        """Which lanes of a block may hold such a score, by the sum of their weights: half of its weight is the bound,
        since weights are not exact."""
        total = self.tops.load(0, at=at)
        return (total >= 2.0 ** (RISE - 1)) | total.isnan()

    def bounded(self, top: Value) -> Value:
        """A lane that has seen nothing yet has maximum -inf; 0 in its place keeps -inf - max from being NaN."""
        return self.f.select(top.eq(-math.inf), self.f.const(self.c.vector, 0.0), top)

    def maximum(self, at: Value) -> Value:
        """What `begin` found."""
        return self.bounded(self.state.load(0, at=at))

    def weigh(self, safe: Value, at: Value, first: Value, stop: Value) -> None:
        """The lines [first, stop)."""
        f, c = self.f, self.c

        def one_word(first: Value, carry: list[Value]) -> list[Value]:
            return [self._word(safe, at, first, carry[0])]

        (part,) = f.fold(first, stop, c.per_word, [f.const(c.vector, 0.0)], one_word)
        self.tops.store(self.tops.load(0, at=at) + part, 0, at=at)

    def weigh_word(self, safe: list[Value], line: Value, begun: Lines) -> None:
        """The lines of one word in every register, where `weigh` is cut further. ``begun``: the sums of those among its
        SUM_LINES that were weighed before, zeros before the first."""
        f, c = self.f, self.c
        places = [f.const("i64", j * c.register) for j in range(len(safe))]
        sums = [self._word(top, at, line, begun.load(0, at=at)) for top, at in zip(safe, places, strict=True)]
        for at, part in zip(places, sums, strict=True):
            begun.store(part, 0, at=at)
        with f.when(((line + c.per_word) & (SUM_LINES - 1)).eq(0)):
            for at, part in zip(places, sums, strict=True):
                self.tops.store(self.tops.load(0, at=at) + part, 0, at=at)
                begun.store(f.const(c.vector, 0.0), 0, at=at)

    def _word(self, safe: Value, at: Value, first: Value, before: Value) -> Value:
        """The weights of the lines of a word, and their sum after what was summed before."""
        f, c = self.f, self.c
        differences = [self.scores.load(first + u, at=at) - safe for u in range(c.per_word)]
        weights = [self.weight(x, coarse=c.product.coarse) for x in differences]
        place = self.scores.at + (first * (c.line.bytes // c.per_word) + at)
        for n, word in enumerate(c.product.split(f, c.isa, weights, cut=True)):
            f.store(word, place + n * c.weights_part, align=c.register)
        return sum(weights, before)

    def end(self, at: Value) -> None:
        f, c, state, tops = self.f, self.c, self.state, self.tops
        before, rescale, block = state.load(1, at=at), self.alpha.load(0, at=at), tops.load(0, at=at)
        state.store(c.isa.multiply_add(f, before, rescale, block), 1, at=at)
        tops.store(f.const(c.vector, -math.inf), 0, at=at)
