"""The online softmax of one panel: scores to weights in place, and the factor for what was summed before."""

from __future__ import annotations

import math

from flashtile.kernels.cpu import math as vmath
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.ir import Function, Module, Value

PAIR_DEGREE = 4  # the weights are rounded to bf16 anyway
SUM_KEYS = 16  # weights summed apart before they join the block's sum: a short chain of roundings, then another


def emit_softmax(module: Module, c: Config, vectors: int) -> str:
    """A function over the scores of one key block; its name.

    Arguments: state (running maximum, then running sum), block maximum (consumed: left at -inf), alpha (out),
    scores, their number (even), c_high, c_low.  Scores become weights exp2((s - m) c); with ``pairs`` two
    keys' weights are rounded to bf16 and share a word, at half the rows.
    """
    name = f"softmax_{vectors}"
    f = Function(module, name, "void", ["ptr", "ptr", "ptr", "ptr", "i64", c.acc, c.acc], internal=True,
                 names=["state", "top", "alpha", "s", "count", "high", "low"])  # fmt: skip
    state, top, alpha, s, count, high, low = f.args
    degree = PAIR_DEGREE if c.pairs else None
    factor = [f.splat(x, c.lanes) for x in (high, low)]

    def weight(difference: Value) -> Value:  # the difference first: the largest weight is exactly 1
        scaled = c.isa.multiply_add(f, difference, factor[0], difference * factor[1])
        return vmath.weight(f, c.isa, scaled, degree=degree)

    maxima = []
    for j in range(vectors):
        at = j * c.register
        old = f.load(c.vector, state + at, align=c.register)
        new = f.maximum(f.load(c.vector, top + at, align=c.register), old)
        # A row that has seen no key yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
        safe = f.select(new.eq(-math.inf), f.const(c.vector, 0.0), new)
        f.store(f.const(c.vector, -math.inf), top + at, align=c.register)
        f.store(new, state + at, align=c.register)
        f.store(weight(old - safe), alpha + at, align=c.register)
        maxima.append(safe)

    def two_keys(key: Value, sums: list[Value]) -> list[Value]:
        sums = list(sums)
        for j in range(vectors):
            pair = []
            for u in range(2):
                at = s + ((key + u) * c.line + j * c.register)
                p = weight(f.load(c.vector, at, align=c.register) - maxima[j])
                sums[j] = sums[j] + p
                pair.append(p)
                if not c.pairs:
                    f.store(p, at, align=c.register)
            if c.pairs:
                to = s + (key * (c.line // 2) + j * c.register)
                f.store(c.isa.narrow_pairs(f, *pair), to, align=c.register)
        return sums

    def some_keys(key: Value, sums: list[Value]) -> list[Value]:
        zeros = [f.const(c.vector, 0.0)] * vectors
        new = f.fold(key, f.minimum(key + SUM_KEYS, count), 2, zeros, two_keys)
        return [a + b for a, b in zip(sums, new, strict=True)]

    sums = f.fold(0, count, SUM_KEYS, [f.const(c.vector, 0.0)] * vectors, some_keys)
    for j in range(vectors):
        at = state + (c.line + j * c.register)
        before = f.load(c.vector, at, align=c.register)
        factor_ = f.load(c.vector, alpha + j * c.register, align=c.register)
        f.store(c.isa.multiply_add(f, before, factor_, sums[j]), at, align=c.register)
    f.ret()
    return name
