"""flashtile through its PyTorch door; not among the default peers, as the kernels are those of `flashtile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cases import Case
from . import flashtile as plain
from . import torch as torch_peer


def refuses(case: Case) -> str | None:
    return "options ride as NumPy arrays" if case.option else torch_peer.refuses(case)


def versions() -> dict[str, str]:
    return {**plain.versions(), **torch_peer.versions()}


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    import torch

    import flashtile.torch

    torch.set_num_threads(threads)
    flashtile.set_num_threads(threads)
    attend = flashtile.torch.scaled_dot_product_attention
    tensors = [torch_peer.to_torch(x) for x in (q, k, v)]
    keywords: dict[str, Any] = {"enable_gqa": case.heads != case.kv_heads, "is_causal": case.causal}
    if case.window:
        keywords["window"] = (case.window - 1, 0)

    def run() -> Any:
        return attend(*tensors, **keywords)

    return run, torch_peer.from_torch
