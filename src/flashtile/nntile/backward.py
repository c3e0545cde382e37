"""The gradients of NNTile's flash attention: one key tile a call; see flashtile.nntile."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashtile.arrays import address_of
from flashtile.dtypes import DTYPES
from flashtile.engines import direct
from flashtile.kernels import tile_kernels
from flashtile.kernels.tiles import Native, TileKernel
from flashtile.nntile.tiles import (
    GRADIENTS,
    Call,
    Tile,
    call_on_arrays,
    call_on_tiles,
)
from flashtile.plan import Plan
from flashtile.plan.tiling import flops_of

TIMES_FORWARD = 5, 2  # five products where the forward has two


def flash_sdpa_bwd(
    K: Any,
    Q: Any,
    mask: Any,
    logsumexp: Any,
    V: Any,
    A: Any,
    dA: Any,
    dK: Any,
    dQ: Any,
    dV: Any,
    *,
    dtype: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    first_query: int = 0,
    first_key: int = 0,
    scale: float | None = None,
) -> None:
    """Add to dK, dQ and dV what one key tile and a query tile give to them.

    Shapes:   as in `flash_sdpa_fwd`, whose A and logsumexp of all key tiles these are; dA as A, dK as K, dQ as Q, dV as
              V. Gradients are of the dtype of Q, or float32 (float64 for float64).
    Options:  as there.
    Numerics: sums of a call in float32 (float64 for float64). Gradients in 16 bits are rounded to nearest once a call;
              over many tiles let them be float32.
    Raises:   SpecError before memory is touched; KernelError.
    Source:   NNTile's flash_sdpa_bwd; Dao 2023, FlashAttention-2, section 3.1.2.

    >>> from flashtile import nntile
    >>> rng = np.random.default_rng(0)
    >>> Q, K, V, dA = (np.asfortranarray(rng.standard_normal((16, 32, 2, 1, 4), np.float32)) for _ in range(4))
    >>> A, logsumexp = np.zeros_like(Q), np.full((32, 2, 1, 4), -np.inf, np.float32, order="F")
    >>> nntile.flash_sdpa_fwd(K, Q, None, logsumexp, V, A, causal=True)
    >>> dK, dQ, dV = (np.zeros_like(x) for x in (K, Q, V))
    >>> nntile.flash_sdpa_bwd(K, Q, None, logsumexp, V, A, dA, dK, dQ, dV, causal=True)
    >>> rows = [x.transpose(2, 4, 3, 1, 0).reshape(2, 4, -1, 16) for x in (dA, Q, K, V, A)]
    >>> lse = logsumexp.transpose(1, 3, 2, 0).reshape(2, 4, -1)
    >>> g = flashtile.attention_backward(*rows, lse, causal=True)
    >>> bool(np.abs(dK.transpose(2, 4, 3, 1, 0).reshape(2, 4, -1, 16) - g.k).max() < 1e-5)
    True
    """
    given = _given(K, Q, mask, logsumexp, V, A, dA, dK, dQ, dV)
    call, arrays = call_on_arrays(given, GRADIENTS, (dtype, causal, window, first_query, first_key, scale))
    if call is not None:
        _run(call, arrays)


def flash_sdpa_bwd_async(
    K: Tile,
    Q: Tile,
    mask: Tile | None,
    logsumexp: Tile,
    V: Tile,
    A: Tile,
    dA: Tile,
    dK: Tile,
    dQ: Tile,
    dV: Tile,
    *,
    dtype: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    first_query: int = 0,
    first_key: int = 0,
    scale: float | None = None,
) -> int:
    """Submit `flash_sdpa_bwd` on tiles as StarPU tasks; returns how many, 0 if the computed mask hides every key.

    Arguments as there, tiles in place of arrays; dK, dQ and dV RW, in the order of submission, the others R. There are
    two tasks, and one for each gradient in 16 bits. Does not wait; `flashtile.starpu.wait` does, and raises what a task
    met, naming codelet, first_query and first_key.
    Raises: SpecError, UnavailableError.
    """
    from flashtile.engines.starpu import accumulated_gradients

    given = _given(K, Q, mask, logsumexp, V, A, dA, dK, dQ, dV)
    call, handles = call_on_tiles(given, GRADIENTS, (dtype, causal, window, first_query, first_key, scale))
    if call is None:
        return 0
    narrow = tuple(n for n in GRADIENTS if given[n].dtype.name != DTYPES[call.spec.dtype].accumulator)
    return accumulated_gradients.submit(call.spec, call.offset, call.mask, handles, narrow, (first_query, first_key))


def _given(K: Any, Q: Any, mask: Any, logsumexp: Any, V: Any, A: Any, dA: Any, dK: Any, dQ: Any, dV: Any) -> Any:
    given = {"K": K, "Q": Q, "V": V, "A": A, "logsumexp": logsumexp, "dA": dA, "dK": dK, "dQ": dQ, "dV": dV}
    return {**given, **({} if mask is None else {"mask": mask})}


WORDS = {
    "Q": "q",
    "K": "k",
    "V": "v",
    "dA": "do",
    "logsumexp": "lse",
    "mask": "mask",
    "dK": "dk",
    "dQ": "dq",
    "dV": "dv",
}


def _run(call: Call, arrays: dict[str, np.ndarray]) -> None:
    """Compute on the embedded engine's threads."""
    spec, kernels = call.spec, tile_kernels().differentiating(call.spec, call.mask)
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    delta = np.empty((spec.heads, spec.q_len), real)
    at = {name: address_of(x) for name, x in arrays.items()}
    _compute(call, kernels["delta"], 0, do=at["dA"], o=at["A"], lse=at["logsumexp"], delta=address_of(delta))
    sums = {n: np.zeros(x.size, real) for n, x in arrays.items() if n in GRADIENTS and x.dtype != real}
    words = {WORDS[n]: a for n, a in (at | {n: address_of(x) for n, x in sums.items()}).items() if n in WORDS}
    times, over = TIMES_FORWARD
    flops = flops_of(spec) * times // over
    _compute(call, kernels["backward"], flops, offset=call.offset, delta=address_of(delta), **words)
    for name, x in sums.items():
        kernel = kernels[f"add_{arrays[name].shape[0]}"]
        _compute(call, kernel, 0, x.size // arrays[name].shape[0], parts=address_of(x), dq=at[name])


def _compute(call: Call, kernel: TileKernel, flops: int, rows: int = 0, **words: int) -> None:
    block = kernel.filled(**words)
    plan = Plan(1, rows or kernel.items, 1, 1, 1, max(1, call.spec.kv_len), flops)
    direct.prepare(plan, Native(kernel))(address_of(block))
