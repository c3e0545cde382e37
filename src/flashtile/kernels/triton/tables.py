"""Where a mask program lets a tile of queries look: its coverage, as two arrays that the kernel walks.

rows  int32 (2 n + 1,)  n tiles of queries, by batch, head and tile: runs rows[2 r] : rows[2 r + 1] of tile r are
                        FULL, runs rows[2 r + 1] : rows[2 r + 2] are PARTIAL
runs  int32 (m, 2)      keys [start, stop) of each run; a FULL run is whole key tiles
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashtile.score.coverage import FULL, PARTIAL, Coverage


class Table(NamedTuple):
    rows: np.ndarray
    runs: np.ndarray
    rows_b: int  # tiles of queries from one batch to the next, 0 where one map serves all
    rows_h: int
    both: np.ndarray  # rows and, right behind them, runs: one array to copy


def table_of(coverage: Coverage) -> Table:
    """The table of a coverage. A FULL run that ends within a key tile gives it up: the tile is not whole."""
    row = np.repeat(np.arange(len(coverage.indptr) - 1), np.diff(coverage.indptr))
    start, stop, full = coverage.start, coverage.stop, coverage.kind == FULL
    whole = np.where(full, stop // coverage.tile_k * coverage.tile_k, stop)
    ragged = full & (whole < stop)
    row = np.concatenate([row, row[ragged]])
    start, stop = np.concatenate([start, whole[ragged]]), np.concatenate([whole, stop[ragged]])
    kind = np.concatenate([coverage.kind, np.full(ragged.sum(), PARTIAL, coverage.kind.dtype)])
    there = start < stop
    row, start, stop, kind = row[there], start[there], stop[there], kind[there]
    group = 2 * row + (kind != FULL)
    order = np.lexsort((start, group))
    batches, heads, tiles, _ = coverage.shape
    rows = np.zeros(2 * batches * heads * tiles + 1, np.int32)
    np.cumsum(np.bincount(group, minlength=len(rows) - 1), out=rows[1:])
    runs = np.stack([start[order], stop[order]], 1).astype(np.int32)
    both = np.concatenate([rows, runs.ravel()])
    return Table(rows, runs, heads * tiles if batches > 1 else 0, tiles if heads > 1 else 0, both)


def turned(coverage: Coverage, q_len: int, kv_len: int) -> Table:
    """The same for kernels that walk rows: runs of rows for every tile of keys. What is FULL is whole tiles of both."""
    batches, heads, row_tiles, key_tiles = coverage.shape
    rows, keys = coverage.tile_q, coverage.tile_k
    first, last = coverage.start // keys, -(-coverage.stop // keys)
    width = last - first
    run = np.repeat(np.arange(len(width)), width)
    key_tile = np.arange(len(run)) - np.repeat(np.cumsum(width) - width, width) + first[run]
    owner = np.repeat(np.arange(len(coverage.indptr) - 1), np.diff(coverage.indptr))[run]
    head, tile = owner // max(row_tiles, 1), owner % max(row_tiles, 1)
    whole = ((tile + 1) * rows <= q_len) & ((key_tile + 1) * keys <= kv_len)
    group = 2 * (head * key_tiles + key_tile) + ((coverage.kind[run] != FULL) | ~whole)
    order = np.lexsort((tile, group))
    group, tile = group[order], tile[order]
    begins = np.flatnonzero(np.append(True, (group[1:] != group[:-1]) | (tile[1:] != tile[:-1] + 1))[: len(group)])
    ends = np.append(begins[1:], len(group))
    pointers = np.zeros(2 * batches * heads * key_tiles + 1, np.int32)
    np.cumsum(np.bincount(group[begins], minlength=len(pointers) - 1), out=pointers[1:])
    stop = np.minimum((tile[ends - 1] + 1) * rows, q_len) if len(begins) else np.zeros(0, np.int64)
    runs = np.stack([tile[begins] * rows, stop], 1).astype(np.int32)
    both = np.concatenate([pointers, runs.ravel()])
    return Table(pointers, runs, heads * key_tiles if batches > 1 else 0, key_tiles if heads > 1 else 0, both)
