"""StarPU's tests: each that could hang or abort runs in a process of its own."""

from __future__ import annotations

import os

os.environ.setdefault("STARPU_NCPU", "2")
os.environ.setdefault("STARPU_SILENT", "1")

# ruff: noqa: E402
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_gpu
import processes
import pytest

from flashtile.engines import starpu as engine
from flashtile.engines.starpu import manifest, runtime
from flashtile.kernels.triton import aot

HERE = Path(__file__).parent

# What most scripts begin with: random q, k, v and room for o and lse, in a reproducible way.
PRELUDE = """
import os, sys, time
import numpy as np
import flashtile
from flashtile import starpu
from flashtile.errors import FlashtileError, KernelError, SpecError, UnavailableError

def arrays(q_len=300, kv_len=300, heads=2, size=16, dtype="float32"):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, n, size)).astype(dtype) for n in (q_len, kv_len, kv_len))
    return q, k, v, np.zeros_like(q), np.zeros((1, heads, q_len), "float32")

def registered(rows=100, **sizes):
    given = arrays(**sizes)
    return given, [starpu.register(x, rows) for x in given]

def starpu_library():
    # What the binding is linked to, which need not be what the loader would find.
    import ctypes
    from flashtile.engines.starpu import build
    build.load()
    with open("/proc/self/maps") as maps:
        return ctypes.CDLL(next(line.split()[-1] for line in maps if "/libstarpu-1" in line))

def message(call, kind=FlashtileError):
    try:
        call()
    except kind as error:
        return str(error)
    raise SystemExit(f"no {kind.__name__}")
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = engine.unavailable()
    if reason is None:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"StarPU: {reason}"))


Script = Callable[..., "subprocess.CompletedProcess[str]"]


@contextmanager
def asleep() -> Iterator[None]:
    """Idle workers of the StarPU that these tests share would take the processors from the process that a test runs."""
    polls = runtime.running() and not runtime.current().pauses
    if polls:
        runtime.current().lib.ft_pause()
    try:
        yield
    finally:
        if polls:
            runtime.current().lib.ft_resume()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs Python text after PRELUDE in a process of its own; fails the test unless it returns `status`."""

    def run(body: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "script.py"
        path.write_text(PRELUDE + textwrap.dedent(body))
        with asleep():
            done = processes.run([sys.executable, str(path)], env={**os.environ, **environment})
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def starpu() -> Iterator[object]:
    """The door, with StarPU running; started once, whatever the test."""
    from flashtile import starpu as door

    if not runtime.running():
        door.init()
    yield door


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kernel of one dtype, and the merge of states, which that one has not."""
    path = tmp_path_factory.mktemp("kernels")
    merging = (one for one in fake_gpu.chosen("float64") if one.name.startswith("merge"))
    list(aot.build(path, fake_gpu.ARCH, [*fake_gpu.chosen(fake_gpu.QUICK), *merging]))
    return path


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_gpu.build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def machine(driver: Path, starpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes the running StarPU one with kernels of a folder."""
    fake_gpu.use_driver(driver)
    for name in ("LOG", "CONTEXT"):  # put back afterwards
        monkeypatch.setenv(f"FAKE_DRIVER_{name}", "")

    def make(folder: Path) -> Any:
        runtime.current().lib.ft_driver_forget()
        monkeypatch.setattr(runtime.current(), "kernels", manifest.Kernels(folder))
        return fake_gpu.Gpu(folder, tmp_path / "log")

    yield make
    runtime.current().lib.ft_driver_forget()
