"""torch's varlen_attn by signature: sequences one after the other, on the CPU too, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtile.checks import check_flag
from flashtile.errors import FlashtileError, described, rename, wrong
from flashtile.score.varlen import boundaries
from flashtile.torch import packed
from flashtile.torch.packed import Lengths, check_window_size
from flashtile.torch.tensors import check_ranks

if TYPE_CHECKING:
    from torch.nn.attention.varlen import AuxRequest

Tensor = torch.Tensor
# The same argument in flashtile's signature and in torch's.
_SPELLINGS = {"q": "query", "k": "key", "v": "value", "window": "window_size"}


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """`torch.nn.attention.varlen.varlen_attn` by its own signature, not padded.

    Shapes:   query (T_q, H, D), key (T_k, H_kv, D), value (T_k, H_kv, D_v) -> (T_q, H, D_v); H_kv other than H with
              enable_gqa alone. cu_seq_q and cu_seq_k (N + 1,): integers that rise from 0 to T_q and to T_k.
    Options:  window_size  (left, right) around the row's own key, the last row of a sequence meeting its last key; -1
                           is open on that side: (-1, 0) is causal.
              seqused_k    (N,): how many keys of each sequence are there, the first ones. With block_table (N, pages)
                           key and value are (pages in all, page size, H_kv, D), and cu_seq_k is not read. Both copy the
                           keys that are used, and have gradients.
    Returns:  o; with return_aux=AuxRequest(lse=True) also lse (T_q, H).
    Raises:   SpecError for boundaries that do not rise from 0 to the totals, a max_q or max_k below the longest
              sequence, more keys used than there are, and for num_splits: how keys are split follows from shapes here.
    Source:   PyTorch 2.13, torch.nn.attention.varlen.
    """
    check_flag("enable_gqa", enable_gqa)
    check_window_size(window_size)
    wants_lse = False if return_aux is None else getattr(return_aux, "lse", None)
    if not isinstance(wants_lse, bool):
        raise wrong("return_aux", described(return_aux), "an AuxRequest, or None")
    if num_splits is not None:
        raise wrong("num_splits", described(num_splits), "None: how keys are split follows from shapes")
    paged = block_table is not None
    if paged and seqused_k is None:
        raise wrong("seqused_k", "None with a block_table", "how many keys of each sequence are there")
    check_ranks(3, "(total, H, D)", query=query)
    check_ranks(*((4, "(pages, page size, H, D)") if paged else (3, "(total, H, D)")), key=key, value=value)
    if seqused_k is not None:
        key, value, cu_seq_k = _used(key, value, cu_seq_k, seqused_k, block_table)
    elif cu_seq_k is None:
        raise wrong("cu_seq_k", "None", "where the keys of each sequence begin, or seqused_k and block_table")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise wrong("key", f"{key.shape[1]} heads beside {query.shape[1]}", "as many as query, or enable_gqa=True")
    lengths = Lengths(cu_seq_q, max_q, "cu_seq_q", "max_q"), Lengths(cu_seq_k, max_k, "cu_seq_k", "max_k")
    try:
        o, lse = packed.attend(query, key, value, *lengths, window=window_size, scale=scale)
    except FlashtileError as e:
        rename(e, _SPELLINGS)
        raise
    return (o, lse.mT.contiguous()) if wants_lse else o


def _integers(name: str, x: Any) -> np.ndarray:
    """Integers of a tensor, or of what NumPy makes an array of, on the host. Raises: SpecError for anything else."""
    try:
        found = np.asarray(x.cpu() if isinstance(x, Tensor) else x)
    except Exception as cause:
        raise wrong(name, described(x), "a tensor of integers") from cause
    if found.dtype.kind not in "iu":
        raise wrong(name, described(x) if found.ndim == 0 else f"dtype {found.dtype}", "a tensor of integers")
    return found


def _used(
    key: Tensor, value: Tensor, cu_seq_k: Tensor | None, seqused_k: Tensor, block_table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys that are used, one sequence after the other, their values, and where each sequence begins."""
    used = _integers("seqused_k", seqused_k)
    sequences = used.shape[0] if used.ndim == 1 else -1
    length = tuple(key.shape[:-2])  # or the number of pages, and how many keys each has
    if tuple(value.shape[:-2]) != length:
        raise wrong("value", f"shape {tuple(value.shape)}", f"({', '.join(map(str, length))}, ...), as key begins")
    if block_table is not None:
        size = key.shape[1]
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        pages = _integers("block_table", block_table)
        inside = pages.size == 0 or 0 <= pages.min() <= pages.max() < length[0]
        if pages.ndim != 2 or pages.shape[0] != sequences or not inside:
            raise wrong("block_table", f"shape {pages.shape}", f"pages of key for each of {sequences} sequences")
        places = [(row[:, None] * size + np.arange(size)).ravel() for row in pages]
    else:
        bounds = boundaries(cu_seq_k, "cu_seq_k")
        if bounds[-1] != len(key):
            raise wrong("cu_seq_k", f"boundaries up to {bounds[-1]}", f"up to the length, {len(key)}")
        places = [np.arange(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    room = np.array([len(x) for x in places])
    if sequences != len(places) or (used < 0).any() or (used > room).any():
        expected = f"({len(places)},) integers, at most {room.tolist()}"
        raise wrong("seqused_k", f"{used.dtype} of shape {used.shape}", expected)
    at = torch.from_numpy(np.concatenate([x[:n] for x, n in zip(places, used, strict=True)]).astype(np.int64))
    at = at.to(key.device)
    return key.index_select(0, at), value.index_select(0, at), torch.from_numpy(np.cumsum([0, *used]))
