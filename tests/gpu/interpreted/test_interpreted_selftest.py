"""The self-test of a first use, on a device that is Triton's interpreter under another name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import launching  # noqa: F401  # skips this file unless Triton interprets
import numpy as np
import pytest
from devices import DeviceArray, HostOwner
from inputs import Shape, uniform

import flashtile
from flashtile import kernels, owners
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES, round_to_bf16
from flashtile.errors import KernelError, UnavailableError
from flashtile.kernels import triton as family
from flashtile.kernels.triton import driver, selftest
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.spec import AttentionSpec
from flashtile.testing import assert_accurate


class Machine:
    """A GPU in name: `device` is what runs its launches."""

    def __init__(self) -> None:
        self.device: Any = Interpreter()
        self.owner = HostOwner()
        self.launched = 0

    def forget(self) -> None:
        """What a new process does not know."""
        selftest._verdicts.clear()
        clear_cache()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Machine]:
    made = Machine()
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(owners.OWNERS, "cupy", lambda: made.owner)  # type: ignore[arg-type]
    monkeypatch.setattr(family, "interpreting", lambda: False)
    monkeypatch.setattr(family, "device_of", lambda spec: made.device)
    monkeypatch.setattr(driver, "missing", lambda: None)
    monkeypatch.setattr(driver, "device", lambda number: driver.Device(f"Fake GPU {number}", "sm_90", 232448, 132))
    made.forget()
    yield made
    made.forget()


class Faulty(Interpreter):
    """A device that gets one output wrong, as miscompiled code would."""

    def launch(self, specialisation: Any, grid: int, values: Any) -> None:
        super().launch(specialisation, grid, values)
        if specialisation.kernel == "forward":
            elements = (ctypes.c_float * 8).from_address(values["o"].address)
            elements[5] += 0.125


class Broken(Interpreter):
    def launch(self, specialisation: Any, grid: int, values: Any) -> None:
        raise KernelError("launch: NVIDIA's driver: error 719: unspecified launch failure")


class Exhausted(Interpreter):
    def launch(self, specialisation: Any, grid: int, values: Any) -> None:
        raise KernelError("launch: NVIDIA's driver: error 2: out of memory") from MemoryError("full")


def inputs(device: int = 0) -> tuple[tuple[np.ndarray, ...], list[DeviceArray]]:
    arrays = uniform(Shape(1, 2, 1, 20, 30, 16, 16), "float32")
    return arrays, [DeviceArray(x, device) for x in arrays]


def self_tests(machine: Machine) -> int:
    """How many self-tests have read back their two results."""
    return sum(entry[0] == "download" for entry in machine.owner.diary) // 2


def test_the_first_call_on_a_device_tests_and_later_ones_do_not(machine: Machine) -> None:
    arrays, placed = inputs()
    o = flashtile.attention(*placed, causal=True, align=5)
    assert_accurate(o.array, *arrays, causal=True, align=5)
    assert self_tests(machine) == 1
    flashtile.attention(*placed)
    machine.forget()
    flashtile.attention(*placed)
    assert self_tests(machine) == 1, "the verdict is kept for other processes"
    flashtile.attention(*inputs(device=1)[1])
    assert self_tests(machine) == 2, "another device, another verdict"
    row = next(row for row in kernels.survey() if row[1] == "triton")
    assert row[2] and row[3].startswith("Fake GPU 0 (sm_90), triton ") and "failed" not in row[3]


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (Faulty, r"output: error over the .* allowed, in 1 of 35072 elements; at \(0, 0, 5\)"),
        (Broken, "KernelError: a kernel failed .* error 719: unspecified launch failure"),
    ],
)
def test_a_failure_takes_the_kernels_out_of_the_choice(machine: Machine, device: Any, why: str) -> None:
    _, placed = inputs()
    machine.device = device()
    message = rf"triton: failed its self-test in float32 on Fake GPU 0 \(sm_90\): {why}.*tried again, remove "
    for _ in range(2):
        with pytest.raises(UnavailableError, match=message):
            flashtile.attention(*placed)
        machine.forget()
        machine.device = Interpreter()  # the verdict stands, whatever would come now
    assert self_tests(machine) <= 1
    row = next(row for row in kernels.survey() if row[1] == "triton")
    assert "failed its self-test in float32 on Fake GPU 0" in row[3]
    reasons = dict(flashtile.explain(*inputs()[0]).passed_over)
    assert reasons["triton"] == "runs on cuda, not on cpu"
    double = [DeviceArray(x.array.astype(np.float64)) for x in placed]
    flashtile.attention(*double)  # other dtypes have verdicts of their own


def test_want_of_memory_is_no_verdict(machine: Machine) -> None:
    arrays, placed = inputs()
    machine.device = Exhausted()
    with pytest.raises(KernelError, match="out of memory"):
        flashtile.attention(*placed)
    machine.device = Interpreter()
    assert_accurate(flashtile.attention(*placed).array, *arrays)


def test_explain_tells_what_is_known_and_tests_nothing(machine: Machine) -> None:
    told = flashtile.explain((1, 2, 20, 16), device="cuda")
    assert (told.kernel, told.isa) == ("triton", "sm_90") and not machine.owner.diary


def test_a_verdict_that_nobody_could_fail_would_be_none(machine: Machine) -> None:
    """The judge accepts the exact answer in every dtype, and none of the answers that come near it."""
    for name in DTYPES:
        view = flashtile.arrays.contiguous((1, 1), name)
        problem = selftest.problem_of(AttentionSpec.of(view, view, view))
        o, lse = flashtile.testing.expect_values(problem.spec, problem.wide)
        accumulator = DTYPES[DTYPES[name].accumulator].numpy
        right = round_to_bf16(o.value) if name == "bfloat16" else o.value.astype(name)
        log = lse.value.astype(accumulator)
        assert selftest.judge(problem, lambda p, a=right, b=log: (a, b)) is None
        assert np.isnan(o.value).sum() == selftest.HEADS and np.isneginf(lse.value).any(), "the problem's hard parts"
        for wrong in (np.zeros_like(right), np.roll(right, 1, axis=0), right[:, ::-1]):
            assert selftest.judge(problem, lambda p, a=wrong, b=log: (a, b)) is not None
        assert selftest.judge(problem, lambda p, a=right, b=log + 1: (a, b)) is not None
