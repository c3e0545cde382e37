"""Keywords that a function does not have: what other packages call the same, or the nearest of its own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Any

from flashtile.errors import KeywordError

_CAUSAL = {"causal": "causal=", "is_causal": "is_causal="}
_MASK = {
    "mask": "mask= for a boolean one (True = attend), bias= for one that is added to the scores",
    "attn_mask": "attn_mask=",
}
_WINDOW = {"window": "window=(left, right)"}
_SOFTCAP = {"softcap": "softcap="}
_SINKS = {"sinks": "sinks="}
_SCALE = {"scale": "scale="}
_DROPOUT = {"seed": "dropout_p= with a seed=", "dropout_p": "dropout_p="}
_LSE = {"return_lse": "return_lse=True (the S x S weights are never stored)"}
_FUNCTION = {"mask": "mask=", "attn_mask": "mask= of flashtile.torch.attention"}
_VARLEN = {"mask": "mask=flashtile.score.varlen(cu_seqlens_q, cu_seqlens_k)"}
_PADDING = {"mask": "mask=flashtile.score.padding(lengths)"}
_KERNEL = {"kernel": "kernel="}

# What torch's SDPA and FlexAttention, flash-attn, JAX, xformers, Transformers and ONNX call it -> what to write
# instead, by the keyword that a function must have for it; "" is for all.
_FOREIGN: dict[str, dict[str, str]] = {
    "is_causal": _CAUSAL,
    "causal": _CAUSAL,
    "attn_mask": _MASK,
    "attention_mask": _MASK,
    "attn_bias": _MASK,
    "mask": _MASK,
    "bias": _MASK,
    "block_mask": _FUNCTION,
    "mask_mod": _FUNCTION,
    "score_mod": {"attn_mask": "score_mod= of flashtile.torch.attention"},
    "align": {"attn_mask": "align= of flashtile.torch.attention"},
    "window_size": _WINDOW,
    "local_window_size": _WINDOW,
    "sliding_window": {"window": "window=(n - 1, 0), for n keys of which the row's own is one"},
    "softmax_scale": _SCALE,
    "sm_scale": _SCALE,
    "logits_soft_cap": _SOFTCAP,
    "soft_cap": _SOFTCAP,
    "s_aux": _SINKS,
    "attn_sink": _SINKS,
    "learnable_sink": _SINKS,
    "p": _DROPOUT,
    "dropout": _DROPOUT,
    "dropout_rate": _DROPOUT,
    "generator": {"seed": "seed=", "dropout_p": "torch.manual_seed, from which the seed is drawn"},
    "return_softmax_lse": _LSE,
    "return_attn_probs": _LSE,
    "return_residual": _LSE,
    "need_weights": _LSE,
    "cu_seqlens": _VARLEN,
    "cu_seqlens_q": _VARLEN,
    "cu_seqlens_k": _VARLEN,
    "max_seqlen_q": _VARLEN,
    "max_seqlen_k": _VARLEN,
    "key_padding_mask": _PADDING,
    "query_seq_lengths": _PADDING,
    "key_value_seq_lengths": _PADDING,
    "nonpad_kv_seqlen": _PADDING,
    "implementation": _KERNEL,
    "backend": _KERNEL,
    "enable_gqa": {"": "k and v with fewer heads than q, which need no keyword"},
    "deterministic": {"": "no keyword: the bits never depend on the number of threads"},
    "layout": {"": "arrays (B, H, S, D): swap axes 1 and 2 of (B, S, H, D)"},
}


def check_keywords(function: Callable[..., Any], given: Iterable[str]) -> None:
    """Raise KeywordError for the first of these keywords, which came to a function that does not have them."""
    for name in given:
        import difflib  # by who mistyped alone

        own = [p.name for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        meant = [text for keyword, text in _FOREIGN.get(name, {}).items() if keyword in ("", *own)]
        meant += [f"{near}=" for near in difflib.get_close_matches(name, own, n=1)]
        hint = f"did you mean {meant[0]}?" if meant else "expected one of " + ", ".join(own)
        raise KeywordError(f"{name}: got a keyword that {function.__name__} does not have, {hint}")
