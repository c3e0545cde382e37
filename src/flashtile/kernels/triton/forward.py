"""The flash forward kernel: attention of query tiles to all their keys, online softmax, one pass over K and V.

A program is one work item: a tile of query rows of one head, or, packed, the rows of all query heads that share a
key/value head, against all keys or one part of them. It visits the key tiles that some of its rows see, first those
that every row sees whole, which need no mask code, then those that the mask cuts. Scores and weights exist one tile at
a time. Sums over many keys are formed in two levels: those of a span of SPAN key tiles apart, which then join those of
earlier spans; so no chain of roundings is as long as the keys.

Source: Dao 2023, FlashAttention-2, section 3.1; Milakov and Gimelshein 2018 for the online softmax; Dao et al. 2023,
Flash-Decoding, for the parts; Castaldo, Whaley, Chronopoulos 2008 for sums in two levels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.containment import add_contained, add_signed, any_not_finite
from flashtile.kernels.triton.dropout import kept, share_of
from flashtile.kernels.triton.functions import exp_of_difference
from flashtile.kernels.triton.language import LN2, LOG2E, MINUS_INF, add_product, number, product, rounded, spread
from flashtile.kernels.triton.rows import key_limits, locate, longest_first, number_of_head, rows_of_tile


@triton.jit
def forward(
    q, k, v, o, lse, odd,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, o_b, o_h, o_s, o_d,
    o_split, lse_split,
    first, items, blocks, together, heads, group, q_len, kv_len, head_size, value_size,
    query_tiles, splits, split_keys,
    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, sinks, captures, origin, threshold, seed,
    SCORE: tl.constexpr, MASK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
    BAND: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, CONTAIN: tl.constexpr, SPAN: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Work items first, first + 1, ...; see `specialisation.forward` for the arguments.

    Shapes:  q (B, H, S_q, D), k (B, H_kv, S_kv, D), v (B, H_kv, S_kv, D_v) -> o (B, H, S_q, D_v), lse (B, H, S_q); for
             a partial result these for every part. Strides in elements.
    Units:   lse and sinks in nats; scale has the bits of a double.
    Two launches make a call. The first, one item a program, marks in odd (work items,) those whose sums are not all
    finite, and leaves their o and lse as they were. The second, CONTAIN, computes just these (containment.py); it has
    as many programs as the device has processors or more, which look through the marks of all `items`.
    origin: of tiles of larger arrays, the first batch, head, row and key, and the heads of those, by which the program
    and dropout know them. A mask without a table (rows) is looked at everywhere.
    """
    if CONTAIN:
        for item in range(first + tl.program_id(0), first + items, tl.num_programs(0)):
            if tl.load(odd + item) != 0:
                _work_item(
                    item, q, k, v, o, lse, odd,
                    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, o_b, o_h, o_s, o_d,
                    o_split, lse_split,
                    blocks, together, heads, group, q_len, kv_len, head_size, value_size,
                    query_tiles, splits, split_keys,
                    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, sinks, captures, origin,
                    threshold, seed,
                    SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE,
                    BAND, STATE, PACKED, CONTAIN, SPAN, DESCRIBED,
                )  # fmt: skip
    else:
        item = first + tl.program_id(0)
        _work_item(
            item, q, k, v, o, lse, odd,
            q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, o_b, o_h, o_s, o_d,
            o_split, lse_split,
            blocks, together, heads, group, q_len, kv_len, head_size, value_size,
            query_tiles, splits, split_keys,
            scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, sinks, captures, origin, threshold, seed,
            SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE,
            BAND, STATE, PACKED, CONTAIN, SPAN, DESCRIBED,
        )  # fmt: skip


@triton.jit
def _work_item(
    item, q, k, v, o, lse, odd,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, o_b, o_h, o_s, o_d,
    o_split, lse_split,
    blocks, together, heads, group, q_len, kv_len, head_size, value_size,
    query_tiles, splits, split_keys,
    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, sinks, captures, origin, threshold, seed,
    SCORE: tl.constexpr, MASK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
    BAND: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, CONTAIN: tl.constexpr, SPAN: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One work item: the arguments of `forward`."""
    ACC: tl.constexpr = lse.dtype.element_ty
    odd += item
    split = item % splits
    block, tile = item // splits // query_tiles, item // splits % query_tiles
    if BAND and left is None:
        block, tile = longest_first(item // splits, query_tiles, blocks, together)
    b, h, kv, i, inside = locate(block, tile, heads, group, q_len, TILE_Q, PACKED)
    begin = split * split_keys
    end = tl.minimum(begin + split_keys, kv_len)
    low, high = key_limits(i, b, begin, end, left, right, offset, offsets, BAND)
    first, last = rows_of_tile(tile, q_len, TILE_Q, PACKED)
    touched, full_to = key_limits(first, b, begin, end, left, right, offset, offsets, BAND)
    full_from, stop = key_limits(last, b, begin, end, left, right, offset, offsets, BAND)
    reach = (touched, full_from, full_to, stop)  # of numbers, not of `low` and `high`: the same for all threads

    batch, head, row = b.to(tl.int64), h.to(tl.int64), i.to(tl.int64)
    d, dv, n = tl.arange(0, HEAD), tl.arange(0, VALUE), tl.arange(0, TILE_K).to(tl.int64)
    columns = dv < value_size
    q_rows = q + batch * q_b + head * q_h + row * q_s
    o_rows = o + split.to(tl.int64) * o_split + batch * o_b + head * o_h + row * o_s
    lse_rows = lse + split.to(tl.int64) * lse_split + (batch * heads + head) * q_len + row
    k += batch * k_b + kv.to(tl.int64) * k_h
    v += batch * v_b + kv.to(tl.int64) * v_h
    if DESCRIBED:  # the memory unit cuts tiles out, with zeros for what lies outside
        keys = tl.make_tensor_descriptor(k, [tl.maximum(kv_len, 1), head_size], [k_s, 1], [TILE_K, HEAD])
        values = tl.make_tensor_descriptor(v, [tl.maximum(kv_len, 1), value_size], [v_s, 1], [TILE_K, VALUE])
    else:
        keys = k + n[None, :] * k_s + d[:, None].to(tl.int64) * k_d  # the first tile; others are a multiple of k_s away
        values = v + n[:, None] * v_s + dv[None, :].to(tl.int64) * v_d

    query = tl.load(
        q_rows[:, None] + d[None, :].to(tl.int64) * q_d, mask=inside[:, None] & (d < head_size)[None, :], other=0.0
    )
    query = rounded(query, OPERAND)
    factor = number(scale, ACC)
    if SCORE is None:
        factor *= tl.full((), LOG2E, ACC)
    table_row = 0 if rows is None else 2 * (b * rows_b + _head_of_table(h, rows_h, PACKED) + tile)
    inputs = (query, keys, values, factor, low, high, begin, end, b, h, i, left, right)
    head_number = number_of_head(b, h, heads, origin)
    draw = (threshold, seed, head_number[:, None] if PACKED else head_number)
    where = (rows, runs, table_row, captures, draw, origin)
    sizes = (k_s.to(tl.int64), v_s.to(tl.int64), kv_len, head_size, value_size)
    sums = _start(o_rows, lse_rows, o_d, inside, columns, threshold, STATE, TILE_Q, VALUE, ACC)
    top, total, acc = _sweep(
        sums, reach, inputs, where, sizes,
        SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN, SPAN,
        DESCRIBED,
    )  # fmt: skip
    if not CONTAIN:
        bad = any_not_finite(acc)
        tl.store(odd, bad)
        inside = inside & (tl.broadcast_to(bad, [TILE_Q]) == 0)

    half = tl.full((), 1.0, ACC)
    if sinks is not None:  # to the last bits, and in two halves: a sink far above the row's scores scales the row
        sink = tl.load(sinks + b * heads + h)
        nats = top * tl.full((), LN2, ACC)
        highest = tl.maximum(nats, sink)
        reference = tl.where(highest == MINUS_INF, 0.0, highest)
        half = exp_of_difference(nats, reference, 0.5)
        total = total * half * half + exp_of_difference(sink, reference, 1.0)
        acc *= half[:, None]
        top = reference * tl.full((), LOG2E, ACC)
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    if threshold is not None:
        half = half / share_of(threshold, ACC)
    acc = tl.where(seen[:, None], acc * (half / total)[:, None], 0.0)
    log_sum = (top + tl.log2(total)) * tl.full((), LN2, ACC)
    out = o_rows[:, None] + dv[None, :].to(tl.int64) * o_d
    tl.store(out, rounded(acc, o.dtype.element_ty), mask=inside[:, None] & columns[None, :])
    tl.store(lse_rows, tl.where(seen, log_sum, MINUS_INF), mask=inside)


@triton.jit
def _head_of_table(h, rows_h, PACKED: tl.constexpr):
    """Rows of the coverage table before a head's; packed heads share one."""
    if PACKED:
        return 0
    else:
        return h * rows_h


@triton.jit
def _start(
    o, lse, o_d, inside, columns, threshold, STATE: tl.constexpr, TILE_Q: tl.constexpr, VALUE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The softmax's state before the first key: maximum (in units of log 2), sum, outputs; or the state carried in.

    A carried output is normalised, so its sum of weights is 1 at a maximum of lse; no key yet: -inf and 0.
    """
    if STATE == "carried":
        before = tl.load(lse, mask=inside, other=MINUS_INF)
        at = o[:, None] + tl.arange(0, VALUE)[None, :].to(tl.int64) * o_d
        acc = tl.load(at, mask=inside[:, None] & columns[None, :], other=0.0).to(ACC)
        if threshold is not None:  # it is divided by what is kept at the end
            acc *= share_of(threshold, ACC)
        return before * tl.full((), LOG2E, ACC), tl.where(before == MINUS_INF, 0.0, 1.0).to(ACC), acc
    else:
        top = tl.full([TILE_Q], MINUS_INF, ACC)
        return top, tl.zeros([TILE_Q], ACC), tl.zeros([TILE_Q, VALUE], ACC)


@triton.jit
def _sweep(
    sums, reach, inputs, where, sizes,
    SCORE: tl.constexpr, MASK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
    PACKED: tl.constexpr, ACC: tl.constexpr, CONTAIN: tl.constexpr, SPAN: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Every key tile that some row sees: first those that all rows see whole, then the others."""
    earlier, tiles = sums, 0  # the sums of earlier spans, key tiles since then
    if SPAN:
        sums = _nothing_since(sums)
    if MASK is None:
        touched, full_from, full_to, stop = reach
        touched = touched // TILE_K * TILE_K
        full_from, full_to = tl.cdiv(full_from, TILE_K) * TILE_K, full_to // TILE_K * TILE_K
        sums, earlier, tiles = _stretch(
            sums, earlier, tiles, full_from, full_to, inputs, where, sizes, True,
            SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN, SPAN,
            DESCRIBED,
        )  # fmt: skip
        top, total, acc = sums
        if inputs[11] is None:  # what is cut follows what is whole
            for n0 in range(tl.maximum(full_to, touched), stop, TILE_K):
                top, total, acc = _key_tile(
                    top, total, acc, n0, inputs, where, sizes, False,
                    SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN,
                    DESCRIBED,
                )  # fmt: skip
        else:
            whole = full_to > full_from
            before = tl.cdiv(tl.maximum(tl.where(whole, full_from, stop) - touched, 0), TILE_K)
            resume = tl.where(whole, full_to, stop)
            after = tl.cdiv(tl.maximum(stop - resume, 0), TILE_K)
            for t in range(0, before + after):  # the band's edges, about as long as a tile of queries: part of a span
                n0 = tl.where(t < before, touched + t * TILE_K, resume + (t - before) * TILE_K)
                top, total, acc = _key_tile(
                    top, total, acc, n0, inputs, where, sizes, False,
                    SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN,
                    DESCRIBED,
                )  # fmt: skip
        sums = top, total, acc
    elif where[0] is None:  # any tile may be cut
        touched, stop = reach[0] // TILE_K * TILE_K, reach[3]
        sums, earlier, tiles = _stretch(
            sums, earlier, tiles, touched, stop, inputs, where, sizes, False,
            SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN, SPAN,
            DESCRIBED,
        )  # fmt: skip
    else:  # the plan's table says where, see tables.py
        begin, end = inputs[6], inputs[7]
        rows, runs = where[0] + where[2], where[1]
        for run in range(tl.load(rows), tl.load(rows + 1)):
            start = tl.maximum(tl.load(runs + 2 * run), begin)
            stop = tl.minimum(tl.load(runs + 2 * run + 1), end)
            sums, earlier, tiles = _stretch(
                sums, earlier, tiles, start, stop, inputs, where, sizes, True,
                SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN,
                SPAN, DESCRIBED,
            )  # fmt: skip
        for run in range(tl.load(rows + 1), tl.load(rows + 2)):
            start = tl.maximum(tl.load(runs + 2 * run), begin)
            stop = tl.minimum(tl.load(runs + 2 * run + 1), end)
            sums, earlier, tiles = _stretch(
                sums, earlier, tiles, start, stop, inputs, where, sizes, False,
                SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN,
                SPAN, DESCRIBED,
            )  # fmt: skip
    return _joined(sums, earlier, CONTAIN) if SPAN else sums


@triton.jit
def _stretch(
    sums, earlier, tiles, start, stop, inputs, where, sizes, FULL: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
    PACKED: tl.constexpr, ACC: tl.constexpr, CONTAIN: tl.constexpr, SPAN: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The key tiles of [start, stop). A span ends with SPAN of them or where, with those of stretches before, it has
    SPAN or more: many short stretches share one."""
    top, total, acc = sums
    if SPAN:
        for begin in range(start, stop, SPAN * TILE_K):
            end = tl.minimum(begin + SPAN * TILE_K, stop)
            for n0 in range(begin, end, TILE_K):
                top, total, acc = _key_tile(
                    top, total, acc, n0, inputs, where, sizes, FULL,
                    SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN,
                    DESCRIBED,
                )  # fmt: skip
            tiles += tl.cdiv(end - begin, TILE_K)
            if tiles >= SPAN:
                earlier = _joined((top, total, acc), earlier, CONTAIN)
                top, total, acc = _nothing_since(earlier)
                tiles = 0
    else:
        for n0 in range(start, stop, TILE_K):
            top, total, acc = _key_tile(
                top, total, acc, n0, inputs, where, sizes, FULL,
                SCORE, MASK, TILE_Q, TILE_K, HEAD, VALUE, WHOLE, OPERAND, PRECISION, NEGATIVE, PACKED, ACC, CONTAIN,
                DESCRIBED,
            )  # fmt: skip
    return (top, total, acc), earlier, tiles


@triton.jit
def _nothing_since(earlier):
    """The sums of a span before its first key. Its maximum goes on from the earlier one, and is never below it."""
    top, total, acc = earlier
    return top, tl.zeros_like(total), tl.zeros_like(acc)


@triton.jit
def _joined(sums, earlier, CONTAIN: tl.constexpr):
    """The sums of a span and of earlier ones, at the span's maximum."""
    top, total, acc = sums
    shrink = tl.exp2(earlier[0] - tl.where(top == MINUS_INF, 0.0, top))  # -inf - -inf would be NaN
    before = earlier[2] * shrink[:, None]
    if CONTAIN:  # an infinity stays one, however small its weight: see containment.py
        before = tl.where(tl.abs(earlier[2]) < float("inf"), before, earlier[2])
    return top, earlier[1] * shrink + total, before + acc


@triton.jit
def _key_tile(
    top, total, acc, n0, inputs, where, sizes, FULL: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
    PACKED: tl.constexpr, ACC: tl.constexpr, CONTAIN: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One key tile: s = q k^T, the online softmax, acc += p v. FULL: every row sees every key of it."""
    query, keys, values, factor, low, high, begin, end, b, h, i, left, right = inputs
    k_s, v_s, kv_len, head_size, value_size = sizes
    j = n0 + tl.arange(0, TILE_K)
    d, dv = tl.arange(0, HEAD), tl.arange(0, VALUE)
    if DESCRIBED:
        key = tl.trans(keys.load([n0, 0]))
    else:
        key = _load(keys + n0 * k_s, (d < head_size)[:, None], (j < kv_len)[None, :], WHOLE, FULL)
    s = product(query, rounded(key, OPERAND), ACC, PRECISION)  # (TILE_Q, TILE_K)

    if SCORE is None and FULL:  # scaled in the exponent, where a multiply-add takes it
        largest = tl.min(s, 1) if NEGATIVE else tl.max(s, 1)
        new = tl.maximum(top, largest * factor)
        reference = tl.where(new == MINUS_INF, 0.0, new)
        p = tl.exp2(s * factor - reference[:, None])
        s *= factor
    else:
        s *= factor
        place_h = h[:, None] if PACKED else spread(h)
        place_b, place_i, place_j = spread(b), i[:, None], j[None, :]
        if not FULL:  # the program reads its arrays within their bounds
            place_j = tl.minimum(place_j, kv_len - 1)
        origin = where[5]
        if origin is not None:
            place_b, place_h = place_b + origin[0], place_h + origin[1]
            place_i, place_j = place_i + origin[2], place_j + origin[3]
        if SCORE is not None:
            s = SCORE(s, place_b, place_h, place_i, place_j, where[3], ACC) * tl.full((), LOG2E, ACC)
        if not FULL:
            seen = (j < end)[None, :] if right is None else j[None, :] < high[:, None]
            if left is not None:
                seen = seen & (j[None, :] >= low[:, None])
            if MASK is not None:
                seen = seen & MASK(s, place_b, place_h, place_i, place_j, where[3], ACC)
            s = tl.where(seen, s, MINUS_INF)
        s = tl.broadcast_to(s, [TILE_Q, TILE_K])
        new = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(new == MINUS_INF, 0.0, new)  # -inf - -inf would be NaN
        p = tl.exp2(s - reference[:, None])

    shrink = tl.exp2(top - reference)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if DESCRIBED:
        value = values.load([n0, 0])
    else:
        value = _load(values + n0 * v_s, (j < kv_len)[:, None], (dv < value_size)[None, :], FULL, WHOLE)
    value = rounded(value, OPERAND)
    threshold, seed, head_number = where[4]
    if threshold is not None:  # the sum of the weights, and with it lse, is taken without dropout
        first_key, row = n0, i[:, None]
        if where[5] is not None:
            first_key, row = n0 + where[5][3], row + where[5][2]
        keep = kept(first_key, row, head_number, threshold, seed, TILE_K, False)
        p = tl.where(keep, p, 0.0)
    if CONTAIN:
        seen = s != MINUS_INF
        if threshold is not None:  # what was dropped is 0, and makes NaN of an infinity
            acc = add_signed(rounded(p, OPERAND), value, tl.where(keep, 1.0, 0.0), seen, acc, ACC, PRECISION)
        else:
            acc = add_contained(rounded(p, OPERAND), value, seen, acc, ACC, PRECISION)
    else:
        acc = add_product(rounded(p, OPERAND), value, acc, ACC, PRECISION)
    return new, total, acc


@triton.jit
def _load(at, first, second, ALL_FIRST: tl.constexpr, ALL_SECOND: tl.constexpr):
    """A tile of K or V, 0 outside; a condition on an axis that always holds costs nothing."""
    if ALL_FIRST and ALL_SECOND:
        return tl.load(at)
    elif ALL_FIRST:
        return tl.load(at, mask=second, other=0.0)
    elif ALL_SECOND:
        return tl.load(at, mask=first, other=0.0)
    else:
        return tl.load(at, mask=first & second, other=0.0)
