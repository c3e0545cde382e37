"""NumPy's unfused form: scores, softmax, output, with every score stored. 16-bit inputs are widened to fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cases import Case
from ..data import additive, numpy_dtype

SCORE_LIMIT = 1 << 30  # bytes


def refuses(case: Case) -> str | None:
    if case.score_bytes > SCORE_LIMIT:
        return f"its scores would take {case.score_bytes / 2**30:.1f} GiB"
    return None


def versions() -> dict[str, str]:
    return {"numpy": np.__version__}


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    dtype = numpy_dtype(case.dtype)
    compute: Any = np.float64 if case.dtype == "f64" else np.float32
    option, bias = case.options, additive(case)
    sinks = None if option.sinks is None else option.sinks(case)[None, :, None, None]
    group = case.heads // case.kv_heads

    def run() -> np.ndarray:
        wide_q, wide_k, wide_v = (x.astype(compute, copy=False) for x in (q, k, v))
        if group > 1:
            wide_k, wide_v = (np.repeat(x, group, axis=1) for x in (wide_k, wide_v))
        scores = (wide_q * compute(case.scale)) @ wide_k.swapaxes(-1, -2)
        if option.softcap:
            np.multiply(np.tanh(scores / option.softcap), option.softcap, out=scores)
        if bias is not None:
            scores += bias
        top = scores.max(axis=-1, keepdims=True)
        scores -= top
        np.exp(scores, out=scores)
        out = scores @ wide_v
        total = scores.sum(axis=-1, keepdims=True)
        out /= total if sinks is None else total + np.exp(sinks - top)
        return out.astype(dtype, copy=False)

    def to_numpy(out: Any) -> np.ndarray:
        return out

    return run, to_numpy
