"""Sequences packed end to end, queries and keys by boundaries of their own: each row sees the keys of its sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..checks import ALIGNMENTS, check_flag, integer
from ..errors import SpecError, described, wrong
from .capture import in_graph
from .expr import FARTHEST, INT_MAX
from .mask import Mask
from .window import sides


class _Spans(NamedTuple):
    """For each position on one side the positions [first, past) that it meets on the other; nothing: (INT_MAX, -1)."""

    first: np.ndarray
    past: np.ndarray

    @classmethod
    def of(cls, first: np.ndarray, past: np.ndarray) -> _Spans:
        none = first >= past
        return cls(np.where(none, INT_MAX, first).astype(np.int32), np.where(none, -1, past).astype(np.int32))

    @property
    def leave_gaps(self) -> bool:
        """Whether neighbours, those that meet nothing left out, ever have something between them."""
        some = self.past >= 0
        return bool((self.past[some][:-1] < self.first[some][1:]).any())

    def meet(self, position: Any, other: Any) -> Any:
        return (self.first[position] <= other) & (other < self.past[position])


def varlen(
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: Any = "bottom_right",
) -> Mask:
    """The mask of flash-attn's `flash_attn_varlen_func`, whose sequences stand one after the other along S.

    Row i of sequence n is one of cu_seqlens_q[n] <= i < cu_seqlens_q[n + 1] and sees, of the keys
    cu_seqlens_k[n] <= j < cu_seqlens_k[n + 1], those that causal and window show it, counted within the sequence.

    Shapes:  cu_seqlens_q, cu_seqlens_k (sequences + 1,): integers that rise from 0 to S_q and to S_kv; lists, arrays
             or tensors, read here, once (from a GPU, that waits for it).
    Options: causal  row i' of a sequence sees its key j' only if j' <= i' + offset.
             window  (left, right): only if -left <= j' - (i' + offset) <= right; -1 or None is open on that side.
             align   the offset of each sequence: "bottom_right", its keys minus its rows, as flash-attn has it;
                     "top_left", 0; an integer, or integers (sequences,).
    Raises:  SpecError for boundaries that do not rise from 0, or are not as many on both sides.

    >>> o = flashtile.attention(np.ones((5, 8)), np.ones((7, 8)), np.ones((7, 8)), mask=varlen([0, 2, 5], [0, 4, 7]))
    >>> o.shape
    (5, 8)
    """
    if in_graph():
        expected = "the mask made outside of it, and given to it: boundaries are read as numbers, once"
        raise wrong("varlen", "a call in a compiled function", expected)
    rows, keys = boundaries(cu_seqlens_q, "cu_seqlens_q"), boundaries(cu_seqlens_k, "cu_seqlens_k")
    if len(rows) != len(keys):
        raise wrong("cu_seqlens_k", f"{len(keys)} boundaries", f"{len(rows)} as in cu_seqlens_q")
    low, high = (None, None) if window is None else _sides(window)
    check_flag("causal", causal)
    if causal:
        high = 0 if high is None else min(high, 0)
    # Positions count from the first of all rows and keys, so that a sequence's offset includes where it starts.
    offset = _offsets(align, rows, keys) + keys[:-1] - rows[:-1]
    seen = _spans(rows, keys, offset, low, high)
    # The bounds of what a tile's rows see cannot tell that a gap between two of them is empty; those of its keys can.
    by_key = _spans(keys, rows, -offset, *(None if x is None else -x for x in (high, low)))

    gaps, ends = seen.leave_gaps, (int(rows[-1]), int(keys[-1]))  # of elements, which no graph has

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return seen.meet(i, j) & by_key.meet(j, i) if gaps else seen.meet(i, j)

    def fits(shape: tuple[int, int, int, int]) -> None:
        for name, last, length in (("cu_seqlens_q", ends[0], shape[2]), ("cu_seqlens_k", ends[1], shape[3])):
            if last != length:
                raise wrong(name, f"boundaries up to {last}", f"up to the length, {length}")

    return Mask(lambda offset: visible, name="varlen", fits=fits)


def _spans(here: np.ndarray, there: np.ndarray, offset: np.ndarray, low: int | None, high: int | None) -> _Spans:
    """What each position sees: of its own sequence, from position + offset + low to position + offset + high."""
    counts = np.diff(here)
    first, past, shift = (np.repeat(x, counts) for x in (there[:-1], there[1:], offset))
    at = np.arange(here[-1]) + shift
    if low is not None:
        first = np.maximum(first, at + low)
    if high is not None:
        past = np.minimum(past, at + high + 1)
    return _Spans.of(first, past)


def boundaries(value: Any, name: str) -> np.ndarray:
    """Cumulative lengths as int64 in CPU memory, checked."""
    expected = "integers that rise from 0, one more than there are sequences"
    try:
        found = np.asarray(value.cpu() if hasattr(value, "cpu") else value.get() if hasattr(value, "get") else value)
    except Exception as cause:
        raise wrong(name, described(value), expected) from cause
    if found.dtype.kind not in "iu" or found.ndim != 1 or not found.size:
        got = described(value) if found.dtype.kind == "O" else f"{found.dtype} of shape {found.shape}"
        raise wrong(name, got, expected)
    if found[0] != 0:
        raise wrong(name, f"{found[0]} first", expected)
    if (falls := np.flatnonzero(found[1:] < found[:-1])).size:
        n = int(falls[0])
        raise wrong(name, f"{found[n + 1]} after {found[n]}", expected)
    if found[-1] > FARTHEST:
        raise wrong(name, f"boundaries up to {found[-1]}", f"at most {FARTHEST}")
    return found.astype(np.int64)


def _sides(window: Any) -> tuple[int | None, int | None]:
    try:
        left, right = window
    except (TypeError, ValueError) as cause:
        raise wrong("window", repr(window), "(left, right) or None") from cause
    farthest = 4 * FARTHEST  # beyond every position, and a number that NumPy holds
    low, high = sides(left, right)
    return None if low is None else max(low, -farthest), None if high is None else min(high, farthest)


def _offsets(align: Any, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The offset of each sequence, counted within it."""
    if isinstance(align, str):
        if align not in ALIGNMENTS:
            raise wrong("align", repr(align), '"bottom_right", "top_left", an integer or integers (sequences,)')
        return np.diff(keys) - np.diff(rows) if align == "bottom_right" else np.zeros(len(rows) - 1, np.int64)
    number, expected = integer(align), f'"bottom_right", "top_left", an integer or integers ({len(rows) - 1},)'
    try:
        found = np.asarray(align if number is None else number)
    except Exception as cause:
        raise wrong("align", described(align), expected) from cause
    if found.dtype.kind not in "iu" or found.shape not in ((), (len(rows) - 1,)):
        got = f"{align!r}" if found.ndim == 0 else f"{found.dtype} of shape {found.shape}"
        raise wrong("align", got, expected)
    if found.size and not -FARTHEST <= int(found.min()) <= int(found.max()) <= FARTHEST:
        raise SpecError(f"align: got offsets from {found.min()} to {found.max()}, expected at most {FARTHEST} in size")
    return np.broadcast_to(found.astype(np.int64), len(rows) - 1)
