"""The forward on Hopper in Gluon, Triton's lower language, where who loads, who computes and who waits is said.

A program has 128 rows of one head. Two groups of four warps compute 64 of them each; one more warp has the memory unit
bring tiles of keys and values into a ring of shared memory, and each side tells the other by barriers what is full and
what is free. While one group is in its softmax the other's products run. Nothing of Gluon runs in an interpreter, so
what is known of this kernel is its machine code (gluon.py says where it stands).

Source: Shah et al. 2024, FlashAttention-3, section 3.1, without the overlap within a group.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.kernels.triton.specialisation import Specialisation

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _load(keys, values, buffers, full, empty, count, N: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads: `count` tiles of keys and of values, each when both groups have left its place."""
    k_buffer, v_buffer = buffers
    k_full, v_full = full
    k_empty, v_empty = empty
    for t in range(count):
        stage = t % STAGES
        phase = (t // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), keys.block_type.nbytes)
        tma.async_load(keys, [t * N, 0], k_full.index(stage), k_buffer.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), values.block_type.nbytes)
        tma.async_load(values, [t * N, 0], v_full.index(stage), v_buffer.index(stage))


@gluon.jit
def _weigh(
    s, acc, top, total, j0, limit, factor, MASKED: gl.constexpr, N: gl.constexpr, S: gl.constexpr, A: gl.constexpr
):
    """The online softmax of one tile: weights, and the sums so far at the new maximum. Rows see keys below `limit`."""
    s = s * factor
    if MASKED:
        j = j0 + gl.arange(0, N, gl.SliceLayout(0, S))
        s = gl.where(j[None, :] < limit[:, None], s, float("-inf"))
    new = gl.maximum(top, gl.max(s, 1))
    reference = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s - reference[:, None])
    shrink = gl.exp2(top - reference)
    total = total * shrink + gl.sum(p, 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
    return p, acc, new, total


@gluon.jit
def _attend(
    q_tile, buffers, full, empty, q_ready, o, lse, o_s, first_row, q_len, kv_len, whole, count, right, factor,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A group that computes M rows from first_row on, over `count` tiles of keys, the first `whole` without a mask."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    k_buffer, v_buffer = buffers
    k_full, v_full = full
    k_empty, v_empty = empty
    i = first_row + gl.arange(0, M, gl.SliceLayout(1, S))
    limit = gl.full([M], 0, gl.int32, gl.SliceLayout(1, S)) + kv_len
    if CAUSAL:
        limit = gl.minimum(gl.maximum(i + right + 1, 0), kv_len)
    top = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([M], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([M, D], gl.float32, A)
    mbarrier.wait(q_ready, 0)
    for t in range(count):
        stage = t % STAGES
        phase = (t // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        turned = k_buffer.index(stage).permute((1, 0))
        s = warpgroup_mma(q_tile, turned, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if t < whole:
            p, acc, top, total = _weigh(s, acc, top, total, t * N, limit, factor, False, N, S, A)
        else:
            p, acc, top, total = _weigh(s, acc, top, total, t * N, limit, factor, True, N, S, A)
        weights = gl.convert_layout(p.to(q_tile.dtype), P)
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(weights, v_buffer.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
    seen = total != 0.0
    total = gl.where(seen, total, 1.0)
    log_sum = gl.where(seen, (top + gl.log2(total)) * LN2, float("-inf"))
    gl.store(lse + i, log_sum, mask=i < q_len)
    scale = gl.where(seen, 1.0 / total, 0.0)
    out = acc * gl.convert_layout(scale, gl.SliceLayout(1, A))[:, None]
    row = first_row + gl.arange(0, M, gl.SliceLayout(1, A))
    d = gl.arange(0, D, gl.SliceLayout(0, A))
    gl.store(o + row[:, None].to(gl.int64) * o_s + d[None, :], out.to(o.dtype.element_ty), mask=(row < q_len)[:, None])


@gluon.jit
def forward(
    q, k, v, o, lse, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    heads, group, q_len, kv_len, query_tiles, right, scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One program for each tile of 2 M query rows of a head; CAUSAL: row i sees key j iff j <= i + right.

    Shapes:  q (B, H, S_q, D), k, v (B, H_kv, S_kv, D) -> o (B, H, S_q, D), lse (B, H, S_q); strides in elements.
    Units:   lse in nats; scale has the bits of a double.
    """
    item = gl.program_id(0)
    block = item // query_tiles
    tile = query_tiles - 1 - item % query_tiles
    b = (block // heads).to(gl.int64)
    h = block % heads
    kv = (h // group).to(gl.int64)
    element: gl.constexpr = q.dtype.element_ty
    qs: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], element)
    ks: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], element)
    queries = tma.make_tensor_descriptor(q + b * q_b + h.to(gl.int64) * q_h, [q_len, D], [q_s, 1], [M, D], qs)
    keys = tma.make_tensor_descriptor(k + b * k_b + kv * k_h, [kv_len, D], [k_s, 1], [N, D], ks)
    values = tma.make_tensor_descriptor(v + b * v_b + kv * v_h, [kv_len, D], [v_s, 1], [N, D], ks)
    q_tiles = gl.allocate_shared_memory(element, [2, M, D], qs)
    k_buffer = gl.allocate_shared_memory(element, [STAGES, N, D], ks)
    v_buffer = gl.allocate_shared_memory(element, [STAGES, N, D], ks)
    q_ready = mbarrier.allocate_mbarrier()
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(q_ready, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=2)
        mbarrier.init(v_empty.index(n), count=2)
    fence_async_shared()
    first = tile * 2 * M
    mbarrier.expect(q_ready, 2 * queries.block_type.nbytes)
    tma.async_load(queries, [first, 0], q_ready, q_tiles.index(0))
    tma.async_load(queries, [first + M, 0], q_ready, q_tiles.index(1))
    stop = kv_len
    whole = kv_len // N
    if CAUSAL:
        last = gl.minimum(first + 2 * M, q_len) - 1
        stop = gl.minimum(gl.maximum(last + right + 1, 0), kv_len)
        whole = gl.minimum(gl.maximum(first + right + 1, 0), kv_len) // N
    count = gl.cdiv(stop, N)
    factor = scale.to(gl.float64, bitcast=True).to(gl.float32) * LOG2E
    o += b * o_b + h.to(gl.int64) * o_h
    lse += block.to(gl.int64) * q_len
    buffers = (k_buffer, v_buffer)
    full = (k_full, v_full)
    empty = (k_empty, v_empty)
    gl.warp_specialize(
        [
            (_attend, (
                q_tiles.index(0), buffers, full, empty, q_ready, o, lse, o_s, first, q_len, kv_len, whole, count,
                right, factor, M, N, D, STAGES, CAUSAL,
            )),
            (_attend, (
                q_tiles.index(1), buffers, full, empty, q_ready, o, lse, o_s, first + M, q_len, kv_len, whole, count,
                right, factor, M, N, D, STAGES, CAUSAL,
            )),
            (_load, (keys, values, buffers, full, empty, count, N, STAGES)),
        ],
        [4, 1],  # warps of the second group, and of the one that loads
        [240, 24],  # registers of their threads
    )  # fmt: skip


def source_of(specialisation: Specialisation) -> Any:
    """What `triton.compile` takes."""
    from triton.experimental.gluon._runtime import GluonASTSource

    types, names = dict(specialisation.signature), forward.arg_names
    place = {name: n for n, name in enumerate(names)}
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(place[name],): [["tt.divisibility", 16]] for name in specialisation.divisible}
    return GluonASTSource(forward, signature, constexprs=dict(specialisation.constants), attrs=attributes)
