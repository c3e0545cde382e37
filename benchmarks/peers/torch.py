"""PyTorch's scaled_dot_product_attention in eager mode; softcap and sinks, which it has not, by eager mathematics."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from ..cases import Case
from ..data import additive, has_mask, numpy_dtype, visible_mask


def refuses(case: Case) -> str | None:
    if case.causal and case.queries != case.keys:
        return "is_causal aligns top left"
    return None


def versions() -> dict[str, str]:
    return {"torch": version("torch")}


def to_torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype == numpy_dtype("f32") or x.dtype.kind == "f":
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)


def from_torch(x: Any) -> np.ndarray:
    """Widened: NumPy has no bfloat16 to give back."""
    return x.double().numpy()


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(threads)
    tensors = [to_torch(x) for x in (q, k, v)]
    if case.options.rescores:
        return _by_mathematics(case, *tensors), from_torch
    keywords: dict[str, Any] = {"enable_gqa": case.heads != case.kv_heads}
    if case.options.bias is not None:
        keywords["attn_mask"] = torch.from_numpy(additive(case))
    elif has_mask(case):
        keywords["attn_mask"] = torch.from_numpy(visible_mask(case))
    else:
        keywords["is_causal"] = case.causal

    def run() -> Any:
        with torch.no_grad():
            return scaled_dot_product_attention(*tensors, **keywords)

    return run, from_torch


def _by_mathematics(case: Case, q: Any, k: Any, v: Any) -> Callable:
    """What a model does whose options SDPA has not: every score is stored, as in SDPA's own math path."""
    import torch

    option, group = case.options, case.heads // case.kv_heads
    added = additive(case)
    added = None if added is None else torch.from_numpy(added)
    sinks = None if option.sinks is None else torch.from_numpy(option.sinks(case))[None, :, None, None]

    def run() -> Any:
        with torch.no_grad():
            keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
            scores = torch.matmul(q, keys.transpose(-1, -2)) * case.scale
            if option.softcap:
                scores = torch.tanh(scores / option.softcap) * option.softcap
            if added is not None:
                scores = scores + added
            if sinks is not None:
                scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
            return torch.matmul(torch.softmax(scores, -1)[..., : case.keys], values)

    return run
