"""The door for code written for flash-attn 2.8: its functions by name, signature, layout and defaults, on CPUs too.

Tensors are (B, S, H, D), or (total, H, D) where sequences of different lengths stand one after the other; causal,
windows and ALiBi are anchored at the bottom right: the last row of a sequence meets its last key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

import flashtile.torch
from flashtile import score
from flashtile.checks import check_flag, integer
from flashtile.errors import FlashtileError, UnavailableError, described, wrong

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Tensor = torch.Tensor
Window = tuple[int, int]

# The same argument in flashtile's signature and in flash-attn's.
_SPELLINGS = {"window": "window_size", "scale": "softmax_scale"}


class _Options(NamedTuple):
    """What all of the functions take."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Window
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool

    @property
    def keywords(self) -> dict[str, Any]:
        """Those that mean the same in any layout, as flashtile.torch.attention calls them."""
        return {"dropout_p": self.dropout_p, "scale": self.softmax_scale, "softcap": self.softcap, "return_lse": True}

    def check(self) -> None:
        check_flag("causal", self.causal)
        check_flag("deterministic", self.deterministic)
        check_flag("return_attn_probs", self.return_attn_probs)
        if not isinstance(self.window_size, (tuple, list)) or len(self.window_size) != 2:
            raise wrong("window_size", described(self.window_size), "(left, right), -1 being open on that side")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn's `flash_attn_func`.

    Shapes:   q (B, S_q, H, D), k (B, S_kv, H_kv, D), v (B, S_kv, H_kv, D_v) -> (B, S_q, H, D_v), contiguous.
    Options:  causal, window_size (left, right; -1 is open) and alibi_slopes, (H,) or (B, H), are anchored at the bottom
              right: row i stands at key i + S_kv - S_q. softcap 0 is off. dropout_p draws its seed from torch's
              generator; the mask is that of `flashtile.attention` with this seed. deterministic changes nothing: the
              bits never depend on the number of threads.
    Returns:  o; with return_attn_probs=True (o, lse, None): lse (B, H, S_q), natural logarithm, float32 (float64 for
              float64). The matrix of weights, which flash-attn returns for its tests, is never stored.
    Numerics: as `flashtile.attention`, float32 and float64 too. A row that sees no key gives 0, and lse -inf.
    Raises:   as flashtile.torch.attention, by the names of this signature.
    Source:   flash-attn 2.8.3, flash_attn_interface.py.

    >>> q = torch.ones(1, 3, 2, 8)
    >>> flash_attn_func(q, q, q, causal=True).shape
    torch.Size([1, 3, 2, 8])
    """
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return _attend(q, k, v, _Options(*given))


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q, k, v in one tensor, (B, S, 3, H, D), read in place."""
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    q, k, v = _parts("qkv", qkv, 5, 3)
    return _attend(q, k, v, _Options(*given))


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q (B, S_q, H, D) and of k, v in one tensor, (B, S_kv, 2, H_kv, D), read in place."""
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    k, v = _parts("kv", kv, 5, 2)
    return _attend(q, k, v, _Options(*given))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """flash-attn's `flash_attn_varlen_func`: sequences of any lengths one after the other, in one call, not padded.

    Shapes:   q (total_q, H, D), k (total_k, H_kv, D), v (total_k, H_kv, D_v) -> (total_q, H, D_v). cu_seqlens_q and
              cu_seqlens_k (B + 1,): integers that rise from 0 to total_q and to total_k; sequence n is what stands
              between the numbers n and n + 1 of each.
    Options:  as `flash_attn_func`, positions counted within a sequence; alibi_slopes (H,) or (B, H). Dropout depends on
              the number of a sequence and on positions within it, as if it were a batch: for dropout alone the
              sequences are copied to one, padded to the longest.
    Returns:  as `flash_attn_func`, lse (H, total_q).
    Raises:   as `flash_attn_func`; SpecError for boundaries that do not rise from 0 to the totals, and for a
              max_seqlen below the longest sequence; UnavailableError for a block_table.
    Source:   flash-attn 2.8.3, flash_attn_interface.py.
    """
    if block_table is not None:
        raise UnavailableError("block_table: got pages, expected None, and keys one after the other")
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    lengths = ("cu_seqlens_q", cu_seqlens_q, max_seqlen_q), ("cu_seqlens_k", cu_seqlens_k, max_seqlen_k)
    return _attend_packed(q, k, v, *lengths, _Options(*given))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q, k, v in one tensor, (total, 3, H, D), read in place."""
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    lengths = "cu_seqlens", cu_seqlens, max_seqlen
    q, k, v = _parts("qkv", qkv, 4, 3)
    return _attend_packed(q, k, v, lengths, lengths, _Options(*given))


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q (total_q, H, D) and of k, v in one tensor, (total_k, 2, H_kv, D), read in place."""
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    lengths = ("cu_seqlens_q", cu_seqlens_q, max_seqlen_q), ("cu_seqlens_k", cu_seqlens_k, max_seqlen_k)
    k, v = _parts("kv", kv, 4, 2)
    return _attend_packed(q, k, v, *lengths, _Options(*given))


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Not available yet. Raises: UnavailableError, with what to call instead."""
    raise UnavailableError(
        "k_cache: got a cache, expected keys: write the new keys and values yourself, and call flash_attn_func on what "
        "is filled; or, with lengths n (B,), flashtile.torch.attention on axes 1 and 2 swapped, with "
        "mask=flashtile.score.padding(n), causal=True, align=n - S_q"
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> Any:
    _check_ranks(4, "(B, S, H, D)", q=q, k=k, v=v)
    options.check()
    o, lse = _call(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=options.causal,
        window=options.window_size,
        align="bottom_right",
        alibi_slopes=options.alibi_slopes,
        **options.keywords,
    )
    return _returned(o.transpose(1, 2), lse, options)


Lengths = tuple[str, Any, Any]  # the name of cumulative lengths, they themselves, and the longest


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, rows: Lengths, keys: Lengths, options: _Options) -> Any:
    """Sequences one after the other: as one, with a mask, or with dropout as a batch."""
    _check_ranks(3, "(total, H, D)", q=q, k=k, v=v)
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
        return _attend_as_batch(q, k, v, *bounds, slopes, options)
    moved = None if slopes is None or not q.shape[0] else _alibi_within(slopes, *bounds)
    o, lse = _call(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask=seen, score_mod=moved, **options.keywords)
    return _returned(o[0].transpose(0, 1), lse[0], options)


def _alibi_within(slopes: Tensor, rows: np.ndarray, keys: np.ndarray) -> Any:
    """ALiBi of sequences one after the other: as a score function, by each row's own offset."""
    lengths = np.diff(rows)
    # Of a row i' of a sequence and its key j', i' + offset - j' is i - j, once the ends of both have met.
    ahead = np.repeat(keys[1:] - rows[1:], lengths).astype(np.int32)
    sequence = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    if slopes.ndim == 1:
        return lambda s, b, h, i, j: s - slopes[h] * abs(i + ahead[i] - j)
    return lambda s, b, h, i, j: s - slopes[sequence[i], h] * abs(i + ahead[i] - j)


def _attend_as_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: np.ndarray,
    keys: np.ndarray,
    slopes: Tensor | None,
    options: _Options,
) -> Any:
    """Sequences copied to a batch that is padded to the longest, whose padding no row sees."""
    row_lengths, key_lengths = np.diff(rows), np.diff(keys)
    at_rows, at_keys = _places(rows, q.device), _places(keys, k.device)

    def spread(x: Tensor, at: tuple[Tensor, Tensor], lengths: np.ndarray) -> Tensor:
        empty = x.new_zeros(len(lengths), int(lengths.max(initial=0)), *x.shape[1:])
        return empty.index_put(at, x).transpose(1, 2)

    o, lse = _call(
        spread(q, at_rows, row_lengths),
        spread(k, at_keys, key_lengths),
        spread(v, at_keys, key_lengths),
        mask=lambda b, h, i, j: (i < row_lengths[b]) & (j < key_lengths[b]),
        causal=options.causal,
        window=options.window_size,
        align=key_lengths - row_lengths,
        alibi_slopes=slopes,
        **options.keywords,
    )
    return _returned(o.transpose(1, 2)[at_rows], lse.transpose(1, 2)[at_rows].T, options)


def _places(bounds: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of each position's sequence, and the position within it."""
    lengths = np.diff(bounds)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return torch.from_numpy(sequence).to(device), torch.from_numpy(within).to(device)


def _returned(o: Tensor, lse: Tensor, options: _Options) -> Any:
    o = o.contiguous()
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


def _check_ranks(rank: int, layout: str, **tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise wrong(name, described(x), f"a torch tensor {layout}")
        if x.ndim != rank:
            raise wrong(name, f"shape {tuple(x.shape)}", layout)


def _parts(name: str, packed: Any, rank: int, parts: int) -> tuple[Any, ...]:
    """q, k, v or k, v of one tensor, which has an axis of them before the heads."""
    layout = f"({'B, S' if rank == 5 else 'total'}, {parts}, H, D)"
    _check_ranks(rank, layout, **{name: packed})
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
