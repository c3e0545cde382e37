"""The door for code written for flash-attn 2.8: its functions by name, signature, layout and defaults, on CPUs too.

Tensors are (B, S, H, D), or (total, H, D) where sequences of different lengths stand one after the other; causal,
windows and ALiBi are anchored at the bottom right: the last row of a sequence meets its last key. The two functions
that flash-attn 4 kept take its keywords, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashtile.errors import UnavailableError
from flashtile.flash_attn.attend import Options, Window, attend, attend_packed, parts_of
from flashtile.flash_attn.combine import flash_attn_combine
from flashtile.flash_attn.install import install, uninstall
from flashtile.torch.packed import Lengths

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
__dir__ = __all__.copy  # the public names, and not what stands beside them

Tensor = torch.Tensor


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
    *,
    learnable_sink: Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    return_lse: bool = False,
) -> Any:
    """flash-attn's `flash_attn_func`.

    Shapes:   q (B, S_q, H, D), k (B, S_kv, H_kv, D), v (B, S_kv, H_kv, D_v) -> (B, S_q, H, D_v), contiguous.
    Options:  causal, window_size (left, right; -1 is open) and alibi_slopes, (H,) or (B, H), are anchored at the bottom
              right: row i stands at key i + S_kv - S_q. softcap 0 is off. dropout_p draws its seed from torch's
              generator; the mask is that of `flashtile.attention` with this seed. deterministic changes nothing: the
              bits never depend on the number of threads.
              As flash-attn 4 names them: learnable_sink (H,), a score without a value in each row's softmax; score_mod,
              a function (s, b, h, i, j) of scores, and mask_mod, (b, h, i, j), which is true for keys that are seen, as
              `flashtile.attention` has them: not the functions on registers that flash-attn 4 compiles.
    Returns:  o; with return_lse=True (o, lse); with return_attn_probs=True (o, lse, None): lse (B, H, S_q), natural
              logarithm, float32 (float64 for float64). The matrix of weights, which flash-attn returns for its tests,
              is never stored.
    Numerics: as `flashtile.attention`, float32 and float64 too. A row that sees no key gives 0, and lse -inf.
    Raises:   as flashtile.torch.attention, by the names of this signature.
    Source:   flash-attn 2.8.3, flash_attn_interface.py; flash-attn 4, cute/interface.py.

    >>> q = torch.ones(1, 3, 2, 8)
    >>> flash_attn_func(q, q, q, causal=True).shape
    torch.Size([1, 3, 2, 8])
    """
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return attend(q, k, v, Options(*given, learnable_sink, score_mod, mask_mod, return_lse))


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
    q, k, v = parts_of("qkv", qkv, 5, 3)
    return attend(q, k, v, Options(*given))


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
    k, v = parts_of("kv", kv, 5, 2)
    return attend(q, k, v, Options(*given))


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
    *,
    learnable_sink: Tensor | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    return_lse: bool = False,
) -> Any:
    """flash-attn's `flash_attn_varlen_func`: sequences of any lengths one after the other, in one call, not padded.

    Shapes:   q (total_q, H, D), k (total_k, H_kv, D), v (total_k, H_kv, D_v) -> (total_q, H, D_v). cu_seqlens_q and
              cu_seqlens_k (B + 1,): integers that rise from 0 to total_q and to total_k; sequence n is what stands
              between the numbers n and n + 1 of each.
    Options:  as `flash_attn_func`, positions counted within a sequence, also those that score_mod and mask_mod see,
              whose b is the number of the sequence; alibi_slopes (H,) or (B, H). Dropout depends on
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
    lengths = (
        Lengths(cu_seqlens_q, max_seqlen_q, "cu_seqlens_q", "max_seqlen_q"),
        Lengths(cu_seqlens_k, max_seqlen_k, "cu_seqlens_k", "max_seqlen_k"),
    )
    return attend_packed(q, k, v, *lengths, Options(*given, learnable_sink, score_mod, mask_mod, return_lse))


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
    lengths = Lengths(cu_seqlens, max_seqlen, "cu_seqlens", "max_seqlen")
    q, k, v = parts_of("qkv", qkv, 4, 3)
    return attend_packed(q, k, v, lengths, lengths, Options(*given))


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
    lengths = (
        Lengths(cu_seqlens_q, max_seqlen_q, "cu_seqlens_q", "max_seqlen_q"),
        Lengths(cu_seqlens_k, max_seqlen_k, "cu_seqlens_k", "max_seqlen_k"),
    )
    k, v = parts_of("kv", kv, 4, 2)
    return attend_packed(q, k, v, *lengths, Options(*given))


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
