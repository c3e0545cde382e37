"""How the backward of a call with few heads is cut, so that it fills the device: dQ in parts of the keys, dK and dV in
parts of the rows and of the heads that share them.

Each part leaves its sums in the accumulator's type, and `add_parts` adds them up, in order: so a call has the same bits
at every run, on devices with as many processors.
"""

from __future__ import annotations

from dataclasses import dataclass

PART_LENGTH = 512  # fewest keys, or rows, of a part: some tiles, so that a program outlives its start


@dataclass(frozen=True)
class Keys:
    """Parts of the keys, each of so many but the last."""

    count: int
    length: int


@dataclass(frozen=True)
class Rows:
    """Parts of the rows, each of so many but the last, for each part of the heads that share keys, likewise."""

    row_parts: int
    rows: int
    head_parts: int
    heads: int

    @property
    def count(self) -> int:
        return self.row_parts * self.head_parts


def parts_of_keys(items: int, length: int, tile: int, processors: int) -> Keys:
    """Parts of whole tiles for `items` work items, as many as run at the same time, of PART_LENGTH keys or more."""
    most = min(processors // max(items, 1), length // PART_LENGTH)
    if most < 2:
        return Keys(1, length)
    tiles = -(-length // (most * tile))
    return Keys(-(-length // (tiles * tile)), tiles * tile)


def parts_of_rows(items: int, group: int, length: int, tile: int, processors: int) -> Rows:
    """The same of rows, for each of so many heads as can be had: their sums are as long as a head's own."""
    most = max(1, min(processors // max(items, 1), group)) if length else 1
    heads = -(-group // most)
    head_parts = -(-group // heads)
    rows = parts_of_keys(items * head_parts, length, tile, processors)
    return Rows(rows.count, rows.length, head_parts, heads)
