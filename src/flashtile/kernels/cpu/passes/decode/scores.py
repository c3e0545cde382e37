"""Scores of a few queries: lanes run over the head dimension, and each key is read once for all the rows of a tile.

A tile of ``rows`` queries by ``keys`` keys holds one register of partial sums for each pair.  Adding them up
across lanes is done for all pairs at once by a network of selections, whose tree of additions is the same
for every pair: a score does not depend on the tile that it was computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.decode.rows import CACHE_LINE, Keys, Slots, bytes_ahead, prefetch, read_slot
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Line, Panel, Scores
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import lanes

ROW_TILES = (4, 3, 2, 1)
KEY_TILE = 8  # keys that are scored together, at most
SCORED_KEYS = 32  # a piece of so many keys meets every row tile before the next piece is read


def accumulators(c: Config) -> int:
    """Registers of sums that a tile may hold: a power of two that leaves room for operands."""
    return power_of_two(c.isa.rows * c.isa.vectors)


def power_of_two(most: int) -> int:
    """The largest that is no more."""
    return 1 << (most.bit_length() - 1)


def _kinds(c: Config, rows: int) -> dict[str, Any]:
    """Queries in slots, a register of words for each row, meet ``count`` keys of a block that has ``block_keys``."""
    scores, counts = Scores.of(Line(c.acc, c.key_block)), {"count": "i64", "block_keys": "i64"}
    return {"queries": Panel.of(Line(c.words, rows)), "keys": Keys.kind(), "scores": scores, **counts}


def emit_scores(module: Module, c: Config, rows: int) -> Routine:
    """Scores of ``rows`` queries with ``count`` keys: whole tiles of them, then one by one.

    The keys of a tile are read abreast, a slot of each, so that a slot of the queries is loaded once for them.  A
    single row needs no such reuse, and reads key after key.
    """
    f = Routine(module, f"scores_{rows}", **_kinds(c, rows))
    queries, keys, scores, count, block_keys = f.parameters
    tile = min(KEY_TILE, power_of_two(accumulators(c) // rows))
    slots = Slots.of_words(c, keys.size)
    width = slots.width * c.element
    per_line = max(1, CACHE_LINE // width)  # slots
    ahead = bytes_ahead(c, keys.stride, keys.size * c.element, block_keys, rows)

    # Lines of a tile are asked for in the order of their addresses, not of reading: key by key, where keys adjoin.
    adjoin = keys.stride.eq(slots.whole * width)
    apart = f.select(adjoin, f.const("i64", CACHE_LINE), keys.stride)
    reach = f.select(adjoin, f.const("i64", width * tile), f.const("i64", width))

    def sums(base: Sequence[Value]) -> list[Value]:
        """Partial sums of every row with the keys at these addresses."""

        def step(slot: Value, totals: list[Value], mask: Value | None = None) -> list[Value]:
            at = slot * width if mask is None else slots.last * c.element
            line, totals = queries.line(slot), list(totals)
            words = [line.load(0, r) for r in range(rows)]
            for n, key in enumerate(base):
                value = read_slot(f, c, key + at, mask)
                for place, word in zip(range(n, len(totals), len(base)), words, strict=True):
                    totals[place] = c.product.multiply_add(f, c.isa, totals[place], value, word)
            return totals

        def steps(slot: Value, totals: list[Value]) -> list[Value]:
            for n in range(len(base)):
                prefetch(c, base[0] + (ahead + n * apart + slot * (reach if len(base) > 1 else width)))
            for u in range(per_line):
                totals = step(slot + u, totals)
            return totals

        lines = slots.whole // per_line * per_line
        totals = f.fold(0, lines, per_line, [f.const(c.vector, 0.0)] * (rows * len(base)), steps)
        if per_line > 1:
            totals = f.fold(lines, slots.whole, 1, totals, step)
        return f.fold(slots.whole, slots.count, 1, totals, lambda slot, totals: step(slot, totals, keys.mask))

    whole = count // tile * tile
    for first, last, abreast in ((0, whole, tile), (whole, count, 1)):
        with f.range(first, last, abreast) as key:
            base = [keys.row(key).at]
            while len(base) < abreast:
                base.append(base[-1] + keys.stride)
            parts = sums(base) if rows > 1 else [part for each in base for part in sums([each])]
            _store_sums(f, c, parts, abreast, scores.lane(key))
    f.ret()
    return f


def emit_score_tiles(module: Module, c: Config) -> Routine:
    """Scores of every row with any number of keys. Queries stand tile by tile, each slot by slot. Keys come in pieces
    that stay in the first-level cache while all row tiles meet them."""
    tiles = {rows: emit_scores(module, c, rows) for rows in ROW_TILES}
    f = Routine(module, "score_tiles", **_kinds(c, 1), rows="i64")
    queries, keys, scores, count, block_keys, rows = f.parameters
    row_bytes = Slots.of_words(c, keys.size).count * c.register
    with f.range(0, count, SCORED_KEYS) as key:
        left = f.minimum(count - key, SCORED_KEYS)

        def tile(n: int, row: Value) -> None:
            here = scores.moved((row * c.key_block + key) * c.size)
            some = Panel(queries.at + row * row_bytes, Line(c.words, n))
            tiles[n](f, queries=some, keys=keys.row(key), scores=here, count=left, block_keys=block_keys)

        each_row_tile(f, rows, tile)
    f.ret()
    return f


def each_row_tile(f: Function, rows: Value, tile: Callable[[int, Value], None]) -> None:
    """tile(n, first row) over all rows: as many of the largest tiles as fit, then one of those that are left."""
    largest, *smaller = ROW_TILES
    whole = rows // largest * largest
    with f.range(0, whole, largest) as row:
        tile(largest, row)
    for n in smaller:
        with f.when((rows - whole).eq(n)):
            tile(n, whole)


def _store_sums(f: Function, c: Config, parts: Sequence[Value], keys: int, scores: Scores) -> None:
    """The sum over lanes of each register; they stand row by row, ``keys`` of each."""
    group = min(len(parts), c.lanes)
    run = min(group, keys)
    for first in range(0, len(parts), group):
        some = list(parts[first : first + group])
        while len(some) & (len(some) - 1):  # of three rows
            some.append(f.const(c.vector, 0.0))
        sums = add_across(f, some)
        for n in range(0, min(group, len(parts) - first), run):
            of_a_row = f.shuffle(sums, sums, range(n, n + run)) if run < group else sums
            f.store(of_a_row, scores.place(*divmod(first + n, keys)))


def add_across(f: Function, parts: Sequence[Value]) -> Value:
    """A vector of the sums over lanes of as many registers (powers of two): lanes i and i + n/2 first, and so on.

    Two registers become one: its lanes are half of each, added to the other half of each, brought to the same place.
    """
    count, parts = len(parts), list(parts)
    n = half = lanes(parts[0].type)
    while len(parts) > 1:
        half //= 2
        near = [i if i & half == 0 else n + i for i in range(n)]
        far = [i + half if i & half == 0 else n + i - half for i in range(n)]
        pairs = zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True)
        parts = [f.shuffle(*pair, near) + f.shuffle(*pair, far) for pair in pairs]
    (x,) = parts
    while half > 1:  # each part has several lanes still
        half //= 2
        x = x + f.shuffle(x, x, [i ^ half for i in range(n)])
    return f.shuffle(x, x, range(0, n, n // count)) if count < n else x


def fold_lanes(f: Function, x: Value, keep: int, combine: Callable[[Value, Value], Value]) -> Value:
    """The lanes of a register combined, upper half with lower, until ``keep`` are left."""
    while (n := lanes(x.type)) > keep:
        low, high = (f.shuffle(x, x, range(start, start + n // 2)) for start in (0, n // 2))
        x = combine(low, high)
    return x
