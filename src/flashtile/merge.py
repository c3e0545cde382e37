"""`flashtile.merge`: partial results over disjoint keys become the result over all of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from flashtile.arrays import is_torch, plain
from flashtile.checks import elements
from flashtile.dtypes import dtype_of
from flashtile.errors import described, wrong


def merge(o_lse_pairs: Iterable[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Merge any number of partial results (o, lse) that attend the same rows to disjoint sets of keys.

    Shapes:   o (..., S_q, D_v), lse (..., S_q), all pairs alike -> o (..., S_q, D_v), lse (..., S_q). All NumPy arrays
              or all torch tensors, which may require gradients.
    Units:    lse in nats. A partial that saw no key is o = 0, lse = -inf; its o is not read.
    Numerics: o = sum_n exp(lse_n - lse) o_n with lse = log sum_n exp(lse_n), relative to the largest lse_n, so nothing
              overflows. Sums in float32 (float64 if o or lse is), added in the order given: each row's bits depend on
              its own partials and their order only; another order differs by rounding. o returns in the dtype of the
              first o, lse in that of the first lse. One pair comes back as it was, but copied. NaN, and +inf in lse,
              make the row NaN.
    Raises:   SpecError if there is no pair, or shapes, dtypes or kinds of array differ.
    Source:   Dao et al. 2023, Flash-Decoding; the softmax's associativity.

    >>> import numpy as np, flashtile
    >>> q, k = np.ones((4, 8)), np.ones((6, 8))
    >>> parts = [flashtile.attention(q, k[s], k[s], return_lse=True) for s in (slice(0, 4), slice(4, 6))]
    >>> o, lse = flashtile.merge(parts)
    >>> bool(np.allclose(o, flashtile.attention(q, k, k)))
    True
    """
    pairs = _validated(o_lse_pairs)
    names = {dtype_of(x.dtype).name for pair in pairs for x in pair}
    accumulator = "float64" if "float64" in names else "float32"
    if is_torch(pairs[0][0]):
        import torch

        accumulate = getattr(torch, accumulator)
        wide = [(o.to(accumulate), lse.to(accumulate)) for o, lse in pairs]
        highest = functools.reduce(torch.maximum, [lse.detach() for _, lse in wide])
        o, lse = _merge(torch, wide, highest)
        return o.to(pairs[0][0].dtype), lse.to(pairs[0][1].dtype)
    wide = [(o.astype(accumulator), lse.astype(accumulator)) for o, lse in pairs]
    with np.errstate(invalid="ignore"):  # inf - inf: the row is NaN
        o, lse = _merge(np, wide, functools.reduce(np.maximum, [lse for _, lse in wide]))
    return o.astype(pairs[0][0].dtype), lse.astype(pairs[0][1].dtype)


def merge_backward(do: Any, o_lse_pairs: Iterable[tuple[Any, Any]], *, dlse: Any = None) -> list[tuple[Any, Any]]:
    """The gradients of `merge`: of sum(do * o) + sum(dlse * lse), to each partial's (o, lse), in the order given.

    Shapes:   do as each o (..., S_q, D_v), dlse as each lse (..., S_q) or None for 0; NumPy arrays only, since torch
              differentiates `merge` itself. Each gradient has the shape and dtype of what it belongs to.
    Numerics: d o_n = w_n do, d lse_n = w_n (rowsum(do * (o_n - o)) + dlse), w_n = exp(lse_n - lse), in float32 (float64
              if any o or lse is). A row of a partial that saw no key gets 0, whatever its o and do hold.
    Raises:   SpecError as `merge`, and for do or dlse of another shape or dtype.
    Source:   the derivative of `merge`'s formula.
    """
    pairs = _validated(o_lse_pairs)
    first_o, first_lse = pairs[0]
    if is_torch(first_o):
        raise wrong("o_lse_pairs", "torch tensors", "NumPy arrays; torch differentiates flashtile.merge itself")
    do = plain(do, "do")
    dlse = np.zeros_like(first_lse) if dlse is None else plain(dlse, "dlse")
    for name, x, like in (("do", do, first_o), ("dlse", dlse, first_lse)):
        if x.shape != like.shape:
            raise wrong(name, f"shape {x.shape}", f"{like.shape}")
        if x.dtype != like.dtype:
            raise wrong(name, f"dtype {x.dtype}", f"{like.dtype}")
    wide = np.float64 if "float64" in {x.dtype.name for pair in pairs for x in pair} else np.float32
    do, dlse = do.astype(wide), dlse.astype(wide)
    o, lse = merge([(part.astype(wide), its.astype(wide)) for part, its in pairs])
    found = []
    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN are answers here
        for part, its in pairs:
            seen = its != -np.inf
            weight = np.where(seen, np.exp(its.astype(wide) - lse), 0)
            d_part = np.where(seen[..., None], weight[..., None] * do, 0)
            d_lse = np.where(seen, weight * (np.sum(do * (part.astype(wide) - o), axis=-1) + dlse), 0)
            found.append((d_part.astype(part.dtype), d_lse.astype(its.dtype)))
    return found


def _merge(xp: Any, pairs: list[tuple[Any, Any]], highest: Any) -> tuple[Any, Any]:
    """The formula, in NumPy or torch. highest (..., S_q): the largest lse of each row, a constant to gradients, because
    the result does not depend on it."""
    anchor = xp.where(highest == -np.inf, 0.0, highest)  # -inf - -inf would be NaN
    weights = [xp.exp(lse - anchor) for _, lse in pairs]
    total = functools.reduce(operator.add, weights)
    none_seen = total == 0  # else the largest lse has weight 1
    total = xp.where(none_seen, 1.0, total)
    terms = [
        # The o of a partial that saw no key is replaced, not multiplied by 0, which would keep its NaN.
        (weight / total)[..., None] * xp.where((lse == -np.inf)[..., None], 0.0, o)
        for weight, (o, lse) in zip(weights, pairs, strict=True)
    ]
    return functools.reduce(operator.add, terms), xp.where(none_seen, -np.inf, anchor + xp.log(total))


def _validated(o_lse_pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    pairs = []
    for n, pair in enumerate(elements("o_lse_pairs", o_lse_pairs, "an iterable of pairs (o, lse)")):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise wrong(f"o_lse_pairs[{n}]", described(pair), "a pair (o, lse)")
        names = (f"o of pair {n}", f"lse of pair {n}")
        o, lse = (x if is_torch(x) else plain(x, name) for x, name in zip(pair, names, strict=True))
        pairs.append((o, lse))
    if not pairs:
        raise wrong("o_lse_pairs", "no pair", "at least one")
    first_o, first_lse = pairs[0]
    for n, (o, lse) in enumerate(pairs):
        rows = tuple(o.shape[:-1])
        if not 2 <= o.ndim <= 4:
            raise wrong(f"o of pair {n}", f"shape {tuple(o.shape)}", "(B, H, S_q, D_v), (H, S_q, D_v) or (S_q, D_v)")
        if tuple(lse.shape) != rows:
            raise wrong(f"lse of pair {n}", f"shape {tuple(lse.shape)}", f"{rows} as its o without the last axis")
        for name, x, first in ((f"o of pair {n}", o, first_o), (f"lse of pair {n}", lse, first_lse)):
            if is_torch(x) != is_torch(first_o):
                raise wrong(name, f"a {type(x).__name__}", f"a {type(first_o).__name__} as in pair 0")
            if x.shape != first.shape:
                raise wrong(name, f"shape {tuple(x.shape)}", f"{tuple(first.shape)} as in pair 0")
            if dtype_of(x.dtype, name) is not dtype_of(first.dtype):
                raise wrong(name, f"dtype {dtype_of(x.dtype).name}", f"{dtype_of(first.dtype).name} as in pair 0")
    return pairs
