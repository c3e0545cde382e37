"""Coverage of the (query, key) plane by a band, counted by formula: nothing here grows with q_len x kv_len.

These are numbers for the plan and for explain, of causal and window masks alone.  (score/coverage.py maps the tiles of
any other mask by interval analysis.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flashtile.plan.items import Plan
from flashtile.spec import AttentionSpec, Band


@dataclass(frozen=True, slots=True)
class Coverage:
    """Numbers of (query tile, key tile) pairs over all batches and heads.

    An empty tile is skipped, a full tile needs no mask, a partial tile is masked element by element.
    visible counts the (row, key) pairs that attend, of `pairs` in all.
    """

    empty: int
    full: int
    partial: int
    visible: int
    pairs: int


def coverage_of(spec: AttentionSpec, plan: Plan, offsets: Iterable[int] | None = None) -> Coverage:
    """Count the tiles of a call; offsets (B,) are needed where spec.offset is None."""
    if offsets is None:
        if spec.offset is None:
            raise ValueError("offsets: got None, expected (B,) integers, because spec.offset is per batch")
        counts = _tiles(spec, plan, spec.offset) * spec.batch
        visible = visible_pairs(spec, spec.offset) * spec.batch
    else:
        offsets = list(offsets)
        counts = sum((_tiles(spec, plan, offset) for offset in offsets), np.zeros(3, np.int64))
        visible = sum(visible_pairs(spec, offset) for offset in offsets)
    empty, full, partial = (int(n) * spec.heads for n in counts)
    pairs = spec.batch * spec.heads * spec.q_len * spec.kv_len
    return Coverage(empty, full, partial, visible * spec.heads, pairs)


def visible_pairs(spec: AttentionSpec, offset: int | None, kv_len: int | None = None) -> int:
    """Visible (row, key) pairs of one head, exactly; for offset None the most that any offset gives. kv_len: of a call
    with another number of keys."""
    keys = spec.kv_len if kv_len is None else kv_len
    if spec.band is None:
        return spec.q_len * keys
    left, right = _closed(spec.band)
    if offset is None:
        return spec.q_len * min(keys, left + right + 1)
    if spec.q_len == 1:  # as at a decoder's steps
        return max(0, min(keys, offset + right + 1) - max(0, offset - left))

    def below(shift: int) -> int:
        """Sum over rows of clamp(row + shift, 0, keys), the keys to the left of a line."""
        return _ramp(spec.q_len + shift, keys) - _ramp(shift, keys)

    return below(offset + right + 1) - below(offset - left)


def key_ranges(
    band: Band | None, offset: int, first: np.ndarray, stop: np.ndarray, kv_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Key ranges of query tiles, rows [first, stop) each: [touched_begin, touched_end) holds every key that some row
    sees and no other; every row sees all of [full_begin, full_end)."""
    if band is None:
        return np.zeros_like(first), np.full_like(first, kv_len), np.zeros_like(first), np.full_like(first, kv_len)
    left, right = _closed(band)

    def clamp(x: np.ndarray) -> np.ndarray:
        return np.clip(x, 0, kv_len)

    touched_begin, touched_end = clamp(first + (offset - left)), clamp(stop + (offset + right))
    full_begin, full_end = clamp(stop - 1 + (offset - left)), clamp(first + (offset + right + 1))
    return touched_begin, touched_end, full_begin, np.maximum(full_begin, full_end)


def _tiles(spec: AttentionSpec, plan: Plan, offset: int) -> np.ndarray:
    """(empty, full, partial) tiles of one head. O(query tiles)."""
    first = np.arange(plan.query_tiles, dtype=np.int64) * plan.tile_q
    stop = np.minimum(first + plan.tile_q, spec.q_len)
    t0, t1, f0, f1 = key_ranges(spec.band, offset, first, stop, spec.kv_len)
    tile_k, key_tiles = plan.tile_k, -(-spec.kv_len // plan.tile_k)
    touched = np.where(t1 > t0, -(-t1 // tile_k) - t0 // tile_k, 0)
    # The last key tile may be short: it is full once its last key is.
    last = np.where(f1 == spec.kv_len, key_tiles, f1 // tile_k)
    full = np.where(f1 > f0, np.maximum(last - -(-f0 // tile_k), 0), 0)
    n_touched, n_full = int(touched.sum()), int(full.sum())
    return np.array([plan.query_tiles * key_tiles - n_touched, n_full, n_touched - n_full], np.int64)


def _ramp(n: int, ceiling: int) -> int:
    """Sum of clamp(x, 0, ceiling) over all integers x < n."""
    rising = max(0, min(n, ceiling))
    return rising * (rising - 1) // 2 + max(0, n - ceiling) * ceiling


def _closed(band: Band) -> tuple[int, int]:
    """The band with open sides replaced by a distance beyond any key."""
    far = 2**61
    return far if band.left is None else band.left, far if band.right is None else band.right
