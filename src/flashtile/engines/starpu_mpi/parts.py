"""Which rank has which tiles of a sequence."""

from __future__ import annotations

import numpy as np

from flashtile.errors import wrong

ZIGZAG, CONTIGUOUS = "zigzag", "contiguous"


def tiles_of(length: int, rank: int, ranks: int, tile: int, distribution: str) -> np.ndarray:
    """The numbers of the tiles of a sequence that a rank has, ascending.

    The sequence is cut into chunks of whole tiles, as even as they come: one a rank ("contiguous"), or two, the r-th
    from either end ("zigzag"), so that causal work is even.
    Raises: SpecError.
    """
    if distribution not in (ZIGZAG, CONTIGUOUS):
        raise wrong("distribution", repr(distribution), f"{ZIGZAG!r} or {CONTIGUOUS!r}")
    chunks = 2 * ranks if distribution == ZIGZAG else ranks
    mine = (rank, chunks - 1 - rank) if distribution == ZIGZAG else (rank,)
    tiles = -(-length // tile)
    return np.concatenate([np.arange(c * tiles // chunks, (c + 1) * tiles // chunks) for c in mine])


def rows_of(tiles: np.ndarray, length: int, tile: int) -> np.ndarray:
    """The numbers of the rows in some tiles, in order."""
    rows = (tiles[:, None] * tile + np.arange(tile)).ravel()
    return rows[rows < length]
