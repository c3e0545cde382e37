"""From text to callable code: errors, symbols, threads, forks, and how long the first call of a process takes."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from lanes import every_isa
from modules import every_module

from flashtile.errors import KernelError
from flashtile.llvm import cache, jit
from flashtile.llvm import machines as isas
from flashtile.llvm.machines import ISA

ADD = "define i64 @add(i64 %a, i64 %b) {\n %c = add i64 %a, %b\n ret i64 %c\n}"
CALLS_OUT = "declare i64 @labs(i64)\ndefine i64 @f(i64 %a) {\n %c = call i64 @labs(i64 %a)\n ret i64 %c\n}"


def undefined_symbols(obj: bytes) -> list[str]:
    """Names that a 64-bit ELF object leaves to the linker."""
    assert obj[:5] == b"\x7fELF\x02", "not a 64-bit ELF object"
    (sections_at,) = struct.unpack_from("<Q", obj, 40)
    size, count = struct.unpack_from("<HH", obj, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", obj, sections_at + n * size) for n in range(count)]
    names = []
    for section in sections:
        if section[1] != 2:  # not a symbol table
            continue
        strings_at = sections[section[6]][4]
        for at in range(section[4] + 24, section[4] + section[5], 24):  # the first symbol is void
            name, _, _, index = struct.unpack_from("<IBBH", obj, at)
            if index == 0:
                start = strings_at + name
                names.append(obj[start : obj.index(b"\0", start)].decode())
    return names


def test_undefined_symbols_are_found() -> None:
    assert undefined_symbols(jit.object_code(CALLS_OUT, isas.current())) == ["labs"]
    assert undefined_symbols(jit.object_code(ADD, isas.current())) == []


MODULES = every_module(for_tests_too=True)


@pytest.mark.parametrize(("isa", "text"), MODULES.values(), ids=MODULES)
def test_kernels_call_no_library_function(isa: ISA, text: Callable[[], str]) -> None:
    """No memset, fma or conversion that the target lacks: on every instruction set, on whatever machine this runs."""
    assert undefined_symbols(jit.object_code(text(), isa)) == []


def test_a_missing_export_does_not_link() -> None:
    with pytest.raises(KernelError, match="other"):
        jit.Library(jit.object_code(ADD, isas.current()), ("other",))


@pytest.mark.parametrize("isa", every_isa())
def test_a_function_runs(isa: ISA) -> None:
    library = jit.Library(jit.object_code(ADD, isa), ("add",))
    add = library.function("add", ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    assert add(40, 2) == 42
    assert library.address("add") == ctypes.cast(add, ctypes.c_void_p).value  # type: ignore[arg-type]


def test_an_object_that_does_not_link_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path / "cache"))
    jit.load(lambda: ADD, "key", isas.current(), ("add",))
    (kept,) = (tmp_path / "cache").iterdir()
    cache._write(kept, b"whole, but no object")
    library = jit.load(lambda: ADD, "key", isas.current(), ("add",))
    assert library.function("add", ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(1, 2) == 3
    assert cache._read(kept) == jit.object_code(ADD, isas.current())


def test_threads_that_want_one_kernel_build_it_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path))
    built, libraries = [], []

    def generate() -> str:
        built.append(1)
        return ADD

    def load() -> None:
        libraries.append(jit.load(generate, "one", isas.current(), ("add",)))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(libraries) == 6 and len(built) == 1


def test_a_child_forked_while_code_is_generated_can_generate_code() -> None:
    """The fork waits, so the child finds no lock that no one will release."""
    inside, leave = threading.Event(), threading.Event()

    def generate() -> str:
        inside.set()
        leave.wait(10)
        return ADD

    thread = threading.Thread(target=jit.load, args=(generate, os.urandom(8).hex(), isas.current(), ("add",)))
    thread.start()
    assert inside.wait(10)
    threading.Timer(0.2, leave.set).start()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            library = jit.Library(jit.object_code(ADD, isas.current()), ("add",))
            status = library.function("add", ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(-1, 1)
        finally:
            os._exit(status)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


FIRST_CALL = """
import time
import numpy as np
import flashtile, llvmlite.binding
import flashtile.kernels.cpu.passes.forward, flashtile.kernels.cpu.passes.merge, flashtile.llvm.jit
q = np.ones((1, 1, 64, 64), np.float32)
begin = time.process_time()
flashtile.attention(q, q, q)
first = time.process_time()
flashtile.attention(q, q, q)
print((first - begin) - (time.process_time() - first))
"""


def test_the_first_call_of_a_process(tmp_path: Path) -> None:
    """Beyond the run itself, imports aside: 1 s where nothing is cached, 60 ms where the object is on disk.

    In CPU time of the process, the better of two: the machine may be busy.
    """

    def seconds(folder: Path) -> float:
        environment = {**os.environ, "FLASHTILE_CACHE_DIR": str(folder)}
        return float(subprocess.check_output([sys.executable, "-c", FIRST_CALL], env=environment, text=True))

    cold = min(seconds(tmp_path / str(n)) for n in range(2))
    warm = min(seconds(tmp_path / "0") for _ in range(2))
    print(f"first call: cold {cold * 1e3:.0f} ms, warm {warm * 1e3:.1f} ms")
    assert cold < 1.0
    assert warm < 0.06
    assert warm < cold / 4, "nothing came from the cache"
