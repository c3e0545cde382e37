"""Every test that takes `kernel` runs on each kernel family, and on each instruction set, that this machine has."""

from __future__ import annotations

import contextlib
import os
import signal

# Test workers share the cores; BLAS threads of each would wait for one another, busily, and so do torch's, which took
# half of the processor's time. Before NumPy and torch are loaded; programs that tests start inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts what runs in the background with interrupts ignored, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# ruff: noqa: E402
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from kernel_cases import GRID_PROPERTY, Kernel, computes_apart, kernel_params, left_out, marks_of

import flashtile
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES

# Compiling a kernel takes half a second inside an example, so no deadline. The examples are the same on every run: the
# accuracy rule is a statistical one, and some one in 200 tiny problems misses it by a little on a kernel that is right.
_QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
# They are not where Hypothesis draws constants of the sources that happen to be imported, as its later versions do.
with contextlib.suppress(ImportError):
    from hypothesis.internal.conjecture import providers

    providers.is_local_module_file = lambda path: False
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=15, suppress_health_check=_QUIET)
settings.load_profile("tests")


def pytest_report_header() -> list[str]:
    return left_out()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "kernel" in names and "dtype" in names:
        pairs = [
            pytest.param(x.values[0], dtype, id=f"{x.id}-{dtype}", marks=marks_of(x.values[0], dtype))
            for x in kernel_params()
            for dtype in DTYPES
            if computes_apart(x.values[0], dtype)
        ]
        metafunc.parametrize(("kernel", "dtype"), pairs, indirect=["kernel"])
    elif "kernel" in names:
        kernels = [x for x in kernel_params() if computes_apart(x.values[0], None)]
        metafunc.parametrize("kernel", kernels, indirect=True)
    elif "dtype" in names:
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
