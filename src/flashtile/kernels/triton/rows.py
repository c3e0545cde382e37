"""Which rows a work item has, and which keys they may see."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(block, tile, heads, group, q_len, TILE_Q: tl.constexpr, PACKED: tl.constexpr):
    """(batch, query head, key/value head, row, whether the row exists) of a tile of queries.

    block counts (batch, query head), or, PACKED, (batch, key/value head): then the rows are those of every query head
    that reads it, and so the query head is a column beside the row. Rows past the last repeat it.
    """
    r = tile * TILE_Q + tl.arange(0, TILE_Q)
    if PACKED:
        kv_heads = heads // group
        b, kv = block // kv_heads, block % kv_heads
        inside = r < group * q_len
        r = tl.minimum(r, group * q_len - 1)
        return b, kv * group + r // q_len, kv, r % q_len, inside
    else:
        b, h = block // heads, block % heads
        return b, h, h // group, tl.minimum(r, q_len - 1), r < q_len


@triton.jit
def number_of_head(b, h, heads, origin):
    """b * H + h, by which dropout knows a head; origin: of tiles of larger arrays, in those."""
    if origin is None:
        return b * heads + h
    else:
        return (b + origin[0]) * origin[4] + h + origin[1]


@triton.jit
def longest_first(place, query_tiles, blocks, together):
    """(block, tile of queries) of a place in the order of work where later rows see more keys: the last tiles first, of
    `together` blocks at a time, whose keys and values the device's cache holds."""
    group = place // (together * query_tiles)
    within = place % (together * query_tiles)
    width = tl.minimum(together, blocks - group * together)
    return group * together + within % width, query_tiles - 1 - within // width


@triton.jit
def rows_of_tile(tile, q_len, TILE_Q: tl.constexpr, PACKED: tl.constexpr):
    """The first row of a tile and the last that exists; PACKED, a tile has all rows."""
    if PACKED:
        return tile * 0, tile * 0 + q_len - 1
    else:
        return tile * TILE_Q, tl.minimum(tile * TILE_Q + TILE_Q, q_len) - 1


@triton.jit
def key_limits(i, b, begin, end, left, right, offset, offsets, BAND: tl.constexpr):
    """The keys [low, high) of [begin, end) that each row i, one or many, sees by its position: key j iff
    -left <= j - (i + offset) <= right. A side that is None is open."""
    if BAND:
        anchor = i.to(tl.int64)
        if offsets is not None:
            anchor += tl.load(offsets + b)
        else:
            anchor += offset
        first, last = begin.to(tl.int64), end.to(tl.int64)
        low, high = tl.zeros_like(i) + begin, tl.zeros_like(i) + end
        if left is not None:
            low = tl.minimum(tl.maximum(anchor - left, first), last).to(tl.int32)
        if right is not None:
            high = tl.minimum(tl.maximum(anchor + right + 1, first), last).to(tl.int32)
        return low, high
    else:
        return tl.zeros_like(i) + begin, tl.zeros_like(i) + end
