"""What torch's scaled_dot_product_attention lets a caller do, as the tensors and options that `attention` takes."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from flashtile.errors import FlashtileError, wrong

Tensor = torch.Tensor
_DEVICES = ("cpu", "cuda")
# The same argument here and in torch's signature, where a message begins with it and where it is mentioned.
_SPELLINGS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "mask": "attn_mask",
    "bias": "attn_mask",
    "causal": "is_causal",
}
_MENTIONED = re.compile(r"\b([qkv])\b")


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype of torch.autocast where it is on for their device, as torch's SDPA has them: float64
    stays. What is no tensor is left to the checks that follow."""
    lower = {d: torch.get_autocast_dtype(d) for d in _DEVICES if torch.is_autocast_enabled(d)}
    if not lower:
        return tensors
    return tuple(x.to(lower[x.device.type]) if _is_cast(x, lower) else x for x in tensors)


def _is_cast(x: Any, lower: dict[str, torch.dtype]) -> bool:
    return (
        isinstance(x, Tensor)
        and x.device.type in lower
        and x.is_floating_point()
        and x.dtype not in (torch.float64, lower[x.device.type])
    )


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


def spell(error: FlashtileError) -> None:
    """Call the arguments in an error's message what torch's signature calls them."""
    argument, colon, rest = str(error).partition(":")
    message = _SPELLINGS.get(argument, argument) + colon + rest
    error.args = (_MENTIONED.sub(lambda found: _SPELLINGS[found[1]], message),)
