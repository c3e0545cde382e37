"""JAX's dot_product_attention, jitted; it takes (batch, sequence, heads, head_size)."""

from __future__ import annotations

import functools
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

    attend, dense = attention(case)
    attend, arrays = jax.jit(attend), [swapped(x) for x in (q, k, v)]
    return lambda: attend(*arrays, **dense).block_until_ready(), to_numpy


def prepare_backward(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, threads: int
) -> tuple[Callable, Callable]:
    import jax

    (attend, dense), arrays, arrived = attention(case), [swapped(x) for x in (q, k, v)], swapped(do)

    def pullback_of(dense: Any, *arrays: Any) -> Any:
        return jax.vjp(functools.partial(attend, **dense), *arrays)[1]

    backward = jax.jit(lambda pullback, arrived: pullback(arrived))
    together = jax.jit(lambda arrived, dense, *arrays: pullback_of(dense, *arrays)(arrived))
    done = None if case.direction == "both" else jax.block_until_ready(jax.jit(pullback_of)(dense, *arrays))

    def run() -> Any:
        found = together(arrived, dense, *arrays) if done is None else backward(done, arrived)
        return jax.block_until_ready(found)

    return run, lambda gradients: tuple(map(to_numpy, gradients))


def swapped(x: np.ndarray) -> Any:
    import jax

    return jax.numpy.asarray(np.ascontiguousarray(x.swapaxes(1, 2)))


def to_numpy(out: Any) -> np.ndarray:
    return np.asarray(out).swapaxes(1, 2)


def attention(case: Case) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The case as a function of q, k, v and dense arrays, to be compiled; and these arrays."""
    import jax

    window = (case.window - 1, 0) if case.window else None
    option = case.options

    def four(x: np.ndarray) -> Any:
        return jax.numpy.asarray(x.reshape((1,) * (4 - x.ndim) + x.shape))

    dense = {
        "mask": None if option.mask is None else four(visible_mask(case)),
        "bias": None if option.bias is None else four(option.bias(case)),
    }

    def attend(*arrays: Any, **dense: Any) -> Any:
        dtype = arrays[0].dtype
        if case.dtype == "f16":  # XLA has no fp16 product with fp32 sums on CPUs
            arrays = tuple(x.astype("float32") for x in arrays)
        out = jax.nn.dot_product_attention(*arrays, is_causal=case.causal, local_window_size=window, **dense)
        return out.astype(dtype)

    return attend, dense
