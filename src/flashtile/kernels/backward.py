"""The gradients of attention in plain NumPy, unfused: what the families `reference` and `vanilla` share.

P is recomputed from the stored lse; what a mask hides is left out by selection, never multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.kernels.gradients import Inputs, Sums
from flashtile.kernels.rule import Rule, hide, product, rule_of, visible

if TYPE_CHECKING:
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

Round = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Arithmetic:
    """How a family computes: its dtype, what it rounds, and how many scores it holds at a time."""

    dtype: np.dtype
    store: Round  # S, P, dP and dS
    operand: Round  # whatever enters a product
    block_scores: int | None  # None: all of a head


def differentiate(
    spec: AttentionSpec,
    inputs: Inputs,
    offset: int | np.ndarray,
    scoring: Scoring | None,
    wanted: frozenset[str],
    how: Arithmetic,
    order: np.ndarray | None = None,
) -> Sums:
    """Gradients of sum(do * o) + sum(dlse * lse).

    `wanted` names "q", "k", "v", "sinks", "arrays"; `order` (S_kv,) permutes the keys, each keeping its index.
    """
    keys = np.arange(spec.kv_len) if order is None else order
    do, q, k, v, o, lse = (x.astype(how.dtype) for x in inputs[:6])
    dlse = np.zeros_like(lse) if inputs.dlse is None else inputs.dlse.astype(how.dtype)
    program = None if scoring is None else scoring.program
    gradients = program.array_gradients if program is not None and "arrays" in wanted else ()
    arrays = {g.slot.number: np.zeros(program.capture(g.slot).array.shape, how.dtype) for g in gradients if program}
    dq, dk, dv = (np.zeros_like(x) if name in wanted else None for name, x in (("q", q), ("k", k), ("v", v)))
    dsinks = np.zeros((spec.batch, spec.heads), how.dtype) if "sinks" in wanted else None
    offsets = np.broadcast_to(offset, (spec.batch,))
    block = max(1, spec.q_len if how.block_scores is None else how.block_scores // max(1, spec.kv_len))
    with np.errstate(all="ignore"):  # inf and NaN are answers here, not accidents
        for b, h in np.ndindex(spec.batch, spec.heads):
            kv, rule = h // spec.group, rule_of(scoring, b, h, spec.heads)
            for begin in range(0, spec.q_len, block):
                rows = slice(begin, min(begin + block, spec.q_len))
                part = _Rows(
                    do[b, h, rows],
                    q[b, h, rows],
                    k[b, kv][keys],
                    v[b, kv][keys],
                    o[b, h, rows],
                    lse[b, h, rows],
                    dlse[b, h, rows],
                    np.arange(rows.start, rows.stop),
                    keys,
                    int(offsets[b]),
                )
                tile = _scores(part, spec, rule, how)
                if dv is not None:
                    dv[b, kv, keys] += seen_product(how.operand(tile.p.T), how.operand(part.do), tile.seen.T)
                if dsinks is not None:
                    dsinks[b, h] += _sink(part, tile, rule.sink)
                if dq is not None:
                    dq[b, h, rows] = spec.scale * seen_product(tile.ds_raw, how.operand(part.k), tile.seen)
                if dk is not None:
                    dk[b, kv, keys] += spec.scale * seen_product(tile.ds_raw.T, how.operand(part.q), tile.seen.T)
                if arrays:
                    _add_arrays(arrays, part, tile, rule)
    return Sums(dq, dk, dv, dsinks, arrays)


def seen_product(w: np.ndarray, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """w @ x over what is seen, whatever x holds elsewhere: (r, n), (n, c), bool (r, n) -> (r, c). w is 0 if unseen."""
    finite = np.isfinite(x)
    nonfinite = np.flatnonzero(~finite.all(axis=1))
    if not len(nonfinite):
        return product(w, x)
    result = product(w, np.where(finite, x, 0))
    for n in nonfinite:
        put_back = seen[:, n, None] & ~finite[n]
        result += np.where(put_back, w[:, n, None] * x[n], 0)
    return result


class _Rows(NamedTuple):
    """Some rows of one head, and all its keys."""

    do: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray
    lse: np.ndarray
    dlse: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    offset: int


class _Tile(NamedTuple):
    """What the gradients of some rows are made of, each (r, n) but delta (r,); 0 where not seen."""

    s: np.ndarray  # scaled, before the program
    seen: np.ndarray
    p: np.ndarray
    ds: np.ndarray  # of the score after the program
    ds_raw: np.ndarray  # of the score before it, as it enters the products
    delta: np.ndarray


def _scores(part: _Rows, spec: AttentionSpec, rule: Rule, how: Arithmetic) -> _Tile:
    raw = how.dtype.type(spec.scale) * product(how.operand(part.q), how.operand(part.k).T)
    seen_by_band = visible(spec.band, part.offset, part.rows, part.keys)
    s = how.store(hide(rule.change(raw, part.rows, part.keys), seen_by_band))
    seen = ~np.isneginf(s)
    # A row that sees nothing has a constant o: what its dO holds must not reach the sink.
    delta = np.where(seen.any(axis=1), (part.do * part.o).sum(axis=1), 0) - part.dlse
    # Dropout multiplies p by keep / (1 - dropout_p) for dV, and dP likewise; p itself stays in dS = p (dP - delta).
    p = how.store(np.where(seen, np.exp(s - part.lse[:, None]), 0))
    dp = how.store(product(how.operand(part.do), how.operand(part.v).T))
    ds = how.store(np.where(seen, p * (dp - delta[:, None]), 0))
    ds_raw = ds
    if rule.program is not None and (slope := rule.program.score_derivative) is not None:
        at = rule.b, rule.h, part.rows[:, None], part.keys[None, :]
        slopes = rule.program.run([slope], raw, *at, raw.dtype)[0]
        # A slope of 0 comes from a selection or a saturated cap: the score does not depend on q and k there.
        ds_raw = how.store(np.where(seen & (slopes != 0), ds * slopes, 0))
    return _Tile(raw, seen, p, ds, how.operand(ds_raw), delta)


def _sink(part: _Rows, tile: _Tile, sink: float) -> np.ndarray | float:
    if np.isneginf(sink):
        return 0.0
    return -np.sum(np.exp(tile.s.dtype.type(sink) - part.lse) * tile.delta)


def _add_arrays(arrays: dict[int, np.ndarray], part: _Rows, tile: _Tile, rule: Rule) -> None:
    """Add what these rows give to each captured array, in a fixed order."""
    program = rule.program
    assert program is not None
    at = rule.b, rule.h, part.rows[:, None], part.keys[None, :]
    for gradient in program.array_gradients:
        value, *index = program.run([gradient.value, *gradient.index], tile.s, *at, tile.s.dtype)
        target = arrays[gradient.slot.number]
        if 0 in target.shape:
            continue
        given = np.where(tile.seen & (value != 0), tile.ds * value, 0)
        where = tuple(np.clip(x, 0, n - 1) for x, n in zip(index, target.shape, strict=True))
        np.add.at(target, tuple(np.broadcast_to(x, given.shape) for x in where), given)
