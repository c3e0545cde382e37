"""The machine that every other falls back to: 16-byte vectors, no fused multiply-add.

16 registers hold a tile of 2 rows by 2 vectors twice: the sums, and the short sums that are added to them.
"""

from __future__ import annotations

from flashtile.llvm.machines.base import ISA

MACHINES = (ISA(name="generic", rank=1, needs=frozenset(("x86_64",)), rows=2),)
