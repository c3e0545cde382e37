"""Options that change scores, each by a function of the problem's shape; with the mask of each, typed out in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from inputs import Shape
from ml_dtypes import bfloat16

from flashtile.score import causal, document, padding, prefix, relative, varlen, window

# Ragged in every tile: panels of 6 to 48 rows, blocks of 32 and 128 keys; two query heads per key/value head.
SHAPE = Shape(2, 4, 2, 70, 150, 20, 24)
AHEAD = SHAPE.kv_len - SHAPE.q_len  # the offset of "bottom_right"

Options = dict[str, Any]


def numbers(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def coins(*shape: int, heads: float = 0.6, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < heads


def ids(length: int, batch: int = 1) -> np.ndarray:
    """Ascending document numbers, other boundaries in each batch."""
    return np.sort(np.random.default_rng(2).integers(0, 5, (batch, length)), axis=1)


SLOPES = np.array([0.5, 0.25, 0.1, 0.01], np.float32)
SINKS = np.array([0.3, -1.0, 2.0, 5.0], np.float32)


def _document_mod(s: Shape) -> Callable[..., Any]:
    doc = ids(s.kv_len, s.batch)
    return lambda b, h, i, j: doc[b, i] == doc[b, j]


def _packed(s: Shape) -> Any:
    """Sequences of other lengths in queries and keys, one without queries, one without keys."""
    rows, keys = np.array([0, 30, 30, 40, s.q_len]), np.array([0, 41, 60, 60, s.kv_len])
    return varlen(rows, keys, causal=True, window=(70, None))


def _block_mod(s: Shape) -> Callable[..., Any]:
    block, reach = 16, 3
    return lambda b, h, i, j: (i // block == (j - AHEAD) // block) | (j % 7 == reach)


def _tapered(s: Shape) -> Callable[..., Any]:
    weight = numbers(s.heads, dtype="float64")
    return lambda score, b, h, i, j: score * (1 + 0.1 * weight[h]) - 0.01 * abs(i - j)


def _everything(s: Shape) -> Options:
    return {
        "softcap": 4.0,
        "alibi_slopes": SLOPES,
        "bias": numbers(1, s.heads, s.q_len, s.kv_len),
        "mask": coins(s.batch, 1, 1, s.kv_len),
        "window": (90, 10),
        "align": np.array([AHEAD, 7]),
        "sinks": SINKS,
    }


def _everything_by_hand(s: Shape) -> Options:
    rule = _document_mod(s)
    return {
        "score_mod": _tapered(s),
        "mask": causal() & rule | prefix(9),
        "align": "bottom_right",
        "sinks": np.stack([SINKS, -SINKS]),
        "softcap": 20.0,
        "bias": numbers(s.q_len, s.kv_len, dtype="float16"),
    }


# Both together use every option.
TOGETHER: dict[str, Callable[[Shape], Options]] = {"built-in": _everything, "by hand": _everything_by_hand}

EACH: dict[str, Callable[[Shape], Options]] = {
    "softcap": lambda s: {"softcap": 2.0},
    "softcap, causal": lambda s: {"softcap": 2.0, "causal": True, "align": "bottom_right"},
    "alibi": lambda s: {"alibi_slopes": SLOPES, "align": "bottom_right"},
    "alibi by batch": lambda s: {"alibi_slopes": np.stack([SLOPES, -SLOPES]).astype("f8"), "align": np.array([3, 80])},
    "sinks": lambda s: {"sinks": SINKS},
    "sinks by batch": lambda s: {"sinks": np.stack([SINKS, -SINKS]).astype("f8"), "causal": True, "align": 0},
    "slopes and sinks of 16 bits": lambda s: {
        "alibi_slopes": np.stack([SLOPES, -SLOPES]).astype(bfloat16),
        "sinks": SINKS.astype("f2"),
        "align": 0,
    },
    "bias": lambda s: {"bias": numbers(1, s.heads, s.q_len, s.kv_len)},
    "bias that hides": lambda s: {"bias": np.where(coins(s.q_len, s.kv_len), numbers(s.q_len, s.kv_len), -np.inf)},
    "bias, window": lambda s: {"bias": numbers(s.kv_len, dtype="float16"), "window": (50, 3), "align": 10},
    "padding array": lambda s: {"mask": coins(s.batch, 1, 1, s.kv_len)},
    "padding": lambda s: {"mask": padding([s.kv_len - 9, 33])},
    "dense mask": lambda s: {"mask": coins(s.batch, s.heads, s.q_len, s.kv_len)},
    "dense mask, causal": lambda s: {"mask": coins(s.q_len, s.kv_len), "causal": True, "align": AHEAD},
    "documents": lambda s: {"mask": document(ids(s.q_len, s.batch), ids(s.kv_len, s.batch))},
    "packed": lambda s: {"mask": _packed(s)},
    "mask function": lambda s: {"mask": _block_mod(s)},
    "mask by head": lambda s: {"mask": lambda b, h, i, j: j <= i + h * 20 - b * 30},
    "masks composed": lambda s: {"mask": ~(window(20, 5) | prefix(10)) & causal(), "align": "bottom_right"},
    "score function": lambda s: {"score_mod": _tapered(s)},
    "relative": lambda s: {"score_mod": relative(numbers(32, s.heads)), "align": "bottom_right"},
}

# The rules that hide keys, and the same in NumPy: (b, h, i, j) -> bool, broadcasting.
MASKS: dict[str, tuple[Options, Callable[..., Any]]] = {
    "padding array": (
        {"mask": coins(2, 1, 1, SHAPE.kv_len)},
        lambda b, h, i, j: coins(2, 1, 1, SHAPE.kv_len)[b, 0, 0, j],
    ),
    "padding": ({"mask": padding([141, 33])}, lambda b, h, i, j: j < np.array([141, 33])[b]),
    "dense": ({"mask": coins(SHAPE.q_len, SHAPE.kv_len)}, lambda b, h, i, j: coins(SHAPE.q_len, SHAPE.kv_len)[i, j]),
    "documents": (
        {"mask": document(ids(SHAPE.q_len)[0], ids(SHAPE.kv_len)[0])},
        lambda b, h, i, j: ids(SHAPE.q_len)[0, i] == ids(SHAPE.kv_len)[0, j],
    ),
    "function": ({"mask": _block_mod(SHAPE)}, _block_mod(SHAPE)),
    "composed": ({"mask": causal() & ~prefix(40), "align": AHEAD}, lambda b, h, i, j: (j <= i + AHEAD) & (j >= 40)),
    "causal and padding": (
        {"mask": padding([141, 33]), "causal": True, "align": AHEAD},
        lambda b, h, i, j: (j <= i + AHEAD) & (j < np.array([141, 33])[b]),
    ),
    "bias": (
        {"bias": np.where(coins(SHAPE.q_len, SHAPE.kv_len), 0.5, -np.inf)},
        lambda b, h, i, j: coins(SHAPE.q_len, SHAPE.kv_len)[i, j],
    ),
    "score": (
        {"score_mod": lambda s, b, h, i, j: np.where(j % 3 != h % 3, s, -np.inf)},
        lambda b, h, i, j: j % 3 != h % 3,
    ),
}


def seen(rule: Callable[..., Any], shape: Shape = SHAPE) -> np.ndarray:
    """bool (B, H, S_q, S_kv) of a rule in NumPy."""
    b, h, i, j = np.ogrid[: shape.batch, : shape.heads, : shape.q_len, : shape.kv_len]
    return np.broadcast_to(rule(b, h, i, j), (shape.batch, shape.heads, shape.q_len, shape.kv_len))
