"""What decides a score in NumPy: the rule of one head, the band, and the product before them."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from flashtile.score.keep import Keep
    from flashtile.score.options import Scoring
    from flashtile.score.program import Program
    from flashtile.spec import Band

_blas = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child that inherited the lock while it was held would wait for ever
    os.register_at_fork(before=_blas.acquire, after_in_parent=_blas.release, after_in_child=_blas.release)


class Rule(NamedTuple):
    """What a call's program and sinks mean for one head."""

    program: Program | None
    b: int
    h: int
    sink: float
    keep: Keep | None = None
    head: int = 0  # b * H + h, by which dropout counts

    def change(self, s: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The scores of these rows and keys after the program, -inf where it hides: (r, n) -> (r, n)."""
        if self.program is None:
            return s
        return self.program.evaluate(s, self.b, self.h, rows[:, None], keys[None, :], s.dtype)

    def drop(self, p: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The weights of these rows and keys after dropout: (r, n) -> (r, n)."""
        return p if self.keep is None else self.keep.drop(p, self.head, rows, keys)


NO_RULE = Rule(None, 0, 0, -np.inf)


def rule_of(scoring: Scoring | None, b: int, h: int, heads: int) -> Rule:
    """The rule of batch b and query head h of `heads`."""
    if scoring is None:
        return NO_RULE
    sink = -np.inf if scoring.sinks is None else float(scoring.sinks[b, h])
    return Rule(scoring.program, b, h, sink, scoring.keep, b * heads + h)


def visible(band: Band | None, offset: int, rows: np.ndarray, keys: np.ndarray) -> np.ndarray | None:
    """Which keys a positional rule shows to which rows: (r,), (n,) indices -> bool (r, n), or None where all are."""
    if band is None:
        return None
    distance = keys - (rows[:, None] + offset)
    seen = np.ones(distance.shape, bool)
    if band.left is not None:
        seen &= distance >= -band.left
    if band.right is not None:
        seen &= distance <= band.right
    return seen


def hide(s: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """-inf in place of the scores that a mask hides, selected so that a hidden NaN goes too."""
    return s if seen is None else np.where(seen, s, -np.inf).astype(s.dtype, copy=False)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, where BLAS does it by one thread of ours at a time: it has its own, and callers that meet there spin."""
    if a.dtype.itemsize > 8:  # no BLAS has longdouble
        return a @ b
    with _blas:
        return a @ b
