"""The baseline: unfused attention in three stages, each storing its whole S_q x S_kv result.

This is what the fused kernel replaces and is measured against, in speed and in error. A 16-bit type rounds the stored
scores and weights to that type.

Source: Vaswani et al. 2017, Attention Is All You Need, section 3.2.1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.containment import add_contained, any_not_finite
from flashtile.kernels.triton.functions import divide, exp, log
from flashtile.kernels.triton.language import MINUS_INF, add_product, number, product, rounded, spread
from flashtile.kernels.triton.rows import key_limits, locate


@triton.jit
def scores(
    q,
    k,
    s,
    q_b,
    q_h,
    q_s,
    q_d,
    k_b,
    k_h,
    k_s,
    k_d,
    s_s,
    first,
    heads,
    group,
    q_len,
    kv_len,
    columns,
    head_size,
    query_tiles,
    key_tiles,
    scale,
    left,
    right,
    offset,
    offsets,
    captures,
    SCORE: tl.constexpr,
    MASK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BAND: tl.constexpr,
):
    """Stage one, one tile per program: s = scale * q k^T, changed by the program, -inf where hidden.

    Shapes:  q (B, H, S_q, D), k (B, H_kv, S_kv, D) -> s (B, H, S_q, columns), rows s_s elements apart; columns beyond
             S_kv are -inf.
    """
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    item = first + tl.program_id(0)
    tile = item // key_tiles % query_tiles
    b, h, kv, i, inside = locate(item // key_tiles // query_tiles, tile, heads, group, q_len, TILE_Q, False)
    j = item % key_tiles * TILE_K + tl.arange(0, TILE_K)
    d = tl.arange(0, HEAD)
    row, key, column = i.to(tl.int64), j.to(tl.int64), d.to(tl.int64)
    batch, head = b.to(tl.int64), h.to(tl.int64)
    q += batch * q_b + head * q_h + row[:, None] * q_s + column[None, :] * q_d
    k += batch * k_b + kv.to(tl.int64) * k_h + key[None, :] * k_s + column[:, None] * k_d
    queries = tl.load(q, mask=inside[:, None] & (d < head_size)[None, :], other=0.0)
    keys = tl.load(k, mask=(j < kv_len)[None, :] & (d < head_size)[:, None], other=0.0)
    x = product(rounded(queries, OPERAND), rounded(keys, OPERAND), ACC, PRECISION) * number(scale, ACC)
    low, high = key_limits(i, b, kv_len * 0, kv_len, left, right, offset, offsets, BAND)
    seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
    place = tl.minimum(j, kv_len - 1)[None, :]
    if SCORE is not None:
        x = SCORE(x, spread(b), spread(h), i[:, None], place, captures, ACC)
    if MASK is not None:
        seen = seen & MASK(x, spread(b), spread(h), i[:, None], place, captures, ACC)
    x = tl.where(seen, x, MINUS_INF)
    s += ((batch * heads + head) * q_len + row)[:, None] * s_s + key[None, :]
    tl.store(s, rounded(x, s.dtype.element_ty), mask=inside[:, None] & (j < columns)[None, :])


@triton.jit
def softmax(s, p, lse, first, q_len, kv_len, query_tiles, sinks, TILE_Q: tl.constexpr, TILE_K: tl.constexpr):
    """Stage two, one tile of rows per program: s (B, H, S_q, S_kv) -> weights p of that shape, lse (B, H, S_q) in nats.

    p may be s. The weight of a hidden key is -0.0, which no other weight is.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    item = first + tl.program_id(0)
    head = item // query_tiles
    i = item % query_tiles * TILE_Q + tl.arange(0, TILE_Q)
    inside = (i < q_len)[:, None]
    row = head.to(tl.int64) * q_len + i
    n = tl.arange(0, TILE_K)
    s += row[:, None] * kv_len + n[None, :]
    p += row[:, None] * kv_len + n[None, :]
    top = tl.full([TILE_Q], MINUS_INF, ACC)
    for n0 in range(0, kv_len, TILE_K):
        x = tl.load(s + n0, mask=inside & (n0 + n < kv_len)[None, :], other=MINUS_INF).to(ACC)
        top = tl.maximum(top, tl.max(x, 1))
    if sinks is not None:
        sink = tl.load(sinks + head)
        top = tl.maximum(top, sink)
    anchor = tl.where(top == MINUS_INF, 0.0, top)  # -inf - -inf would be NaN
    total = tl.zeros([TILE_Q], ACC)
    for n0 in range(0, kv_len, TILE_K):
        x = tl.load(s + n0, mask=inside & (n0 + n < kv_len)[None, :], other=MINUS_INF).to(ACC)
        total += tl.sum(exp(x - anchor[:, None]), 1)
    if sinks is not None:
        total += exp(sink - anchor)
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    for n0 in range(0, kv_len, TILE_K):
        here = inside & (n0 + n < kv_len)[None, :]
        x = tl.load(s + n0, mask=here, other=MINUS_INF).to(ACC)
        weight = exp(x - anchor[:, None]) * tl.where(x == MINUS_INF, -1.0, 1.0).to(ACC)
        share = divide(weight, tl.broadcast_to(total[:, None], [TILE_Q, TILE_K]))
        tl.store(p + n0, rounded(share, p.dtype.element_ty), mask=here)
    tl.store(lse + row, tl.where(seen, anchor + log(total), MINUS_INF), mask=i < q_len)


@triton.jit
def output(
    p,
    v,
    o,
    v_b,
    v_h,
    v_s,
    v_d,
    o_b,
    o_h,
    o_s,
    o_d,
    p_s,
    first,
    heads,
    group,
    q_len,
    kv_len,
    value_size,
    query_tiles,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    VALUE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE: tl.constexpr,
):
    """Stage three, one tile of rows per program: o = p v; of a state that is carried, o + p v.

    Shapes:  p (B, H, S_q, S_kv), rows p_s elements apart, v (B, H_kv, S_kv, D_v) -> o (B, H, S_q, D_v). A weight of
             -0.0 says that the row does not see the key, where values are not finite.
    """
    ACC: tl.constexpr = tl.float64 if v.dtype.element_ty == tl.float64 else tl.float32
    item = first + tl.program_id(0)
    b, h, kv, i, inside = locate(item // query_tiles, item % query_tiles, heads, group, q_len, TILE_Q, False)
    d = tl.arange(0, VALUE)
    row, column = i.to(tl.int64), d.to(tl.int64)
    batch, head = b.to(tl.int64), h.to(tl.int64)
    p += ((batch * heads + head) * q_len + row)[:, None] * p_s
    v += batch * v_b + kv.to(tl.int64) * v_h + column[None, :] * v_d
    o += batch * o_b + head * o_h + row[:, None] * o_s + column[None, :] * o_d
    here = inside[:, None] & (d < value_size)[None, :]
    start = tl.zeros([TILE_Q, VALUE], ACC)
    if STATE == "carried":
        start = tl.load(o, mask=here, other=0.0)
    inputs = (p, v, v_s, kv_len, d < value_size)
    acc = _weigh(inputs, start, TILE_K, OPERAND, PRECISION, ACC, False)
    if any_not_finite(acc) > 0:
        acc = _weigh(inputs, start, TILE_K, OPERAND, PRECISION, ACC, True)
    tl.store(o, rounded(acc, o.dtype.element_ty), mask=here)


@triton.jit
def _weigh(
    inputs,
    acc,
    TILE_K: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    CONTAIN: tl.constexpr,
):
    """acc + p v over all keys."""
    BITS: tl.constexpr = tl.int64 if tl.float64 == ACC else tl.int32
    p, v, v_s, kv_len, columns = inputs
    for n0 in range(0, kv_len, TILE_K):
        j = n0 + tl.arange(0, TILE_K)
        stored = tl.load(p + j[None, :], mask=(j < kv_len)[None, :], other=0.0)
        weight = rounded(stored, OPERAND)
        values = tl.load(v + j[:, None].to(tl.int64) * v_s, mask=(j < kv_len)[:, None] & columns[None, :], other=0.0)
        values = rounded(values, OPERAND)
        if CONTAIN:
            wide = stored.to(ACC)
            seen = (wide != 0.0) | (wide.to(BITS, bitcast=True) == 0)
            seen = seen & (j < kv_len)[None, :]
            acc = add_contained(weight, values, seen, acc, ACC, PRECISION)
        else:
            acc = add_product(weight, values, acc, ACC, PRECISION)
    return acc
