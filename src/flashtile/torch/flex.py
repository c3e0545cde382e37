"""torch's flex_attention by signature: its functions as they are written, its BlockMasks, gradients on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtile import score
from flashtile.checks import check_flag
from flashtile.errors import FlashtileError, UnavailableError, described, rename, wrong
from flashtile.torch.attend import attention
from flashtile.torch.sdpa import SPELLINGS
from flashtile.torch.tensors import compiling

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

Tensor = torch.Tensor


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention` by its own signature; it need not be compiled.

    Shapes:   query (B, H, L, E), key (B, H_kv, S, E), value (B, H_kv, S, E_v) -> (B, H, L, E_v); H_kv other than H with
              enable_gqa alone. Key and value of one batch serve every batch of query.
    Options:  score_mod   a function (score, b, h, q_idx, kv_idx) -> score, as written for torch, or a frozen one.
              block_mask  what create_block_mask made, or a BlockMask put together by hand: rows see the keys that
                          mask_mod shows in its partial blocks, and all keys of its full blocks. Outside of a graph
                          the blocks are held against mask_mod once for each shape, and what came out is remembered as
                          long as the object lives: after a change to its tensors, or to what its mask_mod reads, make
                          a new BlockMask.
              return_lse  returns (o, lse) too; return_aux=AuxRequest(lse=True) returns (o, AuxOutput).
    Numerics: as flashtile.torch.attention; on the CPU, too, autograd has the gradients of query, key, value, and of the
              float tensors that score_mod captured.
    Raises:   as flashtile.torch.attention; SpecError for a block_mask of other lengths, and for kernel_options, which
              are those of torch's Triton kernels; UnavailableError for max_scores.
    Source:   PyTorch 2.13, torch.nn.attention.flex_attention.
    """
    for name, flag in (("enable_gqa", enable_gqa), ("return_lse", return_lse)):
        if type(flag) is not bool:
            check_flag(name, flag)
    if kernel_options is not None:
        raise wrong("kernel_options", described(kernel_options), "None: they tune torch's Triton kernels")
    if return_aux is not None and return_aux.max_scores:
        raise UnavailableError("return_aux: got max_scores=True, expected lse alone: the largest scores are not kept")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else described(x)
            raise wrong(name, got, "a tensor of four axes, (B, H, S, E)")
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise wrong("key", f"{key.shape[1]} heads beside {query.shape[1]}", "as many as query, or enable_gqa=True")
    if key.shape[0] == 1 != query.shape[0]:
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    mask = None if block_mask is None else mask_of(block_mask, query.shape[:3] + key.shape[2:3])
    with_lse = return_lse or (return_aux is not None and return_aux.lse)
    try:
        o, lse = attention(query, key, value, score_mod=score_mod, mask=mask, scale=scale, return_lse=True)
    except FlashtileError as e:
        rename(e, SPELLINGS)
        raise
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return o, AuxOutput(lse=lse if with_lse else None)
    return (o, lse) if with_lse else o


# What a BlockMask means for calls of a shape; its blocks are looked through once.
_masks: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def mask_of(block_mask: Any, shape: tuple[int, ...]) -> Any:
    """What mask= takes for a BlockMask in a call of (B, H, S_q, S_kv); None where every key is visible.

    Its mask_mod alone, if that says the same as its blocks; else both. Raises: SpecError.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise wrong("block_mask", described(block_mask), "a BlockMask, as create_block_mask makes of a mask function")
    if tuple(block_mask.seq_lengths) != tuple(shape[2:]):
        got = f"one of lengths {tuple(block_mask.seq_lengths)}"
        raise wrong("block_mask", got, f"{tuple(shape[2:])} as query and key have")
    blocks = tuple(block_mask.kv_num_blocks.shape[:2])
    for n, size, axis in zip(blocks, shape, ("batches", "heads"), strict=False):
        if n not in (1, size):
            raise wrong("block_mask", f"one of {n} {axis}", f"1 or {size}")
    if compiling():
        return _mask_in_graph(block_mask, shape)
    known = _masks.setdefault(block_mask, {})
    if shape not in known:
        known[shape] = _mask_of(block_mask, shape)
    return known[shape]


def _mask_of(block_mask: Any, shape: tuple[int, ...]) -> Any:
    from torch.nn.attention.flex_attention import noop_mask

    sizes = rows, columns = block_mask.BLOCK_SIZE
    full, partial = _listed(block_mask, shape, _blocks)
    rule = block_mask.mask_mod
    if rule is noop_mask:
        seen = full | partial
        return None if seen.all() else _by_blocks(seen, np.zeros_like(seen), None, sizes)
    kinds = score.coverage(score.Program.of(shape, mask=rule), rows, columns).tiles()  # type: ignore[arg-type]  # four
    hidden, whole = ~(full | partial), full
    alike = (kinds == score.EMPTY) | ~hidden, (kinds == score.FULL) | ~whole
    return rule if all(x.all() for x in alike) else _by_blocks(full, partial, rule, sizes)


def _mask_in_graph(block_mask: Any, shape: tuple[int, ...]) -> Any:
    """As `_mask_of`, where no block has been looked at yet: the blocks are tensors of the graph, and always read."""
    from torch.nn.attention.flex_attention import noop_mask

    full, partial = _listed(block_mask, shape, _blocks_in_graph)
    rule = block_mask.mask_mod
    if rule is noop_mask:
        return _by_blocks(full | partial, partial, None, block_mask.BLOCK_SIZE)
    return _by_blocks(full, partial, rule, block_mask.BLOCK_SIZE)


def _listed(block_mask: Any, shape: tuple[int, ...], read: Callable[..., Any]) -> tuple[Any, Any]:
    """Which blocks are full, and which partial."""
    rows, columns = block_mask.BLOCK_SIZE
    tiles = -(-shape[2] // rows), -(-shape[3] // columns)
    partial = read(block_mask.kv_num_blocks, block_mask.kv_indices, tiles)
    if block_mask.full_kv_num_blocks is None:
        return partial & False, partial
    return read(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, tiles), partial


def _blocks_in_graph(counts: Tensor, indices: Tensor, tiles: tuple[int, int]) -> Tensor:
    """As `_blocks`."""
    _check_blocks(counts, indices, tiles)
    used = torch.where(torch.arange(indices.shape[3]) < counts[..., None], indices, tiles[1])
    listed = torch.zeros((*counts.shape, tiles[1] + 1), dtype=torch.bool)
    return listed.scatter(3, used.long(), True)[..., :-1]


def _check_blocks(counts: Any, indices: Any, tiles: tuple[int, int]) -> None:
    if counts.shape[2] != tiles[0] or indices.shape[3] > tiles[1]:
        got = f"one of {counts.shape[2]} x {indices.shape[3]} blocks"
        raise wrong("block_mask", got, f"{tiles[0]} x {tiles[1]} of its BLOCK_SIZE, as query and key have")


def _blocks(counts: Tensor, indices: Tensor, tiles: tuple[int, int]) -> np.ndarray:
    """Which blocks are listed: (batches, heads, rows of blocks), (..., columns) -> bool (..., rows, columns)."""
    _check_blocks(counts, indices, tiles)
    count, index = counts.cpu().numpy(), indices.cpu().numpy()
    listed = np.zeros((*count.shape, tiles[1] + 1), bool)
    used = np.where(np.arange(index.shape[3]) < count[..., None], index, tiles[1])
    np.put_along_axis(listed, used.astype(np.int64), True, axis=3)
    return listed[..., :-1]


def _by_blocks(full: Any, partial: Any, rule: Any, sizes: tuple[int, int]) -> Any:
    """The mask of blocks: all of those that are full, and what `rule` shows in those that are not."""
    rows, columns = sizes
    batches, heads = full.shape[:2]

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        at = (b if batches > 1 else 0, h if heads > 1 else 0, i // rows, j // columns)
        return full[at] if rule is None else full[at] | (partial[at] & rule(b, h, i, j))

    return visible
