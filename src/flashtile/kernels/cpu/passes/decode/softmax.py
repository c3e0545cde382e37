"""The online softmax of one row whose scores lie along lanes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.decode.program import SeenKeys, score_change
from flashtile.kernels.cpu.passes.decode.rows import element
from flashtile.kernels.cpu.passes.decode.scores import fold_lanes
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.kernels.cpu.steps.spans import add_sum
from flashtile.llvm.blocks import integers
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Line, Lines, Scores, Weights
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import vector


class RowState(Lines):
    """What a row keeps, accumulators: the maximum of raw scores, the sum of weights, the factor for what was summed
    before, and what the sum of weights has lost to rounding."""

    FIELDS: ClassVar = ("maximum", "sum", "alpha", "lost")

    def row(self, n: Value | int) -> RowState:
        return RowState(self.line(n).at, self.shape)

    def read(self, name: str) -> Value:
        return self.load(0, self.FIELDS.index(name))

    def write(self, **values: Value) -> None:
        for name, value in values.items():
            self.store(value, 0, self.FIELDS.index(name))


def state_line(c: Config) -> Line:
    return Line(c.acc, len(RowState.FIELDS))


def emit_row_softmax(module: Module, c: Config) -> Routine:
    """The softmax of one row and one block of ``count`` keys, of which it sees [first, beyond), and of these, where a
    program hides keys, what ``seen`` says. A score program comes first. Hidden scores become -inf. Whole registers are
    read and written: up to lanes - 1 scores beyond the keys, which are taken as hidden. The sum is of weights before
    rounding."""
    lines: dict[str, Any] = {
        "scores": Scores.of(Line(c.acc, c.key_block)),
        "weights": Weights.of(Line(c.word, c.key_block)),
    }
    keys: dict[str, Any] = {**integers("first beyond count"), "frame": Frame.kind(), "seen": SeenKeys.kind()}
    f = Routine(module, "row_softmax", state=RowState.of(state_line(c)), **lines, **keys, factors=Factors.of(c))
    state, scores, weights, first, beyond, count, frame, seen, factors = f.parameters
    change = score_change(f, c, frame)
    weight = factors.weights(c)
    near = [f.splat(f.cast("trunc", f.clamp(x, 0, c.key_block), "i32"), c.lanes) for x in (first, beyond)]
    hidden = f.const(c.vector, -math.inf)

    def highest(key: Value, top: list[Value]) -> list[Value]:
        at = scores.lane(key).at
        lane = f.iota(vector(c.lanes, "i32")) + f.splat(f.cast("trunc", key, "i32"), c.lanes)
        visible = (lane >= near[0]) & (lane < near[1])
        if c.masked:
            visible = visible & seen.key(c, key).read(c)
        score = f.select(visible, change(key, f.load(c.vector, at)), hidden)
        f.store(score, at)
        return [f.maximum(score, top[0])]

    (top,) = f.fold(0, count, c.lanes, [hidden], highest)
    old = state.read("maximum")
    new = f.maximum(f.extract(fold_lanes(f, top, 1, f.maximum), 0), old)
    # A row that has seen no key yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
    safe = f.splat(f.select(new.eq(-math.inf), f.const(c.acc, 0.0), new), c.lanes)
    # To the last bit, since every block's multiplies the sums; of a row's first block it is exp(-inf).
    none = f.const(c.acc, 0.0)
    alpha = f.value_when(old.ne(-math.inf), lambda: f.extract(weight(f.splat(old, c.lanes) - safe), 0), none)

    def weigh(key: Value, total: list[Value]) -> list[Value]:
        w = weight(f.load(c.vector, scores.lane(key).at) - safe, coarse=c.product.rounds)
        f.store(element(f, c, w), weights.moved(key * (c.size // c.per_word)).at)
        return [total[0] + w]

    (total,) = f.fold(0, count, c.lanes, [f.const(c.vector, 0.0)], weigh)
    total = f.extract(fold_lanes(f, total, 1, lambda a, b: a + b), 0)
    total, lost = add_sum(f, c, state.read("sum"), state.read("lost"), alpha, total)
    state.write(sum=total, lost=lost, maximum=new, alpha=alpha)
    f.ret()
    return f
