"""Attention by StarPU's CUDA workers: what the run on hardware computes, and which kernels that takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flashtile.kernels.triton.aot import Chosen


def attention(rows: int) -> None:
    """Output, lse and gradients by tasks. Raises: AssertionError where they are beyond the accuracy rule."""
    import flashtile
    from flashtile.testing import assert_gradients_accurate, expect

    rng = np.random.default_rng(0)
    do, q, k, v = (rng.standard_normal((1, 4, rows, 64)).astype("float32") for _ in range(4))
    o, lse = flashtile.attention(q, k, v, causal=True, engine="starpu", return_lse=True)
    found = flashtile.attention_backward(do, q, k, v, o, lse, causal=True, engine="starpu")
    for got, right, name in zip((o, lse), expect(q, k, v, causal=True), ("output", "lse"), strict=True):
        right.check(got, name)
    assert_gradients_accurate(found, do, q, k, v, causal=True)


def kernels(arch: str) -> Iterator[Chosen]:
    """Those that `attention` launches."""
    from flashtile.kernels.triton import aot

    states = ["partial", "carried"]
    chosen = aot.choose(arch, ["float32"], [64], kernels=["forward", "backward"], states=states, bands=["causal"])
    return (one for one in chosen if not one.name.startswith(("add_parts", "backward")) or "carried" in one.name)
