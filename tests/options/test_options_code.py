"""What masks cost, seen in the generated code and in the segments that kernels walk; and what compiles anew."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from inputs import Shape, uniform

import flashtile
from flashtile.kernels import cpu
from flashtile.kernels.cpu import score_values
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.kernels.cpu.score_values import COVERAGE_KEYS
from flashtile.llvm import machines as isas
from flashtile.plan.segments import segments_of
from flashtile.score import EMPTY, causal, coverage, document, padding, prefix, window
from flashtile.score.program import Program
from flashtile.testing import expect

ISAS = [isa for isa in isas.known().values()]


def functions(isa: Any, **options: Any) -> dict[str, str]:
    """The body of each function of the forward kernel, by its name."""
    code = Program.of((2, 3, 64, 64), **options).code if options else None
    text = forward_text(Config(isa, "float", code=code))
    return {m[1]: m[2] for m in re.finditer(r"^define [^@]*@(\w+)\(.*?\{\n(.*?)^\}", text, re.M | re.S)}


def calls(body: str) -> set[str]:
    return set(re.findall(r"call \w+ @(\w+)\(", body))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_full_tiles_run_no_mask_code(isa: Any) -> None:
    """Of a mask alone: full tiles are the plain kernel's, and no pass follows them. With a score function: their pass
    is that of the score alone."""
    ids = np.zeros(64, np.int32)
    plain, masked = functions(isa), functions(isa, mask=document(ids))
    for n in range(1, isa.vectors + 1):
        assert masked[f"scores_{n}_full_0"] == plain[f"scores_{n}_full_0"]
        assert {name for name in calls(masked[f"panel_{n}"]) if "program" in name} == {f"program_{n}_edge"}
    capped, both = functions(isa, softcap=5.0), functions(isa, softcap=5.0, mask=document(ids))
    for n in range(1, isa.vectors + 1):
        full = f"program_{n}_full"
        assert both[full] == capped[full] and both[f"program_{n}_edge"] != capped[f"program_{n}_edge"]


MASKS: dict[str, Any] = {
    "documents": document(np.sort(np.random.default_rng(0).integers(0, 12, 1500))),
    "causal documents": causal() & document(np.repeat(np.arange(5), 300)),
    "window": window(100, 40),
    "padding": padding([777]),
    "prefix or window": prefix(70) | window(30, 0),
    "function": lambda b, h, i, j: (i // 200 == j // 200) | (j // 130 == 4),
}


@pytest.mark.parametrize("name", MASKS)
def test_empty_tiles_are_in_no_segment(name: str) -> None:
    """A key block none of whose tiles a panel sees is not walked; segments begin and end with tiles that it sees."""
    panel, block = 48, 128
    program = Program.of((1, 1, 1500, 1500), mask=MASKS[name])
    found = coverage(program, panel, COVERAGE_KEYS)
    tiles, segments = found.tiles()[0, 0], segments_of(found, block)
    assert (tiles == EMPTY).mean() > 0.3
    walked = np.zeros(tiles.shape, bool)
    for row in range(len(tiles)):
        for start, stop, *_ in segments.keys[segments.rows[row] : segments.rows[row + 1]]:
            first, last = start // COVERAGE_KEYS, -(-stop // COVERAGE_KEYS)
            assert tiles[row, first] != EMPTY and tiles[row, last - 1] != EMPTY
            walked[row, first:last] = True
    assert walked[tiles != EMPTY].all()
    per_block = block // COVERAGE_KEYS
    for first in range(0, tiles.shape[1], per_block):
        unseen = (tiles[:, first : first + per_block] == EMPTY).all(1)
        assert not walked[unseen, first : first + per_block].any()


SHAPE = Shape(1, 2, 2, 100, 100, 8, 8)


def test_other_values_of_the_same_structure_compile_nothing() -> None:
    """Closures over other numbers and other arrays, of other lengths and strides too; and the results are theirs."""

    def options(width: int, slope: float, ids: np.ndarray, cap: float, bias: np.ndarray) -> dict[str, Any]:
        return {
            "mask": lambda b, h, i, j: (i - j < width) & (ids[i] == ids[j]),
            "score_mod": lambda s, b, h, i, j: s - slope * abs(i - j),
            "softcap": cap,
            "bias": bias,
        }

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, 100)
    cases = [
        (SHAPE, options(7, 0.5, ids, 2.0, rng.normal(size=(100, 100)))),
        (SHAPE, options(40, 0.01, np.repeat(ids[::-1], 2)[::2], 30.0, rng.normal(size=(100, 100)).T)),
        (SHAPE._replace(q_len=70), options(20, 0.1, rng.integers(0, 2, 500), 5.0, rng.normal(size=(70, 100)))),
    ]
    compiled = []
    for shape, given in cases:
        inputs = uniform(shape, "float32")
        o = flashtile.attention(*inputs, kernel="cpu", **given)
        compiled.append(cpu.library_of.cache_info().misses)
        expect(*inputs, **given)[0].check(o)
    assert compiled[0] == compiled[1] == compiled[2]


def test_a_map_is_made_once_for_what_a_mask_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the layers of a model call with one mask: by its elements, wherever they lie; not where they are many."""
    made = []
    mapped = score_values._mapped
    monkeypatch.setattr(score_values, "_mapped", lambda *given: (made.append(given), mapped(*given))[1])
    monkeypatch.setattr(score_values, "_kept", {})
    inputs = uniform(SHAPE, "float32")
    ids = np.arange(100) // 30
    for given in (ids, ids.copy(), np.repeat(ids, 2)[::2], ids // 2):
        flashtile.attention(*inputs, mask=document(given), kernel="cpu")
    assert len(made) == 2
    monkeypatch.setattr(score_values, "KEPT_BYTES", 1)
    for _ in range(2):
        flashtile.attention(*inputs, mask=document(ids), kernel="cpu")
    assert len(made) == 4


def test_arrays_are_read_anew_at_every_call() -> None:
    """A mask over an array that changed in place is another mask: maps are kept by what they were made from."""
    inputs = uniform(SHAPE, "float32")
    ids, width = np.zeros(100, np.int64), np.array(200)
    before = flashtile.attention(*inputs, mask=document(ids), kernel="cpu")
    ids[50:] = 1
    after = flashtile.attention(*inputs, mask=document(ids), kernel="cpu")
    assert (before != after).any()
    expect(*inputs, mask=document(ids))[0].check(after)
    for value in (200, 3, 200):
        width[...] = value
        options: dict[str, Any] = {"mask": lambda b, h, i, j: i - j < width}
        expect(*inputs, **options)[0].check(flashtile.attention(*inputs, kernel="cpu", **options))
    for limit in (0.5, -0.0, 60.5):
        options = {"mask": lambda b, h, i, j, limit=limit: j * 1.0 >= limit}
        expect(*inputs, **options)[0].check(flashtile.attention(*inputs, kernel="cpu", **options))
