"""JAX's dot_product_attention, jitted; it takes (batch, sequence, heads, head_size)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from ..cases import Case

SCORE_LIMIT = 1 << 30  # bytes; on CPUs XLA stores the scores


def refuses(case: Case) -> str | None:
    if case.score_bytes > SCORE_LIMIT:
        return f"its scores would take {case.score_bytes / 2**30:.1f} GiB"
    if case.causal and case.queries != case.keys:
        return "is_causal aligns top left"
    return None


def versions() -> dict[str, str]:
    return {"jax": version("jax"), "jaxlib": version("jaxlib")}


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    import jax

    jax.config.update("jax_enable_x64", case.dtype == "f64")
    arrays = [jax.numpy.asarray(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)]
    window = (case.window - 1, 0) if case.window else None

    @jax.jit
    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=case.causal, local_window_size=window)

    def run() -> Any:
        return attend(*arrays).block_until_ready()

    def to_numpy(out: Any) -> np.ndarray:
        return np.asarray(out).swapaxes(1, 2)

    return run, to_numpy
