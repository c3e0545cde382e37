"""The contract of a family's gradients: arrays in, sums out, on the calling thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec


class Inputs(NamedTuple):
    """The arrays of one call, four axes each, of any float dtype that has arithmetic; lse and dlse (B, H, S_q)."""

    do: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray
    lse: np.ndarray
    dlse: np.ndarray | None


class Sums(NamedTuple):
    """Gradients in the arithmetic's dtype, None where not wanted; arrays by the number of their slot."""

    q: np.ndarray | None
    k: np.ndarray | None
    v: np.ndarray | None
    sinks: np.ndarray | None  # (B, H)
    arrays: dict[int, np.ndarray]


class Backward(Protocol):
    """Gradients of sum(do * o) + sum(dlse * lse), in the family's arithmetic.

    offset is the spec's own, or (B,) integers; `wanted` names "q", "k", "v", "sinks", "arrays"; `order` (S_kv,)
    permutes the keys, each keeping its index: the same mathematics, another rounding.
    """

    def __call__(
        self,
        spec: AttentionSpec,
        inputs: Inputs,
        offset: int | np.ndarray,
        scoring: Scoring | None,
        wanted: frozenset[str],
        order: np.ndarray | None = None,
    ) -> Sums: ...
