"""Tiles and visible pairs of a mask program, counted on its map: what plan/coverage.py does by formula for bands."""

from __future__ import annotations

import numpy as np

from flashtile.plan.coverage import Coverage
from flashtile.score.coverage import EMPTY, FULL, PARTIAL
from flashtile.score.coverage import Coverage as Map
from flashtile.score.program import Program

_AT_ONCE = 1 << 18  # elements whose mask is evaluated together


def count_map(program: Program, tiles: Map) -> Coverage:
    """The numbers of a whole call, over all batches and heads.

    visible is exact: the mask is evaluated over the PARTIAL tiles, so this takes time in proportion to them.
    """
    batch, heads, q_len, kv_len = program.shape
    batches, maps = tiles.shape[:2]
    alike = (batch // max(batches, 1)) * (heads // max(maps, 1))  # maps that stand for several
    count = tiles.count()
    visible = sum(_visible(program, tiles, b, h, n) for b, h, n in np.ndindex(tiles.shape[:3]))
    return Coverage(
        empty=count[EMPTY] * alike,
        full=count[FULL] * alike,
        partial=count[PARTIAL] * alike,
        visible=visible * alike,
        pairs=batch * heads * q_len * kv_len,
    )


def _visible(program: Program, tiles: Map, b: int, h: int, tile: int) -> int:
    """Visible pairs of one query tile."""
    rows = np.arange(tile * tiles.tile_q, min((tile + 1) * tiles.tile_q, program.shape[2]))
    step = max(1, _AT_ONCE // len(rows))
    found = 0
    for start, stop, kind in tiles.runs(b, h, tile):
        if kind == FULL:
            found += len(rows) * (stop - start)
            continue
        for first in range(start, stop, step):
            keys = np.arange(first, min(first + step, stop))
            found += int(np.count_nonzero(program.visible(b, h, rows[:, None], keys[None, :])))
    return found
