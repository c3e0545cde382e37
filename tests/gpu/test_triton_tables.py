"""The table of a mask's coverage, as the kernel walks it, against the map it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashtile.kernels.triton.tables import Table, table_of, turned
from flashtile.score import Program, document, padding, prefix
from flashtile.score.coverage import EMPTY, FULL, PARTIAL, Coverage, coverage

SHAPE = (2, 3, 70, 101)
RNG = np.random.default_rng(0)
MASKS: dict[str, Any] = {
    "none": None,
    "documents": document(np.sort(RNG.integers(0, 4, (2, 70))), np.sort(RNG.integers(0, 4, (2, 101)))),
    "padding": padding(np.array([0, 101])),
    "prefix": prefix(50),
    "of heads": lambda b, h, i, j: (h == 1) & (i >= j),
    "stored": RNG.random((70, 101)) < 0.5,
    "nothing": lambda b, h, i, j: (i < 0) & (j < 0),
}


def walked(table: Table, tiles: Coverage) -> np.ndarray:
    """The map again: for each batch, head and query tile what its runs make of each key tile."""
    kinds = np.zeros(tiles.shape, np.uint8)
    for b, h, tile in np.ndindex(tiles.shape[:3]):
        row = 2 * (b * table.rows_b + h * table.rows_h + tile)
        for kind, first in ((FULL, row), (PARTIAL, row + 1)):
            for start, stop in table.runs[table.rows[first] : table.rows[first + 1]]:
                assert start % tiles.tile_k == 0 and start < stop <= SHAPE[3]
                assert kind == PARTIAL or stop % tiles.tile_k == 0
                part = kinds[b, h, tile, start // tiles.tile_k : -(-stop // tiles.tile_k)]
                assert (part == EMPTY).all()
                part[:] = kind
    return kinds


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_tile_once(name: str, tile: tuple[int, int]) -> None:
    """And of its kind, but that the last key tile, which is ragged, is never FULL."""
    tiles = coverage(Program.of(SHAPE, mask=MASKS[name]), *tile)
    want = tiles.tiles().copy()
    want[..., -1] = np.where(want[..., -1] == FULL, PARTIAL, want[..., -1])
    np.testing.assert_array_equal(walked(table_of(tiles), tiles), want)


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_tile_once_where_rows_are_walked(name: str, tile: tuple[int, int]) -> None:
    """By tiles of keys: what is FULL has whole tiles of both, and runs are as long as they can be."""
    tiles = coverage(Program.of(SHAPE, mask=MASKS[name]), *tile)
    want = tiles.tiles().copy()
    for edge in (np.s_[..., -1], np.s_[..., -1, :]):
        want[edge] = np.where(want[edge] == FULL, PARTIAL, want[edge])
    table, kinds = turned(tiles, *SHAPE[2:]), np.zeros_like(want)
    for b, h, column in np.ndindex(*tiles.shape[:2], tiles.shape[3]):
        at = 2 * (b * table.rows_b + h * table.rows_h + column)
        for kind, first in ((FULL, at), (PARTIAL, at + 1)):
            runs = table.runs[table.rows[first] : table.rows[first + 1]].tolist()
            assert all(stop < start for (_, stop), (start, _) in zip(runs, runs[1:], strict=False))
            for start, stop in runs:
                assert start % tile[0] == 0 and start < stop <= SHAPE[2]
                kinds[b, h, start // tile[0] : -(-stop // tile[0]), column] = kind
    np.testing.assert_array_equal(kinds, want)


def test_full_runs_stay_whole() -> None:
    """One run a stretch, not one a tile: the table grows with the edges of a mask alone."""
    table = table_of(coverage(Program.of((1, 1, 64, 4096), mask=prefix(3000)), 64, 16))
    assert table.runs.tolist() == [[0, 2992], [2992, 3008]] and table.rows.tolist() == [0, 1, 2]
    assert table.rows.dtype == table.runs.dtype == np.int32
