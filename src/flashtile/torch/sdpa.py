"""torch's own SDPA by signature: what it lets a caller do, as the tensors and options that `attention` takes."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch

from flashtile.calls import describe
from flashtile.checks import check_flag
from flashtile.errors import FlashtileError, rename, wrong
from flashtile.hints import check_keywords
from flashtile.signature import Window
from flashtile.torch.attend import attend, drawn
from flashtile.torch.tensors import (
    OTHER,
    autocast_anywhere,
    check_tensors,
    compiling,
    is_jagged,
    kind_of,
    kind_of_others,
    under_autocast,
)

Tensor = torch.Tensor
# The same argument here and in torch's signature, where a message begins with it and where it is mentioned.
SPELLINGS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "mask": "attn_mask",
    "bias": "attn_mask",
    "causal": "is_causal",
}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **unknown: NoReturn,  # checkers refuse it, as calls do
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention` by its own signature and defaults, and a few options more.

    Shapes:   query (..., H, L, E), key (..., H_kv, S, E), value (..., H_kv, S, E_v) -> (..., H, L, E_v). Leading axes
              broadcast. Heads broadcast too unless enable_gqa, with which query head h reads head h // (H / H_kv);
              H_kv may then differ between key and value.
    Options:  is_causal and window are aligned top_left, as torch aligns is_causal: row i stands at key i.
              attn_mask broadcasts to (..., H, L, S): boolean, True = attend, or of a float dtype, added to the scores;
              or a causal_upper_left or causal_lower_right of torch.nn.attention.bias, which aligns window as well.
              softcap, alibi_slopes, sinks as attention. dropout_p draws a seed from torch's generator; the mask is
              that of `flashtile.attention` with this seed, not torch's.
              Nested tensors (..., H, ragged, E) of layout torch.jagged, in all three places: see torch/jagged.py.
    Numerics: a row that sees no key gives 0, where torch may give NaN.
    Raises:   as attention.
    Source:   PyTorch 2.13, torch.nn.functional.scaled_dot_product_attention.
    """
    if unknown:
        check_keywords(scaled_dot_product_attention, unknown)
    if not type(is_causal) is type(enable_gqa) is type(return_lse) is bool:
        for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa), ("return_lse", return_lse)):
            check_flag(name, flag)
    if attn_mask is not None and is_causal:
        raise wrong("attn_mask", "a mask together with is_causal=True", "one of the two, as in torch")
    if type(query) is not Tensor and is_jagged(query):
        from flashtile.torch import jagged

        same: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa, "sinks": sinks}
        same |= {"window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "return_lse": return_lse}
        try:
            return jagged.attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **same)
        except FlashtileError as e:
            rename(e, SPELLINGS)
            raise
    kind, keep = OTHER, None
    if not (in_graph := compiling()):
        keep = None if type(dropout_p) is float and dropout_p == 0 else drawn(dropout_p)
        if autocast_anywhere():
            query, key, value = under_autocast(query, key, value)
        kind = kind_of(query, key, value)
        if kind == OTHER:
            kind = kind_of_others(query=query, key=key, value=value)
    axes = mask = bias = None
    align = "top_left"
    if not query.shape == key.shape == value.shape or query.ndim > 4:
        query, key, value, axes = like_torch(query, key, value, enable_gqa)
    if attn_mask is not None:
        if (found := causal_bias(attn_mask, query, key)) is not None:
            is_causal, align = True, found
        else:
            mask, bias = _mask_like_torch(attn_mask, query, key, axes)
    if in_graph:
        from flashtile.torch import compiled  # as in `attention`

        given = {"mask": mask, "bias": bias, "causal": is_causal, "window": window, "align": align, "scale": scale}
        given |= {"softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks, "dropout_p": dropout_p}
        result = compiled.attention(query, key, value, return_lse=return_lse, **given)
        return _reshaped(result, axes, return_lse)
    scores = mask, bias, None, softcap, alibi_slopes, sinks, keep
    scale = None if scale is None else number("scale", scale)
    options = is_causal, window, align, scale, "ieee", "auto", "auto"
    try:
        result = attend(kind, query, key, value, describe(query, scores, options), return_lse)
    except FlashtileError as e:
        rename(e, SPELLINGS)
        raise
    return result if axes is None else _reshaped(result, axes, return_lse)


def _reshaped(result: Any, axes: torch.Size | None, return_lse: bool) -> Any:
    """The output, and lse, with the leading axes that were one."""
    if axes is None:
        return result
    results = tuple(x.reshape(*axes, *x.shape[1:]) for x in (result if return_lse else (result,)))
    return results if return_lse else results[0]


def _mask_like_torch(
    attn_mask: Tensor, query: Tensor, key: Tensor, axes: torch.Size | None
) -> tuple[Tensor | None, Tensor | None]:
    """`attn_mask` as a mask or as a bias, by its dtype; `axes` are those that the batch of query stands for, if any."""
    if not compiling():
        check_tensors(attn_mask=attn_mask)
    if attn_mask.dtype is not torch.bool and not attn_mask.is_floating_point():
        raise wrong("attn_mask", f"dtype {attn_mask.dtype}", "torch.bool (True = attend) or a float dtype")
    full = (*(query.shape[:-2] if axes is None else (*axes, query.shape[1])), query.shape[-2], key.shape[-2])
    shape = attn_mask.shape
    if len(shape) > len(full) or any(n != m and n != 1 for n, m in zip(reversed(shape), reversed(full), strict=False)):
        raise wrong("attn_mask", f"shape {tuple(shape)}", f"one that broadcasts to {tuple(full)}")
    if axes is not None:  # as one axis; a copy only where those that broadcast stand among others
        whole = attn_mask.reshape((1,) * (len(full) - attn_mask.ndim) + attn_mask.shape)
        last = whole.shape[-3:]
        whole = whole if whole.shape[:-3].numel() == 1 else whole.expand(*axes, *last)
        attn_mask = whole.reshape(whole.shape[:-3].numel(), *last)
    return (attn_mask, None) if attn_mask.dtype is torch.bool else (None, attn_mask)


def like_torch(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, torch.Size | None]:
    """Broadcast the leading axes as torch does: three tensors (B, H, S, D), and the axes that B stands for; None, and
    the tensors as they are, where there is nothing to do."""
    if query.ndim <= 4 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return query, key, value, None
    named = {"query": query, "key": key, "value": value}
    last = -3 if enable_gqa else -2
    for name, x in named.items():
        if x.ndim < -last:
            expected = "rank 3 or more, as heads are grouped" if enable_gqa else "rank 2 or more"
            raise wrong(name, f"shape {tuple(x.shape)}", expected)
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        named["key"], named["value"] = key, value = _as_many_heads(query, key, value)
    try:
        batch = torch.broadcast_shapes(*(x.shape[:last] for x in named.values()))
    except RuntimeError as cause:
        hint = "" if enable_gqa else " (heads that divide query's need enable_gqa=True)"
        shapes = ", ".join(str(tuple(x.shape)) for x in named.values())
        raise wrong("query, key, value", f"shapes {shapes}", f"leading axes that broadcast{hint}") from cause
    query, key, value = (x.expand(*batch, *x.shape[last:]) for x in named.values())
    axes = batch if enable_gqa else batch[:-1]
    # A copy only where the axes cannot be seen as one, as after a broadcast of some of them.
    query, key, value = (x.reshape(axes.numel(), *x.shape[-3:]) for x in (query, key, value))
    return query, key, value, axes


def _as_many_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads, each head as often as it takes: a copy unless it is one head."""
    heads, keys, values = (x.shape[-3] for x in (query, key, value))
    for name, n in (("key", keys), ("value", values)):
        if n == 0 or heads % n:
            raise wrong(name, f"{n} heads", f"a divisor of query's {heads} heads")
    each = math.lcm(keys, values)

    def repeated(x: Tensor) -> Tensor:
        again = each // x.shape[-3]
        return x.unsqueeze(-3).expand(*x.shape[:-2], again, *x.shape[-2:]).flatten(-4, -3)

    return repeated(key), repeated(value)


def causal_bias(attn_mask: Any, query: Tensor, key: Tensor) -> str | None:
    """The alignment of one of torch's causal_upper_left and causal_lower_right; None for another mask.

    Raises: SpecError for one of other lengths.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if type(attn_mask) is not CausalBias:
        return None
    got, expected = (attn_mask.seq_len_q, attn_mask.seq_len_kv), (query.shape[-2], key.shape[-2])
    if got != expected:
        raise wrong("attn_mask", f"a CausalBias of {got[0]} x {got[1]}", f"one of {expected[0]} x {expected[1]}")
    return "top_left" if attn_mask.variant == CausalVariant.UPPER_LEFT else "bottom_right"


def number(name: str, value: Any) -> Any:
    """A number, of a tensor of no axes too, as torch takes one. Raises: SpecError if its gradient would be lost."""
    if not isinstance(value, Tensor) or value.ndim:
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise wrong(name, "a tensor that requires grad", "a number: no gradient is computed for it")
    return value.item()
