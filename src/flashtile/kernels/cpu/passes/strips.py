"""Values of a block strip by strip, on matrix registers in three parts: products of one beside the weights of the next.

    weights 0 | values 0 beside weights 1 | values 1 beside weights 2 | values 2 beside weights 3 | values 3

In three parts the sums of a block are apart until all of it is there (steps/accumulate.py). A strip is a step of depth,
and goes to the sums of every column before the next one does: each sum takes the same steps in the same order as where
a tile of columns takes the whole block at once, and has its bits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.accumulate import emit_accumulate_tile
from flashtile.kernels.cpu.steps.beside import Share, emit_multiply_beside, emit_softmax_edge, emit_weigh, softmax_of
from flashtile.kernels.cpu.steps.product import apart, emit_multiply
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Weights, Words


class Strips:
    """Weighs what a full panel sees of a block, and adds its values. ``steps``: of panel.py, ``v``: what its function
    has at hand, where scores are done."""

    def __init__(self, module: Module, c: Config, width: int, steps: Any) -> None:
        self.c, self.keep = c, steps.keep
        self.keys = c.product.words * c.per_word  # of a strip; tiles of scores are whole strips
        self.begin, self.end = (emit_softmax_edge(module, c, width, step) for step in ("begin", "end"))
        self.weigh = emit_weigh(module, c, width)
        self.add = emit_multiply_beside(module, c, width, onto=True)
        onto = emit_multiply(module, c, width, onto=True)
        self.add_last = emit_accumulate_tile(module, c, width, onto, name="add_last")

    def several(self, v: SimpleNamespace) -> Value:
        """Whether there is more than one strip: something to be beside."""
        return v.whole > self.keys

    def attend(self, f: Function, v: SimpleNamespace) -> None:
        """Products land where a block with values that are not finite would keep what these add."""
        c, keys, last = self.c, f.const("i64", self.keys), v.whole - self.keys
        softmax = softmax_of(c, v, v.scores)
        self.begin(f, **softmax)
        self.weigh(f, **softmax, lines=keys)
        self._keep(f, v, f.const("i64", 0))
        Lines(v.nonfinite.sums, c.line).fill(0.0, v.columns)
        with f.range(0, last, self.keys) as line:
            self._values(f, v, line)
            self._keep(f, v, line + self.keys)
        self.end(f, **softmax)
        rows, weights = self._rows(v, last), self._weights(v, last)
        with f.range(0, v.columns, c.rows) as column:
            extent = {"landed": self._landed(v, column), "count": keys}
            left = rows.row(column)
            self.add_last(f, sums=v.sums.line(column), alpha=v.alpha, rows=left, weights=weights, **extent)

    def _values(self, f: Function, v: SimpleNamespace, line: Value) -> None:
        """Those of the strip that begins with a line, beside the weights of the next one."""
        c, following = self.c, line + self.keys
        softmax = softmax_of(c, v, v.scores.line(following))
        between = apart(c, f.const("i64", c.value_part), f.const("i64", c.weights_part))
        rows, weights = self._rows(v, line), self._weights(v, line)
        right, depth = Lines(weights.at, weights.shape), f.const("i64", c.product.words)
        with f.range(0, v.columns, c.rows) as column:
            share = Share(f.const("i64", self.keys), column // c.rows, v.columns // c.rows)
            operands = {"left": rows.row(column), "right": right, "out": self._landed(v, column), "depth": depth}
            self.add(f, **operands, **between, **softmax, share=share)

    def _keep(self, f: Function, v: SimpleNamespace, line: Value) -> None:
        """Dropout, of the strip that begins with a line."""
        if self.keep is not None:
            keys, draw = f.const("i64", self.keys), v.draw.further(v.seen.some_from + line)
            self.keep(f, weights=self._weights(v, line), draw=draw, count=keys, reach=keys)

    def _rows(self, v: SimpleNamespace, line: Value) -> Words:
        """Values from a line on, a row for each column."""
        c = self.c
        return Words(v.values.at + (v.seen.some_from + line) // c.per_word * c.size, v.values.stride)

    def _weights(self, v: SimpleNamespace, line: Value) -> Weights:
        """Of the strip that begins with a line, in the place of its scores."""
        return Weights(v.work.weights.line(line).at, v.work.weights.shape)

    def _landed(self, v: SimpleNamespace, column: Value) -> Lines:
        return Lines(v.nonfinite.sums, self.c.line).line(column)
