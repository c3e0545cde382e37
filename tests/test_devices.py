"""Calls on a GPU, as far as they go without one: an owner over host memory stands in for a library's device, and the
unfused kernel for the device's own."""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from devices import DeviceArray, Full, HostOwner
from inputs import Shape, uniform

import flashtile
from flashtile import current, devices, owners
from flashtile.calls import clear_cache
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.kernels import cpu, vanilla

pytestmark = pytest.mark.core

SHAPE = Shape(2, 4, 2, 12, 20)


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostOwner]:
    """The owner of every DeviceArray, with a kernel that can read them."""
    single = HostOwner()
    monkeypatch.setitem(owners.OWNERS, "cupy", lambda: single)  # type: ignore[arg-type]

    def capabilities(spec: Any) -> Any:
        return dataclasses.replace(vanilla.capabilities(spec), devices=frozenset(("cpu", "cuda")), at_once=True)

    monkeypatch.setattr(vanilla, "FAMILY", dataclasses.replace(vanilla.FAMILY, capabilities=capabilities))
    clear_cache()
    yield single
    clear_cache()


def on_device(*arrays: np.ndarray, device: int = 0) -> list[DeviceArray]:
    return [DeviceArray(x, device) for x in arrays]


def test_a_call_runs_where_its_arrays_lie(owner: HostOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = uniform(SHAPE, "float32")
    seen: list[tuple[int, str, int | None]] = []
    reach = devices.OnDevice.reach

    def spy(*arguments: Any) -> Any:
        here = current.here()
        seen.append((here.stream, here.device, owner.active))
        return reach(*arguments)

    monkeypatch.setattr(devices.OnDevice, "reach", spy)
    options: dict[str, Any] = {"causal": True, "align": np.array([8, 0]), "sinks": np.ones(4, np.float32)}
    want, want_lse = flashtile.attention(q, k, v, kernel="vanilla", return_lse=True, **options)
    o, lse = flashtile.attention(*on_device(q, k, v, device=1), return_lse=True, **options)
    assert isinstance(o, DeviceArray) and o.device.id == lse.device.id == 1
    assert np.array_equal(o.array, want) and np.array_equal(lse.array, want_lse)
    assert seen == [(0x1001, "cuda:1", 1)], "the library's stream and device"
    assert [entry[0] for entry in owner.diary] == ["empty", "empty", "upload", "mark"], "nothing is read back"
    with pytest.raises(LookupError):
        current.here()


def test_a_second_call_is_prepared_and_another_device_is_not_the_same(owner: HostOwner) -> None:
    from flashtile.calls import cache

    q, k, v = uniform(SHAPE, "float32")
    for device, entries in ((0, 1), (0, 1), (1, 2)):
        flashtile.attention(*on_device(q, k, v, device=device))
        assert len(cache) == entries


def test_options_may_lie_on_the_device(owner: HostOwner) -> None:
    """Sinks are brought into the kernels' form there; a mask and a bias are read where they lie."""
    q, k, v = uniform(SHAPE, "float32")
    taken: list[Any] = []

    class Kernel:
        scratch_bytes, merge_stage = 0, None

        def pack(self, *arguments: Any) -> Any:
            taken.append(arguments[6])

        def run(self, *arguments: Any) -> int:
            return 0

    sinks, bias = on_device(np.ones(4), np.ones((12, 20), np.float32))
    with pytest.MonkeyPatch.context() as patch:
        fake = dataclasses.replace(vanilla.FAMILY, compile=lambda *arguments: Kernel())
        patch.setattr(vanilla, "FAMILY", fake)
        flashtile.attention(*on_device(q, k, v), sinks=sinks, bias=bias)
    scoring = taken[0]
    assert scoring.sinks.place.device == "cuda:0" and scoring.sinks.array.shape == (2, 4)
    assert scoring.sinks.element == "f32", "as the accumulator"
    assert scoring.program.captures[0].place.address == bias.data.ptr
    with pytest.raises(SpecError, match="^sinks: got an array on cuda:0, expected one in CPU memory"):
        flashtile.attention(q, k, v, sinks=sinks)


def test_out_is_written(owner: HostOwner) -> None:
    q, k, v = uniform(SHAPE, "float32")
    (out,) = on_device(np.zeros((2, 4, 12, 8), np.float32))
    assert flashtile.attention(*on_device(q, k, v), out=out) is out
    assert np.array_equal(out.array, flashtile.attention(q, k, v, kernel="vanilla"))
    x, y, z = on_device(q, k, v)
    with pytest.raises(SpecError, match="^out: got an array within the memory that q spans"):
        flashtile.attention(x, x, x, out=x)
    (far,) = on_device(out.array, device=1)
    with pytest.raises(SpecError, match="^out: got an array on cuda:1, expected one on cuda:0 as q"):
        flashtile.attention(x, y, z, out=far)
    with pytest.raises(SpecError, match="^out: got a numpy.ndarray on cpu, expected a cupy.DeviceArray on cuda:0"):
        flashtile.attention(x, y, z, out=out.array)


def test_arrays_on_different_devices(owner: HostOwner) -> None:
    q, k, v = uniform(SHAPE, "float32")
    near, far = on_device(q, k, v), on_device(q, k, v, device=1)
    with pytest.raises(SpecError, match="^v: got an array on cuda:1, expected one on cuda:0 as q"):
        flashtile.attention(near[0], near[1], far[2])
    with pytest.raises(SpecError, match="^k: got a numpy.ndarray on cpu, expected a cupy.DeviceArray on cuda:0 as q"):
        flashtile.attention(near[0], k, v)
    with pytest.raises(SpecError, match="^k: got a cupy.DeviceArray on cuda:0, expected a numpy.ndarray on cpu as q"):
        flashtile.attention(q, near[1], near[2])
    assert not owner.diary, "no memory was touched"


def test_no_usable_kernel_says_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(owners.OWNERS, "cupy", HostOwner)
    q, k, v = on_device(*uniform(SHAPE, "float32"))
    message = "kernel: got 'auto', .*cpu: runs on cpu, not on cuda; vanilla: runs on cpu, not on cuda; .*triton: "
    with pytest.raises(UnavailableError, match=message):
        flashtile.attention(q, k, v)
    with pytest.raises(UnavailableError, match="kernel: got 'cpu', .*; cpu: runs on cpu, not on cuda$"):
        flashtile.attention(q, k, v, kernel="cpu")


@pytest.mark.parametrize(("step", "what"), [("empty", "the output, 3072 bytes"), ("upload", "align, 16 bytes")])
def test_a_full_device_loses_nothing(owner: HostOwner, step: str, what: str) -> None:
    """The library's own error is the cause; inputs are as they were, and the next call succeeds."""
    arrays = uniform(SHAPE, "float32")
    before, given = [x.copy() for x in arrays], on_device(*arrays)
    options: dict[str, Any] = {"causal": True, "align": np.array([1, 2])}
    owner.full_at = step
    with pytest.raises(KernelError, match=f"^cuda:0: no memory for {what}: no room to {step}$") as caught:
        flashtile.attention(*given, **options)
    assert isinstance(caught.value.__cause__, Full)
    owner.full_at = None
    flashtile.attention(*given, **options)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, before, strict=True))


def test_jax_lends_its_arrays(owner: HostOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    """To an owner, through DLPack, and results go back the same way: DLPack orders the streams."""
    q, k, v = uniform(SHAPE, "float32")

    class JaxArray(DeviceArray):
        __module__ = "jaxlib._jax"

    def from_dlpack(x: Any) -> Any:
        assert isinstance(x, JaxArray)
        return DeviceArray(x.array)

    for name, contents in (
        ("cupy", {"from_dlpack": from_dlpack}),
        ("jax", {}),
        ("jax.dlpack", {"from_dlpack": lambda x: JaxArray(x.array)}),
    ):
        monkeypatch.setitem(sys.modules, name, _module(name, contents))
    monkeypatch.setitem(owners.OWNERS, "torch", owners.OWNERS["cupy"])
    o, lse = flashtile.attention(*(JaxArray(x) for x in (q, k, v)), return_lse=True)
    assert isinstance(o, JaxArray) and isinstance(lse, JaxArray)
    assert np.array_equal(o.array, flashtile.attention(q, k, v, kernel="vanilla"))
    with pytest.raises(SpecError, match="^out: got an array of jax, whose arrays are not written to"):
        flashtile.attention(*(JaxArray(x) for x in (q, k, v)), out=JaxArray(q))


def test_inputs_live_until_the_device_has_read_them(owner: HostOwner) -> None:
    """A caller may drop its arrays at once; the next call lets go of those whose kernels have run."""
    owners._held.clear()
    q, k, v = (DeviceArray(x) for x in uniform(SHAPE, "float32"))
    gone = weakref.ref(q)
    flashtile.attention(q, k, v)
    del q
    gc.collect()
    assert gone() is not None and len(owners._held) == 1
    other = DeviceArray(uniform(SHAPE, "float32")[0])
    flashtile.attention(other, k, v)
    assert gone() is not None and len(owners._held) == 2
    owner.idle = True
    flashtile.attention(other, k, v)
    gc.collect()
    assert gone() is None and not owners._held


def test_other_libraries_are_named() -> None:
    class Foreign(DeviceArray):
        __module__ = "foreign.arrays"

    with pytest.raises(SpecError, match="^q: got an array of foreign on a GPU, expected one of torch, CuPy or JAX"):
        flashtile.attention(*(Foreign(x) for x in uniform(SHAPE, "float32")))


def test_explain_knows_the_device(owner: HostOwner) -> None:
    told = flashtile.explain(*on_device(*uniform(SHAPE, "float32")))
    assert (told.kernel, told.spec.device) == ("vanilla", "cuda:0")
    assert ("cpu", "runs on cpu, not on cuda") in told.passed_over
    assert flashtile.explain((1, 2, 8, 4), device="cuda").spec.device == "cuda:0"
    with pytest.raises(SpecError, match="^device: got 'tpu', expected"):
        flashtile.explain((1, 2, 8, 4), device="tpu")
    with pytest.raises(SpecError, match="^device: got 'cuda:0', expected 'cpu' as q, or None"):
        flashtile.explain(np.ones((2, 2)), device="cuda")


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents, __spec__=SimpleNamespace(name=name))
    return module


@pytest.fixture
def backward(owner: HostOwner, monkeypatch: pytest.MonkeyPatch) -> HostOwner:
    """`owner`, with the CPU's gradients in place of the device's own."""
    able = cpu.FAMILY.capabilities

    def capabilities(spec: Any) -> Any:
        found = able(dataclasses.replace(spec, device="cpu"))
        return dataclasses.replace(found, devices=frozenset(("cpu", "cuda")))

    monkeypatch.setattr(cpu, "FAMILY", dataclasses.replace(cpu.FAMILY, capabilities=capabilities))
    return owner


def test_gradients_are_arrays_of_the_library(backward: HostOwner) -> None:
    do, q, k, v = uniform(SHAPE, "float32")[:1] + uniform(SHAPE, "float32", seed=1)
    options: dict[str, Any] = {"causal": True, "align": np.array([8, 0]), "sinks": np.ones((2, 4), np.float32)}
    o, lse = flashtile.attention(q, k, v, kernel="cpu", return_lse=True, **options)
    wrt = ("q", "v", "sinks")
    want = flashtile.attention_backward(do, q, k, v, o, lse, wrt=wrt, kernel="cpu", **options)
    arrays = on_device(do, q, k, v, o, lse, device=1)
    got = flashtile.attention_backward(*arrays, wrt=wrt, kernel="cpu", **options)
    assert got.k is None and all(getattr(got, name).device.id == 1 for name in wrt)
    for name in wrt:
        np.testing.assert_array_equal(getattr(got, name).array, getattr(want, name))
    asked = [entry[0] for entry in backward.diary]
    assert asked == ["zeros", "zeros", "upload", "zeros", "mark"], "nothing is read back"


def test_wrong_gradients_of_a_device(backward: HostOwner) -> None:
    q, k, v = uniform(SHAPE, "float32")
    o, lse = flashtile.attention(q, k, v, kernel="cpu", return_lse=True)
    x, y, z, out, row, far = (*on_device(q, k, v, o, lse), *on_device(o, device=1))
    for change, problem in (
        ({"do": o}, "^do: got a numpy.ndarray on cpu, expected an array on cuda:0 as q"),
        ({"do": far}, "^do: got a cupy.DeviceArray on cuda:1, expected an array on cuda:0 as q"),
        ({"lse": out}, "^lse: got shape "),
        ({"out": flashtile.Gradients()}, "^out: got an array to write to, expected None for arrays on a GPU"),
    ):
        given = {"do": out, "q": x, "k": y, "v": z, "o": out, "lse": row, **change}
        with pytest.raises(SpecError, match=problem):
            flashtile.attention_backward(**given)
