"""How every function of flash-attn becomes a call of flashtile: layouts, options, sequences one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import flashtile.torch
from flashtile import score
from flashtile.checks import check_flag, integer
from flashtile.errors import FlashtileError, described, wrong

Tensor = torch.Tensor
Window = tuple[int, int]

# The same argument in flashtile's signature and in flash-attn's.
_SPELLINGS = {"window": "window_size", "scale": "softmax_scale", "sinks": "learnable_sink", "mask": "mask_mod"}


class Options(NamedTuple):
    """What all of the functions take, and at the end what flash-attn 4 added to two of them."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Window
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    learnable_sink: Tensor | None = None
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    return_lse: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """Those that mean the same in any layout, as flashtile.torch.attention calls them."""
        return {
            "dropout_p": self.dropout_p,
            "scale": self.softmax_scale,
            "softcap": self.softcap,
            "sinks": self.learnable_sink,
            "return_lse": True,
        }

    def check(self) -> None:
        check_flag("causal", self.causal)
        check_flag("deterministic", self.deterministic)
        check_flag("return_attn_probs", self.return_attn_probs)
        check_flag("return_lse", self.return_lse)
        if self.return_lse and self.return_attn_probs:
            raise wrong("return_lse", "True with return_attn_probs=True", "one of them: that has lse, too")
        for name in ("score_mod", "mask_mod"):
            if (function := getattr(self, name)) is not None and not callable(function):
                raise wrong(name, described(function), "a function")
        if not isinstance(self.window_size, (tuple, list)) or len(self.window_size) != 2:
            raise wrong("window_size", described(self.window_size), "(left, right), -1 being open on that side")


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    check_ranks(4, "(B, S, H, D)", q=q, k=k, v=v)
    options.check()
    o, lse = _call(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=options.causal,
        window=options.window_size,
        align="bottom_right",
        alibi_slopes=options.alibi_slopes,
        mask=options.mask_mod,
        score_mod=options.score_mod,
        **options.keywords,
    )
    return _returned(o.transpose(1, 2), lse, options)


Lengths = tuple[str, Any, Any]  # the name of cumulative lengths, they themselves, and the longest


def attend_packed(q: Tensor, k: Tensor, v: Tensor, rows: Lengths, keys: Lengths, options: Options) -> Any:
    """Sequences one after the other: as one, with a mask, or with dropout as a batch."""
    check_ranks(3, "(total, H, D)", q=q, k=k, v=v)
    options.check()
    try:
        seen = score.varlen(rows[1], keys[1], options.causal, options.window_size)
        seen.fits((1, q.shape[1], q.shape[0], k.shape[0]))
    except FlashtileError as e:
        _spell(e, {**_SPELLINGS, "cu_seqlens_q": rows[0], "cu_seqlens_k": keys[0]})
        raise
    bounds = _longest_fits(*rows), _longest_fits(*keys)
    slopes = _slopes_of(options.alibi_slopes, len(bounds[0]) - 1, q.shape[1])
    if options.dropout_p and q.shape[0]:
        return _as_batch(q, k, v, *bounds, slopes, options)
    moved = None
    if q.shape[0] and k.shape[0]:
        seen = _mask_within(options.mask_mod, seen, *bounds)
        moved = _alibi_within(slopes, _score_within(options.score_mod, *bounds), *bounds)
    o, lse = _call(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask=seen, score_mod=moved, **options.keywords)
    return _returned(o[0].transpose(0, 1), lse[0], options)


def _within(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each position's sequence, and the position within it."""
    lengths = np.diff(bounds)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return sequence.astype(np.int32), (np.arange(bounds[-1]) - bounds[sequence]).astype(np.int32)


def _mask_within(visible: Any, seen: score.Mask, rows: np.ndarray, keys: np.ndarray) -> score.Mask:
    """A mask of positions within sequences, on those that stand one after the other, and what these see at all."""
    if visible is None:
        return seen
    (sequence, row), (_, key) = _within(rows), _within(keys)
    return seen & (lambda b, h, i, j: visible(sequence[i], h, row[i], key[j]))


def _score_within(change: Any, rows: np.ndarray, keys: np.ndarray) -> Any:
    """A score function of positions within sequences, on those that stand one after the other."""
    if change is None:
        return None
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
    options: Options,
) -> Any:
    """Sequences copied to a batch that is padded to the longest, whose padding no row sees."""
    row_lengths, key_lengths = np.diff(rows), np.diff(keys)
    at_rows, at_keys = _places(rows, q.device), _places(keys, q.device)
    padded = score.Mask(lambda _: lambda b, h, i, j: (i < row_lengths[b]) & (j < key_lengths[b]))

    def spread(x: Tensor, at: tuple[Tensor, Tensor], lengths: np.ndarray) -> Tensor:
        empty = x.new_zeros(len(lengths), int(lengths.max(initial=0)), *x.shape[1:])
        return empty.index_put(at, x).transpose(1, 2)

    o, lse = _call(
        spread(q, at_rows, row_lengths),
        spread(k, at_keys, key_lengths),
        spread(v, at_keys, key_lengths),
        mask=padded if options.mask_mod is None else padded & options.mask_mod,
        score_mod=options.score_mod,
        causal=options.causal,
        window=options.window_size,
        align=key_lengths - row_lengths,
        alibi_slopes=slopes,
        **options.keywords,
    )
    return _returned(o.transpose(1, 2)[at_rows], lse.transpose(1, 2)[at_rows].T, options)


def _places(bounds: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    sequence, within = _within(bounds)
    return torch.from_numpy(sequence).to(device), torch.from_numpy(within).to(device)


def _returned(o: Tensor, lse: Tensor, options: Options) -> Any:
    o = o.contiguous()
    if options.return_lse:
        return o, lse.contiguous()
    return (o, lse.contiguous(), None) if options.return_attn_probs else o


def _call(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    try:
        return flashtile.torch.attention(q, k, v, **keywords)
    except FlashtileError as e:
        _spell(e, _SPELLINGS)
        raise


def _spell(error: FlashtileError, names: dict[str, str]) -> None:
    """Call the argument that an error's message begins with what this signature calls it."""
    argument, colon, rest = str(error).partition(":")
    error.args = (names.get(argument, argument) + colon + rest,)


def check_ranks(rank: int, layout: str, **tensors: Any) -> None:
    """Raise SpecError unless each is a tensor of so many axes."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise wrong(name, described(x), f"a torch tensor {layout}")
        if x.ndim != rank:
            raise wrong(name, f"shape {tuple(x.shape)}", layout)


def parts_of(name: str, packed: Any, rank: int, parts: int) -> tuple[Any, ...]:
    """q, k, v or k, v of one tensor, which has an axis of them before the heads."""
    layout = f"({'B, S' if rank == 5 else 'total'}, {parts}, H, D)"
    check_ranks(rank, layout, **{name: packed})
    if packed.shape[-3] != parts:
        raise wrong(name, f"shape {tuple(packed.shape)}", layout)
    return packed.unbind(-3)


def _longest_fits(name: str, boundaries: Any, longest: Any) -> np.ndarray:
    """Boundaries as NumPy has them. Raises: SpecError if a sequence is longer than was said."""
    bounds = np.asarray(boundaries.cpu() if isinstance(boundaries, Tensor) else boundaries).astype(np.int64)
    longest = longest.item() if isinstance(longest, Tensor) and longest.ndim == 0 else longest
    number, found = integer(longest), int(np.diff(bounds).max(initial=0))
    said = name.replace("cu", "max").replace("seqlens", "seqlen")
    if number is None or number < found:
        raise wrong(said, described(longest), f"an integer, at least {found}, the longest of {name}")
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
