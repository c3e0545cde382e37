"""Sequences of any lengths that lie one after the other, attended to without padding: what flash-attn's functions of
variable lengths, torch's varlen_attn and its nested tensors come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flashtile import score
from flashtile.checks import integer
from flashtile.errors import FlashtileError, described, rename, wrong
from flashtile.score.keep import threshold_of
from flashtile.score.trace import check_arity
from flashtile.torch.attend import attention

Tensor = torch.Tensor


class Lengths(NamedTuple):
    """Where the sequences of one side begin, (N + 1,) integers from 0 to the end of the last, and how long the longest
    may be; with what a caller calls the two."""

    bounds: Any
    longest: Any
    name: str
    longest_name: str


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Lengths,
    keys: Lengths,
    *,
    causal: bool = False,
    window: Any = None,
    alibi_slopes: Any = None,
    mask: Any = None,
    score_mod: Any = None,
    dropout_p: Any = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """As one sequence with a mask, or with dropout as a batch: q (T_q, H, D), k (T_k, H_kv, D), v (T_k, H_kv, D_v)
    -> o (T_q, H, D_v), in one piece, and lse (H, T_q).

    Positions are counted within a sequence, the last row meeting the last key, and b is the sequence's number.
    Raises: SpecError, arguments under the names that `flashtile.torch.attention` has for them, lengths under their own.
    """
    try:
        seen = score.varlen(rows.bounds, keys.bounds, causal, window)
        seen.fits((1, q.shape[1], q.shape[0], k.shape[0]))
    except FlashtileError as e:
        rename(e, {"cu_seqlens_q": rows.name, "cu_seqlens_k": keys.name})
        raise
    bounds = _longest_fits(rows), _longest_fits(keys)
    slopes = _slopes_of(alibi_slopes, len(bounds[0]) - 1, q.shape[1])
    others["dropout_p"] = dropout_p
    if threshold_of(dropout_p) and q.shape[0]:
        others |= {"causal": causal, "window": window, "score_mod": score_mod}
        return _as_batch(q, k, v, *bounds, slopes, mask, others)
    moved = None
    if q.shape[0] and k.shape[0]:
        seen = _mask_within(mask, seen, *bounds)
        moved = _alibi_within(slopes, _score_within(score_mod, *bounds), *bounds)
    whole = (x.transpose(0, 1)[None] for x in (q, k, v))
    o, lse = attention(*whole, mask=seen, score_mod=moved, return_lse=True, **others)
    return o[0].transpose(0, 1).contiguous(), lse[0]


def check_window_size(window_size: Any) -> None:
    """Raise SpecError unless it is a pair, as flash-attn's and torch's signatures have it."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise wrong("window_size", described(window_size), "(left, right), -1 being open on that side")


def _within(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each position's sequence, and the position within it."""
    lengths = np.diff(bounds)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return sequence.astype(np.int32), (np.arange(bounds[-1]) - bounds[sequence]).astype(np.int32)


def _mask_within(visible: Any, seen: score.Mask, rows: np.ndarray, keys: np.ndarray) -> score.Mask:
    """A mask of positions within sequences, on those that stand one after the other, and what these see at all."""
    if visible is None:
        return seen
    check_arity(visible, "bhij", "mask")  # which what is traced in its place would pass
    (sequence, row), (_, key) = _within(rows), _within(keys)
    return seen & (lambda b, h, i, j: visible(sequence[i], h, row[i], key[j]))


def _score_within(change: Any, rows: np.ndarray, keys: np.ndarray) -> Any:
    """A score function of positions within sequences, on those that stand one after the other."""
    if change is None:
        return None
    check_arity(change, "sbhij", "score_mod")
    (sequence, row), (_, key) = _within(rows), _within(keys)
    return lambda s, b, h, i, j: change(s, sequence[i], h, row[i], key[j])


def _alibi_within(slopes: Tensor | None, before: Any, rows: np.ndarray, keys: np.ndarray) -> Any:
    """ALiBi of sequences one after the other, by each row's own offset, upon a score function or None."""
    if slopes is None:
        return before
    change = before or (lambda s, b, h, i, j: s)
    sequence, _ = _within(rows)
    # Of a row i' of a sequence and its key j', i' + offset - j' is i - j, once the ends of both have met.
    ahead = (keys[1:] - rows[1:])[sequence].astype(np.int32)
    if slopes.ndim == 1:
        return lambda s, b, h, i, j: change(s, b, h, i, j) - slopes[h] * abs(i + ahead[i] - j)
    return lambda s, b, h, i, j: change(s, b, h, i, j) - slopes[sequence[i], h] * abs(i + ahead[i] - j)


def _as_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: np.ndarray,
    keys: np.ndarray,
    slopes: Tensor | None,
    mask: Any,
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Sequences copied to a batch that is padded to the longest, whose padding no row sees."""
    row_lengths, key_lengths = np.diff(rows), np.diff(keys)
    at_rows, at_keys = _places(rows, q.device), _places(keys, q.device)
    padded = score.Mask(lambda _: lambda b, h, i, j: (i < row_lengths[b]) & (j < key_lengths[b]))

    def spread(x: Tensor, at: tuple[Tensor, Tensor], lengths: np.ndarray) -> Tensor:
        empty = x.new_zeros(len(lengths), int(lengths.max(initial=0)), *x.shape[1:])
        return empty.index_put(at, x).transpose(1, 2)

    o, lse = attention(
        spread(q, at_rows, row_lengths),
        spread(k, at_keys, key_lengths),
        spread(v, at_keys, key_lengths),
        mask=padded if mask is None else padded & mask,
        align=key_lengths - row_lengths,
        alibi_slopes=slopes,
        return_lse=True,
        **keywords,
    )
    return o.transpose(1, 2)[at_rows], lse.transpose(1, 2)[at_rows].T


def _places(bounds: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    sequence, within = _within(bounds)
    return torch.from_numpy(sequence).to(device), torch.from_numpy(within).to(device)


def _longest_fits(given: Lengths) -> np.ndarray:
    """Boundaries as NumPy has them. Raises: SpecError if a sequence is longer than was said."""
    bounds, longest = given.bounds, given.longest
    bounds = np.asarray(bounds.cpu() if isinstance(bounds, Tensor) else bounds).astype(np.int64)
    longest = longest.item() if isinstance(longest, Tensor) and longest.ndim == 0 else longest
    number, found = integer(longest), int(np.diff(bounds).max(initial=0))
    if number is None or number < found:
        expected = f"an integer, at least {found}, the longest of {given.name}"
        raise wrong(given.longest_name, described(longest), expected)
    return bounds


def _slopes_of(slopes: Any, sequences: int, heads: int) -> Tensor | None:
    expected = f"floats of shape (H,) = ({heads},) or (B, H) = ({sequences}, {heads})"
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        raise wrong("alibi_slopes", described(slopes), expected)
    if tuple(slopes.shape) not in ((heads,), (sequences, heads)):
        raise wrong("alibi_slopes", f"shape {tuple(slopes.shape)}", expected)
    return slopes
