"""The oracle: attention in fp64 (longdouble for fp64 inputs), in plain NumPy, complete and slow.

Every other kernel is judged by this one, so it computes each row by the definition: all scores of the
row, their softmax, the weighted sum of the values. Only blocks of query rows exist at a time.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES, dtype_of
from flashtile.kernels import Capabilities, Layout
from flashtile.kernels.views import RowsKernel

if TYPE_CHECKING:
    from flashtile.kernels.backward import Inputs, Sums
    from flashtile.plan import Plan
    from flashtile.score.keep import Keep
    from flashtile.score.options import Scoring
    from flashtile.score.program import Program
    from flashtile.spec import AttentionSpec, Band

# Scores held at a time (16 bytes each in longdouble): bounds memory whatever S_q is.
_BLOCK_SCORES = 1 << 18

_blas = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child that inherited the lock while it was held would wait for ever
    os.register_at_fork(before=_blas.acquire, after_in_parent=_blas.release, after_in_child=_blas.release)


class Attended(NamedTuple):
    """The state of some query rows: o normalised, lse in nats; 0 and -inf where no key is visible."""

    o: np.ndarray
    lse: np.ndarray


class Rule(NamedTuple):
    """What a call's program and sinks mean for one head."""

    program: Program | None
    b: int
    h: int
    sink: float
    keep: Keep | None = None
    head: int = 0  # b * H + h, by which dropout counts

    def change(self, s: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The scores of these rows and keys after the program, -inf where it hides: (r, n) -> (r, n)."""
        if self.program is None:
            return s
        return self.program.evaluate(s, self.b, self.h, rows[:, None], keys[None, :], s.dtype)

    def drop(self, p: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The weights of these rows and keys after dropout: (r, n) -> (r, n)."""
        return p if self.keep is None else self.keep.drop(p, self.head, rows, keys)


NO_RULE = Rule(None, 0, 0, -np.inf)


def rule_of(scoring: Scoring | None, b: int, h: int, heads: int) -> Rule:
    """The rule of batch b and query head h of `heads`."""
    if scoring is None:
        return NO_RULE
    sink = -np.inf if scoring.sinks is None else float(scoring.sinks[b, h])
    return Rule(scoring.program, b, h, sink, scoring.keep, b * heads + h)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    band: Band | None = None,
    offset: int | np.ndarray = 0,
    scoring: Scoring | None = None,
    dtype: np.typing.DTypeLike = np.float64,
) -> Attended:
    """Attend every query row to all keys, by the definition.

    Shapes:  q (B, H, S_q, D), k (B, H_kv, S_kv, D), v (B, H_kv, S_kv, D_v) -> o (B, H, S_q, D_v), lse (B, H, S_q);
             offset is one integer or (B,); key j is visible to row i iff -left <= j - (i + offset) <= right and
             the program of `scoring`, if there is one, shows it.
    Units:   lse in nats; scale multiplies q.k before the mask.
    Numerics: everything in `dtype`. A score of -inf has weight 0 and counts as hidden; a hidden key never reaches
             its row, whatever it holds; a visible NaN or a score of +inf makes the row NaN, lse included; a row
             with no visible key gives o = 0, lse = -inf.
    Errors:  NumPy's own on shapes that do not fit; `flashtile.attention` validates.
    Source:  docs, "What flashtile computes".

    >>> q = np.zeros((1, 1, 1, 2)); v = np.array([[[[1.0], [3.0]]]])
    >>> attend(q, np.zeros((1, 1, 2, 2)), v, scale=1.0).o
    array([[[[2.]]]])
    """
    (batch, heads, q_len, _), kv_heads = q.shape, k.shape[1]
    o, lse = np.empty((batch, heads, q_len, v.shape[-1]), dtype), np.empty((batch, heads, q_len), dtype)
    offsets = np.broadcast_to(offset, (batch,))
    for b, h in np.ndindex(batch, heads):
        kv = h // (heads // kv_heads)
        rule = rule_of(scoring, b, h, heads)
        o[b, h], lse[b, h] = attend_rows(
            q[b, h], k[b, kv], v[b, kv], 0, int(offsets[b]), rule, scale=scale, band=band, dtype=dtype
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
    band: Band | None,
    dtype: np.typing.DTypeLike,
) -> Attended:
    """`attend` for rows first, first + 1, ... of one head: (r, D), (S_kv, D), (S_kv, D_v) -> o (r, D_v), lse (r,)."""
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    o, lse = np.empty((len(q), v.shape[-1]), dtype), np.empty(len(q), dtype)
    keys = np.arange(len(k))
    block = max(1, _BLOCK_SCORES // max(1, len(k)))
    with np.errstate(all="ignore"):  # inf and NaN are answers here, not accidents
        for begin in range(0, len(q), block):
            rows = slice(begin, min(begin + block, len(q)))
            s = q.dtype.type(scale) * product(q[rows], k.T)  # (r, S_kv)
            here = first + np.arange(rows.start, rows.stop)
            s = hide(rule.change(s, here, keys), visible(band, offset, here, keys))
            weight, lse[rows] = weights(s, rule.sink)
            o[rows] = weighted_values(rule.drop(weight, here, keys), v, s)
    return Attended(o, lse)


def visible(band: Band | None, offset: int, rows: np.ndarray, keys: np.ndarray) -> np.ndarray | None:
    """Which keys a positional rule shows to which rows: (r,), (n,) indices -> bool (r, n), or None where all are."""
    if band is None:
        return None
    distance = keys - (rows[:, None] + offset)
    seen = np.ones(distance.shape, bool)
    if band.left is not None:
        seen &= distance >= -band.left
    if band.right is not None:
        seen &= distance <= band.right
    return seen


def hide(s: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """-inf in place of the scores that a mask hides, selected so that a hidden NaN goes too."""
    return s if seen is None else np.where(seen, s, -np.inf).astype(s.dtype, copy=False)


def weights(s: np.ndarray, sink: float = -np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of each row and its lse: s (r, n) -> p (r, n), lse (r,); NaN and +inf spread over the visible keys.

    The sink is one more score in the denominator; -inf is none.
    """
    peak = np.max(s, axis=1, initial=sink)
    shift = np.where(np.isneginf(peak), 0, peak).astype(s.dtype, copy=False)  # -inf - -inf would be NaN
    p = np.exp(s - shift[:, None])
    total = p.sum(axis=1) + np.exp(sink - shift)
    return p / np.where(total == 0, 1, total)[:, None], shift + np.log(total)


def weighted_values(p: np.ndarray, v: np.ndarray, s: np.ndarray) -> np.ndarray:
    """p @ v where a hidden key (score -inf) adds nothing whatever its value holds: (r, n), (n, D_v) -> (r, D_v).

    0 * NaN is NaN, so non-finite values are left out of the product and what they do to the rows that see them
    is put in afterwards: NaN, or the infinity whose sign stands alone.
    """
    finite = np.isfinite(v)
    keys = np.flatnonzero(~finite.all(axis=1))
    if not len(keys):
        return product(p, v)
    o = product(p, np.where(finite, v, 0))
    odd, weight, seen = v[keys], p[:, keys], ~np.isneginf(s[:, keys])
    plus = _meets(seen & (weight > 0), np.isposinf(odd))
    minus = _meets(seen & (weight > 0), np.isneginf(odd))
    nan = _meets(seen, np.isnan(odd)) | _meets(seen & (weight == 0), np.isinf(odd)) | (plus & minus)
    o = np.where(plus, np.inf, np.where(minus, -np.inf, o))
    return np.where(nan | np.isnan(p).any(axis=1)[:, None], np.nan, o).astype(p.dtype, copy=False)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, where BLAS does it by one thread of ours at a time: it has its own, and callers that meet there spin."""
    if a.dtype.itemsize > 8:  # no BLAS has longdouble
        return a @ b
    with _blas:
        return a @ b


def _meets(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Whether some key is marked on both sides: bool (r, n), (n, c) -> (r, c)."""
    return product(rows.astype(np.float32), columns.astype(np.float32)) > 0


def unavailable() -> str | None:
    """Why this family cannot run here: it always can."""
    return None


def capabilities(spec: AttentionSpec) -> Capabilities:
    """Every option and dtype, any tile; a request for less precision is honoured at this one."""
    return Capabilities(
        name="reference",
        dtypes=frozenset(DTYPES),
        precisions=frozenset({"ieee"}),
        max_head_size=None,
        query_block=1,
        tile_q=(16, 32, 64, 128, 256),
        tile_k=(max(1, spec.kv_len),),
        options=frozenset({"band", "program", "sinks", "dropout"}),
        native=False,
        directions=frozenset({"forward", "backward"}),
    )


def compile(spec: AttentionSpec, plan: Plan, layout: Layout) -> RowsKernel:
    """The oracle bound to one specification; nothing is generated, so nothing is cached."""
    dtype = oracle_dtype(spec.dtype)
    return RowsKernel(spec, plan, layout, partial(attend_rows, scale=spec.scale, band=spec.band, dtype=dtype), rule_of)


def oracle_dtype(dtype: str) -> np.dtype:
    """The arithmetic that judges a dtype: fp64, and longdouble for fp64 itself."""
    return np.dtype(np.longdouble if dtype_of(dtype).name == "float64" else np.float64)


def backward(
    spec: AttentionSpec,
    inputs: Inputs,
    offset: int | np.ndarray,
    scoring: Scoring | None,
    wanted: frozenset[str | int],
    order: np.ndarray | None = None,
) -> Sums:
    """The gradients in the oracle's dtype, by blocks of rows."""
    from flashtile.kernels.backward import Arithmetic, differentiate  # which builds on this module

    exact = Arithmetic(oracle_dtype(spec.dtype), np.asarray, np.asarray, _BLOCK_SCORES)
    return differentiate(spec, inputs, offset, scoring, wanted, exact, order)
