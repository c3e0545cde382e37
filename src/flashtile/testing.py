"""Results held to the accuracy rule (`flashtile.kernels.accuracy`): how far from exact they may be, judged from data.

from flashtile.testing import assert_accurate
o = flashtile.attention(q, k, v, causal=True)
assert_accurate(o, q, k, v, causal=True)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashtile.calls import Options
from flashtile.checks import integer
from flashtile.kernels.accuracy import FACTOR, Expected, allow, expect_values, key_orders, ulp, values_of
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions
from flashtile.signature import Align, Precision, Window
from flashtile.spec import PER_BATCH

__all__ = [
    "FACTOR", "Expected", "allow", "allowed_error", "assert_accurate", "expect", "expect_values", "key_orders", "ulp",
]  # fmt: skip


def expect(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    **scores: Any,
) -> tuple[Expected, Expected]:
    """What `flashtile.attention` of the same arguments should return: the output, and lse.

    Shapes:  as `flashtile.attention`: (B, H, S, D), (H, S, D) or (S, D); NumPy arrays or CPU torch tensors; `scores`
             are its options mask, bias, score_mod, softcap, alibi_slopes and sinks.
    Units:   lse in nats.
    Numerics: see the rule; lse is judged by the same rule, in the accumulator's dtype.
    Raises:  SpecError as `flashtile.attention`; ValueError where the baseline overflows in every element that the
             reference has finite, for the rule then says nothing.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    per_batch = not (align is None or isinstance(align, str) or integer(align) is not None)
    options = Options(causal, window, PER_BATCH if per_batch else align, scale, precision, "auto", "auto")
    changes = ScoreOptions(**scores, keep=keep_of(dropout_p, seed))
    spec, scoring = options.scored(changes, q, k, v, np.asarray(align) if per_batch else None)
    offset = np.asarray(align) if spec.offset is None else spec.offset
    return expect_values(spec, [values_of(x) for x in (q, k, v)], offset, scoring)


def assert_accurate(got: Any, q: Any, k: Any, v: Any, *, kind: str = "output", **options: Any) -> None:
    """Raise AssertionError unless `got` is what `flashtile.attention(q, k, v, **options)` should return.

    Shapes:  got (B, H, S_q, D_v) for kind "output", (B, H, S_q) for kind "lse", or with as few axes as q.
    Units:   lse in nats.
    Numerics: the dtype, the shape and every element, by the rule.
    Raises:  AssertionError naming the first wrong element; else as `expect`.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    __tracebackhide__ = True
    if kind not in ("output", "lse"):
        raise ValueError(f"kind: got {kind!r}, expected 'output' or 'lse'")
    o, lse = expect(q, k, v, **options)
    (o if kind == "output" else lse).check(got, kind)


def allowed_error(q: Any, k: Any, v: Any, *, kind: str = "output", **options: Any) -> float:
    """The largest error that `assert_accurate` of the same arguments lets pass, in the units of the tensor."""
    o, lse = expect(q, k, v, **options)
    return {"output": o, "lse": lse}[kind].allowed
