"""The online softmax of one row whose scores lie along lanes."""

from __future__ import annotations

import math

from flashtile.kernels.cpu import math as vmath
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.decode_scores import fold_lanes
from flashtile.kernels.cpu.ir import Function, Module, Value

STATE = ("maximum", "sum", "alpha", "spare")  # accumulators that a row keeps: raw scores, weights, factor for older sums


def state(c: Config, row: Value, name: str) -> Value:
    """Where a row keeps one number of its state."""
    return row + STATE.index(name) * c.size


def emit_row_softmax(module: Module, c: Config) -> str:
    """A function over one row's scores of one key block; its name.

    Arguments: state of the row (updated), scores (updated: -inf where hidden), weights (out), first key that the row
    sees and first beyond those, both from the block's start, keys, c_high, c_low.  Whole registers are read and
    written: up to lanes - 1 scores beyond the keys, which are taken as hidden.
    """
    f = Function(module, "row_softmax", "void", ["ptr", "ptr", "ptr", "i64", "i64", "i64", c.acc, c.acc], internal=True,
                 names=["state", "s", "p", "first", "beyond", "keys", "high", "low"])  # fmt: skip
    row, s, p, first, beyond, keys, high, low = f.args
    factor = [f.splat(x, c.lanes) for x in (high, low)]
    near = [f.splat(f.cast("trunc", f.clamp(x, 0, c.key_block), "i32"), c.lanes) for x in (first, beyond)]
    hidden = f.const(c.vector, -math.inf)

    def weight(difference: Value) -> Value:  # the difference first: the largest weight is exactly 1
        scaled = c.isa.multiply_add(f, difference, factor[0], difference * factor[1])
        return vmath.exp2(f, c.isa, scaled, nonpositive=True)

    def highest(key: Value, top: list[Value]) -> list[Value]:
        at = s + key * c.size
        lane = f.iota(f"<{c.lanes} x i32>") + f.splat(f.cast("trunc", key, "i32"), c.lanes)
        score = f.select((lane >= near[0]) & (lane < near[1]), f.load(c.vector, at), hidden)
        f.store(score, at)
        return [f.maximum(score, top[0])]

    (top,) = f.fold(0, keys, c.lanes, [hidden], highest)
    old = f.load(c.acc, state(c, row, "maximum"))
    new = f.maximum(f.extract(fold_lanes(f, top, 1, f.maximum), 0), old)
    # A row that has seen no key yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
    safe = f.splat(f.select(new.eq(-math.inf), f.const(c.acc, 0.0), new), c.lanes)
    alpha = f.extract(weight(f.splat(old, c.lanes) - safe), 0)

    def weigh(key: Value, total: list[Value]) -> list[Value]:
        at = key * c.size
        w = weight(f.load(c.vector, s + at) - safe)
        f.store(w, p + at)
        return [total[0] + w]

    (total,) = f.fold(0, keys, c.lanes, [f.const(c.vector, 0.0)], weigh)
    total = f.extract(fold_lanes(f, total, 1, lambda a, b: a + b), 0)
    before = f.load(c.acc, state(c, row, "sum"))
    f.store(new, state(c, row, "maximum"))
    f.store(before * alpha + total, state(c, row, "sum"))
    f.store(alpha, state(c, row, "alpha"))
    f.ret()
    return f.name
