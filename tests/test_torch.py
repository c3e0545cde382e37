"""flashtile.torch: CPU tensors without a copy, and torch's own signature with torch's own defaults."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
from inputs import Shape, uniform

import flashtile
from flashtile.calls import Options, describe
from flashtile.errors import SpecError, UnavailableError
from flashtile.score.options import ScoreOptions

torch = pytest.importorskip("torch")
import flashtile.devices  # noqa: E402
import flashtile.kernels.vanilla  # noqa: E402
import flashtile.owners  # noqa: E402
import flashtile.torch  # noqa: E402  (after torch is known to be there)
from flashtile.owners import Torch  # noqa: E402
from flashtile.torch.tensors import ON_GPU, OTHER  # noqa: E402

sdpa = torch.nn.functional.scaled_dot_product_attention

TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def tensors(shape: Shape, name: str = "float32", seed: int = 0) -> list[Any]:
    return [torch.from_numpy(x).to(getattr(torch, name)) for x in uniform(shape, "float64", seed=seed)]


def close(got: Any, want: Any, name: str = "float32") -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=TOLERANCE[name], atol=TOLERANCE[name])


def test_every_dtype_and_rank(dtype: str) -> None:
    q, k, v = tensors(Shape(2, 3, 3, 9, 13, 8, 5), dtype)
    for index in ((), (1,), (1, 1)):
        parts = [x[index] for x in (q, k, v)]
        o, lse = flashtile.torch.attention(*parts, return_lse=True)
        close(o, sdpa(*(x[None, None] if x.ndim == 2 else x for x in parts)).reshape(o.shape), dtype)
        assert lse.shape == parts[0].shape[:-1]
        assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        s = parts[0].double() @ parts[1].double().mT / 8**0.5
        torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=0, atol=1e-5)


def test_same_bits_as_numpy_through_the_core() -> None:
    arrays = uniform(Shape(2, 4, 2, 12, 20), "float32")
    options: dict[str, Any] = {"causal": True, "window": (5, -1), "align": np.array([8, -1]), "return_lse": True}
    o, lse = flashtile.attention(*arrays, **options)
    options["align"] = torch.tensor([8, -1])
    for attend in (flashtile.attention, flashtile.torch.attention):
        got_o, got_lse = attend(*map(torch.from_numpy, arrays), **options)
        assert np.array_equal(got_o.numpy(), o) and np.array_equal(got_lse.numpy(), lse)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is given the tensors' own addresses and strides, whatever those are."""
    room = torch.zeros(2, 20, 3, 16)
    q = room[..., ::2].transpose(1, 2)
    o = torch.empty(2, 3, 20, 8)
    seen: list[Any] = []
    vanilla = flashtile.kernels.vanilla
    compile_vanilla = vanilla.compile

    def spy(spec: Any, plan: Any, layout: Any) -> Any:
        kernel = compile_vanilla(spec, plan, layout)
        seen.append(layout)

        class Spy:
            scratch_bytes = kernel.scratch_bytes
            merge_stage = kernel.merge_stage
            run = kernel.run

            @staticmethod
            def pack(*addresses: int) -> Any:
                seen.append(addresses[:4])
                return kernel.pack(*addresses)

        return Spy

    flashtile.api.clear_cache()
    monkeypatch.setattr(vanilla, "FAMILY", dataclasses.replace(vanilla.FAMILY, compile=spy))
    assert flashtile.torch.attention(q, q, q, out=o, kernel="vanilla") is o
    assert seen[0].q == seen[0].v == (20 * 3 * 16 * 4, 16 * 4, 3 * 16 * 4, 8)
    assert seen[1] == (q.data_ptr(), q.data_ptr(), q.data_ptr(), o.data_ptr())
    flashtile.api.clear_cache()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(9, 9), (9, 13), (13, 9)])
def test_sdpa_by_its_own_signature(dtype: str, q_len: int, kv_len: int, is_causal: bool) -> None:
    """torch anchors is_causal at the top left also where the lengths differ."""
    q, k, v = tensors(Shape(2, 3, 3, q_len, kv_len, 8, 5), dtype)
    arguments: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": is_causal, "scale": 0.2}
    ours = flashtile.torch.scaled_dot_product_attention
    close(ours(q, k, v, **arguments), sdpa(q, k, v, **arguments), dtype)
    close(ours(q, k, v, None, 0.0, is_causal), sdpa(q, k, v, None, 0.0, is_causal), dtype)


@pytest.mark.parametrize(
    ("query", "key", "gqa"),
    [
        ((2, 8, 9, 4), (2, 2, 7, 4), True),
        ((8, 9, 4), (2, 7, 4), True),
        ((2, 8, 9, 4), (1, 2, 7, 4), True),
        ((2, 8, 9, 4), (2, 1, 7, 4), False),
        ((2, 8, 9, 4), (8, 7, 4), False),
        ((8, 9, 4), (1, 7, 4), False),
        ((1, 9, 4), (8, 7, 4), False),
        ((5, 2, 3, 9, 4), (5, 2, 3, 7, 4), False),
        ((5, 1, 3, 9, 4), (2, 3, 7, 4), False),
        ((9, 4), (3, 7, 4), False),
        ((3, 9, 4), (7, 4), False),
        ((2, 3, 9, 4), (7, 4), False),
        ((5, 2, 3, 9, 4), (7, 4), False),
        ((5, 2, 6, 9, 4), (5, 2, 3, 7, 4), True),
    ],
)
def test_sdpa_broadcasts_as_torch_does(query: Any, key: Any, gqa: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in (query, key, key))
    o, lse = flashtile.torch.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, return_lse=True)
    if gqa:
        k, v = (x.repeat_interleave(query[-3] // key[-3], dim=-3) for x in (k, v))
    s = q @ k.mT / 2
    close(o, s.softmax(-1) @ v)
    torch.testing.assert_close(lse, s.logsumexp(-1))
    close(o, flashtile.torch.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 4), (3, 2), (1, 12), (12, 4), (4, 1)])
def test_sdpa_groups_heads_of_keys_and_of_values(key_heads: int, value_heads: int) -> None:
    q, _, _ = tensors(Shape(2, 12, 12, 9, 7, 8, 5))
    _, k, _ = tensors(Shape(2, 12, key_heads, 9, 7, 8, 5), seed=1)
    _, _, v = tensors(Shape(2, 12, value_heads, 9, 7, 8, 5), seed=2)
    ours = flashtile.torch.scaled_dot_product_attention
    close(ours(q, k, v, enable_gqa=True), sdpa(q, k, v, enable_gqa=True))
    close(ours(q[0], k, v[0], enable_gqa=True), sdpa(q[0], k, v[0], enable_gqa=True))


@pytest.mark.parametrize("shape", [(2, 2, 0, 5), (2, 2, 5, 0), (0, 2, 3, 4)], ids=["queries", "keys", "batch"])
@pytest.mark.parametrize("rest", [(), (1,), (2, 2)], ids=len)
def test_sdpa_takes_sizes_of_zero_and_a_mask(shape: tuple[int, ...], rest: tuple[int, ...]) -> None:
    """Batches of two axes become one, whatever else is 0; derivatives of the second order, too."""
    *batch, q_len, kv_len = shape
    axes = ((3, *batch, q_len, 4), (3, *batch, kv_len, 4), (3, *batch, kv_len, 6))
    q, k, v = (torch.randn(x, dtype=torch.float64, requires_grad=True) for x in axes)
    mask = torch.ones((*rest, *batch, q_len, kv_len)[-4:], dtype=torch.bool)
    o = flashtile.torch.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert tuple(o.shape) == (3, *batch, q_len, 6) and not o.any()
    first = torch.autograd.grad(o.sum(), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), (q, k, v), allow_unused=True)
    assert not any(x.any() for x in (*first, *second) if x is not None)


def test_sdpa_takes_tensors_of_no_axes_as_numbers() -> None:
    q, k, v = tensors(Shape())
    ours = flashtile.torch.scaled_dot_product_attention
    for scale in (torch.tensor(0.3), torch.tensor(2), torch.tensor(0.3, dtype=torch.bfloat16)):
        close(ours(q, k, v, scale=scale), sdpa(q, k, v, scale=scale))
    learned = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(SpecError, match="^scale: got a tensor that requires grad"):
        ours(q, k, v, scale=learned)
    with torch.no_grad():
        close(ours(q, k, v, scale=learned), sdpa(q, k, v, scale=0.3))
    with pytest.raises(SpecError, match="^scale: got tensor"):
        ours(q, k, v, scale=torch.tensor([0.3]))


@pytest.mark.parametrize(("q_len", "kv_len"), [(9, 9), (9, 13), (13, 9)])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_sdpa_takes_the_causal_biases_of_torch(q_len: int, kv_len: int) -> None:
    """Their elements say nothing: torch keeps the rule beside an empty tensor."""
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = tensors(Shape(2, 3, 3, q_len, kv_len))
    ours = flashtile.torch.scaled_dot_product_attention
    for make, offset in ((causal_upper_left, 0), (causal_lower_right, kv_len - q_len)):
        mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(offset)
        got = ours(q, k, v, attn_mask=make(q_len, kv_len))
        close(got, sdpa(q, k, v, attn_mask=mask).nan_to_num(0))  # rows that see nothing: NaN in older versions
        near = mask & torch.ones(q_len, kv_len, dtype=torch.bool).triu(offset - 2)
        close(ours(q, k, v, make(q_len, kv_len), window=(2, None)), ours(q, k, v, near))
        with pytest.raises(SpecError, match=r"^attn_mask: got a CausalBias of 9 x 8, expected one of"):
            ours(q, k, v, make(9, 8))
        with pytest.raises(SpecError, match="^attn_mask: got a mask together with is_causal"):
            ours(q, k, v, make(q_len, kv_len), is_causal=True)
        for option in ("mask", "bias"):
            with pytest.raises(SpecError, match=f"^{option}: got a torch.*CausalBias, expected causal=True with align"):
                flashtile.torch.attention(q, k, v, **{option: make(q_len, kv_len)})


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_is_honoured_as_by_torch(lower: Any) -> None:
    q, k, v = tensors(Shape(2, 3, 3, 9, 13))
    doors = (flashtile.torch.attention, flashtile.attention, flashtile.torch.scaled_dot_product_attention)
    want = flashtile.torch.attention(*(x.to(lower) for x in (q, k, v)))
    bias = torch.randn(9, 13)
    for attend in doors:
        with torch.autocast("cpu", dtype=lower):
            assert torch.equal(attend(q, k, v), want) and want.dtype == sdpa(q, k, v).dtype
            assert torch.equal(attend(q.bfloat16(), k.half(), v.double().float()).isnan(), want.isnan())
            o, lse = attend(q, k, v, return_lse=True)
            assert o.dtype is lower and lse.dtype is torch.float32
            wide = [x.double() for x in (q, k, v)]
            close(attend(*wide), sdpa(*wide), "float64")
            with pytest.raises(SpecError, match=f"^k.*: got dtype {str(lower)[6:]}, expected float64"):
                attend(q.double(), k, v)  # as in torch
            with torch.autocast("cpu", enabled=False):
                assert attend(q, k, v).dtype is torch.float32
    with torch.autocast("cpu", dtype=lower):
        name = str(lower)[6:]
        close(doors[2](q, k, v, attn_mask=bias), sdpa(q, k, v, attn_mask=bias), name)
        out = torch.empty(want.shape, dtype=lower)
        assert doors[0](q, k, v, out=out) is out and torch.equal(out, want)


def test_sdpa_window_is_anchored_as_causal_is() -> None:
    q, k, v = tensors(Shape(1, 2, 2, 6, 9))
    distance = torch.arange(9)[None] - torch.arange(6)[:, None]
    mask = (distance >= -2) & (distance <= 1)
    close(flashtile.torch.scaled_dot_product_attention(q, k, v, window=(2, 1)), sdpa(q, k, v, attn_mask=mask))


def test_rows_that_see_nothing_give_zero() -> None:
    q, k, v = tensors(Shape(1, 1, 1, 3, 0))
    o, lse = flashtile.torch.scaled_dot_product_attention(q, k, v, return_lse=True)
    assert (o == 0).all() and torch.isneginf(lse).all()


def test_the_owner_of_tensors_on_a_gpu() -> None:
    """What it does alike on the CPU; streams, devices and copies to a GPU need one."""
    owner = flashtile.owners.Torch()
    like = torch.ones(2, 3, dtype=torch.bfloat16).t()
    view = owner.view(like)
    assert view == ((3, 2), (2, 6), torch.bfloat16, "cpu") and owner.address(like) == like.data_ptr()
    for name in ("bfloat16", "float64", "uint8"):
        made = owner.empty((4, 5), name, like)
        assert made.shape == (4, 5) and made.dtype is getattr(torch, name) and made.is_contiguous()
    whole = owner.spread(torch.arange(3.0, dtype=torch.float64), (2, 3), "float32")
    assert whole.dtype is torch.float32 and whole.is_contiguous() and whole.tolist() == [[0, 1, 2]] * 2
    assert owner.download(whole).tolist() == whole.tolist()
    assert all(issubclass(error, Exception) for error in owner.out_of_memory())


class Renamed(torch.Tensor):
    pass


X = torch.ones(1, 2, 4, 8)
NEGATED = torch.ones(1, 2, 4, 8, dtype=torch.complex64).conj().imag


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((1, 2, 4, 8), np.float32), "got a numpy.ndarray, expected a torch.Tensor"),
        ([1.0], "got a list, expected a torch.Tensor"),
        (X.to("meta"), "got a tensor on meta, expected a tensor on the CPU"),
        (X.to_sparse(), "got layout torch.sparse_coo, expected a dense tensor"),
        (X[0, 0].to_mkldnn(), "got layout torch._mkldnn, expected a dense tensor"),
        (NEGATED, r"got a lazily negated view, expected .*resolve_neg"),
        (X.as_subclass(Renamed), "got a test_torch.Renamed, expected a torch.Tensor itself: what a subclass means"),
        (X.int(), "got dtype int32, expected one of"),
        (X.to(torch.complex64), "got dtype complex64, expected one of"),
    ],
)
def test_other_tensors_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(SpecError, match="^q: " + message):
        flashtile.torch.attention(bad, X, X)
    if torch.is_tensor(bad):
        with pytest.raises(SpecError, match="^k: "):
            flashtile.attention(X, bad, X)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"attn_mask": X}, SpecError, r"attn_mask: got shape .* expected one that broadcasts to \(1, 2, 4, 4\)"),
        ({"attn_mask": X[..., :4].int()}, SpecError, "attn_mask: got dtype torch.int32, expected torch.bool"),
        ({"attn_mask": X[..., :4].to("meta")}, SpecError, "attn_mask: got a tensor on meta"),
        ({"attn_mask": X, "is_causal": True}, SpecError, "attn_mask: got a mask together with is_causal"),
        ({"dropout_p": 1.0}, SpecError, "dropout_p: got 1.0, expected a real number"),
        ({"softcap": -30.0}, SpecError, "softcap: got -30.0, expected a finite number > 0"),
        ({"alibi_slopes": X}, SpecError, r"alibi_slopes: got shape \(1, 2, 4, 8\), expected \(H,\) = \(2,\)"),
        ({"sinks": X}, SpecError, r"sinks: got shape \(1, 2, 4, 8\), expected .* \(H,\) = \(2,\)"),
        ({"window": (-2, 0)}, SpecError, r"window: got \(-2, 0\), expected a pair"),
        ({"scale": float("nan")}, SpecError, "scale: got nan, expected a finite real number"),
    ],
)
def test_sdpa_options(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        flashtile.torch.scaled_dot_product_attention(X, X, X, **option)


def test_sdpa_shapes_that_do_not_broadcast() -> None:
    ours = flashtile.torch.scaled_dot_product_attention
    with pytest.raises(SpecError, match="leading axes that broadcast.*enable_gqa=True"):
        ours(torch.ones(1, 8, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8))
    with pytest.raises(SpecError, match="^key: got 3 heads, expected a divisor of query's 8 heads"):
        ours(torch.ones(1, 8, 4, 8), torch.ones(1, 3, 4, 8), torch.ones(1, 3, 4, 8), enable_gqa=True)
    with pytest.raises(SpecError, match="^value: got 3 heads, expected a divisor of query's 8 heads"):
        ours(torch.ones(1, 8, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 3, 4, 8), enable_gqa=True)
    with pytest.raises(SpecError, match="^key: got shape .*rank 3 or more, as heads are grouped"):
        ours(torch.ones(2, 4, 8), torch.ones(4, 8), torch.ones(4, 8), enable_gqa=True)
    with pytest.raises(SpecError, match=r"^key: got shape \(8,\), expected rank 2 or more"):
        ours(torch.ones(2, 4, 8), torch.ones(8), torch.ones(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(8)}, r"query: got shape \(8,\), expected rank 2 or more"),
        ({"key": X.half()}, "key: got dtype float16, expected float32 as in query"),
        ({"value": X[:, :, :3]}, "value: got length 3, expected 4 as in key"),
        ({"key": X[..., :3]}, "key: got head size 3, expected 8 as in query"),
        ({"query": X[..., :3]}, "key: got head size 8, expected 3 as in query"),
        ({"is_causal": "yes"}, "is_causal: got 'yes', expected True or False"),
        ({"enable_gqa": "no"}, "enable_gqa: got 'no', expected True or False"),
        ({"return_lse": "no"}, "return_lse: got 'no', expected True or False"),
        ({"is_causal": 1}, "is_causal: got 1, expected True or False"),
        ({"is_causal": X, "attn_mask": X}, "(?s:is_causal: got tensor.*, expected True or False)"),
    ],
)
def test_sdpa_errors_speak_of_its_own_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"^{message}$"):
        flashtile.torch.scaled_dot_product_attention(**{**dict.fromkeys(("query", "key", "value"), X), **change})


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.full((1, 2, 4, 7), 7.0), r"out: got shape \(1, 2, 4, 7\), expected \(1, 2, 4, 8\)"),
        (torch.full((1, 2, 4, 8), 7.0, dtype=torch.float64), "out: got dtype float64, expected float32 as in q"),
        (torch.full((1, 2, 1, 8), 7.0).expand(1, 2, 4, 8), "out: got strides .* do not share memory"),
        (X, "out: got an array within the memory that q spans"),
        (np.full((1, 2, 4, 8), 7.0, np.float32), "out: got a numpy.ndarray, expected a torch.Tensor"),
    ],
)
def test_bad_out(out: Any, message: str) -> None:
    before = np.asarray(out).copy()
    with pytest.raises(SpecError, match="^" + message):
        flashtile.torch.attention(X, X.clone(), X.clone(), out=out)
    assert np.array_equal(np.asarray(out), before)


@pytest.mark.parametrize("sdpa_door", [False, True])
def test_tensors_on_a_gpu_go_to_their_own_call_with_every_option(
    monkeypatch: pytest.MonkeyPatch, sdpa_door: bool
) -> None:
    """The door's part of it: what the call on a GPU is given computes the same, here on the CPU."""
    q, k, v = tensors(Shape(2, 2, 2, 9, 9, 8, 8))
    calls = 0

    class OnHost(Torch):
        def current(self, x: Any) -> Any:
            nonlocal calls
            calls += 1
            return contextlib.nullcontext()

        def stream(self, x: Any) -> int:
            return 0

        def upload(self, array: np.ndarray, like: Any) -> Any:
            return torch.from_numpy(array.copy())

        def out_of_memory(self) -> Any:
            return (MemoryError,)

    owner = OnHost()
    options: list[dict[str, Any]] = [{}, {"return_lse": True}, {"softcap": 3.0, "sinks": torch.ones(2)}]
    if sdpa_door:
        options += [{"attn_mask": torch.ones(9, 9).tril().bool()}, {"attn_mask": torch.rand(9, 9)}, {"is_causal": True}]
    else:
        options += [{"causal": True, "align": np.array([1, 2])}, {"out": torch.empty_like(q), "scale": 0.3}]
    attend = flashtile.torch.scaled_dot_product_attention if sdpa_door else flashtile.torch.attention
    for option in options:
        want = attend(q, k, v, **option)
        with monkeypatch.context() as patch:
            patch.setattr(flashtile.devices, "owner_of", lambda library: owner)
            for door in (flashtile.torch.attend, flashtile.torch.sdpa):
                patch.setattr(door, "kind_of", lambda *tensors: OTHER)
                patch.setattr(door, "kind_of_others", lambda **tensors: ON_GPU)
            got = attend(q, k, v, **option)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
            assert torch.equal(a, b)
    assert calls == len(options), "to run; tracing asks nothing of the device"


def test_a_function_that_reads_a_recorded_tensor_takes_the_operator_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient would be lost without a word; that is seen before the device is touched."""
    q, k, v = tensors(Shape(1, 2, 2, 4, 4, 8, 8))
    weight = torch.ones(2, requires_grad=True)
    owner = Torch()
    monkeypatch.setattr(owner, "current", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(owner, "stream", lambda x: 0)
    monkeypatch.setattr(flashtile.devices, "owner_of", lambda library: owner)
    for given in ({"score_mod": lambda s, b, h, i, j: s * weight[h]}, {"sinks": weight}):
        request = describe(q, tuple(vars(ScoreOptions(**given)).values()), Options())
        weight.grad = None
        flashtile.torch.attend.attend(ON_GPU, q, k, v, request, False).sum().backward()
        assert weight.grad is not None and weight.grad.any()


sdpa_here = flashtile.torch.scaled_dot_product_attention


def freed() -> Any:
    x = X.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("make", [freed, lambda: torch._efficientzerotensor((1, 2, 4, 8))])
def test_tensors_without_memory_are_refused(make: Any, place: int) -> None:
    for attend, names in ((flashtile.torch.attention, "qkv"), (sdpa_here, ("query", "key", "value"))):
        with pytest.raises(SpecError, match=f"^{names[place]}: got a Tensor without memory, expected one in memory"):
            attend(*(make() if n == place else X for n in range(3)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    """By sdpa of torch's older layout alone."""
    sdpa = flashtile.torch.scaled_dot_product_attention
    for layout, message, doors in (
        (torch.strided, "a nested tensor, expected a dense", (flashtile.torch.attention, sdpa)),
        (torch.jagged, ".*NestedTensor, exp", (flashtile.torch.attention,)),
    ):
        nested = torch.nested.nested_tensor([X[0, 0], X[0, 0, :1]], layout=layout)
        for attend in doors:
            with pytest.raises(SpecError, match=f"^q.*: got {message}") as caught:
                attend(nested, nested, nested)
            assert "score.varlen" in str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_modes_of_torch() -> None:
    """What cannot see the operator gets a clear error, what only changes defaults changes nothing."""
    narrow = X[..., :3].clone()
    for attend in (flashtile.torch.attention, flashtile.torch.scaled_dot_product_attention):
        with pytest.raises(UnavailableError, match="^q.*: got a tensor that torch.jit.trace records"):
            torch.jit.trace(lambda x, attend=attend: attend(x, x, x), (X,))
        want = attend(X, X, narrow, return_lse=True)
        with torch.device("meta"):
            got = attend(X, X, narrow, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
