"""The online softmax of one panel: scores to weights in place, and the factor for what was summed before."""

from __future__ import annotations

import math

from flashtile.kernels.cpu.config import Config
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value

SUM_KEYS = 16  # weights summed apart before they join the row's sum: a short chain of roundings, then another


def words_seen(f: Function, c: Config, reach: Value, keys: Value) -> Value:
    """The words whose keys a register may see, of those that hold ``keys``: the first ``reach`` keys, if so many."""
    return (f.clamp(reach, 0, keys) + (c.per_word - 1)) // c.per_word


def emit_softmax(module: Module, c: Config, vectors: int) -> str:
    """A function over the scores of one key block; its name.

    Arguments: state (running maximum, then running sum), block maximum (consumed: left at -inf), alpha (out),
    scores, the number of keys (even), how many of them the first register of queries may see, as in values.py, c_high,
    c_low.  Scores that may be seen become weights exp2((s - m) c); with ``pairs`` two
    keys' weights are rounded to bf16 and share a word, at half the rows.

    One register of queries at a time, one word of keys a step: more at once do not fit 16 registers beside
    the polynomial, and the machine overlaps the steps by itself.
    """
    name = f"softmax_{vectors}"
    f = Function(module, name, "void", ["ptr", "ptr", "ptr", "ptr", "i64", "i64", c.acc, c.acc], internal=True,
                 names=["state", "top", "alpha", "s", "keys", "reach", "high", "low"])  # fmt: skip
    state, top, alpha, s, keys, reach, high, low = f.args
    factors = [f.splat(x, c.lanes) for x in (high, low)]

    def weight(difference: Value, *, coarse: bool = False) -> Value:
        return vmath.weight_of(f, c.isa, difference, *factors, coarse=coarse)

    with f.range(0, vectors * c.register, c.register) as at:
        count = f.minimum(words_seen(f, c, reach + at // c.size, keys) * c.per_word, keys)
        old = f.load(c.vector, state + at, align=c.register)
        new = f.maximum(f.load(c.vector, top + at, align=c.register), old)
        # A row that has seen no key yet has maximum -inf; 0 in its place keeps -inf - max from being NaN.
        safe = f.select(new.eq(-math.inf), f.const(c.vector, 0.0), new)
        f.store(new, state + at, align=c.register)
        f.store(weight(old - safe), alpha + at, align=c.register)  # to the last bit: it multiplies all sums

        def word_of_keys(key: Value, carry: list[Value]) -> list[Value]:
            places = [s + ((key + u) * c.line + at) for u in range(c.per_word)]
            differences = [f.load(c.vector, place, align=c.register) - safe for place in places]
            weights = [weight(x, coarse=c.pairs) for x in differences]
            if c.pairs:
                f.store(c.isa.narrow_pairs(f, *weights), s + (key * (c.line // 2) + at), align=c.register)
            else:
                f.store(weights[0], places[0], align=c.register)
            return [sum(weights, carry[0])]

        # In memory: one more value in registers is one too many for 16.
        f.store(f.const(c.vector, 0.0), top + at, align=c.register)
        with f.range(0, count, SUM_KEYS) as first:
            stop = f.minimum(first + SUM_KEYS, count)
            (part,) = f.fold(first, stop, c.per_word, [f.const(c.vector, 0.0)], word_of_keys)
            f.store(f.load(c.vector, top + at, align=c.register) + part, top + at, align=c.register)
        total = state + (at + c.line)
        before, rescale, block = (f.load(c.vector, x, align=c.register) for x in (total, alpha + at, top + at))
        f.store(c.isa.multiply_add(f, before, rescale, block), total, align=c.register)
        f.store(f.const(c.vector, -math.inf), top + at, align=c.register)
    f.ret()
    return name
