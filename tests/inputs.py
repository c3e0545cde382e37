"""Inputs for the tests: arrays of a dtype and shape, the same ones on every run."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class Shape(NamedTuple):
    """The sizes of one problem, in the order of the arrays' axes."""

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 16
    kv_len: int = 16
    head_size: int = 8
    value_size: int = 8

    @property
    def q(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.q_len, self.head_size

    @property
    def k(self) -> tuple[int, ...]:
        return self.batch, self.kv_heads, self.kv_len, self.head_size

    @property
    def v(self) -> tuple[int, ...]:
        return self.batch, self.kv_heads, self.kv_len, self.value_size


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype that a user's array of this name has."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def uniform(shape: Shape, dtype: str, *, seed: int = 0, size: float = 1.0) -> tuple[np.ndarray, ...]:
    """q, k, v drawn uniformly from [-size, size]."""
    rng = np.random.default_rng(seed)
    return tuple(rng.uniform(-size, size, s).astype(numpy_dtype(dtype)) for s in (shape.q, shape.k, shape.v))


def preset(shape: Shape, dtype: str) -> tuple[np.ndarray, ...]:
    """q = 0.1 (n mod 10), k = 0.1 ((n + 1) mod 10), v = 0.2 ((n + 2) mod 10) over each tensor's flat index n."""
    return tuple(
        (step * ((np.arange(np.prod(s)) + shift) % 10)).reshape(s).astype(numpy_dtype(dtype))
        for s, step, shift in ((shape.q, 0.1, 0), (shape.k, 0.1, 1), (shape.v, 0.2, 2))
    )


def bits(x: np.ndarray) -> np.ndarray:
    """The bytes of an array, for comparisons that tell -0 from 0 and one NaN from another."""
    return np.ascontiguousarray(x).view(np.uint8)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays agree in shape, dtype and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def placed(
    x: np.ndarray, order: tuple[int, ...], steps: tuple[int, ...], shift: int, constant: tuple[int, ...] = ()
) -> np.ndarray:
    """The same values in another place: axes stored in `order`, `steps` apart (negative: backwards), `shift` bytes off.

    Along the axes in `constant` the first slice is repeated at stride 0. Whatever lies between the elements is NaN.
    """
    kept = x[tuple(slice(0, 1) if axis in constant else slice(None) for axis in range(x.ndim))]
    room = tuple(kept.shape[axis] * abs(steps[axis]) for axis in order)
    buffer = np.full(int(np.prod(room)) * x.itemsize + shift, 0xFF, np.uint8)  # all ones is a NaN in every dtype
    stored = np.ndarray(room, x.dtype, buffer, shift)
    spread = stored.transpose(np.argsort(order))
    view = spread[tuple(slice(None, None, step) for step in steps)]
    view[...] = kept
    return np.broadcast_to(view, x.shape) if constant else view


def whole_memory(x: np.ndarray) -> np.ndarray:
    """The buffer of bytes that `placed` put an array into."""
    while x.base is not None:
        x = x.base
    return x


def read_from(memory: np.ndarray, keys: int) -> dict[str, dict[str, Any]]:
    """Options whose arrays lie in this memory, float32 and row-major (B, H, ...), by the name that errors give them."""
    batch, heads = memory.shape[:2]
    floats = memory.reshape(-1)
    row = floats[:keys]
    return {
        "bias": {"bias": row},
        "mask": {"mask": floats.view(bool)[:keys]},
        "score_mod: row": {"score_mod": lambda s, b, h, i, j: s + row[j]},
        "alibi_slopes": {"alibi_slopes": floats[:heads], "align": 0},
        "align": {"align": floats[: 2 * batch].view(np.int64), "causal": True},
    }
