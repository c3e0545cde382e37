"""AVX2 with FMA and F16C: 16 registers of 32 bytes hold a tile of 4 rows by 3 vectors and one broadcast."""

from __future__ import annotations

from flashtile.llvm.machines.base import ISA

MACHINES = (
    ISA(
        name="avx2",
        rank=20,
        cpu="x86-64-v3",
        needs=frozenset(("x86_64", "avx2", "fma", "f16c", "bmi2")),
        vector_bytes=32,
        vectors=3,
        rows=4,
        fused=True,
        half=True,
    ),
)
