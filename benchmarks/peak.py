"""What one core, or the memory, can do at most: loops generated through llvmlite, measured in the same run.

Dot-product peaks: independent accumulators that stay in registers, so that only the multiply-add units limit. Read
bandwidth: several threads add up a buffer much larger than the caches.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable

import llvmlite.binding as llvm

ACCUMULATORS = 12  # enough to hide the latency of two FMA pipes, few enough for 16 registers
READ_STREAMS = 8
BUFFER_BYTES = 256 << 20


@functools.cache
def host_features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


def vector_bytes() -> int:
    features = host_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx") else 16


def available(kind: str) -> bool:
    """bf16 dot products are measured only where the processor has them."""
    return kind != "bf16" or bool(host_features().get("avx512bf16"))


def _loop(setup: list[str], vector: str, starts: list[str], body: Callable[[int], list[str]]) -> str:
    """A function (pointer, count): `body` turns accumulator %a_s into %r_s in every one of `count` iterations."""
    slots = range(len(starts))
    lines = ["define void @loop(ptr %p, i64 %n) {", "entry:", f"  %sink = alloca {vector}", *setup, "  br label %head"]
    lines += ["head:", "  %i = phi i64 [0, %entry], [%i.next, %head]"]
    lines += [f"  %a{s} = phi {vector} [{starts[s]}, %entry], [%r{s}, %head]" for s in slots]
    for s in slots:
        lines += body(s)
    lines += ["  %i.next = add i64 %i, 1", "  %more = icmp ult i64 %i.next, %n"]
    lines += ["  br i1 %more, label %head, label %done"]
    lines += ["done:"] + [f"  store volatile {vector} %r{s}, ptr %sink" for s in slots] + ["  ret void", "}"]
    return "\n".join(lines)


def _dot_ir(kind: str) -> tuple[str, int]:
    """IR of the multiply-add loop and its FLOPs an iteration."""
    element, size = ("double", 8) if kind == "f64" else ("float", 4)
    lanes = vector_bytes() // size
    vector = f"<{lanes} x {element}>"
    if kind == "bf16":
        operand = f"<{2 * lanes} x bfloat>"
        name, order = f"llvm.x86.avx512bf16.dpbf16ps.{8 * vector_bytes()}", "{acc}, {a}, {b}"
    else:
        operand, suffix = vector, f"v{lanes}f{8 * size}"
        # without an FMA unit llvm.fma would be a library call; fmuladd may split into a product and a sum
        fused = host_features().get("fma") or "aarch64" in llvm.get_process_triple()
        name, order = f"llvm.{'fma' if fused else 'fmuladd'}.{suffix}", "{a}, {b}, {acc}"
    typed = {"acc": f"{vector} %a@", "a": f"{operand} %x", "b": f"{operand} %y"}
    arguments = order.format(**typed)

    def body(s: int) -> list[str]:
        return [f"  %r{s} = call {vector} @{name}({arguments.replace('@', str(s))})"]

    setup = [f"  %x = load {operand}, ptr %p", f"  %y = load volatile {operand}, ptr %p"]
    starts = [f"%seed{s}" for s in range(ACCUMULATORS)]
    for s, start in enumerate(starts):  # from memory one by one, so that no two accumulators are known to be equal
        setup += [f"  %q{s} = getelementptr i8, ptr %p, i64 {s * vector_bytes()}"]
        setup += [f"  {start} = load {vector}, ptr %q{s}"]
    signature = order.format(acc=vector, a=operand, b=operand)
    ir = _loop(setup, vector, starts, body)
    return f"declare {vector} @{name}({signature})\n{ir}", ACCUMULATORS * lanes * (4 if kind == "bf16" else 2)


def _read_ir() -> tuple[str, int]:
    """IR of a sum over consecutive memory and its bytes an iteration."""
    width = vector_bytes()
    vector = f"<{width // 8} x i64>"

    def body(s: int) -> list[str]:
        address = [f"  %o{s} = mul i64 %i, {READ_STREAMS * width}", f"  %e{s} = add i64 %o{s}, {s * width}"]
        load = [f"  %g{s} = getelementptr i8, ptr %p, i64 %e{s}", f"  %v{s} = load {vector}, ptr %g{s}, align 64"]
        return address + load + [f"  %r{s} = add {vector} %a{s}, %v{s}"]

    return _loop([], vector, ["zeroinitializer"] * READ_STREAMS, body), READ_STREAMS * width


@functools.cache
def _compiled(kind: str) -> tuple[Callable[[int, int], None], int, object]:
    """The native function, its work an iteration, and the library that keeps it alive."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    ir, work = _read_ir() if kind == "read" else _dot_ir(kind)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    jit = llvm.create_lljit_compiler(machine)
    library = llvm.JITLibraryBuilder().add_ir(ir).export_symbol("loop").link(jit, f"peak_{kind}")
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(library["loop"])
    return function, work, (jit, library)


@functools.cache
def _buffer(size: int) -> tuple[int, object]:
    """A 64-byte aligned address of `size` bytes that have been written to, and what owns them."""
    import numpy as np

    owner = np.ones(size + 64, dtype=np.uint8)
    return (owner.ctypes.data + 63) & ~63, owner


def dot_peak(kind: str, seconds: float = 0.02, repeats: int = 3, *, factor: float = 1.0) -> float:
    """GFLOP/s of dependent-free multiply-adds on this core: the best of a few short loops. ``factor``: of all products;
    by one that is no power of two sums change in many bits, which may cost power and so the clock."""
    function, work, _ = _compiled(kind)
    size = (ACCUMULATORS + 1) * vector_bytes()
    numbers = [factor] * (size // 4)  # also ordinary ones when read as fp64 or bf16
    memory = (ctypes.c_float * len(numbers))(*numbers)
    address = (ctypes.addressof(memory) + vector_bytes() - 1) & -vector_bytes()
    count, took = 1000, 0.0
    while took < seconds:
        count *= 2
        took = _time(function, address, count)
    return work * count / min(_time(function, address, count) for _ in range(repeats)) / 1e9


def read_bandwidth(threads: int, repeats: int = 3) -> float:
    """GB/s at which `threads` threads together read a large buffer: the best of a few passes."""
    function, work, _ = _compiled("read")
    base, _ = _buffer(BUFFER_BYTES)
    part = BUFFER_BYTES // threads // work
    best = float("inf")
    for _ in range(repeats):
        workers = [threading.Thread(target=function, args=(base + t * part * work, part)) for t in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - start)
    return part * threads * work / best / 1e9


def _time(function: Callable[[int, int], None], address: int, count: int) -> float:
    start = time.perf_counter()
    function(address, count)
    return time.perf_counter() - start


def measure(unit: str, threads: int) -> float | None:
    """GFLOP/s of one core for a dtype's peak, GB/s for "read"; None where the processor has no such unit."""
    if unit == "read":
        return read_bandwidth(threads)
    return dot_peak(unit) if available(unit) else None
