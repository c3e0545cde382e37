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
    return x.detach().double().numpy()


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    import torch

    torch.set_num_threads(threads)
    attend = attention(case, *(to_torch(x) for x in (q, k, v)))

    def run() -> Any:
        with torch.no_grad():
            return attend()

    return run, from_torch


def prepare_backward(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, threads: int
) -> tuple[Callable, Callable]:
    """Autograd's; FlexAttention is not here, since it has no gradients on CPUs."""
    import torch

    torch.set_num_threads(threads)
    tensors = [to_torch(x).requires_grad_() for x in (q, k, v)]
    attend, arrived = attention(case, *tensors), to_torch(do)
    done = attend()

    def run() -> Any:
        if case.direction == "both":
            return torch.autograd.grad(attend(), tensors, arrived)
        return torch.autograd.grad(done, tensors, arrived, retain_graph=True)

    return run, lambda gradients: tuple(map(from_torch, gradients))


def attention(case: Case, *tensors: Any) -> Callable[[], Any]:
    """One call of the case on q, k and v."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if case.options.rescores:
        return _by_mathematics(case, *tensors)
    keywords: dict[str, Any] = {"enable_gqa": case.heads != case.kv_heads}
    if case.options.bias is not None:
        keywords["attn_mask"] = torch.from_numpy(additive(case))
    elif has_mask(case):
        keywords["attn_mask"] = torch.from_numpy(visible_mask(case))
    else:
        keywords["is_causal"] = case.causal

    return lambda: scaled_dot_product_attention(*tensors, **keywords)


def _by_mathematics(case: Case, q: Any, k: Any, v: Any) -> Callable:
    """What a model does whose options SDPA has not: every score is stored, as in SDPA's own math path."""
    import torch

    option, group = case.options, case.heads // case.kv_heads
    added = additive(case)
    added = None if added is None else torch.from_numpy(added)
    sinks = None if option.sinks is None else torch.from_numpy(option.sinks(case))[None, :, None, None]

    def run() -> Any:
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
