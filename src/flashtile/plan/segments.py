"""Segments: what a panel of queries sees of the keys, in the form that the CPU kernels walk.

A kernel works on one key block at a time and knows one stretch of it that every query of the panel sees; so a
panel's runs (score/coverage.py) are cut at block boundaries, and those that share a block are joined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashtile.score.coverage import FULL, Coverage


@dataclass(frozen=True, eq=False)
class Segments:
    """Stretches of keys for every panel of queries, ascending.

    rows       int64 (panels + 1,): the segments of panel r are rows[r] : rows[r + 1]; panels are ordered by batch,
               head and query; a batch or head stands for all where the mask does not depend on it
    keys       int64 (n, 4): some_from, some_to, all_from, all_to.  Keys outside [some_from, some_to) are hidden from
               every query of the panel, those in [all_from, all_to) are seen by every one.  A segment lies in one key
               block, or covers whole blocks, all seen; but kernels take any, as one for a panel is (cpu/reach.py).
    """

    rows: np.ndarray
    keys: np.ndarray


def segments_of(coverage: Coverage, key_block: int) -> Segments:
    """Cut the runs of a coverage, whose query tiles are the panels, at the boundaries of key blocks."""
    row = np.repeat(np.arange(len(coverage.indptr) - 1), np.diff(coverage.indptr))
    pieces = [_whole_blocks(row, coverage, key_block), *_ends(row, coverage, key_block)]
    row, start, stop, full = (np.concatenate(part) for part in zip(*pieces, strict=True))
    order = np.lexsort((start, row))
    row, start, stop, full = (x[order] for x in (row, start, stop, full))
    panels = len(coverage.indptr) - 1
    if not len(row):
        return Segments(np.zeros(panels + 1, np.int64), np.empty((0, 4), np.int64))

    block = start // key_block
    first = np.flatnonzero(np.append(True, (row[1:] != row[:-1]) | (block[1:] != block[:-1])))
    length = np.where(full, stop - start, 0)
    longest = np.maximum.reduceat(length, first)
    group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(row))))
    hits = np.flatnonzero((length == longest[group]) & (length > 0))
    chosen, where = np.unique(group[hits], return_index=True)  # the first of the longest stretches of a group
    keys = np.empty((len(first), 4), np.int64)
    keys[:, 0] = start[first]
    keys[:, 1] = np.maximum.reduceat(stop, first)
    keys[:, 2:] = keys[:, 1:2]  # no stretch that all see: an empty one at the end
    keys[chosen, 2], keys[chosen, 3] = start[hits[where]], stop[hits[where]]
    rows = np.zeros(panels + 1, np.int64)
    np.cumsum(np.bincount(row[first], minlength=panels), out=rows[1:])
    return Segments(rows, keys)


_Pieces = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # panel, start, stop, whether every query sees it


def _whole_blocks(row: np.ndarray, c: Coverage, key_block: int) -> _Pieces:
    """The parts of runs that cover whole key blocks: one piece where all is seen, else one a block."""
    start, stop = -(-c.start // key_block), c.stop // key_block
    blocks = np.maximum(stop - start, 0)
    count = np.where(c.kind == FULL, np.minimum(blocks, 1), blocks)
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    full = np.repeat(c.kind == FULL, count)
    begin = np.repeat(start, count) + nth
    end = np.where(full, np.repeat(stop, count), begin + 1)
    return np.repeat(row, count), begin * key_block, end * key_block, full


def _ends(row: np.ndarray, c: Coverage, key_block: int) -> list[_Pieces]:
    """The parts of runs before their first and after their last block boundary."""
    up, down = -(-c.start // key_block) * key_block, c.stop // key_block * key_block
    head = c.start < up
    tail = (down < c.stop) & (down >= up)
    full = c.kind == FULL
    return [
        (row[head], c.start[head], np.minimum(up, c.stop)[head], full[head]),
        (row[tail], down[tail], c.stop[tail], full[tail]),
    ]
