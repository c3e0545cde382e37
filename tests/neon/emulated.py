"""A pytest plugin: the CPU kernels are generated for NEON, and run under user-mode emulation.

    PYTHONPATH=tests/neon pytest -p emulated ...

Everything but the native call is the product: the API, the plan, the parameters, the engine.  The call is made by an
aarch64 program, driver.c linked with the kernel's object, on the memory of this process.  With the plugin, any
test that takes ``kernel`` runs on NEON instead of on this machine's instruction sets.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import flashtile
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.machines import ISA

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_DRIVER = Path(__file__).with_name("driver.c")
_FAILURES = range(120, 124)  # the driver's own
_NO_ROOM = 122  # an address is taken by the emulator, which lies elsewhere each time
_PR_SET_PTRACER, _ANYONE = 0x59616D61, -1

programs_run = itertools.count()  # next() tells how many, so that a test can know that NEON code ran at all


class Library:
    """As jit.Library, but its functions run under the emulator."""

    def __init__(self, obj: bytes):
        self._keep = tempfile.TemporaryDirectory(prefix="flashtile-neon-")
        self._folder = Path(self._keep.name)
        (self._folder / "kernel.o").write_bytes(obj)

    def function(self, name: str, returns: object, *args: type) -> Callable[..., int]:
        program = self._folder / name
        command = [COMPILER, "-O1", "-Wall", "-Wextra", "-Werror", "-static", f"-DENTRY={name}", str(_DRIVER)]
        subprocess.run([*command, str(self._folder / "kernel.o"), "-o", str(program)], check=True)
        return functools.partial(self._run, program)

    def _run(self, program: Path, *args: bytes | int | None) -> int:
        next(programs_run)
        numbers = [ctypes.cast(a, ctypes.c_void_p).value if isinstance(a, bytes) else int(a or 0) for a in args]
        command = [EMULATOR, str(program), str(os.getpid()), *map(str, numbers)]
        for _ in range(3):
            status = subprocess.run(command).returncode
            if status != _NO_ROOM:
                break
        if status < 0 or status in _FAILURES:
            raise RuntimeError(f"{' '.join(command)} ended with status {status}")
        return status


def _load(generate: Callable[[], str], key: str, isa: ISA, exports: tuple[str, ...]) -> Library:
    return Library(jit.object_code(generate(), isa))


def pytest_configure() -> None:
    """Before any test is collected: the instruction sets of this machine are NEON's, and one thread calls."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_long(_ANYONE), 0, 0, 0)  # where only a parent may look
    isas._host_features = lambda: frozenset(("aarch64", "bf16"))
    jit.load = _load
    flashtile.set_num_threads(1)


def pytest_collection_modifyitems(items: list) -> None:
    """Of the collected tests, just those that a kernel family with instruction sets takes."""
    items[:] = [i for i in items if "cpu-neon" in i.nodeid or "neon/" in i.nodeid]
