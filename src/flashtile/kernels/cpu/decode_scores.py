"""Scores of a few queries: lanes run over the head dimension, and each key is read once for all the rows of a tile.

A tile of ``rows`` queries by ``keys`` keys holds one register of partial sums for each pair.  Adding them up
across lanes is done for all pairs at once by a network of selections, whose tree of additions is the same
for every pair: a score does not depend on the tile that it was computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.decode_pack import Slots, keys_ahead, prefetch, read_slot, slot_width
from flashtile.kernels.cpu.scores import contract
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.types import SIZES, lanes

ROW_TILES = (4, 2, 1)
KEY_TILE = 8  # keys are scored in multiples of this
SCORED_KEYS = 32  # a piece of so many keys meets every row tile before the next piece is read


def accumulators(c: Config) -> int:
    """Registers of sums that a tile may hold: a power of two that leaves room for operands."""
    return 1 << ((c.isa.rows * c.isa.vectors).bit_length() - 1)


def emit_scores(module: Module, c: Config, rows: int) -> str:
    """A function for ``rows`` queries and a multiple of KEY_TILE keys; its name.

    Arguments: queries (slot by slot, the rows of a slot adjacent), keys, bytes between keys, elements of a key, mask of
    the last slot, scores (out, row-major, rows a key block apart), number of keys.

    The keys of a tile are read abreast, a slot of each, so that a slot of the queries is loaded once for them.  A
    single row needs no such reuse, and reads key after key: memory in the order of its addresses is foreseen by
    hardware, better than by a program that names what it will read.
    """
    f = Function(module, f"scores_{rows}", "void", ["ptr", "ptr", "i64", "i64", "ptr", "ptr", "i64"], internal=True,
                 names=["q", "k", "stride", "size", "mask", "s", "count"])  # fmt: skip
    q, k, stride, size, mask, s, count = f.args
    keys = min(KEY_TILE, accumulators(c) // rows)
    slots = Slots.of(f, size, slot_width(c))
    ahead = keys_ahead(f, c, stride, count)

    def sums(base: Sequence[Value]) -> list[Value]:
        """Partial sums of every row with the keys at these addresses."""

        def step(slot: Value, acc: list[Value], masked: bool = False) -> list[Value]:
            at = slots.last * SIZES[c.memory] if masked else slot * (slots.width * SIZES[c.memory])
            line = q + slot * (rows * c.register)
            words = [f.load(c.words, line + r * c.register, align=c.register) for r in range(rows)]
            out = list(acc)
            for n, key in enumerate(base):
                if rows > 1:
                    prefetch(f, key + (at + ahead))
                value = read_slot(f, c, key + at, mask if masked else None)
                for r in range(rows):
                    place = r * len(base) + n
                    out[place] = contract(f, c, acc[place], value, words[r])
            return out

        acc = f.fold(0, slots.whole, 1, [f.const(c.vector, 0.0)] * (rows * len(base)), step)
        return f.fold(slots.whole, slots.count, 1, acc, lambda slot, acc: step(slot, acc, masked=True))

    with f.range(0, count, keys) as key:
        base = [k + key * stride]
        while len(base) < keys:
            base.append(base[-1] + stride)
        parts = sums(base) if rows > 1 else [part for key_ in base for part in sums([key_])]
        _store_sums(f, c, parts, keys, s + key * c.size)
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


def _store_sums(f: Function, c: Config, parts: Sequence[Value], keys: int, s: Value) -> None:
    """The sum over lanes of each register; they stand row by row, ``keys`` of each."""
    group = min(len(parts), c.lanes)
    run = min(group, keys)
    for first in range(0, len(parts), group):
        sums = add_across(f, parts[first : first + group])
        for n in range(0, group, run):
            row, key = divmod(first + n, keys)
            of_a_row = f.shuffle(sums, sums, range(n, n + run)) if run < group else sums
            f.store(of_a_row, s + (row * c.key_block + key) * c.size)


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
