"""The baseline: unfused attention in three stages, each storing its whole S_q x S_kv result.

This is what fused kernels replace and are measured against, in speed and in error: the products go through
BLAS in the accumulator's dtype, and a 16-bit type also rounds the stored scores and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from flashtile.dtypes import DTYPES, round_to_bf16, widen_bits
from flashtile.kernels import Capabilities, Family, Layout
from flashtile.kernels.backward import Arithmetic, differentiate
from flashtile.kernels.gradients import Inputs, Sums
from flashtile.kernels.reference import Attended, weighted_values, weights
from flashtile.kernels.rule import NO_RULE, Rule, hide, product, rule_of, visible
from flashtile.kernels.views import RowsKernel

if TYPE_CHECKING:
    from flashtile.plan import Plan
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec, Band

Change = Callable[[np.ndarray], np.ndarray]  # scores (r, n) to changed scores, -inf where hidden

# The type that a precision request on fp32 inputs gives to the operands of the two products.
OPERANDS = {"ieee": None, "tf32": "tf32", "bf16": "bfloat16", "fp16": "float16"}

# The types that scores and weights are rounded to where they are stored; the wider ones keep the accumulator's.
STORED = {"float16": "float16", "bfloat16": "bfloat16"}


def scores(
    q: np.ndarray, k: np.ndarray, *, scale: float, change: Change | None = None, store: str | None = None
) -> np.ndarray:
    """Stage one: scale * q.k, changed (-inf where hidden), rounded to the `store` type: (r, D), (n, D) -> (r, n)."""
    s = product(q, k.T)
    s *= s.dtype.type(scale)
    return rounded(s if change is None else change(s), store)


def softmax(s: np.ndarray, sink: float = -np.inf, *, store: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Stage two: the weights, rounded to the `store` type, and the lse in nats: (r, n) -> (r, n), (r,)."""
    p, lse = weights(s, sink)
    return rounded(p, store), lse


def output(p: np.ndarray, v: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Stage three: the weighted sum of the values that each row sees: (r, n), (n, D_v), (r, n) -> (r, D_v)."""
    return weighted_values(p, v, s)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    dtype: str,
    band: Band | None = None,
    offset: int | np.ndarray = 0,
    scoring: Scoring | None = None,
    precision: str = "ieee",
    order: np.ndarray | None = None,
) -> Attended:
    """Unfused attention of values that are already widened to the accumulator's dtype.

    Shapes:  q (B, H, S_q, D), k (B, H_kv, S_kv, D), v (B, H_kv, S_kv, D_v) -> o (B, H, S_q, D_v), lse (B, H, S_q).
             `order` (S_kv,) sums the keys in that order: the same mathematics, another rounding.
    Units:   lse in nats; scale multiplies q.k before the mask; offset is one integer or (B,).
    Numerics: fp64 in fp64, the rest in fp32; `dtype` float16 or bfloat16 rounds scores and weights to that type,
             `precision` on float32 rounds the operands of both products. o is not yet rounded to `dtype`.
             float16 scores beyond 65504 overflow, as they do wherever they are stored.
    Raises:  NumPy's own on shapes that do not fit; `flashtile.attention` validates.
    Source:  Vaswani et al. 2017, Attention Is All You Need, section 3.2.1.
    """
    (batch, heads, q_len, _), kv_heads = q.shape, k.shape[1]
    o, lse = np.empty((batch, heads, q_len, v.shape[-1]), q.dtype), np.empty((batch, heads, q_len), q.dtype)
    offsets = np.broadcast_to(offset, (batch,))
    for b, h in np.ndindex(batch, heads):
        kv = h // (heads // kv_heads)
        o[b, h], lse[b, h] = attend_rows(
            q[b, h],
            k[b, kv],
            v[b, kv],
            0,
            int(offsets[b]),
            rule_of(scoring, b, h, heads),
            scale=scale,
            dtype=dtype,
            band=band,
            precision=precision,
            order=order,
        )
    return Attended(o, lse)


def attend_rows(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    first: int,
    offset: int,
    rule: Rule = NO_RULE,
    *,
    scale: float,
    dtype: str,
    band: Band | None,
    precision: str,
    order: np.ndarray | None = None,
) -> Attended:
    """`attend` for rows first, first + 1, ... of one head: (r, D), (S_kv, D), (S_kv, D_v) -> o (r, D_v), lse (r,)."""
    accumulator = DTYPES[dtype].accumulator
    operand = OPERANDS[precision]
    store = STORED.get(dtype)
    keys = np.arange(len(k)) if order is None else order
    q, k, v = (rounded(x.astype(accumulator, copy=False), operand) for x in (q, k[keys], v[keys]))
    with np.errstate(all="ignore"):  # inf and NaN are answers here, not accidents
        rows = first + np.arange(len(q))

        def change(s: np.ndarray) -> np.ndarray:
            return hide(rule.change(s, rows, keys), visible(band, offset, rows, keys))

        s = scores(q, k, scale=scale, change=change, store=store)
        p, lse = softmax(s, rule.sink, store=store or operand)
        if rule.keep is not None:
            p = rounded(rule.drop(p, rows, keys), store or operand)
        return Attended(output(p, v, s), lse)


def rounded(x: np.ndarray, store: str | None) -> np.ndarray:
    """x rounded to nearest even in a narrower type and widened back; None leaves it."""
    if store is None:
        return x
    if store == "bfloat16":
        return widen_bits(round_to_bf16(x))
    if store == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(x.dtype)
    return _round_to_tf32(x)


def _round_to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 with 10 bits of mantissa kept: bit arithmetic carries into the exponent as rounding should."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    kept = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), x, kept.view(np.float32))


def unavailable() -> str | None:
    """Why this family cannot run here: it always can."""
    return None


def capabilities(spec: AttentionSpec) -> Capabilities:
    """Every option and dtype; a work item is a whole head, since unfused stages store S_q x S_kv at once."""
    return Capabilities(
        name="vanilla",
        dtypes=frozenset(DTYPES),
        precisions=frozenset(OPERANDS),
        max_head_size=None,
        query_block=1,
        tile_q=(max(1, spec.q_len),),
        tile_k=(max(1, spec.kv_len),),
        options=frozenset({"band", "program", "sinks", "dropout"}),
        native=False,
        directions=frozenset({"forward", "backward"}),
    )


def compile(spec: AttentionSpec, plan: Plan, layout: Layout) -> RowsKernel:
    """The baseline bound to one specification; nothing is generated, so nothing is cached."""
    attend = partial(attend_rows, scale=spec.scale, dtype=spec.dtype, band=spec.band, precision=spec.precision)
    return RowsKernel(spec, plan, layout, attend)


def backward(
    spec: AttentionSpec,
    inputs: Inputs,
    offset: int | np.ndarray,
    scoring: Scoring | None,
    wanted: frozenset[str],
    order: np.ndarray | None = None,
) -> Sums:
    """The gradients, unfused: a 16-bit type rounds S, P, dP and dS where they are stored, S_q x S_kv a head."""
    store, operand = STORED.get(spec.dtype), OPERANDS[spec.precision]
    accumulator = np.dtype(DTYPES[spec.dtype].accumulator)
    how = Arithmetic(accumulator, partial(rounded, store=store), partial(rounded, store=operand), None)
    return differentiate(spec, inputs, offset, scoring, wanted, how, order)


FAMILY = Family("vanilla", unavailable, capabilities, compile, backward=backward)
