"""Attention written as its definition, in NumPy fp64, for tests that must not lean on the package's own oracle."""

from __future__ import annotations

from typing import Any

import numpy as np


def seen(q_len: int, kv_len: int, offset: int = 0, left: int | None = None, right: int | None = None) -> np.ndarray:
    """(q_len, kv_len): whether row i sees key j."""
    distance = np.arange(kv_len)[None, :] - (np.arange(q_len)[:, None] + offset)
    visible = np.ones((q_len, kv_len), bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def attend(q: Any, k: Any, v: Any, visible: np.ndarray | None = None, scale: float | None = None) -> Any:
    """(o, lse) of (..., H, S, D) arrays; visible broadcasts to (..., H, S_q, S_kv)."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    if group > 1:
        k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    s = np.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if visible is not None:
        s = np.where(visible, s, -np.inf)
    highest = s.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isfinite(highest), highest, 0))
    total = p.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(np.isfinite(highest), highest + np.log(total), -np.inf)[..., 0]
    return np.einsum("...ij,...jd->...id", p / np.where(total == 0, 1, total), v), lse
