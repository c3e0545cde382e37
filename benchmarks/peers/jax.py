"""JAX's dot_product_attention, jitted; it takes (batch, sequence, heads, head_size)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from ..cases import Case
from ..data import visible_mask

SCORE_LIMIT = 1 << 30  # bytes; on CPUs XLA stores the scores


def refuses(case: Case) -> str | None:
    if case.score_bytes > SCORE_LIMIT:
        return f"its scores would take {case.score_bytes / 2**30:.1f} GiB"
    if case.dtype == "f64":
        return "computes the scores of fp64 in fp32"
    if case.causal and case.queries != case.keys:
        return "is_causal aligns top left"
    if case.options.rescores:
        return "no softcap, no sinks"
    return None


def versions() -> dict[str, str]:
    return {"jax": version("jax"), "jaxlib": version("jaxlib")}


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    import jax

    arrays = [jax.numpy.asarray(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)]
    window = (case.window - 1, 0) if case.window else None
    option = case.options

    def four(x: np.ndarray) -> Any:
        return jax.numpy.asarray(x.reshape((1,) * (4 - x.ndim) + x.shape))

    dense = {
        "mask": None if option.mask is None else four(visible_mask(case)),
        "bias": None if option.bias is None else four(option.bias(case)),
    }

    @jax.jit
    def attend(*arrays: Any, **dense: Any) -> Any:
        if case.dtype == "f16":  # XLA has no fp16 product with fp32 sums on CPUs
            arrays = tuple(x.astype("float32") for x in arrays)
        out = jax.nn.dot_product_attention(*arrays, is_causal=case.causal, local_window_size=window, **dense)
        return out.astype(q.dtype)

    def run() -> Any:
        return attend(*arrays, **dense).block_until_ready()

    def to_numpy(out: Any) -> np.ndarray:
        return np.asarray(out).swapaxes(1, 2)

    return run, to_numpy
