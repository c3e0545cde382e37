"""Instruction sets, one file each: what a machine has, as fields, and the few primitives that differ.

    name                      needs                          falls back to
    amx                       avx512_bf16's, amx-{tile,bf16}  avx512_bf16
    avx512_bf16               avx512{f,bw,dq,vl}, bf16 dot    avx512
    avx512                    avx512{f,bw,dq,vl}              avx2
    avx2                      avx2, fma, f16c                 generic
    neon_bf16                 aarch64, bf16                   neon
    neon                      aarch64                         generic
    generic                   nothing

``current()`` picks the best that this machine has; the environment variable FLASHTILE_ISA forces one.
``avx512_bf16_emulated`` runs the kernels of the bf16 dot on any AVX-512 machine, with that one instruction
replaced by its definition, and ``amx_emulated`` those of matrix registers: for tests, never picked by themselves.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from pathlib import Path

from flashtile.errors import UnavailableError
from flashtile.llvm.machines.base import ISA

CPUINFO = Path("/proc/cpuinfo")

__all__ = ["CPUINFO", "ISA", "current", "known", "named", "setting", "unavailable", "usable"]


@functools.cache
def known() -> dict[str, ISA]:
    """Every instruction set of this folder by name, best first."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    found = [isa for module in modules for isa in getattr(module, "MACHINES", ())]
    return {isa.name: isa for isa in sorted(found, key=lambda isa: -isa.rank)}


@functools.cache
def _host_features() -> frozenset[str]:
    import llvmlite.binding as llvm

    arch = llvm.get_process_triple().split("-")[0]
    found = {arch, *(name for name, there in llvm.get_host_cpu_features().items() if there)}
    return frozenset(found | (_said_by_linux(CPUINFO) if arch == "aarch64" else set()))


def _said_by_linux(cpuinfo: Path) -> set[str]:
    """What Linux says that a processor of Arm's has: LLVM reads some of it only."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return {name for line in lines if line.startswith("Features") for name in line.partition(":")[2].split()}


def unavailable(isa: ISA) -> str | None:
    """Why this machine cannot run the instruction set; None if it can."""
    missing = sorted(isa.needs - _host_features())
    return f"this machine has no {', '.join(missing)}" if missing else isa.refusal()


def usable() -> list[str]:
    """Names of the instruction sets that this machine runs, best first; emulated ones last."""
    return [isa.name for isa in known().values() if unavailable(isa) is None]


def current() -> ISA:
    """The instruction set that kernels are generated for: FLASHTILE_ISA, else the best one here."""
    return named(setting())


def setting() -> str:
    """What FLASHTILE_ISA says, or "". Reading it takes a good part of a microsecond: once a call will do."""
    return os.environ.get("FLASHTILE_ISA", "")


@functools.cache
def named(name: str) -> ISA:
    """The instruction set of this name, the best one here for "". Raises: UnavailableError where it cannot run."""
    if not name:
        return next(isa for isa in known().values() if isa.rank > 0 and unavailable(isa) is None)
    isa = known().get(name)
    if isa is None:
        raise UnavailableError(f"FLASHTILE_ISA: got {name!r}, expected one of {', '.join(known())}")
    if reason := unavailable(isa):
        raise UnavailableError(f"FLASHTILE_ISA={name}: {reason}; usable here: {', '.join(usable())}")
    return isa
