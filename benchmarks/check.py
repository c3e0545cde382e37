"""The correctness check that every peer passes before it is timed: sampled rows against wide arithmetic.

The allowed error comes from data: what the plain unfused form loses on the same rows when its scores, weights and
output are rounded to the case's dtype. Peers differ in what they round, hence the factor.
"""

from __future__ import annotations

import numpy as np

from .cases import Case
from .data import numpy_dtype, visible_keys

FACTOR = 4.0  # of the unfused form's own error
ULPS = 4.0  # of the largest |reference| value, where the unfused form happens to be nearly exact
EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}


def sample_rows(case: Case, count: int = 16, seed: int = 1) -> np.ndarray:
    """(count + 2, 3) of (batch, head, query), the first and the last query among them."""
    rng = np.random.default_rng(seed)
    limits = (case.batch, case.heads, case.queries)
    rows = rng.integers(0, limits, size=(count + 2, 3))
    rows[0, 2], rows[1, 2] = 0, case.queries - 1
    return rows


def attend_rows(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray, *, rounded: bool
) -> np.ndarray:
    """Attention of the sampled rows, (rows, head_size): wide (fp64; longdouble for fp64), or rounded at every stage."""
    dtype = numpy_dtype(case.dtype)
    wide = np.longdouble if case.dtype == "f64" else np.float64
    compute = max(dtype, np.dtype(np.float32), key=lambda kind: kind.itemsize) if rounded else np.dtype(wide)

    def settle(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(compute) if rounded else x

    option, shape = case.options, (case.batch, case.heads, case.queries, case.keys)
    bias = None if option.bias is None else np.broadcast_to(option.bias(case), shape)
    out = np.empty((len(rows), v.shape[-1]), dtype=wide)
    for index, (b, h, i) in enumerate(rows):
        group = h // (case.heads // case.kv_heads)
        seen = visible_keys(case, b, h, i)
        keys, values = k[b, group, seen].astype(compute), v[b, group, seen].astype(compute)
        scores = settle((keys @ q[b, h, i].astype(compute)) * compute.type(case.scale))
        if option.softcap:
            scores = settle(compute.type(option.softcap) * np.tanh(scores / compute.type(option.softcap)))
        if bias is not None:
            scores = settle(scores + bias[b, h, i, seen].astype(compute))
        weights = np.exp(scores - scores.max())
        total = weights.sum()
        if option.sinks is not None:
            total += np.exp(option.sinks(case)[h].astype(compute) - scores.max())
        out[index] = settle(settle(weights / total) @ values)
    return out


def allowed_error(case: Case, reference: np.ndarray, rounded: np.ndarray) -> float:
    own = float(np.abs(rounded - reference).max())
    return FACTOR * own + ULPS * EPSILON[case.dtype] * float(np.abs(reference).max())


def largest_error(sample: np.ndarray, reference: np.ndarray) -> float:
    """The largest |difference|; NaN if a value is not finite, infinity if the shapes differ."""
    if sample.shape != reference.shape:
        return float("inf")
    return float(np.abs(sample - reference).max()) if np.isfinite(sample).all() else float("nan")


def complaint(error: float, allowed: float) -> str | None:
    """Why a sample is not accepted, None if it is. Written so that NaN is a complaint."""
    return None if error <= allowed else f"wrong result: largest error {error:.3g}, allowed {allowed:.3g}"
