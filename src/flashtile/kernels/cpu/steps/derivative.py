"""The score program of a backward pass: from raw products to weights, and from dP to the gradient of the raw scores.

One pass over the lines of a block, in place of program.py and differentiate.py: the score and its derivatives share
what they have in common, a tanh or a distance, and a raw score, which the program overwrites, is looked at once. Where
products land in memory scores are always raw, and this is the pass, program or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.readings import Reading
from flashtile.kernels.cpu.scratch import Work
from flashtile.kernels.cpu.steps.arrays import ArraySums, Given
from flashtile.kernels.cpu.steps.band import Band
from flashtile.kernels.cpu.steps.differentiate import RowState, Weighing, store_line, store_pair
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.kernels.cpu.steps.program import Elements, Identity
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Scores, Weights
from flashtile.llvm.routines import Routine


def emit_derivative(module: Module, c: Config, width: int, reads: Sequence[Reading], *, edge: bool) -> Routine:
    """The rows [first, last) of a panel, counted from the block; row ``origin`` stands on the first line, and whole
    words of rows follow it. ``work.scores`` become weights, ``slopes``, which are dP, become dS of the raw scores,
    stored as differentiate.py does; ``reads`` get theirs (arrays.py). An ``edge`` pass hides what the mask hides, or
    where the program has none the band. What is hidden is 0 by selection: what it was computed from may be anything.
    Tiles have lines of their own for weights and dS: ``held_weights``, ``held_slopes``.
    """
    kinds: dict[str, Any] = {
        "work": Work.of(c),
        "slopes": Scores.of(c.line),
        "words": Weights.of(c.word_line),
        "state": RowState.of(c.line),
        **dict.fromkeys(("first", "last", "origin"), "i64"),
        "band": Band.kind(),
        "factors": Factors.of(c),
    }
    if c.lands_in_memory:
        kinds |= dict.fromkeys(("held_weights", "held_slopes"), Scores.of(c.weight_line))
    f = Routine(module, f"derivative_{width}_{'edge' if edge else 'full'}", **kinds)
    _Derivative(f, c, width, reads, edge).emit()
    f.ret()
    return f


class _Element(NamedTuple):
    """What becomes of one register of a row's scores."""

    weight: Value
    slope: Value
    given: list[Given]


class _Derivative:
    """Emits the pass."""

    def __init__(self, f: Routine, c: Config, width: int, reads: Sequence[Reading], edge: bool) -> None:
        self.f, self.c, self.width, self.edge = f, c, width, edge
        self.slope = c.code.score_derivative if c.code else None
        self.work, self.slopes, self.words, state, self.first, self.last, self.origin, *others = f.parameters
        self.band, factors, *self.held = others
        frame = Frame(self.work.frame)
        also = [self.slope, *(x for read in reads for x in (read.gradient.value, *read.gradient.index))]
        self.program: Any = Identity(c)
        if c.code:
            known = [x for x in also if x is not None]
            self.program = Elements(f, c, frame, width, masked=edge and c.masked, also=known)
        self.arrays = ArraySums(f, c, reads, frame, self.program.outer if c.code else None)
        self.weighings = [Weighing(f, c, state, factors, j * c.register) for j in range(width)]

    def emit(self) -> None:
        carry = self.f.fold(self.first, self.last, self.c.per_word, self.arrays.start(self.width), self._word)
        self.arrays.finish(carry, self.width, self.first, self.last, self.origin)

    def _word(self, row: Value, carry: list[Value]) -> list[Value]:
        """As many rows as a word holds."""
        f, c, k = self.f, self.c, self.c.per_word
        rows: list[list[_Element]] = []
        for u in range(k):
            carry = self._row(row, u, rows, carry)
        line = row - self.origin
        if c.lands_in_memory:
            weights, slopes = self.held
            store_pair(f, c, [[x.weight for x in elements] for elements in rows], weights, line)
            pairs = store_pair(f, c, [[x.slope for x in elements] for elements in rows], slopes, line)
            for part, of_part in enumerate(pairs):
                for j, words in enumerate(of_part):
                    self.words.store(words, line // k, j, at=part * c.pairs_part)
            return carry
        for j in range(self.width):
            at = f.const("i64", j * c.register)
            store_line(f, c, [elements[j].weight for elements in rows], self.work.scores, line, at // k)
            joined = store_line(f, c, [elements[j].slope for elements in rows], self.slopes, line, at // k)
            if k > 1:
                self.words.store(joined, line // k, j)
        return carry

    def _row(self, first: Value, u: int, rows: list[list[_Element]], carry: list[Value]) -> list[Value]:
        """One row's elements, put to the others. Past the last row another one stands in, and is hidden."""
        f, c = self.f, self.c
        whole = c.lands_in_memory and not self.edge  # a stretch of tiles ends with a whole word
        exists = first + u < self.last if u and not whole else None
        row = first + u if exists is None else f.select(exists, first + u, first)
        place, line = self.program.row(row), (row - self.origin) * c.line.bytes

        def one_register(j: int) -> _Element:
            raw, slope = (x.load(0, j, at=line) for x in (self.work.scores, self.slopes))
            element = self.program.element(place, j, raw, line)
            score, hidden = self.program.score_of(element), f.const(c.vector, -math.inf)
            if self.edge:
                score = f.select(self.program.sees(element, self.band, j, row), score, hidden)
            if exists is not None:
                score = f.select(exists, score, hidden)
            weight, ds, seen = self.weighings[j](score, slope)
            given = self.arrays.given(element, ds, seen)
            if self.slope is not None:
                # A slope of 0 comes from a selection or a saturated cap: the score does not depend on q and k there.
                factor = element.vector(self.slope)
                ds = f.select(seen & factor.ne(0.0), ds * factor, f.const(c.vector, 0.0))
            return _Element(weight, ds, given)

        rows.append(f.abreast(self.width, one_register))
        return self.arrays.row(place, first + u - self.origin, [x.given for x in rows[-1]], carry)
