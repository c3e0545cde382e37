"""A block in two halves, on matrix registers: the products of one run beside the weights of the other.

    scores 0 | scores 1 beside weights 0 | values 0 beside weights 1 | values 1

Each half is a block of its own to the softmax, so either is as it would be if one followed the other; and so they do
where something seldom is to be looked after, or where one sees nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.beside import Share, emit_multiply_beside, emit_softmax_edge, softmax_of
from flashtile.kernels.cpu.steps.product import apart
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Lines, Scores, Weights, Words
from flashtile.llvm.routines import Routine


@dataclass
class _Half:
    """What is seen of it, where its scores begin, and how many lines they are, whole tiles of them."""

    seen: Seen
    line: int
    scores: Scores
    weights: Weights
    whole: Value


class Halves:
    """Attends a full panel to both halves of a block. ``steps``: of panel.py, which also has what is done to the scores
    of a half, and to the sums before and after its values."""

    def __init__(self, module: Module, c: Config, width: int, steps: Any) -> None:
        self.c, self.steps = c, steps
        self.multiply = emit_multiply_beside(module, c, width, onto=False)
        self.add = emit_multiply_beside(module, c, width, onto=True)
        self.begin, self.end = (emit_softmax_edge(module, c, width, end=end) for end in (False, True))

    def attend(self, f: Routine, v: SimpleNamespace, parts: tuple[Seen, Seen]) -> None:
        steps, (first, second) = self.steps, (self._half(v, seen, n) for n, seen in enumerate(parts))
        steps.scores.products(f, v.work, v.panel, v.rows, v.depth, first.seen)
        self._look(f, v, first)
        with _Beside(self, f, v, first) as beside:
            self._scores(f, v, second, beside)
        self._keep(f, v, first)
        self._look(f, v, second)
        with steps.values(f, v), _Beside(self, f, v, second) as beside:
            self._values(f, v, first, beside)
        self._keep(f, v, second)
        with steps.values(f, v):
            steps.add_values(f, v, second.seen, second.weights, second.whole)

    def _half(self, v: SimpleNamespace, seen: Seen, number: int) -> _Half:
        c, line = self.c, number * self.c.half
        scores, weights = v.work.scores.line(line), v.work.weights.moved(line * c.line.bytes)
        return _Half(seen, line, scores, weights, (seen.count + (c.rows - 1)) // c.rows * c.rows)

    def _look(self, f: Routine, v: SimpleNamespace, half: _Half) -> None:
        """What comes between products and softmax."""
        self.steps.lay_out(f, v, half.seen, half.line)
        self.steps.scores.passes(f, v.work, half.seen, line=half.line)

    def _keep(self, f: Routine, v: SimpleNamespace, half: _Half) -> None:
        if self.steps.keep is not None:
            draw, extent = v.draw.further(half.seen.some_from), {"count": half.whole, "reach": half.whole}
            self.steps.keep(f, weights=half.weights, draw=draw, **extent)

    def _scores(self, f: Routine, v: SimpleNamespace, half: _Half, beside: _Beside) -> None:
        c = self.c
        words, between = Lines(v.panel.at, v.panel.shape), apart(c, v.depth * c.size, v.depth * c.line.bytes)
        steps = v.depth // c.product.words
        with f.range(0, half.whole, c.rows) as row:
            share = beside.share(row // c.rows * steps, half.whole // c.rows * steps)
            left, out = v.rows.row(half.seen.some_from + row), Lines(half.scores.at, c.line).line(row)
            self.multiply(f, left=left, right=words, out=out, depth=v.depth, **between, **share)

    def _values(self, f: Routine, v: SimpleNamespace, half: _Half, beside: _Beside) -> None:
        c, words = self.c, half.whole // self.c.per_word
        between = apart(c, f.const("i64", c.value_part), f.const("i64", c.weights_part))
        rows = Words(v.values.at + half.seen.some_from // c.per_word * c.size, v.values.stride)
        steps = words // c.product.words
        with f.range(0, v.columns, c.rows) as column:
            share = beside.share(column // c.rows * steps, v.columns // c.rows * steps)
            out = Lines(v.sums.line(column).at, c.line)
            right = Lines(half.weights.at, half.weights.shape)
            self.add(f, left=rows.row(column), right=right, out=out, depth=words, **between, **share)


class _Beside:
    """The softmax of a half, whose weights come with the products that are emitted meanwhile."""

    def __init__(self, halves: Halves, f: Routine, v: SimpleNamespace, half: _Half) -> None:
        self.halves, self.f, self.half = halves, f, half
        self.arguments = softmax_of(halves.c, v, half.scores)

    def share(self, first: Value, steps: Value) -> dict[str, Any]:
        """The further arguments of a product."""
        return {**self.arguments, "share": Share(self.half.whole, first, steps)}

    def __enter__(self) -> _Beside:
        self.halves.begin(self.f, **self.arguments)
        return self

    def __exit__(self, *_: object) -> None:
        self.halves.end(self.f, **self.arguments)


def emit_halves(
    f: Routine, c: Config, v: SimpleNamespace, attend: Callable[[Seen], object], halves: Halves | None, clean: Value
) -> None:
    """Both halves of a block, by turns (``halves``) where they are clean, or one after the other."""
    parts = v.seen.cut(c.half)
    some = [seen.some_from < seen.some_to for seen in parts]

    def one_by_one() -> None:
        for seen, any_ in zip(parts, some, strict=True):
            with f.when(any_):
                attend(seen)

    if halves is None:
        one_by_one()
    else:
        f.either(some[0] & some[1] & clean, lambda: halves.attend(f, v, parts), one_by_one)
    f.ret()
