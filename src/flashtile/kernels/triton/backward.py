"""What the backward kernels share: delta, the gradient of sinks, a tile's P and dS, and the walk over key tiles.

    P = exp(S - lse),   dS = P (dP - delta),   delta = rowsum(dO * O) - dlse

P is recomputed from lse, so nothing of size S_q x S_kv is stored. dQ sums over keys and dK, dV over rows: two kernels,
each of which owns what it writes, so that no order is left to chance (backward_q.py, backward_kv.py). Gradients of
captured arrays, which any element may reach, are a third (backward_arrays.py).

Source: Dao 2023, FlashAttention-2, section 3.1.2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.dropout import kept, share_of
from flashtile.kernels.triton.functions import exp
from flashtile.kernels.triton.language import LOG2E, MINUS_INF, over, rounded, spread


@triton.jit
def row_deltas(
    o, do, dlse, delta,
    o_b, o_h, o_s, o_d, do_b, do_h, do_s, do_d,
    first, heads, q_len, value_size, query_tiles, TILE_Q: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dlse of TILE_Q rows; `dlse` may be absent.

    Shapes:  o, do (B, H, S_q, D_v); dlse, delta (B, H, S_q).
    The o of a row that sees no key is 0 and depends on nothing: what its dO holds does not matter.
    """
    ACC: tl.constexpr = delta.dtype.element_ty
    item = first + tl.program_id(0)
    block, tile = item // query_tiles, item % query_tiles
    i = tile * TILE_Q + tl.arange(0, TILE_Q)
    b, h, row, dv = (block // heads).to(tl.int64), (block % heads).to(tl.int64), i.to(tl.int64), tl.arange(0, VALUE)
    there = (i < q_len)[:, None] & (dv < value_size)[None, :]
    column = dv[None, :].to(tl.int64)
    ours = tl.load(o + b * o_b + h * o_h + row[:, None] * o_s + column * o_d, mask=there, other=0.0).to(ACC)
    theirs = tl.load(do + b * do_b + h * do_h + row[:, None] * do_s + column * do_d, mask=there, other=0.0).to(ACC)
    some = tl.max(tl.where(ours == 0.0, 0, 1), 1)
    total = tl.where(some > 0, tl.sum(ours * theirs, 1), 0.0)
    at = block.to(tl.int64) * q_len + row
    if dlse is not None:
        total -= tl.load(dlse + at, mask=i < q_len, other=0.0)
    tl.store(delta + at, total, mask=i < q_len)


@triton.jit
def sink_sums(lse, delta, sinks, dsinks, first, q_len, TILE_Q: tl.constexpr):
    """dsinks += the gradient of a head's sink, -sum exp(sink - lse) delta over its rows; of -inf, which is none, 0."""
    ACC: tl.constexpr = delta.dtype.element_ty
    item = first + tl.program_id(0)
    sink = tl.load(sinks + item)
    at, n = item.to(tl.int64) * q_len, tl.arange(0, TILE_Q)
    total = tl.zeros([TILE_Q], ACC)
    for start in range(0, q_len, TILE_Q):
        there = start + n < q_len
        nats = tl.load(lse + at + start + n, mask=there, other=float("inf"))
        given = exp(sink - nats) * tl.load(delta + at + start + n, mask=there, other=0.0)
        total -= tl.where(there, given, 0.0)
    tl.store(dsinks + item, tl.load(dsinks + item) + tl.where(sink == MINUS_INF, 0.0, tl.sum(total, 0)))


@triton.jit
def add_parts(
    parts, out, out_b, out_h, out_s, out_d, split,
    first, heads, length, size, tiles, splits, TILE_Q: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """out += the sum of partial gradients, in order.

    Shapes:  parts (splits, B, H, S, D), contiguous, `split` elements each; out (B, H, S, D) of any strides. As a kernel
             of dK or dV takes them, H is H_kv and S is S_kv.
    """
    item = first + tl.program_id(0)
    block, tile = item // tiles, item % tiles
    row, d = (tile * TILE_Q + tl.arange(0, TILE_Q)).to(tl.int64), tl.arange(0, VALUE)
    there = (row < length)[:, None] & (d < size)[None, :]
    parts += (block.to(tl.int64) * length + row)[:, None] * size + d[None, :]
    total = tl.zeros([TILE_Q, VALUE], parts.dtype.element_ty)
    for n in range(0, splits):
        total += tl.load(parts + n * split, mask=there, other=0.0)
    b, h = (block // heads).to(tl.int64), (block % heads).to(tl.int64)
    add_to(out + b * out_b + h * out_h + row[:, None] * out_s + d[None, :].to(tl.int64) * out_d, total, there)


@triton.jit
def add_to(out, total, there):
    """Add sums to what an array holds."""
    before = tl.load(out, mask=there, other=0.0).to(total.dtype)
    tl.store(out, rounded(before + total, out.dtype.element_ty), mask=there)


@triton.jit
def leave(out, total, there, PARTS: tl.constexpr):
    """Sums on their way out: added to what the array holds, or, as one of several parts, stored."""
    if PARTS:
        tl.store(out, total, mask=there)
    else:
        add_to(out, total, there)


@triton.jit
def row_values(lse, delta, at, inside):
    """lse and delta of rows. A row without a key, and one that does not exist, has an lse of +inf: weights of 0."""
    nats = tl.load(lse + at, mask=inside, other=MINUS_INF)
    return tl.where(nats == MINUS_INF, float("inf"), nats), tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def weigh(
    s, dp, rows, b, h, j, n0, kv_len, where, FULL: tl.constexpr, SELECT: tl.constexpr, KEYS_FIRST: tl.constexpr,
    KEYS: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile's weights as they meet dO, dS, dS before the score program, what is seen, and scores before that program;
    of s = q k^T, dp = dO v^T. SLOPE: of what dS is multiplied with to be the second.

    Shapes:  all (m, n), or KEYS_FIRST (n, m). rows is (i, lse, delta, low, high, factor), each but the last (m, 1), or
             (1, m); j, keys n0, n0 + 1, ..., is (1, n), or (n, 1). where is (captures, threshold, seed, number of the
             head, origin), as in the forward.
    What is hidden has weights of 0, and so has dS, unless something there is not finite; SELECT: always.
    Dropout's division by the share that is kept is left to who sums up the weights; dS has it.
    """
    i, lse, row_delta, low, high, factor = rows
    captures, threshold, seed, head, origin = where[0], where[1], where[2], where[3], where[4]
    raw = s * factor
    place_b, place_h, place_j = spread(b), spread(h), j
    if not FULL:  # the program reads its arrays within their bounds
        place_j = tl.minimum(j, kv_len - 1)
    place_i, first_key = i, n0
    if origin is not None:  # where they are in the arrays that these are tiles of
        place_b, place_h = place_b + origin[0], place_h + origin[1]
        place_i, place_j, first_key = i + origin[2], place_j + origin[3], n0 + origin[3]
    s = raw
    if SCORE is not None:
        s = over(SCORE(raw, place_b, place_h, place_i, place_j, captures, ACC), raw)
    if not FULL:
        shown = (j >= low) & (j < high)
        if MASK is not None:
            shown = shown & MASK(raw, place_b, place_h, place_i, place_j, captures, ACC)
        s = tl.where(shown, s, MINUS_INF)
    seen = s != MINUS_INF
    p = tl.exp2((s - lse) * tl.full((), LOG2E, ACC))
    weight = p
    if threshold is not None:  # NaN stays, as 0 times NaN would be
        keep = kept(first_key, place_i, head, threshold, seed, KEYS, KEYS_FIRST)
        weight = tl.where(keep | (p != p), p, 0.0)
        dp = tl.where(keep | (dp != dp), dp * (1.0 / share_of(threshold, ACC)), 0.0)
    ds = p * (dp - row_delta)
    if SELECT:
        weight, ds = tl.where(seen, weight, 0.0), tl.where(seen, ds, 0.0)
    before = ds
    if SLOPE is not None:
        # A slope of 0 comes from a selection or a saturated cap: the score does not depend on q and k there.
        slope = over(SLOPE(raw, place_b, place_h, place_i, place_j, captures, ACC), raw)
        before = tl.where(seen & (slope != 0.0), ds * slope, 0.0)
    return weight, ds, before, seen, raw


@triton.jit
def over_keys(
    sums, limits, table, rows, loads, at, where, STEP: tl.constexpr, SELECT: tl.constexpr, TILE_K: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr,
    SLOPE: tl.constexpr, GIVES: tl.constexpr, PLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of STEP over every key tile that some row sees, those that all rows see whole first, as the forward
    goes. limits: the keys [low, high) of each row, and those [begin, end) of this part, whole tiles; table: of a mask's
    coverage, see tables.py; of tiles of larger arrays there is none."""
    low, high, begin, end = limits
    if MASK is None:
        touched = tl.min(low, 0) // TILE_K * TILE_K
        stop = tl.max(high, 0)
        full_from = tl.cdiv(tl.max(low, 0), TILE_K) * TILE_K
        full_to = tl.min(high, 0) // TILE_K * TILE_K
        for n0 in range(full_from, full_to, TILE_K):
            sums = STEP(
                sums, n0, rows, loads, at, where, True, SELECT, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK, SLOPE,
                GIVES, PLACE, ACC,
            )  # fmt: skip
        whole = full_to > full_from
        before = tl.cdiv(tl.maximum(tl.where(whole, full_from, stop) - touched, 0), TILE_K)
        resume = tl.where(whole, full_to, stop)
        after = tl.cdiv(tl.maximum(stop - resume, 0), TILE_K)
        for t in range(0, before + after):
            n0 = tl.where(t < before, touched + t * TILE_K, resume + (t - before) * TILE_K)
            sums = STEP(
                sums, n0, rows, loads, at, where, False, SELECT, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK, SLOPE,
                GIVES, PLACE, ACC,
            )  # fmt: skip
    elif table[0] is None:  # any tile may be cut
        for n0 in range(tl.min(low, 0) // TILE_K * TILE_K, tl.max(high, 0), TILE_K):
            sums = STEP(
                sums, n0, rows, loads, at, where, False, SELECT, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK, SLOPE,
                GIVES, PLACE, ACC,
            )  # fmt: skip
    else:
        first, runs = table
        for run in range(tl.load(first), tl.load(first + 1)):
            for n0 in range(
                tl.maximum(tl.load(runs + 2 * run), begin), tl.minimum(tl.load(runs + 2 * run + 1), end), TILE_K
            ):
                sums = STEP(
                    sums, n0, rows, loads, at, where, True, SELECT, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK,
                    SLOPE, GIVES, PLACE, ACC,
                )  # fmt: skip
        for run in range(tl.load(first + 1), tl.load(first + 2)):
            for n0 in range(
                tl.maximum(tl.load(runs + 2 * run), begin), tl.minimum(tl.load(runs + 2 * run + 1), end), TILE_K
            ):
                sums = STEP(
                    sums, n0, rows, loads, at, where, False, SELECT, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK,
                    SLOPE, GIVES, PLACE, ACC,
                )  # fmt: skip
    return sums


@triton.jit
def load(at, first, second, ALL_FIRST: tl.constexpr, ALL_SECOND: tl.constexpr):
    """A tile, 0 outside; a condition on an axis that always holds costs nothing."""
    if ALL_FIRST and ALL_SECOND:
        return tl.load(at)
    elif ALL_FIRST:
        return tl.load(at, mask=second, other=0.0)
    elif ALL_SECOND:
        return tl.load(at, mask=first, other=0.0)
    else:
        return tl.load(at, mask=first & second, other=0.0)
