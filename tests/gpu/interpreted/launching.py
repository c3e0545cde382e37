"""Kernels launched under Triton's interpreter, past the family's own choice of tiles, parts and packing.

Whether Triton interprets is settled when it is first imported, and a process that interprets cannot compile: so these
tests run in a process of their own, `TRITON_INTERPRET=1 pytest tests/gpu/interpreted`, as scripts/test does.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETING:
    pytest.skip("run with TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

# ruff: noqa: E402
from flashtile.arrays import view_of
from flashtile.calls import Options, split_align
from flashtile.dtypes import DTYPES
from flashtile.kernels import Layout
from flashtile.kernels.triton.host import Forward
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.kernels.triton.specialisation import Tile
from flashtile.kernels.triton.vanilla_host import Vanilla
from flashtile.plan import Plan
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import AttentionSpec
from flashtile.testing import expect

SMALL = Tile(16, 16)


class Problem(NamedTuple):
    """A validated call: its spec, its run-time values, and its arrays; o and lse hold what must be overwritten."""

    spec: AttentionSpec
    scoring: Scoring
    layout: Layout
    offsets: np.ndarray | None
    arrays: tuple[np.ndarray, ...]  # q, k, v, o, lse

    @property
    def addresses(self) -> tuple[int, ...]:
        return (*(x.ctypes.data for x in self.arrays), 0 if self.offsets is None else self.offsets.ctypes.data)


def problem(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    window: Any = None,
    align: Any = None,
    scale: float | None = None,
    precision: str = "ieee",
    **scores: Any,
) -> Problem:
    """What `flashtile.attention` of the same arguments would compute."""
    align, offsets = (None, None) if align is None else split_align(align, q.shape)
    options = Options(causal, window, align, scale, precision, "triton", "auto")
    spec, scoring = options.scored(ScoreOptions(**scores), q, k, v, offsets)
    o = np.full((*q.shape[:3], v.shape[3]), 7, q.dtype)
    lse = np.full(q.shape[:3], 7, DTYPES[spec.dtype].accumulator)
    layout = Layout(*(view_of(x).strides4() for x in (q, k, v, o)))
    return Problem(spec, scoring, layout, offsets if spec.offset is None else None, (q, k, v, o, lse))


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    tile: Tile = SMALL,
    parts: int = 1,
    packed: bool = False,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """o and lse by the flash kernel, with these tiles, in so many parts of the keys, query heads packed or not."""
    p = problem(q, k, v, **options)
    spec = p.spec
    keys = 0 if parts == 1 else -(-spec.kv_len // (parts * tile.tile_k)) * tile.tile_k
    plan = Plan(
        batch=spec.batch,
        heads=spec.heads,
        query_tiles=1 if packed else -(-spec.q_len // tile.tile_q),
        splits=-(-spec.kv_len // keys) if keys else 1,
        tile_q=tile.tile_q,
        tile_k=tile.tile_k,
        flops=0,
        split_keys=keys,
        head_block=spec.group if packed else 1,
    )
    kernel = Forward(spec, plan, p.layout, tile, Interpreter())
    call = kernel.pack(*p.addresses, p.scoring)
    kernel.run(call, 0, plan.items, 0)
    return p.arrays[3], p.arrays[4]


def attend_unfused(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, tile: Tile = SMALL, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """o and lse by the three stages of the baseline."""
    p = problem(q, k, v, **options)
    plan = Plan(p.spec.batch, p.spec.heads, 1, 1, max(1, p.spec.q_len), max(1, p.spec.kv_len), 0)
    kernel = Vanilla(p.spec, plan, p.layout, tile, Interpreter())
    kernel.run(kernel.pack(*p.addresses, p.scoring), 0, plan.items, 0)
    return p.arrays[3], p.arrays[4]


def check(got: tuple[np.ndarray, np.ndarray], q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> None:
    """Output and lse by the accuracy rule."""
    for result, want, name in zip(got, expect(q, k, v, **options), ("output", "lse"), strict=True):
        want.check(result, name)
