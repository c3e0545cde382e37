"""dQ = scale dS K: a program sums over the keys that its tile of query rows sees, as the forward walks them."""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.backward import leave, load, over_keys, row_values, weigh
from flashtile.kernels.triton.containment import add_signed, any_not_finite
from flashtile.kernels.triton.language import add_product, number, product, rounded
from flashtile.kernels.triton.rows import key_limits, locate, number_of_head


@triton.jit
def backward_q(
    q, k, v, do, lse, delta, dq, odd,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d, dq_b, dq_h, dq_s, dq_d,
    first, items, heads, group, q_len, kv_len, head_size, value_size, query_tiles, splits, split_keys, dq_split,
    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HEAD: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BAND: tl.constexpr, PARTS: tl.constexpr, CONTAIN: tl.constexpr,
):  # fmt: skip
    """Work items first, first + 1, ..., tiles of query rows: their dQ is added to what dq holds. PARTS: each against
    split_keys of the keys, and dq (splits, B, H, S_q, D) gets what each part gives, dq_split elements apart.

    Shapes:  as `forward`, do as o, dq as q; lse and delta (B, H, S_q).
    Two launches, as the forward's: the second, CONTAIN, computes what the first has marked in odd as not finite.
    """
    if CONTAIN:
        for item in range(first + tl.program_id(0), first + items, tl.num_programs(0)):
            if tl.load(odd + item) != 0:
                _tile(
                    item, q, k, v, do, lse, delta, dq, odd,
                    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
                    dq_b, dq_h, dq_s, dq_d,
                    heads, group, q_len, kv_len, head_size, value_size, query_tiles, splits, split_keys, dq_split,
                    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
                    SCORE, MASK, SLOPE, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, BAND, PARTS,
                    CONTAIN,
                )  # fmt: skip
    else:
        _tile(
            first + tl.program_id(0), q, k, v, do, lse, delta, dq, odd,
            q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
            dq_b, dq_h, dq_s, dq_d,
            heads, group, q_len, kv_len, head_size, value_size, query_tiles, splits, split_keys, dq_split,
            scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
            SCORE, MASK, SLOPE, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, BAND, PARTS,
            CONTAIN,
        )  # fmt: skip


@triton.jit
def _tile(
    item, q, k, v, do, lse, delta, dq, odd,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d, dq_b, dq_h, dq_s, dq_d,
    heads, group, q_len, kv_len, head_size, value_size, query_tiles, splits, split_keys, dq_split,
    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HEAD: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BAND: tl.constexpr, PARTS: tl.constexpr, CONTAIN: tl.constexpr,
):  # fmt: skip
    """One tile of query rows: the arguments of `backward_q`."""
    ACC: tl.constexpr = lse.dtype.element_ty
    odd += item
    if PARTS:
        split, item = item % splits, item // splits
        begin = split * split_keys
        end = tl.minimum(begin + split_keys, kv_len)
        dq += split.to(tl.int64) * dq_split
    else:
        begin, end = tl.zeros_like(kv_len), kv_len
    tile = item % query_tiles
    if BAND:  # later rows see more keys of a causal call: start with what takes longest
        tile = query_tiles - 1 - tile
    b, h, kv, i, inside = locate(item // query_tiles, tile, heads, group, q_len, TILE_Q, False)
    low, high = key_limits(i, b, begin, end, left, right, offset, offsets, BAND)
    loads, at = tile_of_rows(
        q, k, v, do, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
        b, h, kv, i, inside, kv_len, head_size, value_size, TILE_K, HEAD, VALUE, OPERAND,
    )  # fmt: skip
    factor = number(scale, ACC)
    nats, row_delta = row_values(lse, delta, (b.to(tl.int64) * heads + h) * q_len + i, inside)
    of_rows = (i[:, None], nats[:, None], row_delta[:, None], low[:, None], high[:, None], factor)
    table = (rows, runs) if rows is None else (rows + 2 * (b * rows_b + h * rows_h + tile), runs)
    acc = over_keys(
        tl.zeros([TILE_Q, HEAD], ACC), (low, high, begin, end), table, of_rows, loads, at,
        (captures, threshold, seed, number_of_head(b, h, heads, origin), origin), _key_tile,
        CONTAIN, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK, SLOPE, None, None, ACC,
    )  # fmt: skip
    if not CONTAIN:
        bad = any_not_finite(tl.where(inside[:, None], acc, 0.0))
        tl.store(odd, bad)
        inside = inside & (tl.broadcast_to(bad, [TILE_Q]) == 0)
    d, batch, head = tl.arange(0, HEAD), b.to(tl.int64), h.to(tl.int64)
    out = dq + batch * dq_b + head * dq_h + i.to(tl.int64)[:, None] * dq_s + d.to(tl.int64)[None, :] * dq_d
    there = inside[:, None] & (d < head_size)[None, :]
    leave(out, acc * factor, there, PARTS)


@triton.jit
def tile_of_rows(
    q, k, v, do, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
    b, h, kv, i, inside, kv_len, head_size, value_size,
    TILE_K: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """(q and dO of the rows, addresses of the first tiles of K and V), and the sizes by which these are read."""
    batch, head, group = b.to(tl.int64), h.to(tl.int64), kv.to(tl.int64)
    d, dv, n = tl.arange(0, HEAD), tl.arange(0, VALUE), tl.arange(0, TILE_K).to(tl.int64)
    row = i.to(tl.int64)[:, None]
    depth, value_depth = d.to(tl.int64)[None, :], dv.to(tl.int64)[None, :]
    ours = q + batch * q_b + head * q_h + row * q_s + depth * q_d
    query = tl.load(ours, mask=inside[:, None] & (d < head_size)[None, :], other=0.0)
    theirs = do + batch * do_b + head * do_h + row * do_s + value_depth * do_d
    slope = tl.load(theirs, mask=inside[:, None] & (dv < value_size)[None, :], other=0.0)
    keys = k + batch * k_b + group * k_h + n[:, None] * k_s + depth * k_d
    values = v + batch * v_b + group * v_h + n[:, None] * v_s + value_depth * v_d
    loads = rounded(query, OPERAND), rounded(slope, OPERAND), keys, values
    return loads, (b, h, k_s.to(tl.int64), v_s.to(tl.int64), kv_len, head_size, value_size)


@triton.jit
def weighed(
    n0, rows, loads, at, where, FULL: tl.constexpr, SELECT: tl.constexpr, TILE_K: tl.constexpr, WHOLE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """`weigh` of the key tile at n0, and its keys (TILE_K, HEAD)."""
    query, slope, keys, values = loads
    b, h, k_s, v_s, kv_len, head_size, value_size = at
    j = n0 + tl.arange(0, TILE_K)
    d, dv = tl.arange(0, keys.shape[1]), tl.arange(0, values.shape[1])
    key = load(keys + n0 * k_s, (j < kv_len)[:, None], (d < head_size)[None, :], FULL, WHOLE)
    value = load(values + n0 * v_s, (j < kv_len)[:, None], (dv < value_size)[None, :], FULL, WHOLE)
    key, value = rounded(key, OPERAND), rounded(value, OPERAND)
    s = product(query, tl.trans(key), ACC, PRECISION)
    dp = product(slope, tl.trans(value), ACC, PRECISION)
    found = weigh(
        s, dp, rows, b, h, j[None, :], n0, kv_len, where, FULL, SELECT, False, TILE_K, SCORE, MASK, SLOPE, ACC
    )
    return found, key


@triton.jit
def _key_tile(
    acc, n0, rows, loads, at, where, FULL: tl.constexpr, CONTAIN: tl.constexpr, TILE_K: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr,
    SLOPE: tl.constexpr, GIVES: tl.constexpr, PLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc += dS k of one key tile."""
    found, key = weighed(
        n0, rows, loads, at, where, FULL, CONTAIN, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK, SLOPE, ACC
    )
    before, seen = found[2], found[3]
    if CONTAIN:
        return add_signed(rounded(before, OPERAND), key, before, seen, acc, ACC, PRECISION)
    else:
        return add_product(rounded(before, OPERAND), key, acc, ACC, PRECISION)
