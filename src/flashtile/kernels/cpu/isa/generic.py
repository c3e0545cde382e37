"""The machine that every other falls back to: 16-byte vectors, no fused multiply-add."""

from __future__ import annotations

from flashtile.kernels.cpu.isa.base import ISA

MACHINES = (ISA(name="generic", rank=1, needs=frozenset(("x86_64",))),)
