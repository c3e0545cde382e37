"""In which order tiles meet in a backward over ranks: a step for each pair of tiles, of global tile numbers alone.

A row's sum of dQ is at one key tile at a time, and a rank computes one pair at a time. In the order of the forward (i,
i - 1, ..., 0) causal rows meet the last key tiles first, all at once; with the first and the last tiles on one rank, as
zigzag has them, ranks then have two pairs a step and later one, and wait for one another: 3 n / 2 steps for n tiles.

Folded, tile n - 1 - t lies on tile t. The two triangles at the diagonal are then one square, in which every rank has
one pair a step, and so is what is below it: n + 1 steps.
"""

from __future__ import annotations

import numpy as np


def steps_of(touched: np.ndarray) -> np.ndarray:
    """int64 (query tiles, key tiles): the steps of pairs, where `touched`, bool, says which there are; of two orders
    that which takes fewer steps if each rank has a tile and its fold. The number of ranks does not matter."""
    i, j = (np.asarray(x, np.int64) for x in np.indices(touched.shape))
    tiles = max(1, *touched.shape)
    along = (np.minimum(i, max(0, touched.shape[1] - 1)) - j) % max(1, touched.shape[1])
    folded = _folded(i, j, tiles)
    owner = np.minimum(j, tiles - 1 - j)
    return folded if _length(folded, owner, touched) < _length(along, owner, touched) else along


def _folded(i: np.ndarray, j: np.ndarray, tiles: int) -> np.ndarray:
    """The triangles at the diagonal, the square below it, the triangles above it, the square above it."""
    half = (tiles + 1) // 2
    row, key = np.minimum(i, tiles - 1 - i), np.minimum(j, tiles - 1 - j)
    first = i < half  # rows that lie where they are
    diagonal = first == (j < half)
    below = np.where(first, row >= key, row <= key)
    steps = [
        (row + first - key) % (half + 1),
        half + 1 + (row - key) % half,
        2 * half + 1 + (row - (~first).astype(np.int64) - key) % max(1, half - 1),
        3 * half + (row - key) % half,
    ]
    return np.select([diagonal & below, ~diagonal & ~first, diagonal], steps[:3], steps[3])


def _length(steps: np.ndarray, owner: np.ndarray, touched: np.ndarray) -> int:
    """How many pairs are computed one after the other, if every rank ends a step before the next begins."""
    ranks = int(owner.max(initial=0)) + 1
    count = np.bincount((steps * ranks + owner)[touched], minlength=(int(steps.max(initial=0)) + 1) * ranks)
    return int(count.reshape(-1, ranks).max(axis=1).sum())


def first_use(ranks: int, rank: np.ndarray, tile: np.ndarray, tiles: int) -> np.ndarray:
    """int64 (ranks, tiles): the number of the first pair for which a rank needs a tile; how many there are, if for
    none. rank, tile (pairs,): of each pair, in their order."""
    found = np.full((ranks, tiles), len(rank))
    np.minimum.at(found, (rank, tile), np.arange(len(rank)))
    return found
