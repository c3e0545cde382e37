"""The online softmax of one row whose scores lie along lanes."""

from __future__ import annotations

import math

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.decode_scores import fold_lanes
from flashtile.kernels.cpu.spans import add_sum
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value

# Accumulators that a row keeps: of raw scores, of weights, the factor for what was summed before, and what the sum of
# weights has lost to rounding.
STATE = ("maximum", "sum", "alpha", "lost")


def state(c: Config, row: Value, name: str) -> Value:
    """Where a row keeps one number of its state."""
    return row + STATE.index(name) * c.size


def weight_size(c: Config) -> int:
    """Bytes of a weight: an accumulator, or with ``pairs`` a bf16, so that two keys' weights make a word."""
    return c.size // c.per_word


def emit_row_softmax(module: Module, c: Config) -> str:
    """A function over one row's scores of one key block; its name.

    Arguments: state of the row (updated), scores (updated: -inf where hidden), weights (out), first key that the row
    sees and first beyond those, both from the block's start, keys, c_high, c_low.  Whole registers are read and
    written: up to lanes - 1 scores beyond the keys, which are taken as hidden.  The sum is of weights before rounding.
    """
    f = Function(module, "row_softmax", "void", ["ptr", "ptr", "ptr", "i64", "i64", "i64", c.acc, c.acc], internal=True,
                 names=["state", "s", "p", "first", "beyond", "keys", "high", "low"])  # fmt: skip
    row, s, p, first, beyond, keys, high, low = f.args
    factors = [f.splat(x, c.lanes) for x in (high, low)]
    near = [f.splat(f.cast("trunc", f.clamp(x, 0, c.key_block), "i32"), c.lanes) for x in (first, beyond)]
    hidden = f.const(c.vector, -math.inf)

    def weight(difference: Value, *, coarse: bool = False) -> Value:
        return vmath.weight_of(f, c.isa, difference, *factors, coarse=coarse)

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
    alpha = f.extract(weight(f.splat(old, c.lanes) - safe), 0)  # to the last bit: every block's multiplies the sums

    def weigh(key: Value, total: list[Value]) -> list[Value]:
        w = weight(f.load(c.vector, s + key * c.size) - safe, coarse=c.pairs)
        f.store(c.isa.narrow(f, w, "bfloat") if c.pairs else w, p + key * weight_size(c))
        return [total[0] + w]

    (total,) = f.fold(0, keys, c.lanes, [f.const(c.vector, 0.0)], weigh)
    total = f.extract(fold_lanes(f, total, 1, lambda a, b: a + b), 0)
    places = state(c, row, "sum"), state(c, row, "lost")
    before, lost = (f.load(c.acc, place) for place in places)
    for number, place in zip(add_sum(f, c, before, lost, alpha, total), places, strict=True):
        f.store(number, place)
    f.store(new, state(c, row, "maximum"))
    f.store(alpha, state(c, row, "alpha"))
    f.ret()
    return f.name
