"""What is computed on several ranks: each case by name, with its arrays and options."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import flashtile.score

Ranks = Callable[..., "subprocess.CompletedProcess[str]"]  # run(n, program, *arguments)


class Case(NamedTuple):
    """Arrays of the whole, options, and how the sequence is cut."""

    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
    options: dict[str, Any]
    cut: dict[str, Any]
    wrt: tuple[str, ...] = ()  # gradients that are computed, too

    @property
    def do(self) -> np.ndarray:
        """What arrives at the output."""
        q, _, v = self.arrays
        shape = (*q.shape[:3], v.shape[3])
        return np.random.default_rng(2).standard_normal(shape).astype(q.dtype)


QKV = "q", "k", "v"


def _arrays(q_len: int = 500, kv_len: int = 500, dtype: Any = np.float32, size: int = 24) -> Any:
    rng = np.random.default_rng(0)
    shapes = (2, 4, q_len, size), (2, 2, kv_len, size), (2, 2, kv_len, 16)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def cases() -> dict[str, Case]:
    """Every case by name. Tiles of 96 rows: six of them, the last one short."""
    rng = np.random.default_rng(1)
    tile: dict[str, Any] = {"tile": 96}
    documents = np.sort(rng.integers(0, 4, (2, 500)))
    table = rng.standard_normal((4, 999)).astype(np.float32)
    made = {
        "plain": Case(_arrays(), {}, tile),
        "causal": Case(_arrays(), {"causal": True}, tile, QKV),
        "contiguous": Case(_arrays(), {"causal": True}, {**tile, "distribution": "contiguous"}),
        "window": Case(_arrays(), {"window": (60, 0)}, tile),
        "bottom right": Case(_arrays(300, 500), {"causal": True, "align": "bottom_right"}, tile),
        "an offset a batch": Case(_arrays(300, 500), {"causal": True, "align": np.array([10, 150])}, tile, QKV),
        "documents": Case(_arrays(), {"mask": flashtile.score.document(documents), "causal": True}, tile, QKV),
        "bias": Case(  # of which each rank passes its rows
            _arrays(),
            {"causal": True, "bias": rng.standard_normal((1, 4, 500, 500)).astype(np.float32)},
            tile,
            (*QKV, "bias"),
        ),
        "bias, of which no gradient": Case(
            _arrays(300, 300), {"bias": rng.standard_normal((300, 300)).astype(np.float32)}, tile, QKV
        ),
        "sinks, softcap, ALiBi": Case(
            _arrays(),
            {"sinks": np.arange(4.0), "softcap": 9.0, "alibi_slopes": np.full(4, 0.1)},
            tile,
            ("v", "sinks", "alibi_slopes"),
        ),
        "own": Case(
            _arrays(), {"score_mod": lambda s, b, h, i, j: s + table[h, i - j + 499]}, tile, (*QKV, "captured")
        ),
        "float64": Case(_arrays(dtype=np.float64), {"causal": True}, tile),
        "float16": Case(_arrays(dtype=np.float16), {"causal": True, "window": (200, 0)}, tile, QKV),
        "dropout": Case(_arrays(), {"causal": True, "dropout_p": 0.2, "seed": 5}, tile, QKV),
        "fewer tiles than ranks": Case(_arrays(130, 130), {"causal": True}, tile, QKV),
        "one tile": Case(_arrays(5, 7), {}, tile, QKV),
        "no keys": Case(_arrays(200, 0), {}, tile, QKV),
    }
    try:
        import ml_dtypes
    except ImportError:
        return made
    return {**made, "bfloat16": Case(_arrays(dtype=ml_dtypes.bfloat16, size=32), {"causal": True}, tile)}
