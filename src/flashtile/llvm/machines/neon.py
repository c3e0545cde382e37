"""aarch64: 32 registers of 16 bytes hold a tile of 8 rows by 3 vectors; conversions of fp16 are in the base set."""

from __future__ import annotations

from flashtile.llvm.machines.base import ISA

MACHINES = (
    ISA(
        name="neon",
        rank=20,
        arch="aarch64",
        # Scheduled for the Cortex-A57, within the base instruction set: scheduled for LLVM's "generic", the loop
        # over values keeps two of its 24 sums on the stack.
        cpu="cortex-a57",
        features="-aes,-sha2,-crc",
        needs=frozenset(("aarch64",)),
        vector_bytes=16,
        vectors=3,
        rows=8,
        fused=True,
        half=True,
    ),
)
