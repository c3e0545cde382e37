"""aarch64: 32 registers of 16 bytes hold a tile of 8 rows by 3 vectors; conversions of fp16 are in the base set."""

from __future__ import annotations

from flashtile.kernels.cpu.isa.base import ISA

MACHINES = (
    ISA(
        name="neon",
        rank=20,
        arch="aarch64",
        cpu="generic",
        features="+neon",
        needs=frozenset(("aarch64",)),
        vector_bytes=16,
        vectors=3,
        rows=8,
        fused=True,
        half=True,
    ),
)
