"""How every function of flash-attn becomes a call of flashtile: layouts, names, options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import flashtile.torch
from flashtile.checks import check_flag
from flashtile.errors import FlashtileError, described, rename, wrong
from flashtile.torch import packed
from flashtile.torch.packed import Lengths, check_window_size
from flashtile.torch.tensors import check_ranks

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
        """What decides the result, as flashtile.torch.attention calls it."""
        return {
            "causal": self.causal,
            "window": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "mask": self.mask_mod,
            "score_mod": self.score_mod,
            "dropout_p": self.dropout_p,
            "scale": self.softmax_scale,
            "softcap": self.softcap,
            "sinks": self.learnable_sink,
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
        check_window_size(self.window_size)


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    check_ranks(4, "(B, S, H, D)", q=q, k=k, v=v)
    options.check()
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    try:
        o, lse = flashtile.torch.attention(*heads_first, align="bottom_right", return_lse=True, **options.keywords)
    except FlashtileError as e:
        rename(e, _SPELLINGS)
        raise
    return _returned(o.transpose(1, 2), lse, options)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, rows: Lengths, keys: Lengths, options: Options) -> Any:
    """Sequences one after the other."""
    check_ranks(3, "(total, H, D)", q=q, k=k, v=v)
    options.check()
    try:
        o, lse = packed.attend(q, k, v, rows, keys, **options.keywords)
    except FlashtileError as e:
        rename(e, _SPELLINGS)
        raise
    return _returned(o, lse, options)


def _returned(o: Tensor, lse: Tensor, options: Options) -> Any:
    o = o.contiguous()
    if options.return_lse:
        return o, lse.contiguous()
    return (o, lse.contiguous(), None) if options.return_attn_probs else o


def parts_of(name: str, packed: Any, rank: int, parts: int) -> tuple[Any, ...]:
    """q, k, v or k, v of one tensor, which has an axis of them before the heads."""
    layout = f"({'B, S' if rank == 5 else 'total'}, {parts}, H, D)"
    check_ranks(rank, layout, **{name: packed})
    if packed.shape[-3] != parts:
        raise wrong(name, f"shape {tuple(packed.shape)}", layout)
    return packed.unbind(-3)
