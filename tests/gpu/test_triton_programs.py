"""Score programs through Triton's compiler: what the interpreter takes, a GPU's compiler has to take as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.specialisation import Memory, Tile
from flashtile.score import Program
from flashtile.score.expr import postorder
from flashtile.score.operations import OPERATIONS
from flashtile.spec import AttentionSpec

SIZES = (2, 8, 8, 8)
INTEGERS = np.array([2**31 - 1, -(2**31), 2**30, -5, -1, 0, 1, 7], np.int32)
BOOLS, HALVES, DOUBLES = np.zeros((2, 8), bool), np.zeros((8, 8), np.float16), np.zeros((8, 8))
BFLOATS = torch.zeros(8, dtype=torch.bfloat16)
FACTOR, NUMBER = 0.3, 7


def every_kind(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """A score function that uses every node kind that a kernel may meet."""
    m, n = INTEGERS[i], INTEGERS[j]
    whole = m // n + m % n - (m << (n % 40 - 4)) + (m >> (n % 40 - 4)) + abs(-m) + ((m & n) ^ (~m | 12))
    whole = whole + np.minimum(m, j) + np.maximum(n, NUMBER) + (s * 1e9).astype(np.int32)
    real = s.exp() + s.exp2() + s.log() + s.log2() + s.tanh() + s.sigmoid() + s.sqrt() + np.floor(s * 1.25)
    real = real + s % 0.75 + s // 0.5 - abs(-s) / FACTOR + DOUBLES[i, j] + BFLOATS[j]
    real = real + np.where(BOOLS[b, (i + 3) % 8], np.minimum(s, 1.0), np.maximum(s, HALVES[i, j]))
    real = np.where((s < 1) | ((s <= 2) & (s != s)) ^ (s == 3), real, whole * 0.5) + (i > j) * 1.5
    return real + np.where(m.astype(bool), s, -s)


PROGRAM = Program.of(SIZES, score_mod=every_kind, mask=lambda b, h, i, j: (j <= i) | BOOLS[b, j])
SPEC = AttentionSpec(2, 8, 8, 8, 8, 16, 16, "float32", "ieee", None, 0, 1.0, program=PROGRAM.code)


def test_the_program_uses_every_kind() -> None:
    used = {x.operation.name for x in postorder(PROGRAM.roots)}
    assert set(OPERATIONS) - used == {"inside"}  # which gradients alone ask for


@pytest.mark.parametrize(
    ("storage", "arch"),
    [
        ("float32", "sm_90"),
        pytest.param("float64", "sm_80", marks=pytest.mark.slow),
        pytest.param("bfloat16", "sm_100", marks=pytest.mark.slow),
        pytest.param("float16", "gfx942", marks=pytest.mark.slow),
    ],
)
def test_every_kind_compiles(storage: str, arch: str) -> None:
    kernel = special.forward(replace(SPEC, dtype=storage), Tile(32, 32))
    assert kernel.code == PROGRAM.code
    assert compiled(kernel, arch).metadata.name == "forward"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_variant_compiles(arch: str) -> None:
    """Packed, in parts, carried, with arrays that lie anyhow; the stages of the baseline."""
    spec, tile = replace(SPEC, dtype="float16", sinks=True), Tile(32, 32)
    for memory in (Memory(False, False), Memory(True, True)):
        for state in special.STATES:
            compiled(special.forward(spec, tile, state=state, packed=True, contain=True, memory=memory), arch)
        compiled(special.merge(spec, tile, memory=memory), arch)
        compiled(special.scores(spec, tile, memory=memory), arch)
        compiled(special.output(spec, tile, memory=memory), arch)
    compiled(special.softmax(spec, tile), arch)


def test_masks_that_multiply_floats_are_not_fused() -> None:
    """A product and a sum rounded at once could put an element on another side than its tile."""

    def kernel(mask: Any) -> special.Specialisation:
        return special.forward(replace(SPEC, program=Program.of(SIZES, mask=mask).code), Tile(32, 32))

    assert kernel(lambda b, h, i, j: 3 * j <= i + 7).fuses
    assert special.forward(replace(SPEC, program=None), Tile(32, 32)).fuses
    product = kernel(lambda b, h, i, j: 0.3 * j <= i + 0.7)
    assert not product.fuses
    assert not compiled(product, "sm_90").metadata.enable_fp_fusion
