"""Merge and finish: partial results over parts of the keys, in order, become the result over all of them.

Partials are (o normalised, lse in nats), both in accumulators; a part that saw no key is o = 0, lse = -inf.

    lse = log sum_n exp(lse_n) (+ exp(sink)),   o = sum_n exp(lse_n - lse) o_n

One part finishes a carried state: the sink joins, and o is rounded to its storage type.

Source: Dao et al. 2023, Flash-Decoding; `flashtile.merge` is the same in NumPy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.functions import divide, exp_of_difference, log
from flashtile.kernels.triton.language import LOG2E, MINUS_INF, rounded


@triton.jit
def merge(
    parts_o,
    parts_lse,
    o,
    lse,
    o_b,
    o_h,
    o_s,
    o_d,
    o_split,
    lse_split,
    first,
    heads,
    q_len,
    value_size,
    query_tiles,
    splits,
    sinks,
    TILE_Q: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Tiles of rows first, first + 1, ... one a program; see `specialisation.merge` for the arguments.

    Shapes:  parts_o (splits, B, H, S_q, D_v) and parts_lse (splits, B, H, S_q), each part contiguous and o_split and
             lse_split elements after the one before -> o (B, H, S_q, D_v) of any strides, lse (B, H, S_q).
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    item = first + tl.program_id(0)
    head = item // query_tiles
    i = item % query_tiles * TILE_Q + tl.arange(0, TILE_Q)
    d = tl.arange(0, VALUE)
    inside = i < q_len
    here = inside[:, None] & (d < value_size)[None, :]
    row = head.to(tl.int64) * q_len + i
    parts_lse += row
    parts_o += row[:, None] * value_size + d[None, :]
    log2e = tl.full((), LOG2E, ACC)

    top = tl.full([TILE_Q], MINUS_INF, ACC)
    for n in range(0, splits):
        top = tl.maximum(top, tl.load(parts_lse + n * lse_split, mask=inside, other=MINUS_INF))
    total = tl.zeros([TILE_Q], ACC)
    anchor = tl.where(top == MINUS_INF, 0.0, top)  # -inf - -inf would be NaN
    acc = tl.zeros([TILE_Q, VALUE], ACC)
    for n in range(0, splits):
        part = tl.load(parts_lse + n * lse_split, mask=inside, other=MINUS_INF)
        weight = tl.exp2((part - anchor) * log2e)
        values = tl.load(parts_o + n * o_split, mask=here, other=0.0)
        acc += tl.where((part == MINUS_INF)[:, None], 0.0, weight[:, None] * values)
        total += weight
    half = tl.full((), 1.0, ACC)
    if sinks is not None:  # to the last bits, and in two halves: a sink far above the row's scores scales the row
        sink = tl.load(sinks + head)
        highest = tl.maximum(top, sink)
        anchor = tl.where(highest == MINUS_INF, 0.0, highest)
        half = exp_of_difference(top, anchor, 0.5)
        total = total * half * half + exp_of_difference(sink, anchor, 1.0)
        acc *= half[:, None]
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc * divide(tl.broadcast_to(half, [TILE_Q]), total)[:, None]
    batch, in_batch = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    o += (batch * o_b + in_batch * o_h + i.to(tl.int64) * o_s)[:, None] + d[None, :].to(tl.int64) * o_d
    tl.store(o, rounded(acc, o.dtype.element_ty), mask=here)
    tl.store(lse + row, tl.where(seen, anchor + log(total), MINUS_INF), mask=inside)
