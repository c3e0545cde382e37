"""PyTorch's scaled_dot_product_attention in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from ..cases import Case
from ..data import numpy_dtype, visible_mask


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
    keywords: dict[str, Any] = {"enable_gqa": case.heads != case.kv_heads}
    if case.window:
        keywords["attn_mask"] = torch.from_numpy(visible_mask(case))
    else:
        keywords["is_causal"] = case.causal

    def run() -> Any:
        with torch.no_grad():
            return scaled_dot_product_attention(*tensors, **keywords)

    return run, from_torch
