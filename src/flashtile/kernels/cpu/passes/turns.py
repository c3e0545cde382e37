"""A block on matrix registers: products of some of its keys beside the weights of others, in turns.

A strip is as many keys as a tile of scores has:

    scores 0 | scores 1 beside weights 0 | scores 2 and values 0 beside weights 1 | ... | values n - 1

Each is a block of its own to the softmax, so all is as it would be if one followed the other; and so they do where
something seldom is to be looked after.

Maxima would come between, and products would wait for them. But a row's maximum need not be exact, and few blocks raise
it by more than RISE octaves: so once every lane has seen a key, weights are made without looking, and their sums tell
whether that was right. If not, the strip is done again, with maxima, and so are those after it. Which lanes then raise
theirs depends on each one's own scores: the others get the bits that they had.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.beside import (
    Share,
    emit_exceeded,
    emit_multiply_beside,
    emit_softmax_edge,
    emit_weigh,
    softmax_of,
)
from flashtile.kernels.cpu.steps.product import apart
from flashtile.kernels.cpu.steps.range import any_lane
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Lines, Scores, State, Weights, Words
from flashtile.llvm.routines import Routine


@dataclass
class _Strip:
    """What is seen of it, and where its scores and weights are: as far from the block's as its keys."""

    seen: Seen
    line: Value
    scores: Scores
    weights: Weights


class Turns:
    """Attends a full panel to strips of a block. ``steps``: of panel.py, which also has what is done to the scores of a
    strip, and to the sums before and after its values."""

    def __init__(self, module: Module, c: Config, width: int, steps: Any) -> None:
        self.c, self.steps = c, steps
        self.multiply = emit_multiply_beside(module, c, width, onto=False)
        self.add = emit_multiply_beside(module, c, width, onto=True)
        self.begin, self.go_on, self.end = (emit_softmax_edge(module, c, width, x) for x in ("begin", "go_on", "end"))
        self.weigh = emit_weigh(module, c, width)
        self.exceeded = emit_exceeded(module, c, width)

    def attend(self, f: Routine, v: SimpleNamespace, first: Value, last: Value, *, go_on: bool = False) -> Value:
        """To the strips [first, last), at least one. With ``go_on`` no maximum is looked for. Returns the first strip
        that is not done, of which, and of those after it, nothing is left."""
        steps, start, none = self.steps, self._strip(v, first), f.const("i64", 0)
        steps.scores.products(f, v.work, v.panel, v.rows, v.depth, start.seen, line=start.line)
        self._look(f, v, start, top=not go_on)

        def one(walk: list[Value]) -> list[Value]:
            k, _ = walk
            here, earlier, further = self._strip(v, k), k > first, k + 1 < last
            softmax = softmax_of(self.c, v, here.scores)
            of_scores, of_values = v.depth // self.c.product.words, v.columns // self.c.rows
            of_scores, of_values = f.select(further, of_scores, none), f.select(earlier, of_values, none)
            turns = of_scores + of_values
            with f.when(earlier):
                steps.raise_sums(f, v)
            (self.go_on if go_on else self.begin)(f, **softmax)
            with f.when(further):
                self._scores(f, v, self._strip(v, k + 1), softmax, turns)
            with f.when(earlier), steps.aside(f, v):
                self._values(f, v, self._strip(v, k - 1), softmax, of_scores, turns)
            with f.when(turns.eq(0)):
                self.weigh(f, **softmax, lines=f.const("i64", self.c.rows))
            done = self.exceeded(f, **softmax).eq(0) if go_on else f.const("i1", 1)
            with f.when(done):
                self.end(f, **softmax)
                self._keep(f, v, here)
                with f.when(further):
                    self._look(f, v, self._strip(v, k + 1), top=not go_on)
            return [k + f.cast("zext", done, "i64"), done]

        done, _ = f.repeat([first, f.const("i1", 1)], lambda walk: (walk[0] < last) & walk[1], one)
        with f.when(done.eq(last)):
            end = self._strip(v, last - 1)
            steps.raise_sums(f, v)
            with steps.aside(f, v):
                steps.add_values(f, v, end.seen, end.weights, f.const("i64", self.c.rows))
        return done

    def _strip(self, v: SimpleNamespace, number: Value) -> _Strip:
        c, line = self.c, number * self.c.rows
        scores, weights = v.work.scores.line(line), v.work.weights.moved(line * c.line.bytes)
        return _Strip(v.seen.between(line, line + c.rows), line, scores, weights)

    def _look(self, f: Routine, v: SimpleNamespace, strip: _Strip, *, top: bool) -> None:
        """What comes between products and softmax."""
        self.steps.lay_out(f, v, strip.seen, strip.line)
        self.steps.scores.passes(f, v.work, strip.seen, line=strip.line, top=top)

    def _keep(self, f: Routine, v: SimpleNamespace, strip: _Strip) -> None:
        if self.steps.keep is not None:
            lines = f.const("i64", self.c.rows)
            draw = v.draw.further(strip.seen.some_from)
            self.steps.keep(f, weights=strip.weights, draw=draw, count=lines, reach=lines)

    def _scores(self, f: Routine, v: SimpleNamespace, strip: _Strip, softmax: dict[str, Any], turns: Value) -> None:
        """Those of a strip, beside a softmax: the first of so many turns of it."""
        c = self.c
        words, between = Lines(v.panel.at, v.panel.shape), apart(c, v.depth * c.size, v.depth * c.line.bytes)
        left, out = v.rows.row(strip.seen.some_from), Lines(strip.scores.at, c.line)
        share = Share(f.const("i64", c.rows), f.const("i64", 0), turns)
        self.multiply(f, left=left, right=words, out=out, depth=v.depth, **between, **softmax, share=share)

    def _values(
        self, f: Routine, v: SimpleNamespace, strip: _Strip, softmax: dict[str, Any], first: Value, turns: Value
    ) -> None:
        """The same of its values: the turns from one on."""
        c = self.c
        between = apart(c, f.const("i64", c.value_part), f.const("i64", c.weights_part))
        rows = Words(v.values.at + strip.line // c.per_word * c.size, v.values.stride)
        right, depth = Lines(strip.weights.at, strip.weights.shape), f.const("i64", c.product.words)
        with f.range(0, v.columns, c.rows) as column:
            share = Share(f.const("i64", c.rows), first + column // c.rows, turns)
            out = Lines(v.sums.line(column).at, c.line)
            left = rows.row(column)
            self.add(f, left=left, right=right, out=out, depth=depth, **between, **softmax, share=share)


def emit_turns(
    f: Routine, c: Config, v: SimpleNamespace, attend: Callable[[Seen], object], turns: Turns | None, clean: Value
) -> None:
    """All strips of a block that a panel sees, by ``turns`` where there is nothing else to look after, or one after the
    other."""
    first, last = v.seen.some_from // c.rows, (v.seen.some_to + (c.rows - 1)) // c.rows

    def one_by_one() -> None:
        with f.range(first, last) as strip:
            attend(v.seen.between(strip * c.rows, (strip + 1) * c.rows))

    def by_turns(turns: Turns) -> None:
        done = f.value_when(known(f, c, v.state), lambda: turns.attend(f, v, first, last, go_on=True), first)
        with f.when(done < last):
            turns.attend(f, v, done, last)

    if turns is None:
        one_by_one()
    else:
        f.either(clean, lambda: by_turns(turns), one_by_one)
    f.ret()


def known(f: Routine, c: Config, state: State) -> Value:
    """Whether every lane has seen a key, so that there is something to measure scores from."""
    unknown = [state.load(0, j).eq(-math.inf) for j in range(c.registers)]
    return any_lane(f, functools.reduce(operator.or_, unknown)).eq(0)
