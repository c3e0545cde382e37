"""The correctness check that every peer passes before it is timed: sampled rows against wide arithmetic.

What is compared has an axis of tensors first: the output alone, or the gradients of q, k and v.

The allowed error comes from data: what the plain unfused form loses on the same rows when its scores, weights and
output are rounded to the case's dtype. Peers differ in what they round, hence the factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .cases import Case
from .data import numpy_dtype, sampled, visible_keys, visible_mask

FACTOR = 4.0  # of the unfused form's own error
GRADIENT_FACTOR = 6.0  # which sums products of more rounded numbers
TOGETHER = 32  # query rows of a product of matrices
BLOCK = 512  # query rows of the gradients' reference at a time
ULPS = 4.0  # of the largest |reference| value, where the unfused form happens to be nearly exact
EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}


def sample_rows(case: Case, count: int = 16, seed: int = 1) -> np.ndarray:
    """(tensors, count + 2, 3) of (batch, head, row), the first and the last row among them. Of gradients: of one
    key/value head and the query heads that share it, since each row of dk and dv takes all of theirs."""
    rng = np.random.default_rng(seed)
    limits = [(case.batch, case.heads, case.queries), *[(case.batch, case.kv_heads, case.keys)] * 2]
    tensors = 1 if case.direction == "forward" else 3
    found = np.stack([rng.integers(0, limit, size=(count + 2, 3)) for limit in limits[:tensors]])
    for rows, limit in zip(found, limits, strict=False):
        rows[0, 2], rows[1, 2] = 0, limit[2] - 1
    if tensors > 1:
        found[..., 0], found[1:, :, 1] = case.batch - 1, case.kv_heads - 1
        group = case.heads // case.kv_heads
        found[0, :, 1] = case.heads - group + found[0, :, 1] % group
    return found


def expected_rows(case: Case, arrays: Sequence[np.ndarray], rows: np.ndarray, *, rounded: bool) -> np.ndarray:
    """The sampled rows of each tensor: wide (fp64; longdouble for fp64), or rounded at every stage."""
    if case.direction == "forward":
        return attend_rows(case, *arrays, rows[0], rounded=rounded)[None]
    return gradient_rows(case, *arrays, rows, rounded=rounded)


class Arithmetic:
    """Wide, or in the case's dtype as an unfused form has it: sums in fp32 or more, what is stored rounded."""

    def __init__(self, case: Case, rounded: bool) -> None:
        self.dtype, self.rounded = numpy_dtype(case.dtype), rounded
        self.wide = np.dtype(np.longdouble if case.dtype == "f64" else np.float64)
        self.compute = max(self.dtype, np.dtype(np.float32), key=lambda kind: kind.itemsize) if rounded else self.wide
        self.fraction = case.options.fraction if rounded else 0

    def operand(self, x: np.ndarray) -> np.ndarray:
        """What a product takes."""
        x = x.astype(self.compute)
        if not self.fraction:
            return x
        parts, exponent = np.frexp(x)
        steps = 2.0 ** (self.fraction + 1)
        return np.ldexp(np.rint(parts * steps) / steps, exponent).astype(self.compute)

    def settle(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self.dtype).astype(self.compute) if self.rounded else x


def attend_rows(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray, *, rounded: bool
) -> np.ndarray:
    """Attention of the sampled rows, (rows, head_size)."""
    how = Arithmetic(case, rounded)
    compute, wide, settle = how.compute, how.wide, how.settle
    option, shape = case.options, (case.batch, case.heads, case.queries, case.keys)
    bias = None if option.bias is None else np.broadcast_to(option.bias(case), shape)
    out = np.empty((len(rows), v.shape[-1]), dtype=wide)
    for index, (b, h, i) in enumerate(rows):
        group = h // (case.heads // case.kv_heads)
        seen = visible_keys(case, b, h, i)
        keys, values = how.operand(k[b, group, seen]), how.operand(v[b, group, seen])
        products = _products(how.operand(q[b, h]), i, keys) if rounded else keys @ q[b, h, i].astype(compute)
        scores = settle(products * compute.type(case.scale))
        if option.softcap:
            scores = settle(compute.type(option.softcap) * np.tanh(scores / compute.type(option.softcap)))
        if bias is not None:
            scores = settle(scores + bias[b, h, i, seen].astype(compute))
        weights = np.exp(scores - scores.max())
        total = weights.sum()
        if option.sinks is not None:
            total += np.exp(option.sinks(case)[h].astype(compute) - scores.max())
        out[index] = settle(how.operand(settle(weights / total)) @ values)
    return out


def _products(queries: np.ndarray, row: int, keys: np.ndarray) -> np.ndarray:
    """Scores of one row, of a product of matrices: a library sums a product of a matrix and a vector in more places at
    once, which loses several times less, and would allow an error that no unfused form keeps to."""
    first = max(0, min(row - TOGETHER // 2, len(queries) - TOGETHER))
    found: np.ndarray = (queries[first : first + TOGETHER].astype(keys.dtype) @ keys.T)[row - first]
    return found


def gradient_rows(
    case: Case,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    do: np.ndarray,
    rows: np.ndarray,
    *,
    rounded: bool,
) -> np.ndarray:
    """The sampled rows of dq, dk and dv, (3, rows, head_size), all of one batch and key/value head."""
    how = Arithmetic(case, rounded)
    b, g = rows[1, 0, :2]
    keys, values = k[b, g].astype(how.compute), v[b, g].astype(how.compute)
    dq = np.zeros(q.shape[1:], how.wide)
    dk, dv = np.zeros_like(keys), np.zeros_like(values)
    group = case.heads // case.kv_heads
    for h in range(g * group, (g + 1) * group):
        for first in range(0, case.queries, BLOCK):
            at = slice(first, first + BLOCK)
            here, arrived = (x[b, h, at].astype(how.compute) for x in (q, do))
            p, slope = _weights(case, how, here, keys, (b, h, at))
            o = how.settle(p @ values)
            dp = how.settle(arrived @ values.T) - (arrived * o).sum(axis=1, keepdims=True)
            ds = how.settle(p * dp * slope * how.compute.type(case.scale))
            dq[h, at] = how.settle(ds @ keys)
            dk += ds.T @ here
            dv += p.T @ arrived
    found = dq[None], how.settle(dk)[None, None], how.settle(dv)[None, None]
    at_zero = [rows[0] * (0, 1, 1), rows[1] * (0, 0, 1), rows[2] * (0, 0, 1)]
    return sampled(found, np.stack(at_zero)).astype(how.wide)


def _weights(
    case: Case, how: Arithmetic, q: np.ndarray, k: np.ndarray, where: tuple[int, int, slice]
) -> tuple[np.ndarray, np.ndarray | float]:
    """The weights of some rows of a head, and the derivative of their scores by what they were before a softcap."""
    b, h, at = where
    option, shape = case.options, (case.batch, case.heads, case.queries, case.keys)
    scores, slope = how.settle(q @ k.T * how.compute.type(case.scale)), how.compute.type(1)
    if option.softcap:
        cap = how.compute.type(option.softcap)
        capped = np.tanh(scores / cap)
        scores, slope = how.settle(cap * capped), 1 - capped * capped
    if option.bias is not None:
        scores = how.settle(scores + np.broadcast_to(option.bias(case), shape)[b, h, at].astype(how.compute))
    seen = np.broadcast_to(visible_mask(case), shape)[b, h, at]
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0)).astype(how.compute)
    total = weights.sum(axis=1, keepdims=True)
    if option.sinks is not None:
        total = total + np.exp(option.sinks(case)[h].astype(how.compute) - top)
    return how.settle(weights / np.where(total == 0, 1, total)), slope


def epsilon(case: Case) -> float:
    """Of what operands are rounded to."""
    return 2.0**-case.options.fraction if case.options.fraction else EPSILON[case.dtype]


def allowed_error(case: Case, reference: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """Of each tensor."""
    axes = tuple(range(1, reference.ndim))
    factor = FACTOR if case.direction == "forward" else GRADIENT_FACTOR
    own, largest = np.abs(rounded - reference).max(axes), np.abs(reference).max(axes)
    return (factor * own + ULPS * epsilon(case) * largest).astype(float)


def worst(sample: np.ndarray, reference: np.ndarray, allowed: np.ndarray) -> tuple[float, float]:
    """The error of the tensor that is the farthest off, and what is allowed there."""
    if len(sample) != len(reference):
        return float("inf"), float(allowed.max())
    errors = [largest_error(s, r) for s, r in zip(sample, reference, strict=True)]
    place = int(np.argmax([np.inf if np.isnan(e) else e / a for e, a in zip(errors, allowed, strict=True)]))
    return errors[place], float(allowed[place])


def largest_error(sample: np.ndarray, reference: np.ndarray) -> float:
    """The largest |difference|; NaN if a value is not finite, infinity if the shapes differ."""
    if sample.shape != reference.shape:
        return float("inf")
    return float(np.abs(sample - reference).max()) if np.isfinite(sample).all() else float("nan")


def complaint(error: float, allowed: float) -> str | None:
    """Why a sample is not accepted, None if it is. Written so that NaN is a complaint."""
    return None if error <= allowed else f"wrong result: largest error {error:.3g}, allowed {allowed:.3g}"
