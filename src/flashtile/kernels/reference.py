"""The oracle: attention in fp64 (longdouble for fp64 inputs), in plain NumPy, complete and slow.

Every other kernel is judged by this one, so it computes each row by the definition: all scores of the
row, their softmax, the weighted sum of the values. Only blocks of query rows exist at a time.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES, dtype_of
from flashtile.kernels import Capabilities, Family, Layout
from flashtile.kernels.backward import Arithmetic, differentiate
from flashtile.kernels.gradients import Inputs, Sums
from flashtile.kernels.rule import NO_RULE, Rule, hide, product, rule_of, visible
from flashtile.kernels.views import RowsKernel

if TYPE_CHECKING:
    from flashtile.plan import Plan
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec, Band

# Scores held at a time (16 bytes each in longdouble): bounds memory whatever S_q is.
_BLOCK_SCORES = 1 << 18


class Attended(NamedTuple):
    """The state of some query rows: o normalised, lse in nats; 0 and -inf where no key is visible."""

    o: np.ndarray
    lse: np.ndarray


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
    Raises:  NumPy's own on shapes that do not fit; `flashtile.attention` validates.
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
    nonfinite, weight, seen = v[keys], p[:, keys], ~np.isneginf(s[:, keys])
    plus = _meets(seen & (weight > 0), np.isposinf(nonfinite))
    minus = _meets(seen & (weight > 0), np.isneginf(nonfinite))
    nan = _meets(seen, np.isnan(nonfinite)) | _meets(seen & (weight == 0), np.isinf(nonfinite)) | (plus & minus)
    o = np.where(plus, np.inf, np.where(minus, -np.inf, o))
    return np.where(nan | np.isnan(p).any(axis=1)[:, None], np.nan, o).astype(p.dtype, copy=False)


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
    return RowsKernel(spec, plan, layout, partial(attend_rows, scale=spec.scale, band=spec.band, dtype=dtype))


def oracle_dtype(dtype: str) -> np.dtype:
    """The arithmetic that judges a dtype: fp64, and longdouble for fp64 itself."""
    return np.dtype(np.longdouble if dtype_of(dtype).name == "float64" else np.float64)


def backward(
    spec: AttentionSpec,
    inputs: Inputs,
    offset: int | np.ndarray,
    scoring: Scoring | None,
    wanted: frozenset[str],
    order: np.ndarray | None = None,
) -> Sums:
    """The gradients in the oracle's dtype, by blocks of rows."""
    exact = Arithmetic(oracle_dtype(spec.dtype), np.asarray, np.asarray, _BLOCK_SCORES)
    return differentiate(spec, inputs, offset, scoring, wanted, exact, order)


FAMILY = Family("reference", unavailable, capabilities, compile, backward=backward)
