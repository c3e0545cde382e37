"""Dense masks and biases: every dtype, any strides, in place; the same bits for any number of threads; decode."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from kernel_cases import Kernel
from option_cases import SHAPE, SINKS, SLOPES, TOGETHER, coins, numbers

import flashtile
from flashtile.kernels.cpu import score_values
from flashtile.score import document, padding
from flashtile.score.options import ScoreOptions
from flashtile.spec import AttentionSpec
from flashtile.testing import assert_accurate, expect

FULL = (SHAPE.batch, SHAPE.heads, SHAPE.q_len, SHAPE.kv_len)


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same values of (B, H, S_q, S_kv) in memory of other strides."""
    spread = np.full((*x.shape[:2], 2 * x.shape[2], 3 * x.shape[3]), 7).astype(x.dtype)
    spread[:, :, ::2, ::3] = x
    return {
        "Fortran": np.asfortranarray(x),
        "keys outermost": np.ascontiguousarray(x.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0),
        "backwards": np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
        "spread": spread[:, :, ::2, ::3],
    }


@pytest.mark.parametrize("element", ["float16", "bfloat16", "float32", "float64", "bool"])
def test_dense_arrays_of_any_dtype_and_strides(kernel: Kernel, element: str) -> None:
    """The bits do not depend on how the array lies, nor on its dtype where its values are the same."""
    inputs = uniform(SHAPE, "float32")
    name = "mask" if element == "bool" else "bias"
    values = coins(*FULL) if element == "bool" else numbers(*FULL).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    stored = values.astype(ml_dtypes.bfloat16 if element == "bfloat16" else element)
    o, lse = kernel(*inputs, return_lse=True, **{name: values})
    want_o, want_lse = expect(*inputs, **{name: values})
    want_o.check(o)
    want_lse.check(lse)
    for layout, array in layouts(stored).items():
        assert same_bits(kernel(*inputs, **{name: array}), o), layout
    for axes in ((0,), (1,), (2,), (3,), (0, 1), (2, 3), (1, 2)):  # stride 0 against the same values written out
        row = stored[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))]
        whole = np.ascontiguousarray(np.broadcast_to(row, FULL))
        assert same_bits(kernel(*inputs, **{name: np.broadcast_to(row, FULL)}), kernel(*inputs, **{name: whole})), axes


def test_dense_arrays_are_read_where_they_lie() -> None:
    """The address and the strides that a kernel gets are the caller's own."""
    inputs = uniform(SHAPE, "float32")
    spec = AttentionSpec.of(*inputs)
    for option, array in (("bias", numbers(*FULL, dtype="float16")), ("mask", coins(*FULL))):
        for given in (array, array[..., ::-1, :], np.broadcast_to(array[:1, :, :1], FULL)):
            _, scoring = ScoreOptions(**{option: given}).scoring(spec, False, None, 0)
            assert scoring.program is not None
            (held,) = (x for x in scoring.program.captures if hasattr(x, "array"))
            assert held.array.ctypes.data == given.ctypes.data and held.array.strides == given.strides


@pytest.mark.parametrize("name", TOGETHER)
def test_number_of_threads_changes_no_bit(
    kernel: Kernel, dtype: str, name: str, threads: Callable[[int], None]
) -> None:
    inputs, options = uniform(SHAPE, dtype), TOGETHER[name](SHAPE)
    threads(1)
    o, lse = kernel(*inputs, return_lse=True, **options)
    for count in (2, 3):
        threads(count)
        again_o, again_lse = kernel(*inputs, return_lse=True, **options)
        assert same_bits(o, again_o) and same_bits(lse, again_lse), f"{count} threads"


DECODE: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "softcap and sinks": lambda s: {"softcap": 3.0, "sinks": SINKS[: s.heads]},
    "alibi": lambda s: {"alibi_slopes": SLOPES[: s.heads], "align": "bottom_right"},
    "bias": lambda s: {"bias": numbers(s.batch, 1, 1, s.kv_len)},
    "padding": lambda s: {"mask": padding([s.kv_len - 700, 1])},
    "documents": lambda s: {"mask": document(np.full(s.q_len, 3), np.arange(s.kv_len) // 400)},
    "function, window": lambda s: {
        "score_mod": lambda x, b, h, i, j: x * (1 + 0.1 * h),
        "mask": lambda b, h, i, j: j % 5 != i % 5,
        "window": (1500, 0),
        "align": "bottom_right",
    },
}


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("name", DECODE)
def test_few_queries_on_long_keys(kernel: Kernel, name: str, q_len: int) -> None:
    shape = Shape(2, 4, 2, q_len, 2300, 16, 8)
    inputs, options = uniform(shape, "bfloat16" if name == "padding" else "float32"), DECODE[name](shape)
    o, lse = kernel(*inputs, return_lse=True, **options)
    want_o, want_lse = expect(*inputs, **options)
    want_o.check(o)
    want_lse.check(lse)


@pytest.mark.parametrize("kv_len", [16, 32])
@pytest.mark.parametrize("stored", ["padding", "plane"])
def test_a_small_plane_is_not_mapped(stored: str, kv_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask is asked for every pair of query and key, and anew at every call."""
    monkeypatch.setattr(score_values, "_mapped", None)
    q, k, v = uniform(Shape(3, 4, 2, 20, kv_len, 16), "float32")
    mask = np.arange(kv_len) < np.array([kv_len - 5, 1, 0])[:, None, None, None]
    if stored == "plane":
        mask = np.ascontiguousarray(np.broadcast_to(mask, (3, 1, 20, kv_len)))
    for _ in range(2):
        assert_accurate(flashtile.attention(q, k, v, mask=mask, kernel="cpu"), q, k, v, mask=mask)
        mask = ~mask


_PEAK = """
import json, sys
import numpy as np
import flashtile
from flashtile.score import causal, document, prefix, relative, window

S = int(sys.argv[1])
rng = np.random.default_rng(0)
q, k, v, out = (rng.standard_normal((1, 2, S, 16), dtype=np.float32) for _ in "qkvo")
slopes, sinks = np.array([0.5, 0.1], np.float32), np.zeros(2, np.float32)
table, everything = rng.standard_normal((32, 2)), rng.standard_normal(S, dtype=np.float32)

def cases(n):
    ids, row = np.arange(n) // 500, everything[:n]
    return {
        "documents": {"mask": document(ids)},
        "composed": {"mask": causal() & document(ids) | prefix(40)},
        "by hand": {"mask": lambda b, h, i, j: ids[i] == ids[j], "score_mod": lambda s, b, h, i, j: s * row[j]},
        "cap, alibi, sinks, window": {"softcap": 5.0, "alibi_slopes": slopes, "sinks": sinks, "window": (700, 0)},
        "relative": {"score_mod": relative(table)},
        "stride 0": {"bias": np.broadcast_to(row, (1, 2, n, n)), "mask": np.broadcast_to(row > -1, (n, n))},
    }

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

found = {}
small = cases(300)
for name, options in cases(S).items():
    flashtile.attention(*(x[:, :, :300] for x in (q, k, v)), **small[name])  # compiles
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark is what is resident now
    before = status("VmRSS")
    flashtile.attention(q, k, v, out=out, **options)
    found[name] = status("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_of_the_size_of_the_scores_is_stored() -> None:
    """One byte a score would be 36 MB: beyond inputs and outputs a call takes a fraction, whatever is computed."""
    length = 6000
    done = subprocess.run([sys.executable, "-c", _PEAK, str(length)], capture_output=True, text=True, check=True)
    for name, peak in json.loads(done.stdout.splitlines()[-1]).items():
        assert peak < length * length / 2, f"{name}: {peak / 1e6:.1f} MB"
