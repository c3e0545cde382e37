"""AMX: AVX-512 with the bf16 dot, and eight matrix registers of 1 KB, tiles of 16 rows by 16 words.

``amx_emulated`` replaces the tile instructions by their definition, to the bit, on any AVX-512 machine: for tests.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass

from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.machines.avx512 import AVX512, NEEDS, BF16Dot, machine
from flashtile.llvm.machines.base import ISA, TileRegisters
from flashtile.llvm.routines import Routine

TILES, ROWS, ROW_BYTES = 8, 16, 64
_FLOATS, _WORDS = "<16 x float>", "<16 x i32>"
# What ldtilecfg reads: palette 1, from row 0 on; then of each tile the bytes of a row, in 16 bits, and the rows, in 8.
CONFIGURATION = b"".join(
    [bytes([1, 0]), bytes(14), ROW_BYTES.to_bytes(2, "little") * TILES, bytes(16), bytes([ROWS] * TILES), bytes(8)]
)
# Of the control word of x86's float unit: round to nearest, denormals read as 0 and flushed, nothing raised.
_FLUSHING = 0x9FC0
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def _system_call(*numbers: int) -> int:
    """0, or the error's number."""
    library = ctypes.CDLL(None, use_errno=True)
    return 0 if library.syscall(*(ctypes.c_long(n) for n in numbers)) == 0 else ctypes.get_errno()


@functools.cache
def refusal() -> str | None:
    """Ask Linux for the tile registers' state, once a process: threads that run already have it then too, and forked
    children keep it. None, or why it is refused; using tiles would then end the process."""
    if not sys.platform.startswith("linux"):
        return f"matrix registers are asked for on Linux only, not on {sys.platform}"
    error = _system_call(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return f"the system refuses matrix registers: arch_prctl: {os.strerror(error)}" if error else None


class _Instructions(TileRegisters):
    """Tiles by the instructions of AMX."""

    def _emit(self, name: str, *args: Value) -> None:
        self.f.intrinsic(f"llvm.x86.{name}", "void", args)

    def _number(self, tile: int) -> Value:
        return self.f.const("i8", tile)

    def zero(self, tile: int) -> None:
        self._emit("tilezero", self._number(tile))

    def load(self, tile: int, at: Value, stride: Value, *, streamed: bool = False) -> None:
        self._emit("tileloaddt164" if streamed else "tileloadd64", self._number(tile), at, stride)

    def store(self, tile: int, at: Value, stride: Value) -> None:
        self._emit("tilestored64", self._number(tile), at, stride)

    def dot_pairs(self, total: int, left: int, right: int) -> None:
        self._emit("tdpbf16ps", *map(self._number, (total, left, right)))


class _Emulated(TileRegisters):
    """Tiles in memory, and what the instructions do to them."""

    def __init__(self, f: Function) -> None:
        super().__init__(f)
        self.at = f.emit("ptr", f"alloca [{TILES * ROWS * ROW_BYTES} x i8], align {ROW_BYTES}")

    def _tile(self, tile: int) -> Value:
        return self.at + tile * ROWS * ROW_BYTES

    def _copy(self, source: Value, step: Value | int, target: Value, target_step: Value | int) -> None:
        f = self.f
        with f.range(0, ROWS) as row:
            f.store(f.load(_WORDS, source + row * step, align=1), target + row * target_step, align=1)

    def zero(self, tile: int) -> None:
        f = self.f
        with f.range(0, ROWS) as row:
            f.store(f.const(_WORDS, 0), self._tile(tile) + row * ROW_BYTES, align=ROW_BYTES)

    def load(self, tile: int, at: Value, stride: Value, *, streamed: bool = False) -> None:
        self._copy(at, stride, self._tile(tile), ROW_BYTES)

    def store(self, tile: int, at: Value, stride: Value) -> None:
        self._copy(self._tile(tile), ROW_BYTES, at, stride)

    def dot_pairs(self, total: int, left: int, right: int) -> None:
        dot = next((g for g in self.f.module.functions if g.name == "tile_dot"), None) or _emit_dot(self.f.module)
        dot(self.f, total=self._tile(total), left=self._tile(left), right=self._tile(right))  # type: ignore[operator]  # a Routine


def _emit_dot(module: Module) -> Routine:
    """total += left right, as TDPBF16PS computes: for each sum two chains of 16 fused multiply-adds from +0, over even
    and odd elements, whose sum joins it; rounded to nearest, denormals read as 0 and flushed.

    The float unit's mode is the emulation's within the loops alone, in blocks of code that nothing else can enter.
    """
    f = Routine(module, "tile_dot", total="ptr", left="ptr", right="ptr")
    total, left, right = f.parameters
    saved, mode = (f.emit("ptr", "alloca i32, align 4") for _ in range(2))
    f.intrinsic("llvm.x86.sse.stmxcsr", "void", [saved])
    f.store(f.const("i32", _FLUSHING), mode)
    f.intrinsic("llvm.x86.sse.ldmxcsr", "void", [mode])
    zero, upper = f.const(_FLOATS, 0.0), 0xFFFF0000 - (1 << 32)

    def halves(words: Value) -> list[Value]:
        return [f.bitcast(words << 16, "float"), f.bitcast(words & upper, "float")]

    with f.range(0, ROWS) as row:

        def term(k: Value, chains: list[Value]) -> list[Value]:
            word = f.splat(f.load("i32", left + (row * ROW_BYTES + k * 4)), ROWS)
            line = f.load(_WORDS, right + k * ROW_BYTES, align=ROW_BYTES)
            return [f.fma(*x) for x in zip(halves(word), halves(line), chains, strict=True)]

        even, odd = f.fold(0, ROWS, 1, [zero, zero], term)
        at = total + row * ROW_BYTES
        f.store(f.load(_FLOATS, at, align=ROW_BYTES) + (even + odd), at, align=ROW_BYTES)
    f.intrinsic("llvm.x86.sse.ldmxcsr", "void", [saved])
    f.ret()
    return f


@dataclass(frozen=True)
class _AMX(BF16Dot):
    """The instructions, and what surrounds their use."""

    def refusal(self) -> str | None:
        return refusal()

    def enter(self, f: Function) -> None:
        at = f.emit("ptr", f"alloca [{len(CONFIGURATION)} x i8], align {ROW_BYTES}")
        f.store(f.integers(f"<{len(CONFIGURATION)} x i8>", CONFIGURATION), at, align=ROW_BYTES)
        f.intrinsic("llvm.x86.ldtilecfg", "void", [at])

    def leave(self, f: Function) -> None:
        f.intrinsic("llvm.x86.tilerelease", "void", [])

    def tile_registers(self, f: Function) -> TileRegisters:
        return _Instructions(f)


@dataclass(frozen=True)
class _EmulatedAMX(AVX512):
    """Another machine's, for tests."""

    def narrow_pairs(self, f: Function, even: Value, odd: Value) -> Value:
        """As the other machine's instruction does, which takes denormals as 0."""
        bits = [f.bitcast(x, "i32") for x in (even, odd)]
        signs = [f.bitcast(x & -(1 << 31), "float") for x in bits]
        normal = [(x & 0x7F800000).ne(0) for x in bits]
        return super().narrow_pairs(f, *map(f.select, normal, (even, odd), signs))

    def tile_registers(self, f: Function) -> TileRegisters:
        return _Emulated(f)


MACHINES: tuple[ISA, ...] = (
    machine(
        _AMX,
        name="amx",
        rank=50,
        features="+avx512bf16,+amx-tile,+amx-bf16",
        needs=NEEDS | {"avx512bf16", "amx-tile", "amx-bf16"},
        bf16_dot=True,
        tiles=True,
        scales=True,
    ),
    machine(_EmulatedAMX, name="amx_emulated", rank=0, needs=NEEDS, bf16_dot=True, tiles=True, scales=True),
)
