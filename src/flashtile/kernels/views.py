"""The kernel object that the NumPy families share.

A door hands a kernel addresses and byte strides, whoever owns the memory. The NumPy kernels rebuild
arrays from them without a copy, so every door works with every kernel and an engine runs them all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.arrays import view
from flashtile.dtypes import dtype_of, round_to_bf16, widen_bits
from flashtile.kernels.rule import Rule, rule_of

if TYPE_CHECKING:
    from flashtile.kernels import Layout
    from flashtile.plan import Plan
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

# The rows of one head: (q (r, D), k (S_kv, D), v (S_kv, D_v), first row, offset, rule) -> (o (r, D_v), lse (r,)).
AttendRows = Callable[[np.ndarray, np.ndarray, np.ndarray, int, int, "Rule"], "tuple[np.ndarray, np.ndarray]"]


class Views(NamedTuple):
    """The arrays of one call, rebuilt from their addresses."""

    q: np.ndarray  # (B, H, S_q, D)
    k: np.ndarray  # (B, H_kv, S_kv, D)
    v: np.ndarray  # (B, H_kv, S_kv, D_v)
    o: np.ndarray  # (B, H, S_q, D_v)
    lse: np.ndarray | None  # (B, H, S_q)
    offsets: np.ndarray  # (B,)
    scoring: Scoring | None


@dataclass(frozen=True)
class RowsKernel:
    """A compiled kernel made of one NumPy function that attends some rows of one head."""

    spec: AttentionSpec
    plan: Plan
    layout: Layout
    attend_rows: AttendRows
    scratch_bytes: int = 0
    merge_stage: None = None

    def pack(self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None) -> Views:
        """Views over one call's addresses; lse is 0 if it is not wanted, offsets if spec.offset is a number."""
        spec, layout, dtype = self.spec, self.layout, dtype_of(self.spec.dtype)
        batch, heads, kv_heads = spec.batch, spec.heads, spec.kv_heads
        lse_dtype = np.dtype(dtype.accumulator)
        lse_strides = tuple(lse_dtype.itemsize * n for n in (heads * spec.q_len, spec.q_len, 1))
        return Views(
            view(q, (batch, heads, spec.q_len, spec.head_size), layout.q, dtype.numpy),
            view(k, (batch, kv_heads, spec.kv_len, spec.head_size), layout.k, dtype.numpy),
            view(v, (batch, kv_heads, spec.kv_len, spec.value_size), layout.v, dtype.numpy),
            view(o, (batch, heads, spec.q_len, spec.value_size), layout.o, dtype.numpy, writable=True),
            view(lse, (batch, heads, spec.q_len), lse_strides, lse_dtype, writable=True) if lse else None,
            view(offsets, (batch,), (8,), np.dtype(np.int64)) if offsets else np.full(batch, spec.offset or 0),
            scoring,
        )

    def run(self, params: Views, begin: int, end: int, scratch: int) -> int:
        """Work items [begin, end) of the plan; always 0, since a NumPy failure is an exception already."""
        spec, plan = self.spec, self.plan
        for item in range(begin, end):
            b, h, tile, _ = plan.locate(item)
            first, kv = tile * plan.tile_q, h // spec.group
            rows = slice(first, min(first + plan.tile_q, spec.q_len))
            q, k, v = widen(params.q[b, h, rows]), widen(params.k[b, kv]), widen(params.v[b, kv])
            rule = rule_of(params.scoring, b, h, spec.heads)
            o, lse = self.attend_rows(q, k, v, first, int(params.offsets[b]), rule)
            with np.errstate(over="ignore"):  # what the output's type cannot hold is an infinity there
                params.o[b, h, rows] = round_to_bf16(o) if spec.dtype == "bfloat16" else o
                if params.lse is not None:
                    params.lse[b, h, rows] = lse
        return 0


def widen(x: np.ndarray) -> np.ndarray:
    """The values of a kernel's operand: bfloat16 arrives as its bits (uint16) and becomes float32, the rest stays."""
    return widen_bits(x) if x.dtype == np.uint16 else x
