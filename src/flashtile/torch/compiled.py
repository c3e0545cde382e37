"""`attention` inside `torch.compile`: Python that its tracer reads, from the keywords to the operator, and no value."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from flashtile.errors import wrong
from flashtile.score.frozen import FrozenMask, FrozenScore
from flashtile.torch.operator import ATTENTION, draw

Tensor = torch.Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    bias: Any,
    score_mod: Any,
    causal: bool,
    window: Any,
    align: Any,
    softcap: float | None,
    alibi_slopes: Any,
    sinks: Any,
    scale: float | None,
    dropout_p: float,
    seed: Any,
    precision: str,
    return_lse: bool,
    kernel: str,
    engine: str,
    progress: Any,
    out: Any,
    unknown: Any = None,
) -> Any:
    """The call as one node of a graph. Functions must be frozen: the tracer cannot run them on symbols, and breaks the
    graph there."""
    if not isinstance(score_mod, FrozenScore | None) or not isinstance(mask, FrozenMask | Tensor | None):
        given = dict(mask=mask, bias=bias, score_mod=score_mod, causal=causal, window=window, align=align)
        given |= dict(softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, scale=scale, dropout_p=dropout_p)
        given |= dict(seed=seed, precision=precision, return_lse=return_lse, kernel=kernel, engine=engine)
        return _outside(q, k, v, progress=progress, out=out, **given)
    for name, x in (("progress", progress), ("out", out)):
        if x is not None:
            raise wrong(name, "one in a compiled function", "None there")
    captured: list[Tensor] = []
    numbers: list[float] = []
    score_text = mask_text = ""
    if score_mod is not None:
        score_text = score_mod.text
        captured += [torch.as_tensor(x) for x in score_mod.arrays]
        numbers += score_mod.numbers
    if mask is not None and not isinstance(mask, Tensor):
        mask_text = mask.text
        captured += [torch.as_tensor(x) for x in mask.arrays]
        numbers += mask.numbers
        mask = None
    offsets = offset = None
    if isinstance(align, int):
        align, offset = None, align
    elif align is not None and not isinstance(align, str):
        align, offsets = None, torch.as_tensor(align).to(torch.int64)
    o, lse = ATTENTION(
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sinks,
        offsets,
        _seed(dropout_p, seed),
        captured,
        score_text,
        mask_text,
        numbers,
        causal,
        None if window is None else [-1 if x is None else x for x in window],
        align,
        offset,
        scale,
        softcap,
        dropout_p,
        precision,
        kernel,
        engine,
    )
    return (o, lse) if return_lse else o


def _uncompiled(*inputs: Tensor, **keywords: Any) -> Any:
    from flashtile.torch.attend import attention

    return attention(*inputs, **keywords)


# torch.compile's own error says so where it may not break the graph.
_REASON = "a mask or score function: give one that flashtile.score.freeze made outside of the compiled function"
_reason = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
_outside = torch.compiler.disable(_uncompiled, **_reason)


def _seed(dropout_p: float, seed: Any) -> Tensor | None:
    if dropout_p == 0:
        return None
    if seed is None:
        return draw()
    return torch.tensor(seed - (1 << 64) if seed >= 1 << 63 else seed)
