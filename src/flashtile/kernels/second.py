"""Derivatives of attention along tangents, and of its gradients: plain NumPy, over blocks of rows, by library products.

With tangents t of the inputs x, forward mode is J t, J being the derivative of (o, lse); and H t, H being the second
derivative of sum(do * o) + sum(dlse * lse), is both what forward mode makes of the gradients and what their own
backward is. P is recomputed from the stored lse; memory beyond inputs and outputs is a few blocks of scores.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.kernels.backward import seen_product
from flashtile.kernels.gradients import Inputs, Sums
from flashtile.kernels.rule import Rule, hide, product, rule_of, visible
from flashtile.score.derivative import derivative
from flashtile.score.expr import Expr, postorder
from flashtile.score.operations import apply, const, inside, is_const, variable

if TYPE_CHECKING:
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

BLOCK_SCORES = 1 << 18


class Tangents(NamedTuple):
    """Tangents of the inputs, in the shapes of `Inputs` and of captured arrays by their slots; None is 0."""

    q: np.ndarray | None
    k: np.ndarray | None
    v: np.ndarray | None
    sinks: np.ndarray | None  # (B, H)
    arrays: dict[int, np.ndarray]


class Second(NamedTuple):
    """J t, for o and lse, and what of H t was wanted."""

    o: np.ndarray
    lse: np.ndarray
    sums: Sums


class _Slopes(NamedTuple):
    """Derivatives of a score, Z, by the raw score s and by its loads of float arrays, as expressions."""

    s: Expr
    ss: Expr
    loads: tuple[Expr, ...]
    by_load: tuple[Expr, ...]
    by_s_and_load: tuple[Expr, ...]
    by_loads: tuple[tuple[Expr, ...], ...]


@functools.lru_cache(maxsize=64)
def _slopes_of(score: Expr) -> _Slopes:
    s = variable("s")

    def by(x: Expr, load: Expr) -> Expr:
        found = derivative(x, load)
        return found if is_const(found, 0.0) else apply("where", inside(load), found, const(0.0))

    first = derivative(score, s)
    floats = (x for x in postorder([score]) if x.operation.name == "load" and x.type == "float")
    loads = tuple(x for x in floats if not is_const(derivative(score, x), 0.0))
    each = tuple(by(score, x) for x in loads)
    mixed = tuple(derivative(x, s) for x in each)
    return _Slopes(first, derivative(first, s), loads, each, mixed, tuple(tuple(by(x, y) for y in loads) for x in each))


def differentiate(
    spec: AttentionSpec,
    inputs: Inputs,
    offset: int | np.ndarray,
    scoring: Scoring | None,
    tangents: Tangents,
    wanted: frozenset[str | int] = frozenset(),
) -> Second:
    """J t, and of H t what `wanted` names, as a family's backward is asked. inputs.do and dlse matter to H alone.

    Numerics: in float64 for float64, else in float32; what a mask hides is left out by selection.
    """
    dtype = np.dtype(np.float64 if inputs.q.dtype == np.float64 else np.float32)
    do, q, k, v, o, lse = (x.astype(dtype) for x in inputs[:6])
    dlse = np.zeros_like(lse) if inputs.dlse is None else inputs.dlse.astype(dtype)
    moving = [np.zeros_like(x) if t is None else t.astype(dtype) for x, t in zip((q, k, v), tangents[:3], strict=True)]
    program = None if scoring is None else scoring.program
    slots = range(0 if program is None else len(program.captures))
    arrays = {n: np.zeros(program.captures[n].array.shape, dtype) for n in slots if program and n in wanted}  # type: ignore[union-attr]  # wanted are arrays
    dq, dk, dv = (np.zeros_like(x) if name in wanted else None for name, x in (("q", q), ("k", k), ("v", v)))
    dsinks = np.zeros((spec.batch, spec.heads), dtype) if "sinks" in wanted else None
    found = Second(np.zeros_like(o), np.zeros_like(lse), Sums(dq, dk, dv, dsinks, arrays))
    offsets = np.broadcast_to(offset, (spec.batch,))
    block = max(1, BLOCK_SCORES // max(1, spec.kv_len))
    with np.errstate(all="ignore"):  # inf and NaN are answers here, not accidents
        for b, h in np.ndindex(spec.batch, spec.heads):
            kv, rule = h // spec.group, rule_of(scoring, b, h, spec.heads)
            ts = 0.0 if tangents.sinks is None else float(tangents.sinks[b, h])
            for begin in range(0, spec.q_len, block):
                rows = slice(begin, min(begin + block, spec.q_len))
                part = _Rows(
                    do[b, h, rows],
                    q[b, h, rows],
                    k[b, kv],
                    v[b, kv],
                    lse[b, h, rows],
                    dlse[b, h, rows],
                    moving[0][b, h, rows],
                    moving[1][b, kv],
                    moving[2][b, kv],
                    ts,
                    np.arange(rows.start, rows.stop),
                    np.arange(spec.kv_len),
                )
                seen_by_band = visible(spec.band, int(offsets[b]), part.rows, part.keys)
                tile = _forward(part, spec, rule, tangents.arrays, seen_by_band)
                found.o[b, h, rows] = tile.o
                found.lse[b, h, rows] = tile.lse
                if wanted:
                    _add(found.sums, part, tile, spec, rule, (b, h, kv, rows), tangents.arrays)
    return found


class _Rows(NamedTuple):
    """Some rows of one head and all its keys; t is for tangents."""

    do: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    lse: np.ndarray
    dlse: np.ndarray
    tq: np.ndarray
    tk: np.ndarray
    tv: np.ndarray
    ts: float
    rows: np.ndarray
    keys: np.ndarray


class _Values(NamedTuple):
    """Values of `_Slopes` on some rows, 0 where not seen; of loads that have a tangent, or whose gradient is wanted."""

    s: np.ndarray | float
    ss: np.ndarray | float
    by_load: list[np.ndarray]
    by_s_and_load: list[np.ndarray]
    by_loads: list[list[np.ndarray]]
    places: list[tuple[np.ndarray, ...]]
    slots: list[int]
    tangents: list[np.ndarray | float]


class _Tile(NamedTuple):
    """Scores (r, n) and their tangents; the sink's weight and lse's tangent (r,); o's tangent (r, D_v)."""

    seen: np.ndarray
    p: np.ndarray
    sdot: np.ndarray
    zdot: np.ndarray
    pdot: np.ndarray
    sink: np.ndarray | float
    lse: np.ndarray
    o: np.ndarray
    slopes: _Values


def _forward(
    part: _Rows, spec: AttentionSpec, rule: Rule, arrays: dict[int, np.ndarray], seen_by_band: np.ndarray | None
) -> _Tile:
    scale = part.q.dtype.type(spec.scale)
    raw = scale * product(part.q, part.k.T)
    z = hide(rule.change(raw, part.rows, part.keys), seen_by_band)
    seen = ~np.isneginf(z)
    p = np.where(seen, np.exp(z - part.lse[:, None]), 0)
    sink = 0.0 if np.isneginf(rule.sink) else np.exp(raw.dtype.type(rule.sink) - part.lse)
    sdot = np.where(seen, scale * (product(part.tq, part.k.T) + product(part.q, part.tk.T)), 0)
    slopes = _values(rule, raw, seen, part, arrays)
    zdot = _times(slopes.s, sdot)
    for value, tangent in zip(slopes.by_load, slopes.tangents, strict=True):
        zdot = zdot + _times(value, tangent)
    lse = (p * zdot).sum(axis=1) + sink * part.ts
    pdot = p * (zdot - np.where(seen.any(axis=1), lse, 0)[:, None])
    o = seen_product(rule.drop(pdot, part.rows, part.keys), part.v, seen)
    o += seen_product(rule.drop(p, part.rows, part.keys), part.tv, seen)
    return _Tile(seen, p, sdot, zdot, pdot, sink, lse, o, slopes)


def _times(slope: np.ndarray | float, x: np.ndarray | float) -> np.ndarray:
    """slope * x; a slope of 0 comes from a selection or a saturated cap, and what it would meet does not matter."""
    return np.where(np.asarray(slope) != 0, slope * x, 0)


def _values(rule: Rule, raw: np.ndarray, seen: np.ndarray, part: _Rows, arrays: dict[int, np.ndarray]) -> _Values:
    program = rule.program
    if program is None or program.score is None:
        return _Values(1.0, 0.0, [], [], [], [], [], [])
    slopes = _slopes_of(program.score)
    at = rule.b, rule.h, part.rows[:, None], part.keys[None, :]

    def run(roots: list[Expr]) -> list[np.ndarray]:
        found = program.run(roots, raw, *at, raw.dtype)
        return [np.where(seen, x, 0) for x in found]

    many = len(slopes.loads)
    flat = run([slopes.s, slopes.ss, *slopes.by_load, *slopes.by_s_and_load, *(y for x in slopes.by_loads for y in x)])
    pairs = [flat[2 + (2 + n) * many : 2 + (3 + n) * many] for n in range(many)]
    index, moving, slots = [], [], []
    for load in slopes.loads:
        slot = load.data.source.number
        shape = program.captures[slot].array.shape
        places = program.run(list(load.args), raw, *at, raw.dtype)
        where = tuple(np.clip(x, 0, max(n - 1, 0)) for x, n in zip(places, shape, strict=True))
        tangent = arrays.get(slot)
        moving.append(0.0 if tangent is None or 0 in shape else tangent[where].astype(raw.dtype))
        index.append(where)
        slots.append(slot)
    return _Values(flat[0], flat[1], flat[2 : 2 + many], flat[2 + many : 2 + 2 * many], pairs, index, slots, moving)


def _add(
    sums: Sums,
    part: _Rows,
    tile: _Tile,
    spec: AttentionSpec,
    rule: Rule,
    place: tuple[int, int, int, slice],
    arrays: dict[int, np.ndarray],
) -> None:
    """Add what these rows give to H t.

    With A = dP, the gradient of the weights, and a its mean in a row, Phi = sum(do * o_t) + sum(dlse * lse_t) is
    sum(P Z_t (A + dlse - a)) + sum(P A_t), A_t being do v_t; its derivatives by Z_t and by P lead down to the inputs.
    """
    b, h, kv, rows = place
    seen, p, slopes = tile.seen, tile.p, tile.slopes
    scale = p.dtype.type(spec.scale)
    some = seen.any(axis=1)
    da = np.where(seen, rule.drop(product(part.do, part.v.T), part.rows, part.keys), 0)
    dat = np.where(seen, rule.drop(product(part.do, part.tv.T), part.rows, part.keys), 0)
    mean = np.where(some, (p * da).sum(axis=1), 0)
    rest = (part.dlse - mean)[:, None]
    by_zdot = p * (da + rest)
    by_p = tile.zdot * (da + rest) + dat - np.where(some, tile.lse, 0)[:, None] * da
    by_sink = part.ts * rest[:, 0]
    all_p = (p * by_p).sum(axis=1) + tile.sink * by_sink
    by_z = np.where(seen, p * (by_p - all_p[:, None]), 0)
    curved = _times(slopes.ss, tile.sdot)
    for value, tangent in zip(slopes.by_s_and_load, slopes.tangents, strict=True):
        curved = curved + _times(value, tangent)
    by_s = np.where(seen, _times(slopes.s, by_z) + _times(by_zdot, curved), 0)
    by_sdot = np.where(seen, _times(slopes.s, by_zdot), 0)
    if sums.q is not None:
        sums.q[b, h, rows] = scale * (seen_product(by_s, part.k, seen) + seen_product(by_sdot, part.tk, seen))
    if sums.k is not None:
        whole = seen_product(by_s.T, part.q, seen.T) + seen_product(by_sdot.T, part.tq, seen.T)
        sums.k[b, kv] += scale * whole
    if sums.v is not None:
        dropped = rule.drop(tile.pdot, part.rows, part.keys)
        sums.v[b, kv] += seen_product(np.where(seen, dropped, 0).T, part.do, seen.T)
    if sums.sinks is not None:
        sums.sinks[b, h] += np.sum(tile.sink * (by_sink - all_p))
    for n, slot in enumerate(slopes.slots):
        if slot not in sums.arrays or 0 in sums.arrays[slot].shape:
            continue
        turned = _times(slopes.by_s_and_load[n], tile.sdot)
        for value, tangent in zip(slopes.by_loads[n], slopes.tangents, strict=True):
            turned = turned + _times(value, tangent)
        given = np.where(seen, _times(slopes.by_load[n], by_z) + _times(by_zdot, turned), 0)
        where = tuple(np.broadcast_to(x, given.shape) for x in slopes.places[n])
        if where:
            np.add.at(sums.arrays[slot], where, given)
        else:  # one element, read everywhere
            sums.arrays[slot][...] += given.sum()
