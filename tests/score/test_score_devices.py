"""Captured arrays on a GPU: their shapes count, their values are never read here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import DeviceArray

from flashtile.arrays import contiguous
from flashtile.errors import SpecError
from flashtile.score.capture import Place, capture
from flashtile.score.coverage import FULL, PARTIAL, coverage
from flashtile.score.options import ScoreOptions
from flashtile.score.program import Program
from flashtile.spec import AttentionSpec

pytestmark = pytest.mark.core

SHAPE = (2, 3, 64, 64)


def on_device(array: Any, device: int = 0) -> DeviceArray:
    return DeviceArray(np.asarray(array), device)


def spec_on(device: str) -> AttentionSpec:
    view = contiguous((2, 3, 64, 8), "float32", device)
    return AttentionSpec.of(view, view, view, align="top_left")


def test_a_place_instead_of_values() -> None:
    array = np.arange(12, dtype=np.float16).reshape(3, 4)[:, ::2]
    found = capture(on_device(array, 1), "bias")
    assert found.place == Place("cuda:1", array.ctypes.data, (8, 4)) and found.device == "cuda:1"
    assert (found.element, found.array.shape, found.array.any()) == ("f16", (3, 2), False)
    assert capture(array).device == "cpu"
    with pytest.raises(SpecError, match="^mask: got dtype complex64"):
        capture(on_device(np.zeros(2, np.complex64)), "mask")


def same_document(ids: Any) -> Program:
    return Program.of(SHAPE, mask=lambda b, h, i, j: ids[i] == ids[j])


def test_coverage_knows_nothing_of_them() -> None:
    documents = np.repeat([0, 1], 32)
    here, there = (same_document(ids) for ids in (documents, on_device(documents)))
    assert set(coverage(here, 32, 32).kind) == {FULL} and set(coverage(there, 32, 32).kind) == {PARTIAL}
    assert here.code == there.code, "one kernel for both"


def test_only_certain_errors_are_errors() -> None:
    """The zeros that stand for values on a device must not decide what is out of bounds."""
    table, index = np.ones(64, np.float32), on_device(np.ones(64, np.int32))
    Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s + table[index[j] - 1])
    Program.of(SHAPE, score_mod=lambda s, b, h, i, j: np.where(index[j] > 0, s, s + table[j - 64]))
    Program.of(SHAPE, mask=lambda b, h, i, j: index[j] > 0, score_mod=lambda s, b, h, i, j: s + table[j])
    short = on_device(np.ones(10, np.float32))
    with pytest.raises(SpecError, match="expected one within its shape"):
        Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s + short[j])


def test_options_lie_where_q_lies_or_on_the_cpu() -> None:
    bias, slopes = on_device(np.ones((64, 64), np.float32)), on_device(np.ones(3, np.float32))
    for options in (ScoreOptions(bias=bias, alibi_slopes=slopes), ScoreOptions(bias=np.ones((64, 64), np.float32))):
        spec, scoring = options.scoring(spec_on("cuda:0"), False, None, 0)
        assert spec.program is not None and scoring.program is not None
    for device in ("cpu", "cuda:1"):
        for name, array in (("bias", bias), ("alibi_slopes", slopes)):
            with pytest.raises(SpecError, match=f"^{name}: got an array on cuda:0, expected one in CPU memory"):
                ScoreOptions(**{name: array}).scoring(spec_on(device), False, None, 0)
