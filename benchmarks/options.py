"""The options that change scores, in the forms that peers take: computed by flashtile, dense arrays for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .cases import Case

DOCUMENTS = 16


@dataclass(frozen=True)
class Option:
    """One way to change scores; every field takes the case.

    keywords  of `flashtile.attention`
    mask      bool that broadcasts to (batch, heads, queries, keys), True where a key is seen; beside causal and window
    bias      float32 that broadcasts likewise, added to the scores
    softcap   scores become softcap * tanh(score / softcap); 0 is off
    sinks     (heads,) logits that join the denominator only
    fraction  bits of the fractions of operands, where a precision lets them have fewer than the dtype; 0: all
    """

    keywords: Callable[[Case], dict[str, Any]]
    mask: Callable[[Case], np.ndarray] | None = None
    bias: Callable[[Case], np.ndarray] | None = None
    softcap: float = 0.0
    sinks: Callable[[Case], np.ndarray] | None = None
    fraction: int = 0

    @property
    def rescores(self) -> bool:
        """Beyond what a mask or a bias can say."""
        return self.softcap != 0 or self.sinks is not None


def document_ids(case: Case) -> np.ndarray:
    """Documents of uneven lengths, packed one after the other."""
    cuts = np.random.default_rng(3).choice(case.keys - 1, DOCUMENTS - 1, replace=False) + 1
    return np.searchsorted(np.sort(cuts), np.arange(case.keys), side="right")


def padding_array(case: Case) -> np.ndarray:
    """(batch, 1, 1, keys): five sixths of the keys are there."""
    lengths = case.keys - case.keys // 6 - np.arange(case.batch)
    return (np.arange(case.keys) < lengths[:, None])[:, None, None, :]


def any_mask(case: Case) -> np.ndarray:
    """(1, 1, queries, keys): four fifths of the pairs are seen, the first key by every row."""
    seen = np.random.default_rng(5).random((1, 1, case.queries, case.keys)) < 0.8
    seen[..., 0] = True
    return seen


def turned(array: np.ndarray) -> np.ndarray:
    """The same values, queries next to one another in memory instead of keys."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)


def dense_bias(case: Case) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((1, case.heads, case.queries, case.keys), dtype=np.float32)


def slopes(case: Case) -> np.ndarray:
    return np.exp2(-8.0 / case.heads * np.arange(1, case.heads + 1)).astype(np.float32)


def distance_bias(case: Case) -> np.ndarray:
    """What ALiBi adds, as an array."""
    distance = abs(np.arange(case.queries)[:, None] - np.arange(case.keys)).astype(np.float32)
    return -slopes(case)[None, :, None, None] * distance


def sink_logits(case: Case) -> np.ndarray:
    return np.linspace(-1.0, 3.0, case.heads, dtype=np.float32)


def _documents(case: Case) -> dict[str, Any]:
    from flashtile.score import document

    return {"mask": document(document_ids(case))}


def _documents_by_hand(case: Case) -> dict[str, Any]:
    ids = document_ids(case)
    return {"mask": lambda b, h, q, kv: ids[q] == ids[kv]}


def _window_by_hand(case: Case) -> dict[str, Any]:
    width = case.window
    return {"mask": lambda b, h, q, kv: (q >= kv) & (q - kv < width), "causal": False, "window": None}


def _alibi(case: Case) -> dict[str, Any]:
    return {"alibi_slopes": slopes(case), **({} if case.queries == case.keys else {"align": "top_left"})}


def _alibi_by_hand(case: Case) -> dict[str, Any]:
    slope = slopes(case)
    return {"score_mod": lambda s, b, h, q, kv: s - slope[h] * abs(q - kv)}


def _softcap_by_hand(case: Case) -> dict[str, Any]:
    cap = 30.0
    return {"score_mod": lambda s, b, h, q, kv: cap * np.tanh(s / cap)}


def _same_document(case: Case) -> np.ndarray:
    ids = document_ids(case)
    return ids[:, None] == ids[None, :]


def _softcap_alibi_by_hand(case: Case) -> dict[str, Any]:
    cap, slope = 30.0, slopes(case)
    return {"score_mod": lambda s, b, h, q, kv: cap * np.tanh(s / cap) - slope[h] * abs(q - kv)}


OPTIONS = {
    "": Option(lambda case: {}),
    "tf32": Option(lambda case: {"precision": "tf32"} if case.dtype == "f32" else {}, fraction=10),
    "documents": Option(_documents, mask=_same_document),
    "padding": Option(lambda case: {"mask": padding_array(case)}, mask=padding_array),
    "bias": Option(lambda case: {"bias": dense_bias(case)}, bias=dense_bias),
    "mask": Option(lambda case: {"mask": any_mask(case)}, mask=any_mask),
    "mask transposed": Option(lambda case: {"mask": turned(any_mask(case))}, mask=any_mask),
    "bias transposed": Option(lambda case: {"bias": turned(dense_bias(case))}, bias=dense_bias),
    "alibi": Option(_alibi, bias=distance_bias),
    "softcap": Option(lambda case: {"softcap": 30.0}, softcap=30.0),
    "sinks": Option(lambda case: {"sinks": sink_logits(case)}, sinks=sink_logits),
    "softcap, sinks": Option(
        lambda case: {"softcap": 30.0, "sinks": sink_logits(case)}, softcap=30.0, sinks=sink_logits
    ),
    "documents by hand": Option(_documents_by_hand, mask=_same_document),
    "window by hand": Option(_window_by_hand),
    "alibi by hand": Option(_alibi_by_hand, bias=distance_bias),
    "softcap by hand": Option(_softcap_by_hand, softcap=30.0),
    "softcap, alibi by hand": Option(_softcap_alibi_by_hand, bias=distance_bias, softcap=30.0),
}
