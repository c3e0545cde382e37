"""The door for NNTile: flash attention on Fortran-ordered tiles, one key tile a call::

    A, logsumexp = zeros, minus infinity
    for K, V, mask in key tiles:
        nntile.flash_sdpa_fwd(K, Q, mask, logsumexp, V, A)
    dQ = zeros                                                # and dK, dV of every key tile
    for K, V, mask, dK, dV in key tiles:
        nntile.flash_sdpa_bwd(K, Q, mask, logsumexp, V, A, dA, dK, dQ, dV)

Shapes are NNTile's, in Fortran order: Q and A [head_size, n_seq, n_batch, kv_group_size, n_head_kv], K and V the same
with their own n_seq, mask [n_seq of K, n_seq of Q], logsumexp [n_seq of Q, n_batch, kv_group_size, n_head_kv].

These compute on NumPy arrays before they return. `flash_sdpa_fwd_async` and `flash_sdpa_bwd_async` submit StarPU tasks
on tiles, in the order of NNTile's arguments; `flashtile.starpu` starts StarPU and waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashtile.arrays import address_of
from flashtile.engines import direct
from flashtile.kernels import tile_kernels
from flashtile.kernels.tiles import Native
from flashtile.nntile.backward import flash_sdpa_bwd, flash_sdpa_bwd_async
from flashtile.nntile.tiles import (
    DTYPE_NAMES,
    STATE,
    Call,
    Tile,
    call_on_arrays,
    call_on_tiles,
    empty,
    register,
    wrap,
)
from flashtile.plan import Plan
from flashtile.plan.tiling import flops_of

__all__ = [
    "DTYPE_NAMES",
    "Tile",
    "empty",
    "flash_sdpa_bwd",
    "flash_sdpa_bwd_async",
    "flash_sdpa_fwd",
    "flash_sdpa_fwd_async",
    "register",
    "wrap",
]
__dir__ = __all__.copy  # the public names, and not what stands beside them


def flash_sdpa_fwd(
    K: Any,
    Q: Any,
    mask: Any,
    logsumexp: Any,
    V: Any,
    A: Any,
    *,
    dtype: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    first_query: int = 0,
    first_key: int = 0,
    scale: float | None = None,
) -> None:
    """Add one key tile to (A, logsumexp), which hold the state of earlier ones: at first 0 and -inf.

    Shapes:   Fortran-ordered arrays; K, V [head_size, n_keys, n_batch, kv_group_size, n_head_kv]; Q, A the same with
              n_queries; mask [n_keys, n_queries] or None; logsumexp [n_queries, n_batch, kv_group_size, n_head_kv] in
              float32 (float64 for float64). n_keys and n_queries may differ, and so may the head size of V and A.
              mask in the dtype of Q, or float32, is added to the scores (0 shows, -inf hides); a bool mask shows what
              is True.
    Options:  dtype      one of NNTile's names, DTYPE_NAMES, if it is not the arrays' own: "fp32_fast_tf32",
                         "fp32_fast_fp16" and "fp32_fast_bf16" say how the products of float32 arrays may be rounded.
              causal, window  computed masks, as in `flashtile.attention`, between query first_query + i and key
                         first_key + j; they join a stored one.
              scale      by default 1 / sqrt(head_size).
    Numerics: sums in float32 (float64 for float64). In 16 bits A is rounded to nearest once a call: after n key tiles
              it is off by at most n x 0.5 ulp (of the largest element of A on the way, by size) from a sum that was
              kept in float32.
    Raises:   SpecError before memory is touched; KernelError.
    Source:   NNTile's flash_sdpa_fwd; Milakov and Gimelshein 2018 for the state.

    >>> from flashtile import nntile
    >>> rng = np.random.default_rng(0)
    >>> Q, K, V = (np.asfortranarray(rng.standard_normal((64, n, 2, 1, 4), np.float32)) for n in (128, 256, 256))
    >>> A, logsumexp = np.zeros_like(Q), np.full((128, 2, 1, 4), -np.inf, np.float32, order="F")
    >>> for at in (0, 128):
    ...     k, v = (np.asfortranarray(x[:, at : at + 128]) for x in (K, V))
    ...     nntile.flash_sdpa_fwd(k, Q, None, logsumexp, v, A)
    >>> rows = [x.transpose(2, 4, 3, 1, 0).reshape(2, 4, -1, 64) for x in (Q, K, V)]
    >>> bool(np.abs(A.transpose(2, 4, 3, 1, 0).reshape(2, 4, -1, 64) - flashtile.attention(*rows)).max() < 1e-6)
    True
    """
    given = {"K": K, "Q": Q, "V": V, "A": A, "logsumexp": logsumexp, **({} if mask is None else {"mask": mask})}
    call, arrays = call_on_arrays(given, STATE, (dtype, causal, window, first_query, first_key, scale))
    if call is not None:
        _run(call, arrays)


def flash_sdpa_fwd_async(
    K: Tile,
    Q: Tile,
    mask: Tile | None,
    logsumexp: Tile,
    V: Tile,
    A: Tile,
    *,
    dtype: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    first_query: int = 0,
    first_key: int = 0,
    scale: float | None = None,
    accumulate: str = "ordered",
) -> int:
    """Submit `flash_sdpa_fwd` on tiles as one task; returns 1, or 0 if the computed mask hides every key.

    Arguments as there, tiles in place of arrays. accumulate "commute" lets StarPU take the calls on one A in any order
    (STARPU_COMMUTE): the bits may then differ from run to run. Does not wait; `flashtile.starpu.wait` does, and raises
    what a task met, naming codelet, first_query and first_key.
    Raises: SpecError, UnavailableError.
    """
    from flashtile.engines.starpu import accumulation

    given = {"K": K, "Q": Q, "V": V, "A": A, "logsumexp": logsumexp, **({} if mask is None else {"mask": mask})}
    call, handles = call_on_tiles(given, STATE, (dtype, causal, window, first_query, first_key, scale))
    if call is None:
        return 0
    return accumulation.submit(call.spec, call.offset, call.mask, handles, (first_query, first_key), accumulate)


def _run(call: Call, arrays: dict[str, np.ndarray]) -> None:
    """Compute on the embedded engine's threads."""
    kernel = tile_kernels().accumulating(call.spec, call.mask)
    words = {"Q": "q", "K": "k", "V": "v", "A": "o", "logsumexp": "lse", "mask": "mask"}
    block = kernel.filled(offset=call.offset, **{words[name]: address_of(x) for name, x in arrays.items()})
    query_tiles = kernel.items // call.spec.heads
    plan = Plan(1, call.spec.heads, query_tiles, 1, 1, call.spec.kv_len, flops_of(call.spec))
    direct.prepare(plan, Native(kernel))(address_of(block))
