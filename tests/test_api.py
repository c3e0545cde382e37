"""flashtile.attention on NumPy arrays: ranks, arrays of every kind, options, empty sizes and the call cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import plain
import pytest
from inputs import Shape, numpy_dtype, same_bits, uniform

import flashtile
from flashtile import calls
from flashtile.arrays import _ask_address, address_of

pytestmark = pytest.mark.core

TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


def close(got: Any, want: np.ndarray, name: str = "float32") -> None:
    assert got.shape == want.shape
    got = np.asarray(got).astype(np.float64)
    assert np.isfinite(got).all() or np.isneginf(want).any()
    np.testing.assert_allclose(got, want, rtol=TOLERANCE[name], atol=TOLERANCE[name])


def test_every_dtype_and_rank(kernel: Any, dtype: str) -> None:
    q, k, v = uniform(Shape(2, 4, 2, 9, 13, 8, 5), dtype)
    for index in ((), (1,), (1, 1)):
        parts = [x[index] for x in (q, k, v)]
        o, lse = kernel(*parts, return_lse=True)
        want_o, want_lse = plain.attend(*parts)
        assert o.dtype == numpy_dtype(dtype) and lse.dtype == (np.float64 if dtype == "float64" else np.float32)
        close(o, want_o, dtype)
        close(lse, want_lse, dtype)
        assert same_bits(kernel(*parts), o)


@pytest.mark.parametrize(("align", "offset"), [("top_left", 0), ("bottom_right", 8), (3, 3), (-2, -2)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, (4, 1)), (True, (2, -1)), (False, [None, 2])])
def test_positional_rules(kernel: Any, causal: bool, window: Any, align: Any, offset: int) -> None:
    q, k, v = uniform(Shape(1, 2, 2, 12, 20), "float32")
    left, right = window or (None, None)
    visible = plain.seen(12, 20, offset, None if left == -1 else left, 0 if causal else right)
    o, lse = kernel(q, k, v, causal=causal, window=window, align=align, return_lse=True)
    want_o, want_lse = plain.attend(q, k, v, visible)
    close(o, want_o)
    close(lse, want_lse)
    assert (o[:, :, ~visible.any(axis=1)] == 0).all()


@pytest.mark.parametrize("given", [np.array([0, -3, 9]), [0, -3, 9], np.array([0, 99, -3, 99, 9], np.int16)[::2]])
def test_an_offset_for_each_batch(kernel: Any, given: Any) -> None:
    q, k, v = uniform(Shape(3, 2, 2, 6, 10), "float32")
    visible = np.stack([plain.seen(6, 10, offset, None, 0) for offset in np.asarray(given).tolist()])[:, None]
    close(kernel(q, k, v, causal=True, align=given), plain.attend(q, k, v, visible)[0])
    close(kernel(q, k, v, align=given), plain.attend(q, k, v)[0])
    # The values are read at every call, though the call is prepared once.
    prepared = len(calls.cache)
    close(kernel(q, k, v, causal=True, align=np.full(3, 100)), plain.attend(q, k, v)[0])
    assert len(calls.cache) == prepared


@pytest.mark.parametrize("scale", [0.3, -2, 0, np.float32(0.125)])
def test_scale(kernel: Any, scale: Any) -> None:
    q, k, v = uniform(Shape(), "float32")
    close(kernel(q, k, v, scale=scale), plain.attend(q, k, v, scale=float(scale))[0])


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_precision_may_be_asked_for(kernel: Any, precision: str) -> None:
    q, k, v = uniform(Shape(), "float32")
    o = kernel(q, k, v, precision=precision)
    assert o.dtype == np.float32
    np.testing.assert_allclose(o, plain.attend(q, k, v)[0], atol=3e-2)


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 0, 0), (2, 0, 0)])
def test_empty_sizes(kernel: Any, dtype: str, batch: int, q_len: int, kv_len: int) -> None:
    q, k, v = uniform(Shape(batch, 2, 1, q_len, kv_len, 8, 3), dtype)
    o, lse = kernel(q, k, v, return_lse=True)
    assert o.shape == (batch, 2, q_len, 3) and lse.shape == (batch, 2, q_len)
    assert o.dtype == q.dtype and (o == 0).all() and (kv_len > 0 or np.isneginf(lse).all())
    out = np.full_like(o, 7)
    assert kernel(q, k, v, out=out) is out and (out == 0).all()


def test_out_of_any_strides(kernel: Any, dtype: str) -> None:
    q, k, v = uniform(Shape(2, 2, 2, 9, 9, 8, 5), dtype)
    want = kernel(q, k, v)
    room = np.full((9, 2, 2, 12), 7, q.dtype)
    out = room.transpose(1, 2, 0, 3)[:, ::-1, :, 10:0:-2]
    assert kernel(q, k, v, out=out) is out and same_bits(np.ascontiguousarray(out), want)
    o, lse = kernel(q, k, v, out=out, return_lse=True)
    assert o is out and lse.shape == (2, 2, 9)
    assert (room[..., 1::2] == 7).all() and (room[..., 0] == 7).all(), "nothing else may be written"


def test_inputs_of_any_place(kernel: Any, dtype: str) -> None:
    q, k, v = uniform(Shape(2, 3, 3, 9, 9), dtype)
    want = kernel(q, k, v)

    def misplaced(x: np.ndarray) -> np.ndarray:
        raw = np.zeros(x.nbytes + 1, np.uint8)
        moved = raw[1:].view(x.dtype).reshape(x.shape)
        moved[...] = x
        return moved

    places: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: np.ascontiguousarray(x.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2),
        lambda x: np.ascontiguousarray(x[:, ::-1, ::-1, ::-1])[:, ::-1, ::-1, ::-1],
        lambda x: np.repeat(np.repeat(x, 2, axis=3), 3, axis=2)[:, :, ::3, ::2],
        misplaced,
    ]
    for place in places:
        np.testing.assert_allclose(
            kernel(place(q), place(k), place(v)).astype(np.float64), want.astype(np.float64), atol=TOLERANCE[dtype]
        )
    same = np.broadcast_to(q[:1, :1], q.shape)
    np.testing.assert_allclose(
        kernel(same, k, v).astype(np.float64), kernel(same.copy(), k, v).astype(np.float64), atol=TOLERANCE[dtype]
    )


def test_read_only_inputs_stay_as_they_are(kernel: Any) -> None:
    arrays = uniform(Shape(), "float32")
    copies = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    kernel(*arrays, causal=True)
    assert all(same_bits(x, copy) for x, copy in zip(arrays, copies, strict=True))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_subclasses_of_ndarray(tmp_path: Any) -> None:
    q, k, v = (x[0, 0] for x in uniform(Shape(), "float32"))
    want = flashtile.attention(q, k, v)
    o = flashtile.attention(np.asmatrix(q), k, v)
    assert type(o) is np.ndarray and same_bits(o, want)
    for name, x in (("q", q), ("k", k), ("v", v)):
        np.save(tmp_path / name, x)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "qkv"]
    out = np.lib.format.open_memmap(tmp_path / "o.npy", "w+", q.dtype, q.shape)
    assert flashtile.attention(*mapped, out=out) is out and same_bits(np.asarray(out), want)


def test_progress_ends_complete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = uniform(Shape(1, 2, 2, 40, 40), "float32")
    seen: list[tuple[int, int]] = []
    want = flashtile.attention(q, k, v)
    assert same_bits(flashtile.attention(q, k, v, progress=lambda *step: seen.append(step)), want)
    assert seen and seen[-1][0] == seen[-1][1] > 0
    assert same_bits(flashtile.attention(q, k, v, progress=False), want)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # as if it were not installed
    assert same_bits(flashtile.attention(q, k, v, progress=True), want)
    assert capsys.readouterr().err.endswith("[" + "#" * 40 + "] 100%\n")


def test_progress_bar_of_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    q, k, v = uniform(Shape(1, 2, 2, 40, 40), "float32")
    flashtile.attention(q, k, v, progress=True)
    assert "attention: 100%" in capsys.readouterr().err


def test_a_repeated_call_is_prepared_once() -> None:
    flashtile.api.clear_cache()
    q, k, v = uniform(Shape(), "float32")
    variants: list[dict[str, Any]] = [
        {},
        {"causal": True},
        {"window": (1, 0)},
        {"scale": 0.5},
        {"precision": "bf16"},
        {"kernel": "reference"},
        {"align": 2, "causal": True},
    ]
    for _ in range(2):
        for n, options in enumerate(variants, 1):
            flashtile.attention(q, k, v, **options)
            assert len(calls.cache) in (n, len(variants))
    flashtile.attention(q, k, v, window=[1, 0], return_lse=True)  # a list is as good, and lse is not part of it
    assert len(calls.cache) == len(variants)
    flashtile.attention(q[:, :, ::2], k, v)
    assert len(calls.cache) == len(variants) + 1


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    flashtile.api.clear_cache()
    monkeypatch.setattr(calls.prepared, "CACHE_ENTRIES", 4)
    q = np.ones((3, 8), np.float32)
    for n in range(1, 12):
        close(flashtile.attention(q, q, q, scale=n, kernel="vanilla"), q.astype(np.float64))
        assert len(calls.cache) <= 4


def test_the_package_lists_its_public_names() -> None:
    assert set(dir(flashtile)) == {*flashtile.__all__, "__version__", "__doc__"}
    assert all(hasattr(flashtile, name) for name in dir(flashtile) if name != "plot_coverage")


def test_addresses_are_what_numpy_says() -> None:
    for x in (np.arange(6.0)[2:], np.zeros((0, 3)), np.ones((2, 2), ml_dtypes.bfloat16).T, np.array(1.0)):
        assert address_of(x) == _ask_address(x) == x.__array_interface__["data"][0]


def test_threads_by_default_by_variable_and_by_call(threads: Callable[[int], None]) -> None:
    threads(5)
    assert flashtile.get_num_threads() == 5
    code = "import flashtile; print(flashtile.get_num_threads())"
    for value, expected in (("3", "3"), ("", None)):
        done = subprocess.run([sys.executable, "-c", code], env=_environment(value), capture_output=True, text=True)
        assert done.stdout.strip() == (expected or _affinity()), done.stderr
    done = subprocess.run([sys.executable, "-c", code], env=_environment("many"), capture_output=True, text=True)
    assert "SpecError: FLASHTILE_NUM_THREADS: got 'many', expected an integer from 1 to 4096" in done.stderr


def _environment(value: str) -> dict[str, str]:
    return {**os.environ, "FLASHTILE_NUM_THREADS": value}


def _affinity() -> str:
    return str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


@pytest.mark.parametrize("off", [None, 0, 0.0, np.float32(0), np.int64(0)])
def test_a_softcap_of_zero_is_none(off: Any) -> None:
    q = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
    assert (flashtile.attention(q, q, q, softcap=off) == flashtile.attention(q, q, q)).all()
