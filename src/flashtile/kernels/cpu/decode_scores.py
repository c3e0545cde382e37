"""Scores of a few queries: lanes run over the head dimension, and each key is read once for all the rows of a tile.

A tile of ``rows`` queries by ``keys`` keys holds one register of partial sums for each pair.  Adding them up
across lanes is done for all pairs at once by a network of interleavings, whose tree of additions is the same
for every pair: a score does not depend on the tile that it was computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.decode_pack import KEYS_AHEAD, Slots, prefetch, read_slot, slot_width
from flashtile.kernels.cpu.ir import SIZES, Function, Module, Value, lanes
from flashtile.kernels.cpu.scores import contract

ROW_TILES = (4, 2, 1)
KEY_TILE = 8  # keys are scored in multiples of this
SCORED_KEYS = 32  # a piece of so many keys meets every row tile before the next piece is read


def accumulators(c: Config) -> int:
    """Registers of sums that a tile may hold: a power of two that leaves room for operands."""
    return 1 << ((c.isa.rows * c.isa.vectors).bit_length() - 1)


def emit_scores(module: Module, c: Config, rows: int) -> str:
    """A function for ``rows`` queries and a multiple of KEY_TILE keys; its name.

    Arguments: queries (in slots), keys, bytes between keys, elements of a key, mask of the last slot, scores (out,
    row-major), number of keys.  Rows of queries are adjacent, rows of scores a key block apart.
    """
    f = Function(module, f"scores_{rows}", "void", ["ptr", "ptr", "i64", "i64", "ptr", "ptr", "i64"], internal=True,
                 names=["q", "k", "stride", "size", "mask", "s", "count"])  # fmt: skip
    q, k, stride, size, mask, s, count = f.args
    keys = min(KEY_TILE, accumulators(c) // rows)
    slots = Slots.of(f, size, slot_width(c))
    ahead = stride * KEYS_AHEAD
    queries = [q + slots.count * (c.register * r) for r in range(rows)]
    with f.range(0, count, keys) as key:
        base = [k + key * stride]
        while len(base) < keys:
            base.append(base[-1] + stride)

        def step(slot: Value, acc: list[Value], base: Sequence[Value] = base, masked: bool = False) -> list[Value]:
            at = slots.last * SIZES[c.memory] if masked else slot * (slots.width * SIZES[c.memory])
            words = [f.load(c.words, x + slot * c.register, align=c.register) for x in queries]
            out = list(acc)
            for n, row in enumerate(base):
                prefetch(f, row + (at + ahead))
                value = read_slot(f, c, row + at, mask if masked else None)
                for r in range(rows):
                    out[r * keys + n] = contract(f, c, acc[r * keys + n], value, words[r])
            return out

        acc = f.fold(0, slots.whole, 1, [f.const(c.vector, 0.0)] * (rows * keys), step)
        acc = f.fold(slots.whole, slots.count, 1, acc, lambda slot, acc: step(slot, acc, masked=True))
        for r in range(rows):
            _store_sums(f, c, acc[r * keys : (r + 1) * keys], s + (key * c.size + r * c.key_block * c.size))
    f.ret()
    return f.name


def emit_score_tiles(module: Module, c: Config) -> str:
    """A function that scores every row against a range of keys; its name.

    Arguments: as of ``emit_scores``, with any number of keys (whole tiles of KEY_TILE are read and written), and the
    number of rows.  Keys come in pieces that stay in the first-level cache while every row tile meets them.
    """
    tiles = {rows: emit_scores(module, c, rows) for rows in ROW_TILES}
    f = Function(module, "score_tiles", "void", ["ptr", "ptr", "i64", "i64", "ptr", "ptr", "i64", "i64"], internal=True,
                 names=["q", "k", "stride", "size", "mask", "s", "count", "rows"])  # fmt: skip
    q, k, stride, size, mask, s, count, rows = f.args
    q_row = Slots.of(f, size, slot_width(c)).count * c.register
    with f.range(0, count, SCORED_KEYS) as key:
        left = f.minimum(count - key, SCORED_KEYS)

        def tile(n: int, row: Value) -> None:
            out = s + (row * c.key_block + key) * c.size
            f.call(tiles[n], "void", [q + row * q_row, k + key * stride, stride, size, mask, out, left])

        each_row_tile(f, rows, tile)
    f.ret()
    return f.name


def each_row_tile(f: Function, rows: Value, tile: Callable[[int, Value], None]) -> None:
    """tile(n, first row) over all rows: as many of the largest tiles as fit, then at most one of each other."""
    largest, *smaller = ROW_TILES
    with f.range(0, rows // largest * largest, largest) as row:
        tile(largest, row)
    for n in smaller:
        with f.when((rows & n).ne(0)):
            tile(n, rows // (2 * n) * (2 * n))


def _store_sums(f: Function, c: Config, parts: Sequence[Value], at: Value) -> None:
    """The sum over lanes of each register, one after the other in memory."""
    group = min(len(parts), c.lanes)
    for n in range(0, len(parts), group):
        sums = add_across(f, parts[n : n + group])
        f.store(sums, at + n * c.size)


def add_across(f: Function, parts: Sequence[Value]) -> Value:
    """A vector of the sums over lanes of as many registers (powers of two): lanes i and i + n/2 first, and so on."""
    count, parts = len(parts), list(parts)
    while len(parts) > 1:
        half = len(parts) // 2
        pairs = [f.interleave(parts[i], parts[i + half]) for i in range(half)]
        parts = [low + high for low, high in pairs]
    return fold_lanes(f, parts[0], count, lambda low, high: low + high)


def fold_lanes(f: Function, x: Value, keep: int, combine: Callable[[Value, Value], Value]) -> Value:
    """The lanes of a register combined, upper half with lower, until ``keep`` are left."""
    while (n := lanes(x.type)) > keep:
        low, high = (f.shuffle(x, x, range(start, start + n // 2)) for start in (0, n // 2))
        x = combine(low, high)
    return x
