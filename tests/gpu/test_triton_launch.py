"""Launches on a GPU, as far as they go without one: real machine code, and a driver that writes down what it is told.

The parameters of each launch are read back by the offsets that stand in the machine code itself.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from devices import DeviceArray, HostOwner
from inputs import Shape, uniform

import flashtile
from benchmarks.gpu import precompile
from flashtile import owners
from flashtile.calls import clear_cache
from flashtile.errors import KernelError, UnavailableError
from flashtile.kernels import triton as family
from flashtile.kernels.triton import cuda, driver, kept, parameters
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.resources import resources_of
from flashtile.kernels.triton.specialisation import Specialisation

ARCH = "sm_90"
SHAPE = Shape(2, 4, 2, 200, 333, 64, 64)


class Launched(NamedTuple):
    """One line of the fake driver's log."""

    function: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    parameters: bytes


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled against NVIDIA's header, which Triton brings."""
    import triton

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fake driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    target = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).parent / "fake_cuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-I", include, "-o", target, source], check=True)
    return target


class Gpu:
    """A machine with fake GPUs: what was launched, and with which specialisations."""

    def __init__(self, log: Path) -> None:
        self.log, self.specialisations = log, list[Specialisation]()
        self.owner = HostOwner()

    def launches(self) -> list[Launched]:
        found = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            words = line.split()
            x, y = (tuple(map(int, words[n : n + 3])) for n in (3, 7))
            found.append(Launched(words[1], x, y, int(words[11]), int(words[13]), bytes.fromhex(words[15])))
        return found


CACHES = (driver.library, driver.device, driver._primary_context, cuda._loaded)


@pytest.fixture
def gpu(fake_driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    machine = Gpu(tmp_path / "log")
    monkeypatch.setenv("FAKE_CUDA_LOG", str(machine.log))
    monkeypatch.setenv("FAKE_CUDA_ARCH", ARCH.removeprefix("sm_"))
    monkeypatch.setattr(driver, "LIBRARY", str(fake_driver))
    monkeypatch.setattr(driver, "missing", lambda: None)
    untested = replace(family.FAMILY, refuses=lambda spec: None)  # the self-test needs a GPU that computes
    monkeypatch.setattr(family, "FAMILY", untested)
    monkeypatch.setitem(owners.OWNERS, "cupy", lambda: machine.owner)  # type: ignore[arg-type]
    launch = cuda.Ready.__call__

    def spy(ready: cuda.Ready, grid: int, values: Any) -> None:
        machine.specialisations.append(ready.specialisation)
        launch(ready, grid, values)

    monkeypatch.setattr(cuda.Ready, "__call__", spy)
    for cache in CACHES:
        cache.cache_clear()
    clear_cache()
    kept.forget()
    yield machine
    clear_cache()
    for cache in CACHES:
        cache.cache_clear()


def read(launched: Launched, specialisation: Specialisation) -> dict[str, int]:
    """The values of the parameters by name, at the offsets that the machine code has."""
    places = resources_of(compiled(specialisation, ARCH)).parameters
    names = [*(name for name, _ in parameters.flat_names(specialisation)), "global_scratch", "profile_scratch"]
    assert len(places) == len(names) and len(launched.parameters) == places[-1].offset + places[-1].size
    values = {}
    for name, place in zip(names, places, strict=True):
        raw = launched.parameters[place.offset : place.offset + place.size]
        values[name] = int.from_bytes(raw, "little", signed=True)
    return values


def test_what_the_driver_is_told(gpu: Gpu) -> None:
    q, k, v = (DeviceArray(x, 1) for x in uniform(SHAPE, "float32"))
    o, lse = flashtile.attention(q, k, v, causal=True, align="bottom_right", return_lse=True, scale=0.3)
    launches = gpu.launches()
    assert [x.function for x in launches] == ["forward", "forward"], "one, and one that looks for what is not finite"
    for launched, what in zip(launches, gpu.specialisations, strict=True):
        meta, constants = compiled(what, ARCH).metadata, dict(what.constants)
        query_tiles = -(-200 // constants["TILE_Q"])
        assert launched.grid == (2 * 4 * query_tiles, 1, 1)
        assert launched.block == (32 * what.num_warps, 1, 1) and launched.shared == meta.shared
        assert launched.stream == gpu.owner.stream(q)
        got = read(launched, what)
        expected = {
            "q": q.data.ptr,
            "k": k.data.ptr,
            "v": v.data.ptr,
            "o": o.data.ptr,
            "lse": lse.data.ptr,
            "first": 0,
            "q_b": 4 * 200 * 64,
            "q_h": 200 * 64,
            "q_s": 64,
            "k_b": 2 * 333 * 64,
            "v_h": 333 * 64,
            "o_s": 64,
            "heads": 4,
            "group": 2,
            "q_len": 200,
            "kv_len": 333,
            "head_size": 64,
            "value_size": 64,
            "query_tiles": query_tiles,
            "splits": 1,
            "split_keys": 333,
            "right": 0,
            "offset": 133,
            "scale": struct.unpack("<q", struct.pack("<d", 0.3))[0],
            "global_scratch": 0,
            "profile_scratch": 0,
        }
        assert {name: got[name] for name in expected} == expected
    assert [dict(x.constants)["CONTAIN"] for x in gpu.specialisations] == [False, True]
    assert read(launches[0], gpu.specialisations[0])["odd"] == read(launches[1], gpu.specialisations[1])["odd"] != 0
    assert not [entry for entry in gpu.owner.diary if entry[0] == "download"], "nothing is waited for"


def test_the_second_launch_is_small(gpu: Gpu) -> None:
    """It looks for marks with a program a processor, however many work items there are. What descriptors are made in
    is the first one's alone, and a part of the workspace: one allocation."""
    q = DeviceArray(uniform(Shape(2, 16, 16, 1300, 64, 64, 64), "float16")[0])
    k = DeviceArray(uniform(Shape(2, 16, 16, 64, 64, 64, 64), "float16")[0])
    flashtile.attention(q, k, k)
    first, second = gpu.launches()
    told, again = (read(*both) for both in zip((first, second), gpu.specialisations, strict=True))
    assert first.grid[0] == again["items"] > 132 and second.grid == (132, 1, 1)
    own = first.grid[0] * compiled(gpu.specialisations[0], ARCH).metadata.global_scratch_size
    assert own and told["odd"] == told["global_scratch"] + own and again["global_scratch"] == 0
    ahead = [precompile.specialised(precompile.Job(64, False, "float16", contain), ARCH) for contain in (False, True)]
    assert gpu.specialisations == ahead, "what the run on hardware compiles beside its checks"
    assert sum(entry[0] == "empty" for entry in gpu.owner.diary) == 2, "the output, and the workspace"


@pytest.mark.parametrize("device", [0, 1])
def test_a_context_that_is_current_is_kept(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, device: int) -> None:
    """A library has made the first device's current on this thread: a launch on the second still finds its own."""
    q = DeviceArray(uniform(Shape(1, 1, 1, 20, 20, 64, 64), "float16")[0], device)
    monkeypatch.setenv("FAKE_CUDA_BOUND", "1")
    pushed: list[int] = []
    entered = driver._on
    monkeypatch.setattr(driver, "_on", lambda number: pushed.append(number) or entered(number))  # type: ignore[func-returns-value]
    flashtile.attention(q, q, q)
    pushed.clear()
    flashtile.attention(q, q, q)
    assert pushed == [1, 1] * device and len(gpu.launches()) == 4


def test_few_queries_are_split_over_keys_and_merged(gpu: Gpu) -> None:
    """Heads of a group share a tile, parts of the keys are computed apart, and the merge follows in the stream."""
    q, k, v = (DeviceArray(x) for x in uniform(Shape(1, 8, 2, 1, 4096, 64, 64), "float16"))
    o = flashtile.attention(q, k, v)
    first, contain, merge = gpu.launches()
    assert (first.function, contain.function, merge.function) == ("forward", "forward", "merge")
    values, merged = read(first, gpu.specialisations[0]), read(merge, gpu.specialisations[2])
    splits = values["splits"]
    assert first.grid == (2 * splits, 1, 1) and splits > 1 and values["split_keys"] * splits >= 4096
    assert merge.grid == (8, 1, 1) and merged["splits"] == splits
    assert merged["parts_o"] == values["o"] and merged["parts_lse"] == values["lse"] and merged["o"] == o.data.ptr


def test_captured_arrays_of_the_host_are_copied_once_as_they_broadcast(gpu: Gpu) -> None:
    q, k, v = (DeviceArray(x) for x in uniform(Shape(2, 2, 2, 40, 50, 64, 64), "float32"))
    bias = np.broadcast_to(np.arange(50, dtype=np.float32), (2, 2, 40, 50))
    here = DeviceArray(np.ones((40, 50), bool))
    for n in range(2):
        flashtile.attention(q, k, v, bias=bias, mask=here, sinks=np.zeros(2, np.float32))
        copied = [entry for entry in gpu.owner.diary if entry[0] == "upload"]
        assert len(copied) == 3 + 2 * n, "the table of what the mask shows is there still"
    values = read(gpu.launches()[0], gpu.specialisations[0])
    addresses = [value for name, value in values.items() if name.startswith("captures[")]
    assert here.data.ptr in addresses, "read where it lies"
    assert ("upload", (1, 1, 1, 50)) in gpu.owner.diary, "once, not for every row"
    assert values["rows"] and values["runs"] and values["sinks"]


def test_no_item_is_no_launch(gpu: Gpu) -> None:
    q, k, v = (DeviceArray(x) for x in uniform(Shape(1, 2, 2, 0, 50, 64, 64), "float32"))
    assert flashtile.attention(q, k, v).shape == (1, 2, 0, 64)
    assert not gpu.launches()


@pytest.mark.parametrize(
    ("fails", "message", "cause"),
    [
        ("cuLaunchKernel:2", "launch: NVIDIA's driver: error 2: out of memory", MemoryError),
        ("cuModuleLoadData:209", "load of kernel forward: NVIDIA's driver: error 209: as the test wanted", None),
        ("cuInit:100", "start: NVIDIA's driver: error 100", None),
    ],
)
def test_the_driver_says_no(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, fails: str, message: str, cause: type[Exception] | None
) -> None:
    """The error names the step and has the driver's words; the next call succeeds."""
    q, k, v = (DeviceArray(x) for x in uniform(Shape(1, 2, 2, 40, 50, 64, 64), "float32"))
    monkeypatch.setenv("FAKE_CUDA_FAIL", fails)
    with pytest.raises(KernelError, match=message) as caught:
        flashtile.attention(q, k, v)
    chain = [caught.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)  # type: ignore[arg-type]
    assert cause is None or isinstance(chain[-1], cause)
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    flashtile.attention(q, k, v)
    assert len(gpu.launches()) == 2


def test_a_kernel_too_large_for_the_device(gpu: Gpu) -> None:
    with pytest.raises(KernelError, match="kernel forward: got 300000 bytes of shared memory, expected 232448 at most"):
        driver.load(0, b"\x7fELF", "forward", 128, 300000)


def test_the_capabilities_are_those_of_the_device(gpu: Gpu) -> None:
    told = flashtile.explain((1, 8, 4096, 64), dtype="bfloat16", device="cuda", causal=True)
    assert (told.kernel, told.isa, told.plan.at_once) == ("triton", ARCH, True)
    assert "all work items at once on cuda:0" in str(told)
    assert driver.device(0) == driver.Device("Fake GPU 0", ARCH, 227 << 10, 132, 50 << 20)
    with pytest.raises(UnavailableError, match="triton: head sizes up to 256, not 300"):
        flashtile.explain((1, 8, 64, 300), device="cuda")
