"""dV = P^T dO and dK = scale dS^T Q: a program owns a tile of keys, and sums over the rows that see them.

Tiles are turned here, keys first, so that P and dS are left operands of the products as they come. Query heads that
share a key/value head follow one another in one program: their sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.backward import leave, load, row_values, weigh
from flashtile.kernels.triton.containment import add_signed, any_not_finite
from flashtile.kernels.triton.dropout import share_of
from flashtile.kernels.triton.language import add_product, number, product, rounded
from flashtile.kernels.triton.rows import key_limits, number_of_head


@triton.jit
def backward_kv(
    q, k, v, do, lse, delta, dk, dv, odd,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
    dk_b, dk_h, dk_s, dk_d, dv_b, dv_h, dv_s, dv_d,
    first, items, heads, group, q_len, kv_len, head_size, value_size, key_tiles,
    splits, row_parts, split_rows, split_heads, dk_split, dv_split,
    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HEAD: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BAND: tl.constexpr, PARTS: tl.constexpr, CONTAIN: tl.constexpr,
):  # fmt: skip
    """Work items first, first + 1, ..., tiles of keys: their dK and dV are added to what dk and dv hold. PARTS: each
    from split_heads of the heads that share them and split_rows of the rows, and dk and dv (splits, B, H_kv, S_kv, D)
    get what each part gives, dk_split and dv_split elements apart.

    Shapes:  as `forward`, do as o, dk as k, dv as v; lse and delta (B, H, S_q). rows and runs: the coverage of a mask
             turned, rows for each tile of keys.
    Two launches, as the forward's: the second, CONTAIN, computes what the first has marked in odd as not finite.
    """
    if CONTAIN:
        for item in range(first + tl.program_id(0), first + items, tl.num_programs(0)):
            if tl.load(odd + item) != 0:
                _tile(
                    item, q, k, v, do, lse, delta, dk, dv, odd,
                    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
                    dk_b, dk_h, dk_s, dk_d, dv_b, dv_h, dv_s, dv_d,
                    heads, group, q_len, kv_len, head_size, value_size, key_tiles,
                    splits, row_parts, split_rows, split_heads, dk_split, dv_split,
                    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
                    SCORE, MASK, SLOPE, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, BAND, PARTS,
                    CONTAIN,
                )  # fmt: skip
    else:
        _tile(
            first + tl.program_id(0), q, k, v, do, lse, delta, dk, dv, odd,
            q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
            dk_b, dk_h, dk_s, dk_d, dv_b, dv_h, dv_s, dv_d,
            heads, group, q_len, kv_len, head_size, value_size, key_tiles,
            splits, row_parts, split_rows, split_heads, dk_split, dv_split,
            scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
            SCORE, MASK, SLOPE, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, BAND, PARTS,
            CONTAIN,
        )  # fmt: skip


@triton.jit
def _tile(
    item, q, k, v, do, lse, delta, dk, dv, odd,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
    dk_b, dk_h, dk_s, dk_d, dv_b, dv_h, dv_s, dv_d,
    heads, group, q_len, kv_len, head_size, value_size, key_tiles,
    splits, row_parts, split_rows, split_heads, dk_split, dv_split,
    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HEAD: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BAND: tl.constexpr, PARTS: tl.constexpr, CONTAIN: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the arguments of `backward_kv`."""
    ACC: tl.constexpr = lse.dtype.element_ty
    odd += item
    first_head, heads_here, first_row, last_row = tl.zeros_like(group), group, tl.zeros_like(q_len), q_len
    if PARTS:
        split, item = item % splits, item // splits
        first_head, first_row = split // row_parts * split_heads, split % row_parts * split_rows
        heads_here, last_row = tl.minimum(split_heads, group - first_head), tl.minimum(first_row + split_rows, q_len)
        if dk is not None:
            dk += split.to(tl.int64) * dk_split
        if dv is not None:
            dv += split.to(tl.int64) * dv_split
    tile, kv_heads = item % key_tiles, heads // group
    b, kv, n0 = item // key_tiles // kv_heads, item // key_tiles % kv_heads, tile * TILE_K
    batch, kv_head, j = b.to(tl.int64), kv.to(tl.int64), n0 + tl.arange(0, TILE_K)
    d, dvs, column, inside = tl.arange(0, HEAD), tl.arange(0, VALUE), j.to(tl.int64)[:, None], j < kv_len
    depth, value_depth = d.to(tl.int64)[None, :], dvs.to(tl.int64)[None, :]
    some, some_values = inside[:, None] & (d < head_size)[None, :], inside[:, None] & (dvs < value_size)[None, :]
    key = tl.load(k + batch * k_b + kv_head * k_h + column * k_s + depth * k_d, mask=some, other=0.0)
    value = tl.load(v + batch * v_b + kv_head * v_h + column * v_s + value_depth * v_d, mask=some_values, other=0.0)
    key, value, factor = rounded(key, OPERAND), rounded(value, OPERAND), number(scale, ACC)

    m = tl.arange(0, TILE_Q).to(tl.int64)[:, None]
    rows_at = (n0, kv_len, q_len, head_size, value_size, q_s.to(tl.int64), do_s.to(tl.int64), first_row, last_row)
    band = (left, right, offset, offsets)
    sums = tl.zeros([TILE_K, HEAD], ACC), tl.zeros([TILE_K, VALUE], ACC)
    for g in range(first_head, first_head + heads_here):
        h = kv * group + g
        head = h.to(tl.int64)
        queries = q + batch * q_b + head * q_h + m * q_s + depth * q_d
        slopes = do + batch * do_b + head * do_h + m * do_s + value_depth * do_d
        loads = (key, value, queries, slopes, lse + (batch * heads + h) * q_len, delta + (batch * heads + h) * q_len)
        table = (rows, runs) if rows is None else (rows + 2 * (b * rows_b + h * rows_h + tile), runs)
        where = (captures, threshold, seed, number_of_head(b, h, heads, origin), origin)
        sums = _over_rows(
            sums, table, loads, rows_at, band, (b, h, factor), where,
            CONTAIN, TILE_Q, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK, SLOPE, BAND, ACC,
        )  # fmt: skip
    acc_k, acc_v = sums
    if not CONTAIN:
        bad = 0
        if dk is not None:
            bad = any_not_finite(acc_k)
        if dv is not None:
            bad = bad | any_not_finite(acc_v)
        tl.store(odd, bad)
        good = tl.broadcast_to(bad, [TILE_K])[:, None] == 0
        some, some_values = some & good, some_values & good
    if dk is not None:
        leave(dk + batch * dk_b + kv_head * dk_h + column * dk_s + depth * dk_d, acc_k * factor, some, PARTS)
    if dv is not None:
        if threshold is not None:
            acc_v = acc_v / share_of(threshold, ACC)
        leave(dv + batch * dv_b + kv_head * dv_h + column * dv_s + value_depth * dv_d, acc_v, some_values, PARTS)


@triton.jit
def _over_rows(
    sums, table, loads, at, band, place, where, CONTAIN: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr,
    SLOPE: tl.constexpr, BAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums over every tile of rows of one head that sees some of the keys, those that see all of them first."""
    if MASK is None:
        touched, stop, full_from, full_to = _row_limits(at, place, band, TILE_Q, TILE_K, BAND)
        for m0 in range(full_from, full_to, TILE_Q):
            sums = _row_tile(
                sums, m0, loads, at, band, place, where, True, CONTAIN, TILE_Q, TILE_K, WHOLE, OPERAND, PRECISION,
                SCORE, MASK, SLOPE, BAND, ACC,
            )  # fmt: skip
        whole = full_to > full_from
        before = tl.cdiv(tl.maximum(tl.where(whole, full_from, stop) - touched, 0), TILE_Q)
        resume = tl.where(whole, full_to, stop)
        after = tl.cdiv(tl.maximum(stop - resume, 0), TILE_Q)
        for t in range(0, before + after):
            m0 = tl.where(t < before, touched + t * TILE_Q, resume + (t - before) * TILE_Q)
            sums = _row_tile(
                sums, m0, loads, at, band, place, where, False, CONTAIN, TILE_Q, TILE_K, WHOLE, OPERAND, PRECISION,
                SCORE, MASK, SLOPE, BAND, ACC,
            )  # fmt: skip
    elif table[0] is None:  # any tile may be cut
        touched, stop, _, _ = _row_limits(at, place, band, TILE_Q, TILE_K, BAND)
        for m0 in range(touched, stop, TILE_Q):
            sums = _row_tile(
                sums, m0, loads, at, band, place, where, False, CONTAIN, TILE_Q, TILE_K, WHOLE, OPERAND, PRECISION,
                SCORE, MASK, SLOPE, BAND, ACC,
            )  # fmt: skip
    else:
        first, runs = table
        for run in range(tl.load(first), tl.load(first + 1)):
            for m0 in range(
                tl.maximum(tl.load(runs + 2 * run), at[7]), tl.minimum(tl.load(runs + 2 * run + 1), at[8]), TILE_Q
            ):
                sums = _row_tile(
                    sums, m0, loads, at, band, place, where, True, CONTAIN, TILE_Q, TILE_K, WHOLE, OPERAND, PRECISION,
                    SCORE, MASK, SLOPE, BAND, ACC,
                )  # fmt: skip
        for run in range(tl.load(first + 1), tl.load(first + 2)):
            for m0 in range(
                tl.maximum(tl.load(runs + 2 * run), at[7]), tl.minimum(tl.load(runs + 2 * run + 1), at[8]), TILE_Q
            ):
                sums = _row_tile(
                    sums, m0, loads, at, band, place, where, False, CONTAIN, TILE_Q, TILE_K, WHOLE, OPERAND, PRECISION,
                    SCORE, MASK, SLOPE, BAND, ACC,
                )  # fmt: skip
    return sums


@triton.jit
def _row_limits(at, place, band, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr):
    """(touched, stop): tiles of rows that see some of the keys; (full_from, full_to): rows of whole tiles that see all.
    All of them among the rows of this part, whole tiles.

    Row i sees key j iff -left <= j - (i + offset) <= right.
    """
    n0, kv_len = at[0], at[1]
    low, high = at[7], at[8]
    full_low, full_high = low, high
    if BAND:
        left, right, offset, offsets = band
        first, last = n0.to(tl.int64), tl.minimum(n0 + TILE_K, kv_len).to(tl.int64) - 1
        shift = tl.load(offsets + place[0]) if offsets is not None else offset
        least, most = low.to(tl.int64), high.to(tl.int64)
        low = tl.minimum(tl.maximum(first - right - shift, least), most).to(tl.int32)
        high = tl.minimum(tl.maximum(last + left - shift + 1, least), most).to(tl.int32)
        full_low = tl.minimum(tl.maximum(last - right - shift, least), most).to(tl.int32)
        full_high = tl.minimum(tl.maximum(first + left - shift + 1, least), most).to(tl.int32)
    full_high = tl.where(n0 + TILE_K <= kv_len, full_high, 0)
    return low // TILE_Q * TILE_Q, high, tl.cdiv(full_low, TILE_Q) * TILE_Q, full_high // TILE_Q * TILE_Q


@triton.jit
def _row_tile(
    sums, m0, loads, at, band, place, where, FULL: tl.constexpr, CONTAIN: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr,
    MASK: tl.constexpr, SLOPE: tl.constexpr, BAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dK += dS^T q and dV += P^T dO of one tile of rows. FULL: every row of it sees every key."""
    acc_k, acc_v = sums
    key, value, queries, slopes, lse, delta = loads
    n0, kv_len, q_len, head_size, value_size, q_s, do_s, _, _ = at
    b, h, factor = place
    row = m0 + tl.arange(0, TILE_Q)
    inside = row < q_len
    d, dv = tl.arange(0, key.shape[1]), tl.arange(0, value.shape[1])
    query = load(queries + m0 * q_s, inside[:, None], (d < head_size)[None, :], FULL, WHOLE)
    slope = load(slopes + m0 * do_s, inside[:, None], (dv < value_size)[None, :], FULL, WHOLE)
    query, slope = rounded(query, OPERAND), rounded(slope, OPERAND)
    i = tl.minimum(row, q_len - 1)
    nats, row_delta = row_values(lse, delta, row, inside)
    low, high = i, i
    if not FULL:
        low, high = key_limits(i, b, tl.zeros_like(kv_len), kv_len, band[0], band[1], band[2], band[3], BAND)
        high = tl.where(inside, high, 0)
    rows = (i[None, :], nats[None, :], row_delta[None, :], low[None, :], high[None, :], factor)
    j = (n0 + tl.arange(0, TILE_K))[:, None]
    s = product(key, tl.trans(query), ACC, PRECISION)
    dp = product(value, tl.trans(slope), ACC, PRECISION)
    weight, _, before, seen, _ = weigh(
        s, dp, rows, b, h, j, n0, kv_len, where, FULL, CONTAIN, True, TILE_K, SCORE, MASK, SLOPE, ACC
    )
    if CONTAIN:
        acc_v = add_signed(rounded(weight, OPERAND), slope, weight, seen, acc_v, ACC, PRECISION)
        acc_k = add_signed(rounded(before, OPERAND), query, before, seen, acc_k, ACC, PRECISION)
    else:
        acc_v = add_product(rounded(weight, OPERAND), slope, acc_v, ACC, PRECISION)
        acc_k = add_product(rounded(before, OPERAND), query, acc_k, ACC, PRECISION)
    return acc_k, acc_v
