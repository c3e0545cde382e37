"""Every kernel family of this machine, on each instruction set, as what a test's `kernel` argument may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

import flashtile
import flashtile.kernels
from flashtile.llvm import machines
from flashtile.llvm.products import TILES

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
    """One test parameter for each kernel and instruction set that this machine can run."""
    return [
        pytest.param(Kernel(name, isa), id=name if isa is None else f"{name}-{isa}")
        for _, name, available, _ in flashtile.kernels.survey()
        if available
        for isa in _isas(name)
    ]


def computes_apart(kernel: Kernel, dtype: str | None) -> bool:
    """Whether a kernel's machine code for a dtype is its own, rather than another machine's: of matrix registers in
    all but fp64, of squares in bf16. None: a test that has no dtype, or one of its own."""
    machine = machines.known().get(kernel.isa or "")
    if machine is not None and machine.squares:
        return dtype == "bfloat16"
    return not _on_tiles(kernel) or dtype not in (None, "float64")


def own_decoding() -> list[str]:
    """The instruction sets of this machine whose kernels for few queries are their own: those of a machine with matrix
    registers are the ones of the machine below it, which tests/llvm/test_amx.py holds, but for the polynomial of bf16's
    weights, which some tests run on every one."""
    return [name for name in machines.usable() if TILES.unavailable(machines.known()[name])]


def marks_of(kernel: Kernel, dtype: str) -> list[Any]:
    """Products of several parts go through the suites in a nightly run: they share all with those of one part but for
    what tests/cpu/test_cpu_tiles.py, which runs every time, looks at."""
    return [pytest.mark.slow] if _on_tiles(kernel) and dtype != "bfloat16" else []


def _on_tiles(kernel: Kernel) -> bool:
    machine = machines.known().get(kernel.isa or "")
    return machine is not None and TILES.unavailable(machine) is None


def left_out() -> list[str]:
    """A line for each kernel that cannot run here, with its reason: none of its tests is collected."""
    rows = flashtile.kernels.survey()
    return [f"not tested here: kernel {name}: {reason}" for _, name, available, reason in rows if not available]


def _isas(name: str) -> list[str | None]:
    """The instruction sets that a family can be forced to use on this machine; [None] if it has no such choice."""
    chosen = flashtile.explain((1, 1, 1, 1), kernel=name).isa
    return list(machines.usable()) if chosen in machines.known() else [None]
