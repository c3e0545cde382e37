"""The fused backward kernel: the rule on every instruction set, poison, strides, threads, and what is not asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import flashtile
from flashtile import kernels
from flashtile.calls import Options, clear_cache
from flashtile.dtypes import DTYPES
from flashtile.kernels.cpu import backward
from flashtile.llvm import machines as isas
from flashtile.testing import assert_gradients_accurate


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_size: int
    value_size: int


CASES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "dense": (Shape(1, 2, 2, 100, 150, 64, 64), {}),
    "causal": (Shape(1, 1, 1, 300, 300, 32, 48), {"causal": True}),
    "shared heads": (Shape(2, 4, 2, 60, 140, 40, 24), {"causal": True, "align": "bottom_right"}),
    "one key head": (Shape(1, 3, 1, 50, 40, 16, 16), {"window": (7, 5), "align": "top_left"}),
    "window": (Shape(1, 1, 1, 170, 400, 17, 96), {"window": (40, 0), "align": -100, "scale": -0.3}),
    "one offset per batch": (Shape(2, 2, 2, 90, 70, 5, 3), {"causal": True, "align": np.array([-30, 40])}),
    "rows without keys": (Shape(1, 1, 1, 64, 20, 8, 8), {"causal": True, "align": -30}),
    "smallest": (Shape(1, 1, 1, 1, 1, 1, 1), {}),
    "one column": (Shape(1, 2, 1, 20, 30, 80, 1), {"scale": 0.0}),
}


@pytest.fixture(params=isas.usable())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that this machine runs, in turn."""
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield request.param
    clear_cache()


def inputs(shape: Shape, storage: str, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v, do, dlse."""
    r = np.random.default_rng(seed)
    b, h, kv, s, t, d, e = shape
    shapes = (b, h, s, d), (b, kv, t, d), (b, kv, t, e), (b, h, s, e), (b, h, s)
    *arrays, dlse = (r.standard_normal(x) for x in shapes)
    return *(stored(x, storage) for x in arrays), dlse.astype(DTYPES[storage].accumulator)


def stored(x: np.ndarray, storage: str) -> np.ndarray:
    return x.astype(pytest.importorskip("ml_dtypes").bfloat16 if storage == "bfloat16" else storage)


def gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, dlse: Any = None, *, more: Any = None, **options: Any
) -> flashtile.Gradients:
    o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="cpu", **options)
    return flashtile.attention_backward(do, q, k, v, o, lse, dlse=dlse, kernel="cpu", **options, **(more or {}))


def same(a: flashtile.Gradients, b: flashtile.Gradients, names: str = "qkv") -> bool:
    return all(getattr(a, n).tobytes() == getattr(b, n).tobytes() for n in names)


@pytest.mark.parametrize("storage", list(DTYPES))
def test_the_rule_holds_on_every_instruction_set(isa: str, storage: str) -> None:
    for shape, options in CASES.values():
        q, k, v, do, dlse = inputs(shape, storage)
        got = gradients(q, k, v, do, dlse, **options)
        assert_gradients_accurate(got, do, q, k, v, dlse=dlse, **options)


def test_the_rule_holds_where_float32_is_multiplied_as_bfloat16(isa: str) -> None:
    shape, options = CASES["shared heads"]
    q, k, v, do, dlse = inputs(shape, "float32")
    got = gradients(q, k, v, do, dlse, precision="bf16", **options)
    assert_gradients_accurate(got, do, q, k, v, dlse=dlse, precision="bf16", **options)


@pytest.mark.parametrize("heads", [1, 3])
def test_bits_do_not_depend_on_threads(threads: Callable[[int], None], heads: int) -> None:
    q, k, v, do, dlse = inputs(Shape(1, 2 * heads, heads, 500, 600, 32, 32), "float32")
    found = []
    for n in (1, 2, 3, 8):
        threads(n)
        found.append(gradients(q, k, v, do, dlse, causal=True, align=60))
    assert all(same(found[0], x) for x in found[1:])


def test_parts_of_the_keys_share_what_rows_see() -> None:
    """Few heads are cut into parts of their keys: by the spec alone, so that each has about as much to do."""
    spec = Options(True, None, None, None, "ieee", "auto", "auto").spec(*3 * [np.zeros((1, 1, 8192, 64), np.float32)])
    bounds = backward.parts_of(spec, 128)
    assert len(bounds) == 5 and bounds[0] == 0 and bounds[-1] == 8192
    work = [sum(8192 - j for j in range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert max(work) < 1.1 * sum(work) / 4


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16"])
def test_what_the_band_hides_reaches_no_gradient(storage: str, poison: float) -> None:
    """Row i sees keys i + 1 ... i + 11: key 0 and the last ones are seen by nobody, the last rows see nothing."""
    options: dict[str, Any] = {"window": (5, 5), "align": 6}
    clean = inputs(Shape(1, 2, 1, 130, 150, 24, 40), storage)
    q, k, v, do, dlse = (x.copy() for x in clean)
    k[:, :, :1] = v[:, :, :1] = k[:, :, 141:] = v[:, :, 141:] = poison
    assert same(gradients(*clean, **options), gradients(q, k, v, do, dlse, **options))
    options = {"causal": True, "align": -20}
    q, k, v, do, dlse = (x.copy() for x in clean)
    q[:, :, :20] = do[:, :, 3] = k[:, :, 110:] = v[:, :, 110:] = poison
    assert same(gradients(*clean, **options), gradients(q, k, v, do, dlse, **options))


@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16"])
def test_a_visible_nan_stays_where_the_reference_has_it(storage: str, which: str) -> None:
    shape = Shape(1, 1, 1, 120, 140, 24, 40)
    arrays = dict(zip(("q", "k", "v", "do"), inputs(shape, storage), strict=False))
    arrays[which][0, 0, 57, 3] = np.nan
    do, q, k, v = (arrays[n] for n in ("do", "q", "k", "v"))
    options = {"window": (9, 4), "align": 0}
    o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="reference", **options)
    got, want = (flashtile.attention_backward(do, q, k, v, o, lse, kernel=x, **options) for x in ("cpu", "reference"))
    assert any(np.isnan(getattr(want, n).astype(np.float64)).any() for n in "qkv")
    for n in "qkv":
        a, b = (np.isnan(getattr(x, n).astype(np.float64)) for x in (got, want))
        np.testing.assert_array_equal(a, b, err_msg=n)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_strides_are_free(storage: str) -> None:
    shape = Shape(2, 2, 1, 70, 60, 32, 16)
    q, k, v, do, dlse = inputs(shape, storage)
    do[:] = do[:, :, :1, :1]
    want = gradients(q, k, v, do, dlse, causal=True, align=0)

    def strange(x: np.ndarray, n: int) -> np.ndarray:
        room = np.zeros((*x.shape[:-1], x.shape[-1] * 2 + 1), x.dtype)
        swapped = room[..., : x.shape[-1]].swapaxes(1, 2).copy().swapaxes(1, 2)
        turned = (room[..., 1::2], room[..., ::-2][..., 1:], swapped)[n]
        turned = turned[:, :, ::-1] if n else turned
        turned = turned[..., : x.shape[-1]]
        turned[...] = x
        return turned

    still = np.broadcast_to(do[:, :, :1, :1], do.shape)
    out = flashtile.Gradients(*(strange(np.zeros_like(x), 1) for x in (q, k, v)))
    got = gradients(strange(q, 0), strange(k, 1), strange(v, 2), still, dlse, causal=True, align=0, more={"out": out})
    assert got is not out and all(getattr(got, n) is getattr(out, n) for n in "qkv")
    if storage == "float32":  # packed or not, the forward may round another way
        for n in "qkv":
            np.testing.assert_allclose(getattr(got, n), getattr(want, n), rtol=1e-4, atol=1e-5)
    assert_gradients_accurate(got, do, q, k, v, dlse=dlse, causal=True, align=0)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_only_what_is_asked_for_is_computed_with_the_same_bits(storage: str) -> None:
    q, k, v, do, dlse = inputs(Shape(1, 2, 1, 90, 80, 24, 40), storage)
    whole = gradients(q, k, v, do, dlse)
    for wrt in (("q",), ("k",), ("v",), ("q", "v"), ()):
        part = gradients(q, k, v, do, dlse, more={"wrt": wrt})
        assert same(part, whole, "".join(wrt)) and all(getattr(part, n) is None for n in "qkv" if n not in wrt)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_gradients_add_to_what_is_there(storage: str) -> None:
    q, k, v, do, dlse = inputs(Shape(1, 1, 1, 60, 300, 24, 40), storage)
    whole = gradients(q, k, v, do, dlse)
    before = [np.ones_like(x) for x in (q, k, v)]
    out = flashtile.Gradients(*(x.copy() for x in before))
    gradients(q, k, v, do, dlse, more={"out": out, "accumulate": True})
    for n, x in zip("qkv", before, strict=True):
        wide, added = (np.asarray(y, np.float64) for y in (getattr(whole, n) + x, getattr(out, n)))
        eps = {"float32": 2.0**-22, "float16": 2.0**-9, "bfloat16": 2.0**-6}[storage]  # two roundings against one
        np.testing.assert_allclose(added, wide, rtol=eps, atol=eps)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_operands_that_are_made_ready_at_every_visit_give_the_same_bits(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = inputs(Shape(1, 2, 1, 150, 300, 24, 40), storage)
    kept = gradients(*arrays, causal=True, align=0)
    clear_cache()
    monkeypatch.setattr(backward, "_KEPT_BYTES", 0)
    assert same(kept, gradients(*arrays, causal=True, align=0))
    clear_cache()


def test_the_choice_by_default_and_what_falls_to_others() -> None:
    arrays = inputs(Shape(1, 1, 1, 4, 4, 4, 4), "float32")[:3]
    spec = Options(True, None, None, None, "ieee", "auto", "auto").spec(*arrays)
    assert kernels.pick(spec, "auto", "backward").name == "cpu"


def test_tensors_reach_it_as_they_lie() -> None:
    torch = pytest.importorskip("torch")
    import flashtile.torch

    q, k, v, do, _ = inputs(Shape(1, 2, 1, 70, 80, 24, 40), "float32")
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.from_numpy(x).to(dtype).requires_grad_() for x in (q, k, v)]
        flashtile.torch.attention(*tensors, kernel="cpu").backward(torch.from_numpy(do).to(dtype))
        arrays = [x.detach() for x in tensors]
        if dtype is torch.bfloat16:
            bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
            arrays = [x.view(torch.int16).numpy().view(bfloat16) for x in arrays]
            want = gradients(*arrays, do.astype(bfloat16))
            got = [x.grad.view(torch.int16).numpy() for x in tensors]
        else:
            want, got = gradients(*(x.numpy() for x in arrays), do), [x.grad.numpy() for x in tensors]
        for n, x in zip("qkv", got, strict=True):
            assert x.tobytes() == getattr(want, n).tobytes()


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "keys"), [(8, 100_000), (100_000, 8)])
def test_long_sums_keep_to_the_rule(storage: str, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chain of roundings is as long as the keys, or the rows; of one sign, so that errors of one direction grow."""
    clear_cache()
    monkeypatch.setattr(backward, "_MOST_PARTS", 1)
    q, k, v, do, dlse = inputs(Shape(1, 1, 1, rows, keys, 8, 4), storage)
    q, k, v, do = (np.abs(x) for x in (q, k, v, do))
    got = gradients(q, k, v, do, dlse, scale=0.25)
    assert_gradients_accurate(got, do, q, k, v, dlse=dlse, scale=0.25)
    clear_cache()
