"""Tiles of K and V by tensor descriptors, under Triton's interpreter by the accuracy rule, and plain loads where a
descriptor cannot say how the arrays lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from launching import attend, check

from flashtile.kernels.triton import jit
from flashtile.kernels.triton.specialisation import Tile

DESCRIBED = Tile(16, 16, described=True)
RNG = np.random.default_rng(5)


def aligned(*shape: int) -> np.ndarray:
    """float16, at a multiple of 16 bytes, as on a device."""
    memory = np.zeros(int(np.prod(shape)) + 8, np.float16)
    start = -memory.ctypes.data % 16 // 2
    found = memory[start : start + int(np.prod(shape))].reshape(shape)
    found[:] = RNG.standard_normal(shape)
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every forward kernel that is launched, whether it has descriptors."""
    seen: list[bool] = []
    constants = jit.constants

    def spy(specialisation: Any) -> Any:
        found = constants(specialisation)
        if "DESCRIBED" in found:
            seen.append(found["DESCRIBED"])
        return found

    monkeypatch.setattr(jit, "constants", spy)
    return seen


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((32, 16), {}),
        ((16, 32), {"causal": True, "align": 20}),
        ((32, 32), {"window": (9, 4), "align": 3}),
        ((32, 32), {"mask": lambda b, h, i, j: (i + j) % 3 > 0, "parts": 2}),
    ],
)
def test_descriptors_cut_out_the_same_tiles(
    sizes: tuple[int, int], options: dict[str, Any], launched: list[bool]
) -> None:
    """Ragged lengths, and D and D_v of which one alone fills its power of two."""
    q, k, v = aligned(2, 2, 21, sizes[0]), aligned(2, 1, 40, sizes[0]), aligned(2, 1, 40, sizes[1])
    by_descriptor = attend(q, k, v, tile=DESCRIBED, **options)
    assert launched == [True, False], "the second launch reads as ever"
    options.pop("parts", None)
    check(by_descriptor, q, k, v, **options)


def test_what_a_descriptor_cannot_say_is_loaded_plainly(launched: list[bool]) -> None:
    q, k, v = aligned(1, 2, 21, 32), aligned(1, 2, 40, 32), aligned(1, 2, 40, 32)
    for other in (
        k[:, :, ::-1],  # backwards
        np.broadcast_to(k[:, :, :1], k.shape),  # one row for all
        aligned(1, 2, 40, 64)[..., ::2],  # gaps between elements
        np.concatenate([k[..., :8].ravel(), k.ravel()])[4 : 4 + k.size].reshape(k.shape),  # not aligned
    ):
        del launched[:]
        check(attend(q, other, v, tile=DESCRIBED), q, other, v)
        assert launched == [False, False]
