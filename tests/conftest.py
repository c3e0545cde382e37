"""Every test that takes `kernel` runs on each kernel family, and on each instruction set, that this machine has."""

from __future__ import annotations

import os

# Test workers share the cores; BLAS threads of each would wait for one another, busily. Before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# ruff: noqa: E402
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import flashtile
import flashtile.kernels
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES

# Compiling a kernel takes half a second inside an example, so no deadline. The examples are the same on every run: the
# accuracy rule is a statistical one, and some one in 200 tiny problems misses it by a little on a kernel that is right.
_QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=15, suppress_health_check=_QUIET)
settings.load_profile("tests")

GRID_PROPERTY = "grid element checks"


@dataclass(frozen=True)
class Kernel:
    """One kernel family, on one instruction set where it has several; called as `flashtile.attention`."""

    name: str
    isa: str | None

    def __call__(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return flashtile.attention(q, k, v, kernel=self.name, **options)


@cache
def kernel_params() -> list[Any]:
    """One test parameter for each kernel and instruction set; what cannot run here is skipped with its reason."""
    params = []
    for room, name, available, reason in flashtile.kernels.survey():
        if room != "kernel":
            continue
        if not available:
            params.append(pytest.param(Kernel(name, None), id=name, marks=pytest.mark.skip(reason=f"{name}: {reason}")))
            continue
        for isa in _isas(name):
            params.append(pytest.param(Kernel(name, isa), id=name if isa is None else f"{name}-{isa}"))
    return params


def _isas(name: str) -> list[str | None]:
    """The instruction sets that a family can be forced to use on this machine; [None] if it has no such choice."""
    try:
        module = importlib.import_module(f"flashtile.kernels.{name}.isa")
    except ModuleNotFoundError:
        return [None]
    return list(module.usable())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernel_params(), indirect=True)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", list(DTYPES))


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The kernel under test, its instruction set in force."""
    if request.param.isa is not None:
        monkeypatch.setenv("FLASHTILE_ISA", request.param.isa)
    clear_cache()
    yield request.param
    clear_cache()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and puts it back after the test."""
    before = flashtile.get_num_threads()
    yield flashtile.set_num_threads
    flashtile.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The count that the grid is known by, for each kernel; it comes with the reports, from workers too."""
    for report in terminalreporter.stats.get("passed", []):
        for key, count in getattr(report, "user_properties", []):
            if key == GRID_PROPERTY:
                terminalreporter.write_line(f"{report.nodeid}: {count:,} element checks")
