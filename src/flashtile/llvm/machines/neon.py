"""aarch64: 32 registers of 16 bytes hold a tile of 8 rows by 3 vectors; conversions of fp16 are in the base set.

``neon_bf16`` has Armv8.6's bf16 instructions: the dot of pairs, bfdot, and bfmmla, which multiplies 2 x 4 by 4 x 2 in
one register, as two of these dots do. Both add the two products of a pair first, rounding each sum to odd, and take
denormals for 0; sums of many are as exact as with fp32's own additions, their last bits differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.types import lanes, like, vector


@dataclass(frozen=True)
class _BF16(ISA):
    """The instructions of FEAT_BF16."""

    def dot_pairs(self, f: Function, acc: Value, a: Value, b: Value) -> Value:
        n = lanes(acc.type)
        a, b = (f.cast("bitcast", x, vector(2 * n, "bfloat")) for x in (a, b))
        return f.intrinsic(f"llvm.aarch64.neon.bfdot.v{n}f32.v{2 * n}bf16", acc.type, [acc, a, b])

    def multiply_squares(self, f: Function, acc: Value, a: Value, b: Value) -> Value:
        a, b = (f.cast("bitcast", x, vector(8, "bfloat")) for x in (a, b))
        return f.intrinsic("llvm.aarch64.neon.bfmmla", acc.type, [acc, a, b])

    def narrow(self, f: Function, x: Value, storage: str) -> Value:
        if storage != "bfloat":
            return super().narrow(f, x, storage)
        return f.bitcast(f.cast("fptrunc", x, like(x.type, "bfloat")), "i16")

    def narrow_pairs(self, f: Function, even: Value, odd: Value) -> Value:
        n = lanes(even.type)
        low, high = (self.narrow(f, x, "bfloat") for x in (even, odd))
        order = [lane for t in range(n) for lane in (t, n + t)]
        return f.cast("bitcast", f.shuffle(low, high, order), vector(n, "i32"))


# Scheduled for the Cortex-A57, within the base instruction set: scheduled for LLVM's "generic", the loop over values
# keeps two of its 24 sums on the stack. For the A57 the loop between the products of gradients keeps a constant there,
# scheduled for Apple's first core nothing.
_REGISTERS = {"arch": "aarch64", "vector_bytes": 16, "vectors": 3, "rows": 8}
_BASE = "-aes,-sha2,-crc"

MACHINES = (
    ISA(
        name="neon",
        rank=20,
        cpu="cortex-a57",
        features=_BASE,
        needs=frozenset(("aarch64",)),
        fused=True,
        half=True,
        **_REGISTERS,  # type: ignore[arg-type]  # of several types
    ),
    _BF16(
        name="neon_bf16",
        rank=30,
        cpu="cyclone",
        features=f"{_BASE},+bf16",
        needs=frozenset(("aarch64", "bf16")),
        fused=True,
        half=True,
        bf16_dot=True,
        squares=True,
        **_REGISTERS,  # type: ignore[arg-type]  # of several types
    ),
)
