"""Outputs of a few queries: lanes run over value columns, and each value is read once for all the rows of a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.decode_pack import Slots, keys_ahead, prefetch
from flashtile.kernels.cpu.decode_scores import ROW_TILES, accumulators, each_row_tile
from flashtile.kernels.cpu.decode_softmax import STATE, state
from flashtile.kernels.cpu.pack import read
from flashtile.kernels.cpu.scores import contract
from flashtile.kernels.cpu.spans import add_sum
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.types import SIZES, vector

CACHE_LINE = 64
WIDEST = 8  # registers of value columns in a tile
ARGUMENTS = ["ptr", "i64", "ptr", "ptr", "i64", "ptr", "ptr", "i64"]
NAMES = ["o", "o_row", "state", "v", "stride", "p", "s", "count"]


def emit_values(module: Module, c: Config, rows: int, vectors: int, contained: str) -> str:
    """A function for ``rows`` queries and ``vectors`` registers of value columns; its name.

    Arguments: outputs (updated), bytes between their rows (a row's outputs, then what they have lost to rounding),
    state of the rows, values at the tile's first column, bytes between them, weights and scores (row-major, a key block
    apart), keys.  With ``pairs`` two keys' products are added at once, their weights rounded to bf16.  Sums of one key
    block are formed apart and then added to what was there: blocked summation.

    A hidden key's weight is 0, but 0 * NaN is NaN.  So a block whose sums are not all finite, as happens with broken
    data only, is summed again by ``contained``, which leaves hidden keys out; finite data costs one test a block.
    """
    f = Function(module, f"values_{rows}_{vectors}", "void", ARGUMENTS, names=NAMES, internal=True)
    o, o_row, states, v, stride, p, s, count = f.args
    line = c.key_block * c.size
    each = c.lanes * SIZES[c.memory]
    ahead = keys_ahead(f, c, stride, count)

    def step(word: Value, acc: list[Value], keys: int = c.per_word) -> list[Value]:
        key = word * c.per_word
        at = [v + (key + u) * stride for u in range(keys)]
        for line_at in range(0, vectors * each if rows > 1 else 0, CACHE_LINE):  # a single row reads in order
            for row in at:
                prefetch(f, row + (ahead + line_at))
        values = _words(f, c, at, vectors)
        weights = [f.splat(f.load(c.word, p + (word * c.size + r * line)), c.lanes) for r in range(rows)]
        return [contract(f, c, a, weights[n // vectors], values[n % vectors]) for n, a in enumerate(acc)]

    def steps(word: Value, acc: list[Value]) -> list[Value]:
        for u in range(c.unroll):
            acc = step(word + u, acc)
        return acc

    words = count // c.per_word
    whole = words - words % c.unroll
    acc = f.fold(0, whole, c.unroll, [f.const(c.vector, 0.0)] * (rows * vectors), steps)
    acc = f.fold(whole, words, 1, acc, step)
    if c.pairs:  # a last key without a partner: the weight beside its own is 0
        acc = f.fold(words, words + count % 2, 1, acc, lambda word, acc: step(word, acc, keys=1))
    wild = acc[0] * 0.0  # NaN where a sum is not finite
    for a in acc[1:]:
        wild = wild + a * 0.0
    bad = f.cast("bitcast", wild.isnan(), f"i{c.lanes}").ne(0)
    outputs = [o + o_row * r for r in range(rows)]
    row_states = [states + r * len(STATE) * c.size for r in range(rows)]

    def add() -> None:
        for r in range(rows):
            alpha = f.splat(f.load(c.acc, state(c, row_states[r], "alpha")), c.lanes)
            for j in range(vectors):
                _add_to_outputs(f, c, outputs[r] + j * c.register, o_row, alpha, acc[r * vectors + j])

    def contain() -> None:
        for r in range(rows):
            for j in range(vectors):
                f.call(contained, "void", [outputs[r] + j * c.register, o_row, row_states[r], v + j * each, stride,
                                           p + r * line, s + r * line, count])  # fmt: skip

    f.either(bad, contain, add)
    f.ret()
    return f.name


def _add_to_outputs(f: Function, c: Config, at: Value, o_row: Value, alpha: Value, block: Value) -> None:
    """One register of a block's sums joins the outputs; what they lose is kept behind them, half a row further."""
    places = at, at + o_row // 2
    before, lost = (f.load(c.vector, place, align=c.register) for place in places)
    for number, place in zip(add_sum(f, c, before, lost, alpha, block), places, strict=True):
        f.store(number, place, align=c.register)


def _words(f: Function, c: Config, rows: Sequence[Value], vectors: int) -> list[Value]:
    """Registers of value columns of one key, or with ``pairs`` of two keys in words (of one, with itself)."""
    each = c.lanes * SIZES[c.memory]
    if not c.pairs:
        return [read(f, c, rows[0] + j * each, c.lanes) for j in range(vectors)]
    bits = [[f.load(vector(c.lanes, c.memory), row + j * each, align=1) for row in rows] for j in range(vectors)]
    return [_interleaved(f, c, pair) for pair in bits]


def _interleaved(f: Function, c: Config, keys: Sequence[Value]) -> Value:
    """Words of bf16 of two keys, the first one's low."""
    order = [lane for t in range(c.lanes) for lane in (t, c.lanes + t)]
    return f.cast("bitcast", f.shuffle(keys[0], keys[-1], order), c.words)


def emit_contained_values(module: Module, c: Config) -> str:
    """As ``emit_values`` for one row and one register, but keys with score -inf are left out; its name.

    The order of additions is the same, so a row that sees only finite values gets the bits of the fast function.  A
    value that is not finite enters unweighted: its weight is positive, however small it was rounded.
    """
    f = Function(module, "contained_values", "void", ARGUMENTS, names=NAMES, internal=True)
    o, o_row, states, v, stride, p, s, count = f.args

    def step(word: Value, acc: list[Value]) -> list[Value]:
        key = word * c.per_word
        total, clean = acc[0], []
        for u in range(c.per_word):
            at = v + (f.minimum(key + u, count - 1) if u else key) * stride
            value = read(f, c, at, c.lanes)
            seen = f.splat(f.load(c.acc, s + (key + u) * c.size).ne(-math.inf), c.lanes)
            wild = (value * 0.0).isnan()
            total = f.select(seen & wild, total + value, total)
            bits = f.load(vector(c.lanes, c.memory), at, align=1) if c.pairs else value
            zero = f.const(bits.type, 0)
            clean.append(f.select(seen, f.select(wild, zero, bits), zero))
        weight = f.splat(f.load(c.word, p + word * c.size), c.lanes)
        return [contract(f, c, total, weight, _interleaved(f, c, clean) if c.pairs else clean[0])]

    words = (count + (c.per_word - 1)) // c.per_word
    (total,) = f.fold(0, words, 1, [f.const(c.vector, 0.0)], step)
    _add_to_outputs(f, c, o, o_row, f.splat(f.load(c.acc, state(c, states, "alpha")), c.lanes), total)
    f.ret()
    return f.name


def emit_value_tiles(module: Module, c: Config) -> str:
    """A function that adds a range of values to the outputs of every row; its name.

    Arguments: as of ``emit_values``, then elements of a value, and the number of rows.  A row of outputs is cut into
    column tiles of as many registers as the accumulators allow, and single registers for what is left.
    """
    contained = emit_contained_values(module, c)
    wide = {rows: min(WIDEST, accumulators(c) // rows) for rows in ROW_TILES}
    sizes = {(rows, n): None for rows in ROW_TILES for n in (wide[rows], 1)}  # with few registers both are 1
    tiles = {size: emit_values(module, c, *size, contained) for size in sizes}
    types, names = [*ARGUMENTS, "i64", "i64"], [*NAMES, "size", "rows"]
    f = Function(module, "value_tiles", "void", types, names=names, internal=True)
    o, o_row, states, v, stride, p, s, count, size, rows = f.args
    slots = Slots.of(f, size, c.lanes)

    def row_tile(n: int, row: Value) -> None:
        line = row * (c.key_block * c.size)

        def tile(vectors: int, slot: Value, element: Value) -> None:
            args = [o + row * o_row + slot * c.register, o_row, states + row * (len(STATE) * c.size),
                    v + element * SIZES[c.memory], stride, p + line, s + line, count]  # fmt: skip
            f.call(tiles[n, vectors], "void", args)

        edge = slots.whole // wide[n] * wide[n]
        with f.range(0, edge, wide[n]) as slot:
            tile(wide[n], slot, slot * c.lanes)
        with f.range(edge, slots.count) as slot:
            tile(1, slot, f.minimum(slot * c.lanes, slots.padded - c.lanes))

    each_row_tile(f, rows, row_tile)
    f.ret()
    return f.name
