"""Score tiles: S^T[key][query] = K Q^T for a few keys by one panel of queries.

Lanes run over queries.  A key's elements are broadcast from row-major memory, so K needs no packing; the
queries were transposed once (pack.py).  ``rows`` keys by ``vectors`` registers of accumulators fill the
register file; the contraction is the loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.params import Scratch
from flashtile.llvm.ir import Function, Module, Value

FAR = 1 << 30  # beyond any distance inside a tile, and no overflow when a lane number is added


def contract(f: Function, c: Config, acc: Value, a: Value, b: Value) -> Value:
    """acc + a b over one word of each."""
    return c.isa.dot_pairs(f, acc, a, b) if c.pairs else c.isa.multiply_add(f, a, b, acc)


def emit_scores(
    module: Module, c: Config, vectors: int, *, edge: bool = False, first: int = 0, top: bool = True
) -> str:
    """A function for one tile; the name of the function.

    Arguments: scratch memory, queries (transposed), keys, bytes between keys, words of a row, and the tile's line
    among the scores.  It keeps the running maximum, unless the score program does that later (``top``; rescore.py).  An
    ``edge`` tile also takes the last valid key of the tile (keys beyond it are readable memory, but hidden), and
    two distances: query lane i sees key r iff  i + above - r >= 0  and  i + below - r <= 0.  Vectors before
    ``first`` are known to be hidden: their scores are -inf, uncomputed.
    """
    name = f"scores_{vectors}_{('edge' if edge else 'full') if top else 'raw'}_{first}"
    types, names = ["ptr", "ptr", "ptr", "i64", "i64", "i64"], ["scratch", "q", "k", "stride", "words", "line"]
    if edge:
        types, names = types + ["i64", "i32", "i32"], names + ["last", "above", "below"]
    f = Function(module, name, "void", types, names=names, internal=True)
    scratch, q, k, stride, words, line = f.args[:6]
    live = range(first, vectors)

    rows = [k]
    while len(rows) < c.rows:
        rows.append(rows[-1] + stride)
    acc = _contraction(f, c, q, rows, words, live)

    s, tops = scratch + Scratch(c).scores + line * c.line, scratch + Scratch(c).block_max
    hidden = f.const(c.vector, -math.inf)
    for r in range(c.rows):
        for n, j in enumerate(live):
            at = r * len(live) + n
            if edge:
                acc[at] = f.select(_in_band(f, c, r, j), acc[at], hidden)
            f.store(acc[at], s + (r * c.line + j * c.register), align=c.register)
        for j in range(first):
            f.store(hidden, s + (r * c.line + j * c.register), align=c.register)
    for n, j in enumerate(live if top else ()):
        largest = f.load(c.vector, tops + j * c.register, align=c.register)
        for r in range(c.rows):
            largest = f.maximum(acc[r * len(live) + n], largest)
        f.store(largest, tops + j * c.register, align=c.register)
    f.ret()
    return name


def _contraction(f: Function, c: Config, q: Value, rows: Sequence[Value], words: Value, live: range) -> list[Value]:
    """The accumulators, row by row: acc[r][j] = sum over words of k[r] * q[j]."""

    def step(d: Value, acc: list[Value]) -> list[Value]:
        queries = [f.load(c.words, q + (d * c.line + j * c.register), align=c.register) for j in live]
        at = d * c.size
        keys = (f.splat(f.load(c.word, row + at, align=1), c.lanes) for row in rows)
        products = ((key, query) for key in keys for query in queries)
        return [contract(f, c, sum_, *factors) for sum_, factors in zip(acc, products, strict=True)]

    zero = [f.const(c.vector, 0.0)] * (len(rows) * len(live))
    unroll = c.unroll if c.isa.fused else 2 * c.unroll

    def steps(d: Value, acc: list[Value]) -> list[Value]:
        # Without a fused multiply-add every product is rounded, too.  Some summed first meet the large sum less often,
        # for the same instructions.
        sums = acc if c.isa.fused else zero
        for u in range(unroll):
            sums = step(d + u, sums)
        return sums if c.isa.fused else [a + b for a, b in zip(acc, sums, strict=True)]

    whole = words - words % unroll
    acc = f.fold(0, whole, unroll, zero, steps)
    return f.fold(whole, words, 1, acc, step)


def _in_band(f: Function, c: Config, r: int, j: int) -> Value:
    """Lanes of register j whose band holds key r of an edge tile."""
    last, above, below = f.args[6:]
    lane = f.iota(f"<{c.lanes} x i32>", j * c.lanes)
    above = f.select(last < r, f.const("i32", -FAR), above - r)
    return (lane + f.splat(above, c.lanes) >= 0) & (lane + f.splat(below - r, c.lanes) <= 0)
