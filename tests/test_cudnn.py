"""cuDNN's family where there is no GPU: what it refuses, what it hands to torch's operator, and what it makes of the
answer. Two functions over host memory, of the operators' own schema, stand in for cuDNN."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from devices import DeviceArray, HostOwner

import flashtile
from flashtile import kernels, owners
from flashtile.arrays import contiguous
from flashtile.calls import clear_cache, run_backward
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.kernels import Layout, cudnn
from flashtile.kernels.triton import driver
from flashtile.plan import make_plan
from flashtile.spec import AttentionSpec
from flashtile.testing import expect, expect_gradients

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Stub:
    """cuDNN by its contract, in fp32 on the host; what was asked of it, and strict about what it is given."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def _scores(self, q: Any, k: Any, scale: float, causal: bool) -> Any:
        group = q.shape[1] // k.shape[1]
        s = scale * q.float() @ k.float().repeat_interleave(group, 1).transpose(-1, -2)
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)  # from the top left corner
        return s.masked_fill(hidden, float("-inf")) if causal else s

    def _expect(self, *tensors: Any) -> None:
        for x in tensors:
            assert x.dtype in (torch.float16, torch.bfloat16) and x.dim() == 4
            assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(x.stride(n) % 8 == 0 for n in range(3))

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any,
        compute_log_sumexp: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        self._expect(query, key, value)
        assert attn_bias is None and dropout_p == 0 and not return_debug_mask and scale
        self.calls.append(SimpleNamespace(lse=compute_log_sumexp, causal=is_causal, strides=query.stride()))
        s = self._scores(query, key, scale, is_causal)
        v = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
        o = (s.softmax(-1).to(v.dtype).float() @ v.float()).to(query.dtype)
        lse = s.logsumexp(-1, keepdim=True) if compute_log_sumexp else None
        seed = torch.zeros((), dtype=torch.int64)
        return o, lse, None, None, query.shape[2], key.shape[2], seed, seed, None

    def backward(
        self,
        grad_out: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logsumexp: Any,
        philox_seed: Any,
        philox_offset: Any,
        attn_bias: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *,
        scale: float | None = None,
    ) -> tuple[Any, Any, Any]:
        self._expect(grad_out, query, key, value, out)
        assert attn_bias is cum_seq_q is cum_seq_k is None and dropout_p == 0 and scale
        assert logsumexp.shape == (*query.shape[:3], 1) and logsumexp.dtype is torch.float32
        assert philox_seed.dtype is philox_offset.dtype is torch.int64 and (max_q, max_k) == (q2(query), q2(key))
        group = query.shape[1] // key.shape[1]
        p = (self._scores(query, key, scale, is_causal) - logsumexp).exp()
        k, v = (x.float().repeat_interleave(group, 1) for x in (key, value))
        delta = (grad_out.float() * out.float()).sum(-1, keepdim=True)
        ds = (p * (grad_out.float() @ v.transpose(-1, -2) - delta)).to(query.dtype).float()

        def shared(x: Any) -> Any:
            return x.unflatten(1, (key.shape[1], group)).sum(2)

        dq = scale * ds @ k
        dk = shared(scale * ds.transpose(-1, -2) @ query.float())
        dv = shared(p.to(query.dtype).float().transpose(-1, -2) @ grad_out.float())
        return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)


def q2(x: Any) -> int:
    return int(x.shape[2])


def host_tensor(address: int, shape: Any, strides: Any, dtype: str, number: int) -> Any:
    """As cudnn.tensor_at, of host memory."""
    kind = getattr(torch, dtype)
    reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + kind.itemsize
    flat = torch.frombuffer((ctypes.c_char * reach).from_address(address), dtype=kind)
    return flat.as_strided(shape, [step // kind.itemsize for step in strides])


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """cuDNN on a machine without a GPU: its operators, and arrays that say they lie on one."""
    found, owner = Stub(), HostOwner()
    monkeypatch.setitem(owners.OWNERS, "cupy", lambda: owner)  # type: ignore[arg-type]
    monkeypatch.setattr(driver, "device", lambda number: driver.Device("Fake GPU", "sm_90", 232448, 132))
    monkeypatch.setattr(cudnn, "operators", lambda: cudnn.Operators(found.forward, found.backward))
    monkeypatch.setattr(cudnn, "tensor_at", host_tensor)
    monkeypatch.setattr(cudnn, "in_stream", lambda here: contextlib.nullcontext())
    monkeypatch.setattr(cudnn, "FAMILY", dataclasses.replace(cudnn.FAMILY, unavailable=lambda: None))
    clear_cache()
    yield found
    clear_cache()


def random(*shape: int, dtype: str = "float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(TYPES[dtype])


def inputs(dtype: str, q_len: int = 33, kv_len: int = 33, sizes: tuple[int, int] = (16, 24)) -> list[np.ndarray]:
    shapes = (2, 4, q_len, sizes[0]), (2, 2, kv_len, sizes[0]), (2, 2, kv_len, sizes[1])
    return [random(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("storage", "lengths", "options"),
    [
        ("float16", (33, 33), {}),
        ("bfloat16", (33, 33), {"causal": True}),
        ("float16", (20, 41), {"causal": True, "align": "top_left", "scale": 0.3}),
        ("bfloat16", (41, 20), {"causal": True, "align": 0}),
    ],
)
def test_calls_reach_the_operator(stub: Stub, storage: str, lengths: tuple[int, int], options: dict[str, Any]) -> None:
    q, k, v = inputs(storage, *lengths)
    o, lse = expect(q, k, v, **options)
    got, got_lse = flashtile.attention(*map(DeviceArray, (q, k, v)), kernel="cudnn", return_lse=True, **options)
    o.check(got.array, "output")
    lse.check(got_lse.array, "lse")
    again = flashtile.attention(*map(DeviceArray, (q, k, v)), kernel="cudnn", **options)
    assert np.array_equal(again.array.view(np.uint16), got.array.view(np.uint16))
    assert [(call.lse, call.causal) for call in stub.calls] == [
        (True, "causal" in options),
        (False, "causal" in options),
    ]


def test_what_cudnn_does_not_read_is_copied_and_the_rest_is_not(stub: Stub) -> None:
    q, k, v = inputs("float16")
    rows_first = np.ascontiguousarray(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    loose = np.repeat(q, 2, axis=-1)[..., ::2]
    odd = np.zeros(q.size + 1, np.float16)[1:].reshape(q.shape)
    odd[:] = q
    shared = np.broadcast_to(q[:1], q.shape)
    want = flashtile.attention(*map(DeviceArray, (q, k, v)), kernel="cudnn").array
    for x, strides in (
        (rows_first, tuple(n // 2 for n in rows_first.strides)),
        (loose, q.strides),
        (odd, q.strides),
        (shared, q.strides),
    ):
        got = flashtile.attention(*map(DeviceArray, (x, k, v)), kernel="cudnn").array
        same = flashtile.attention(*map(DeviceArray, (np.ascontiguousarray(x), k, v)), kernel="cudnn").array
        assert np.array_equal(got, same) and (x is shared or np.array_equal(got, want))
        kept = stub.calls[-2].strides == strides if x is rows_first else stub.calls[-2].strides[-1] == 1
        assert kept
    out = np.zeros((2, 4, 66, 24), np.float16)[:, :, ::2]
    flashtile.attention(*map(DeviceArray, (q, k, v)), kernel="cudnn", out=DeviceArray(out))
    assert np.array_equal(out, want)
    with pytest.raises(SpecError, match="^k: got strides of .*expected none below 0 with kernel='cudnn'"):
        flashtile.attention(*map(DeviceArray, (q, k[:, :, ::-1], v)), kernel="cudnn")


GRADIENTS = [("float16", {}), ("bfloat16", {"causal": True})]


@pytest.mark.parametrize(("storage", "options"), GRADIENTS)
def test_gradients_come_from_its_backward(stub: Stub, storage: str, options: dict[str, Any]) -> None:
    """Added to what is there, of what is wanted, by the accuracy rule."""
    q, k, v = inputs(storage)
    o, lse = flashtile.attention(q, k, v, kernel="reference", return_lse=True, **options)
    do = random(*o.shape, dtype=storage, seed=9)
    arrays = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "do": do, "dq": np.zeros_like(q), "dv": np.zeros_like(v)}
    spec = AttentionSpec.of(*(contiguous(x.shape, storage, "cuda:0") for x in (q, k, v)), **options)
    family = kernels.pick(spec, "cudnn", "backward")
    from flashtile.current import calling

    with calling(HostOwner(), DeviceArray(q)):
        run_backward(Host(storage), spec, family, "auto", arrays, 0)
    right = expect_gradients(do, q, k, v, **options)
    right.q.check(arrays["dq"], "dq")
    right.v.check(arrays["dv"], "dv")
    pack = family.compile_backward(spec, layout_of(arrays | {"dk": k}), ()).pack  # type: ignore[misc]
    with pytest.raises(UnavailableError, match="^lse: got a gradient of it, which kernel='cudnn' cannot pass on"):
        pack(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0)


class Host(NamedTuple):
    """Arrays of the host, asked as a GPU's library is: strides are in elements."""

    dtype: str

    def address(self, x: np.ndarray) -> int:
        return x.ctypes.data

    def strides(self, x: np.ndarray) -> tuple[int, ...]:
        return tuple(n // x.itemsize for n in x.strides)


def layout_of(arrays: dict[str, np.ndarray]) -> Any:
    from flashtile.kernels import BackwardLayout

    names = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    return BackwardLayout(*(arrays[name].strides for name in names))  # type: ignore[arg-type]


CUDA = "cuda:0"


def spec_of(
    dtype: str = "bfloat16", sizes: tuple[int, int] = (64, 64), lengths: tuple[int, int] = (128, 128), **options: Any
) -> AttentionSpec:
    heads = options.pop("heads", 4)
    shapes = (1, heads, lengths[0], sizes[0]), (1, 2, lengths[1], sizes[0]), (1, 2, lengths[1], sizes[1])
    return AttentionSpec.of(*(contiguous(shape, dtype, options.pop("device", CUDA)) for shape in shapes), **options)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (spec_of(), None),
        (spec_of("float16", causal=True), None),
        (spec_of(lengths=(20, 40), causal=True, align="top_left"), None),
        (spec_of("float32"), "computes bfloat16, float16, not float32"),
        (spec_of("float64"), "computes bfloat16, float16, not float64"),
        (spec_of(sizes=(136, 64)), "head sizes up to 128, not 136"),
        (spec_of(sizes=(64, 20)), "takes head sizes that are multiples of 8"),
        (spec_of(lengths=(20, 40), causal=True, align="bottom_right"), "hides no keys but those after each row"),
        (spec_of(window=(3, 0)), "no window"),
        (spec_of(scale=-1.0), "takes a scale above 0, not -1"),
        (spec_of(lengths=(4, 1)), "takes 2 keys or more, not 1"),
        (spec_of(lengths=(0, 4)), "takes no empty call"),
        (spec_of(heads=65536), "takes 65535 batches and heads at most"),
        (dataclasses.replace(spec_of(), sinks=True), "does not know sinks"),
        (dataclasses.replace(spec_of(), dropout=True), "does not know dropout"),
        (dataclasses.replace(spec_of(), device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_what_it_cannot_do_is_said(stub: Stub, spec: AttentionSpec, why: str | None) -> None:
    found = kernels.objection(cudnn.FAMILY, spec)
    assert found is None if why is None else why in str(found)


def test_the_error_says_what_to_use(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile.kernels import vanilla

    able = dataclasses.replace(vanilla.capabilities(spec_of()), devices=frozenset(("cuda",)), at_once=True)
    monkeypatch.setattr(vanilla, "FAMILY", dataclasses.replace(vanilla.FAMILY, capabilities=lambda spec: able))
    q, k, v = map(DeviceArray, inputs("float16"))
    with pytest.raises(
        UnavailableError, match="^kernel: got 'cudnn', .*; cudnn: does not know program; 'vanilla' can$"
    ):
        flashtile.attention(q, k, v, softcap=5.0, kernel="cudnn")


def test_it_is_never_chosen_by_itself(stub: Stub) -> None:
    q, k, v = map(DeviceArray, inputs("float16"))
    with pytest.raises(UnavailableError, match="cudnn: no run on a GPU has shown yet"):
        flashtile.attention(q, k, v)
    assert flashtile.explain(q, k, v, kernel="cudnn").kernel == "cudnn"
    assert not stub.calls


def test_torch_s_wish_for_the_same_bits_is_heard(stub: Stub) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert "same bits twice" in str(kernels.objection(cudnn.FAMILY, spec_of()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels.objection(cudnn.FAMILY, spec_of()) is None


def test_amd_has_no_cudnn(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "device", lambda number: driver.Device("gfx942", "gfx942", 65536, 304))
    assert kernels.objection(cudnn.FAMILY, spec_of()) == "runs on NVIDIA's GPUs, not on gfx942"


def test_an_error_of_the_operator_arrives(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("cuDNN Frontend error: no execution plans")

    monkeypatch.setattr(cudnn, "operators", lambda: cudnn.Operators(broken, broken))
    with pytest.raises(KernelError, match="no execution plans; kernel='triton' can"):
        flashtile.attention(*map(DeviceArray, inputs("float16")), kernel="cudnn")


def test_torch_has_the_operators_as_they_are_called() -> None:
    """By torch's own schema, and by its dispatcher: on tensors without memory it looks at every argument."""
    found = cudnn.operators()
    spec = dataclasses.replace(spec_of(lengths=(24, 40), causal=True, align=0), device="meta")
    q, k, v = (torch.empty(cudnn.shape_of(spec, x), dtype=torch.bfloat16, device="meta") for x in ("q", "k", "v"))
    o, lse = cudnn.attend(found, spec, (q, k, v), True)
    assert (o.shape, o.dtype) == ((1, 4, 24, 64), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((1, 4, 24, 1), torch.float32)
    gradients = cudnn.differentiate(found, spec, (torch.empty_like(o), q, k, v, o, lse.squeeze(-1)))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_a_torch_of_another_schema_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "FORWARD", "query * scale")
    with pytest.raises(UnavailableError, match="has no _scaled_dot_product_cudnn_attention of known arguments"):
        cudnn.operators()


def test_the_stub_has_the_schema_of_the_operators() -> None:
    import inspect

    for function, known in ((Stub.forward, cudnn.FORWARD), (Stub.backward, cudnn.BACKWARD)):
        given = list(inspect.signature(function).parameters.values())[1:]
        plain, keyword = ([x.name for x in given if (x.kind == x.KEYWORD_ONLY) is by] for by in (False, True))
        assert [*plain, "*", *keyword] == known.split()


def test_why_it_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's own files are read, torch is not imported."""
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(
        cudnn.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=tmp_path / "__init__.py")
    )
    monkeypatch.setattr(driver, "missing", lambda: driver.NO_GPU)
    for text, why in (
        ("cuda: Optional[str] = None\n", "was built without CUDA"),
        ("hip: Optional[str] = '7.0'\n", "was built without CUDA"),
        ("cuda: Optional[str] = '13.0'\n", driver.NO_GPU),
        ("cuda = '12.8'\n", driver.NO_GPU),
    ):
        (tmp_path / "version.py").write_text(text)
        assert why in str(cudnn.unavailable())
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: None)
    assert "pip install torch" in str(cudnn.unavailable())


def test_a_kernel_s_own_tensors_lie_where_the_arrays_lie() -> None:
    """What torch is told of memory on a device: the interface that array libraries share."""
    seen: list[Any] = []
    fake = SimpleNamespace(
        as_tensor=lambda x, device: seen.append((x.__cuda_array_interface__, device)) or torch.ones(2)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "_torch", lambda: fake)
        cudnn.tensor_at(4096, (2, 3), (6, 2), "float16", number=1)
    assert seen == [
        ({"shape": (2, 3), "strides": (6, 2), "typestr": "<f2", "data": (4096, False), "version": 2}, "cuda:1")
    ]


def test_a_plan_is_one_item_a_head(stub: Stub) -> None:
    spec = spec_of()
    plan = make_plan(spec, cudnn.capabilities(spec))
    assert (plan.items, plan.at_once) == (4, True)
    layout = Layout(*((65536, 16384, 128, 2) for _ in range(4)))
    assert cudnn.compile(spec, plan, layout).merge_stage is None
