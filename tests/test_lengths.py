"""A call at a new length: what was prepared for another one serves it, and nothing of the other one stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, same_bits, uniform

import flashtile
from flashtile import calls, kernels
from flashtile.calls import prepared
from flashtile.errors import SpecError
from flashtile.plan.tiling import ENOUGH_ITEMS
from flashtile.score import padding

pytestmark = pytest.mark.core


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of keys that kernels were compiled for, one after the other."""
    found: list[int] = []
    honest = prepared.family_of

    def counting(*given: Any) -> Any:
        family = honest(*given)
        return replace(family, compile=lambda spec, *rest: found.append(spec.kv_len) or family.compile(spec, *rest))

    monkeypatch.setattr(prepared, "family_of", counting)
    calls.clear_cache()
    yield found
    calls.clear_cache()


@pytest.mark.parametrize(("window", "step"), [((7, 0), 1), (None, 40)], ids=["window", "dense"])
def test_ten_thousand_lengths_prepare_a_handful_of_calls(bound: list[int], window: Any, step: int) -> None:
    """With scores of 0 the output is the mean of the values that are seen: of the last, wherever they lie. Few of the
    lengths where each of them reads all of the keys."""
    most = 10_000
    q, cache = np.zeros((1, 2, 1, 4), np.float32), np.empty((1, 1, most, 4), np.float32)
    cache[...] = np.arange(most)[:, None]
    for n in range(1, most + 1, step):
        v = cache[:, :, :n] if n // step % 2 else cache[:, :, :n].copy()
        o = flashtile.attention(q, v, v, window=window, align="bottom_right")
        np.testing.assert_allclose(o, n - (1 + min(n, 8 if window else n)) / 2, rtol=1e-5)
    assert len(bound) <= (1 if window else ENOUGH_ITEMS)  # one for each number of parts that keys are cut into
    assert len(calls.cache) <= calls.CACHE_ENTRIES


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "dense": lambda n: {},
    "scale": lambda n: {"scale": -0.5},
    "causal": lambda n: {"causal": True, "align": "bottom_right"},
    "window": lambda n: {"window": (40, 3), "align": 17},
    "offsets": lambda n: {"causal": True, "align": np.array([n // 2, n - 1])},
    "padding": lambda n: {"mask": padding([n, n // 2])},
    "scores": lambda n: {"softcap": 2.0, "alibi_slopes": np.arange(4) / 8, "sinks": np.arange(4.0), "align": n - 1},
    "stored": lambda n: {"mask": np.arange(n) % 3 > 0, "bias": np.linspace(-1, 1, n, dtype=np.float32)},
}
COMPILED = {"bfloat16": "padding", "float32": "scores", "float64": "stored"}  # for one dtype each, since they compile
LENGTHS = 1399, 1, 2, 0, 1040, 30, 1400, 31, 33


def test_lengths_in_turns_are_what_each_would_be_alone(kernel: Any, dtype: str) -> None:
    """Over lengths where keys begin to be split, rows begin to be few, and the cache has other strides."""
    q, k, v = uniform(Shape(1, 4, 2, 2, 1400, 16), dtype)

    def at(n: int, name: str) -> np.ndarray:
        return kernel(q, *(LAYOUTS[n % 2](x, n) for x in (k, v)), return_lse=True, **OPTIONS[name](n))[0]

    steps = [(n, name) for n in LENGTHS for name in ("dense", "scale", "causal", "window")]
    calls.clear_cache()
    grown = [at(*step) for step in steps]
    for step, o in zip(steps, grown, strict=True):
        calls.clear_cache()
        assert same_bits(at(*step), o), step


# How the first n of more keys, or a copy of them, may lie.
LAYOUTS: list[Callable[[np.ndarray, int], np.ndarray]] = [
    lambda x, n: np.ascontiguousarray(x[:, :, :n]),
    lambda x, n: x[:, :, :n],
    lambda x, n: np.ascontiguousarray(x[:, :, :n].swapaxes(1, 2)).swapaxes(1, 2),
    lambda x, n: np.ascontiguousarray(x[:, :, :n].swapaxes(2, 3)).swapaxes(2, 3),
    lambda x, n: x[:, :, n - 1 :: -1] if n else x[:, :, :0],
]


def test_no_field_of_another_call_stays(bound: list[int]) -> None:
    """Rows, lengths, options, strides and dtypes in a random order: the bits of every call are those of one alone."""
    rng = np.random.default_rng(0)
    arrays = {name: uniform(Shape(2, 4, 2, 40, 1400, 16, 24), name) for name in COMPILED}
    outs = {name: np.empty((2, 4, 40, 24), numpy_dtype(name)) for name in arrays}

    def run(dtype: str, rows: int, name: str, n: int, layouts: tuple[int, int]) -> list[np.ndarray]:
        q, k, v = arrays[dtype]
        k, v = (LAYOUTS[x](y, n) for x, y in zip(layouts, (k, v), strict=True))
        out = outs[dtype][:, :, :rows] if name in ("causal", "scores") else None
        o, lse = flashtile.attention(q[:, :, :rows], k, v, return_lse=True, out=out, **OPTIONS[name](n))
        return [o.copy(), lse]

    both = [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in ("dense", "scale", "causal", "window", "offsets")
    ]
    alike = [(*x, rows) for x in (*both, *COMPILED.items()) for rows in (1, 40)]
    steps = [
        (dtype, rows, name, int(n), tuple(rng.integers(len(LAYOUTS), size=2)))
        for dtype, name, rows in alike
        for n in rng.choice(LENGTHS, 8)
    ]
    rng.shuffle(steps)  # type: ignore[arg-type]
    together = [run(*step) for step in steps]
    assert len(alike) <= len(bound) < len(steps) / 2
    for step, found in zip(steps, together, strict=True):
        calls.clear_cache()
        assert all(map(same_bits, run(*step), found)), step


def test_a_new_length_neither_picks_nor_lists_anything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes its scores."""
    q, cache = np.ones((1, 4, 1, 16), np.float32), np.ones((1, 2, 200, 16), np.float32)
    picked = []
    honest = kernels.pick
    monkeypatch.setattr(kernels, "pick", lambda *given: picked.append(given) or honest(*given))
    for name in ("dense", "causal", "scores"):
        calls.clear_cache()
        picked.clear()
        for n in range(1, 200):
            o = flashtile.attention(q, cache[:, :, :n], cache[:, :, :n], **OPTIONS[name](n))
            assert o.shape == q.shape
        assert len(picked) == 1


def test_a_new_length_is_validated() -> None:
    q, k = np.ones((1, 2, 5, 16), np.float32), np.ones((1, 2, 9, 16), np.float32)
    flashtile.attention(q, k[:, :, :5], k[:, :, :5], causal=True)
    slopes = np.array([0.1, 0.2])
    flashtile.attention(q, k[:, :, :5], k[:, :, :5], alibi_slopes=slopes)
    for rule in ({"causal": True}, {"alibi_slopes": slopes}):
        with pytest.raises(SpecError, match=r"align: got None with 5 queries and 6 keys"):
            flashtile.attention(q, k[:, :, :6], k[:, :, :6], **rule)
    with pytest.raises(SpecError, match=r"v: got length 6, expected 5 as in k"):
        flashtile.attention(q, k[:, :, :5], k[:, :, :6], causal=True)
    with pytest.raises(SpecError, match=r"window: got \(1, \[\]\)"):
        flashtile.attention(q, k[:, :, :5], k[:, :, :5], window=[1, []])


@pytest.mark.parametrize("rows", [1, 40])
def test_what_runs_without_python_is_of_its_own_keys(rows: int) -> None:
    """The memory that machine code of other libraries calls a kernel with."""
    q, cache = np.ones((1, 4, rows, 16), np.float32), np.ones((1, 2, 60, 16), np.float32)

    def memory(n: int) -> bytes:
        k = cache[:, :, :n].copy()
        flashtile.attention(q, k, k)
        call = next(call for call in calls.cache.values() if call.spec.kv_len == n)
        assert call.native is not None
        template = call.native.template(None)
        assert template is not None
        return template.memory

    calls.clear_cache()
    together = [memory(n) for n in (50, 51, 60)]
    assert len(set(together)) == 3
    for n, found in zip((50, 51, 60), together, strict=True):
        calls.clear_cache()
        assert memory(n) == found
