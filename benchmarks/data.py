"""Inputs shared by all peers: drawn once, handed over as files, so that every peer computes the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Case


def numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bf16":
        import ml_dtypes  # NumPy itself has no bfloat16

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"f64": np.float64, "f32": np.float32, "f16": np.float16}[name])


def make_inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Standard normal q, k, v, for gradients also do: zeros or constants would let a peer skip work, and would hide a
    wrong result."""
    rng = np.random.default_rng(seed)
    q_shape = (case.batch, case.heads, case.queries, case.head_size)
    k_shape = (case.batch, case.kv_heads, case.keys, case.head_size)
    kind = np.float64 if case.dtype == "f64" else np.float32
    dtype = numpy_dtype(case.dtype)
    shapes = {"q": q_shape, "k": k_shape, "v": k_shape, "do": q_shape}
    return tuple(rng.standard_normal(shapes[name], dtype=kind).astype(dtype) for name in case.inputs)


def save_inputs(folder: Path, case: Case, arrays: tuple[np.ndarray, ...]) -> None:
    for name, array in zip(case.inputs, arrays, strict=True):
        # .npy knows no bfloat16: its bits travel as uint16
        np.save(folder / f"{name}.npy", array.view(np.uint16) if case.dtype == "bf16" else array)


def load_inputs(folder: Path, case: Case) -> tuple[np.ndarray, ...]:
    dtype = numpy_dtype(case.dtype)
    return tuple(np.load(folder / f"{name}.npy").view(dtype) for name in case.inputs)


def sampled(outputs: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Rows of each output, (outputs, rows, head_size), in the widest type; rows (outputs, rows, 3) are (b, h, row)."""
    found = [x[tuple(at.T)] for x, at in zip(outputs, rows, strict=True)]
    return np.stack([x.astype(np.longdouble if x.dtype == np.float64 else np.float64) for x in found])


def visible_mask(case: Case) -> np.ndarray:
    """Boolean, True where a key is attended to: for peers that take a mask as an array.

    (queries, keys), or an option's mask as it comes, which broadcasts to (batch, heads, queries, keys).
    """
    if case.options.mask is not None:
        return case.options.mask(case)
    position = np.arange(case.queries)[:, None] + (case.keys - case.queries)
    key = np.arange(case.keys)[None, :]
    mask = np.ones((case.queries, case.keys), dtype=bool)
    if case.hides:
        mask &= key <= position
    if case.window:
        mask &= key > position - case.window
    return mask


def visible_keys(case: Case, b: int, h: int, i: int) -> np.ndarray:
    """The keys that one query attends to."""
    if case.options.mask is None:
        return np.array(case.visible_keys(i))
    shape = (case.batch, case.heads, case.queries, case.keys)
    return np.flatnonzero(np.broadcast_to(case.options.mask(case), shape)[b, h, i])


def has_mask(case: Case) -> bool:
    """Whether keys are hidden that `causal` alone does not hide."""
    return case.window > 0 or case.options.mask is not None


def additive(case: Case) -> np.ndarray | None:
    """Mask and bias as one float32 array to be added to the scores; None if there is neither."""
    bias = None if case.options.bias is None else case.options.bias(case)
    if not case.hides and case.options.mask is None:
        return bias
    hidden = np.where(visible_mask(case), np.float32(0), np.float32(-np.inf))
    return hidden if bias is None else bias + hidden
