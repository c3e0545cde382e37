"""The fields and primitives of an instruction set."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.types import SIZES, like, vector


class TileRegisters:
    """Eight matrix registers by number, of a function under construction: 16 rows of 64 bytes each, which no called
    function keeps."""

    def __init__(self, f: Function) -> None:
        self.f = f

    def zero(self, tile: int) -> None:
        """NumPy: tile[:] = 0."""
        raise NotImplementedError

    def load(self, tile: int, at: Value, stride: Value, *, streamed: bool = False) -> None:
        """16 rows from memory, so many bytes apart. NumPy: tile[:] = rows. ``streamed``: past the nearest cache."""
        raise NotImplementedError

    def store(self, tile: int, at: Value, stride: Value) -> None:
        """The reverse. NumPy: rows[:] = tile."""
        raise NotImplementedError

    def dot_pairs(self, total: int, left: int, right: int) -> None:
        """Sums over words that each hold two bf16, left (row, depth), right (depth, lane), in fp32.

        NumPy: total += widen(left) @ widen(right).reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ISA:
    """One machine: its registers as data, and how it spells the primitives that differ.

    The class itself is the generic machine: no fused multiply-add, no conversions, no dot.  A better
    machine sets fields; one with an instruction of its own overrides a method.

    rank            larger is better; 0 is never picked by itself
    cpu, features   what LLVM is told to generate for; ``needs`` are features the host must report
    vector_bytes    width of a register
    vectors, rows   the micro-kernel's tile: ``rows`` keys (or value columns) by ``vectors`` registers of queries
    """

    name: str
    rank: int
    arch: str = "x86_64"
    cpu: str = "x86-64"
    features: str = ""
    needs: frozenset[str] = field(default=frozenset(), repr=False)  # a set's order would change cache keys
    vector_bytes: int = 16
    vectors: int = 2
    rows: int = 4
    fused: bool = False
    half: bool = False  # converts between fp16 and fp32
    bf16_dot: bool = False  # accumulates products of bf16 pairs in fp32
    tiles: bool = False  # has matrix registers, of 16 rows by 16 words of bf16 pairs or sums
    squares: bool = False  # multiplies 2 rows of four bf16 by 2 lanes of four, sums in one register of fp32
    permutes: bool = False  # picks lanes of a register by numbers in another, as cheaply as it adds: a small table
    scales: bool = False  # takes whole parts off and multiplies by powers of two, as cheaply as it adds

    def lanes(self, type_: str) -> int:
        """How many elements of this type a register holds."""
        return self.vector_bytes // SIZES[type_]

    def multiply_add(self, f: Function, a: Value, b: Value, c: Value) -> Value:
        """a * b + c; one rounding where the machine has it.  NumPy: a * b + c."""
        return f.fma(a, b, c) if self.fused else a * b + c

    def divide(self, f: Function, a: Value, b: Value) -> Value:
        """a / b within an ulp, for b and 1 / b both normal, or NaN.  NumPy: a / b."""
        return a / b

    def look_up(self, f: Function, table: Value, index: Value) -> Value:
        """table[index mod lanes], registers of integers, where the machine ``permutes``.  NumPy: table[index % n]."""
        raise NotImplementedError(self.name)

    def fraction(self, f: Function, x: Value) -> Value:
        """A register of floats less the integers below, rounded down, where the machine ``scales``.  NumPy:
        x - floor(x), but less than 1."""
        raise NotImplementedError(self.name)

    def scale(self, f: Function, x: Value, power: Value) -> Value:
        """x times 2^floor(power), where the machine ``scales``.  NumPy: ldexp(x, floor(power).astype(int))."""
        raise NotImplementedError(self.name)

    def dot_pairs(self, f: Function, acc: Value, a: Value, b: Value) -> Value:
        """acc + a.lo * b.lo + a.hi * b.hi over words that each hold two bf16, accumulated in fp32.

        NumPy: acc + (widen(a) * widen(b)).reshape(-1, 2).sum(-1)
        """
        return self.emulated_dot_pairs(f, acc, a, b)

    def emulated_dot_pairs(self, f: Function, acc: Value, a: Value, b: Value) -> Value:
        """The same by shifts: a bf16 is the upper half of an fp32."""
        upper = 0xFFFF0000 - (1 << 32)  # as a signed literal
        for take in (lambda w: w & upper, lambda w: w << 16):
            acc = self.multiply_add(f, f.bitcast(take(a), "float"), f.bitcast(take(b), "float"), acc)
        return acc

    def multiply_squares(self, f: Function, acc: Value, a: Value, b: Value) -> Value:
        """Sums of 2 rows by 2 lanes, of registers of two words a row and two a lane, where the machine has ``squares``.

        NumPy: (acc.reshape(2, 2) + widen(a).reshape(2, 4) @ widen(b).reshape(2, 4).T).ravel()
        """
        raise NotImplementedError(self.name)

    # -- 16-bit floats live in memory as i16; these convert them to and from fp32 lanes (or scalars) ----

    def widen(self, f: Function, bits: Value, storage: str) -> Value:
        """i16 bits of ``storage`` ("half" or "bfloat") to float.  NumPy: bits.view(storage).astype(float32)."""
        wide = like(bits.type, "float")
        if storage == "bfloat":
            return f.bitcast(f.cast("zext", bits, like(bits.type, "i32")) << 16, "float")
        if self.half:
            return f.cast("fpext", f.bitcast(bits, "half"), wide)
        return _half_to_float(f, bits)

    def narrow(self, f: Function, x: Value, storage: str) -> Value:
        """float to i16 bits of ``storage``, to nearest even, NaN kept.  NumPy: x.astype(storage).view(int16)."""
        if storage == "bfloat":
            return _float_to_bfloat(f, x)
        if self.half:
            return f.bitcast(f.cast("fptrunc", x, like(x.type, "half")), "i16")
        return _float_to_half(f, x)

    def narrow_pairs(self, f: Function, even: Value, odd: Value) -> Value:
        """Lanes of two float vectors rounded to bf16 and packed as words (even low, odd high)."""
        low, high = (f.cast("zext", self.narrow(f, x, "bfloat"), like(x.type, "i32")) for x in (even, odd))
        return low | (high << 16)

    def narrow_both(self, f: Function, low: Value, high: Value) -> Value:
        """Lanes of two float vectors rounded to bf16, those of one after those of the other.

        NumPy: np.concatenate([low, high]).astype(bfloat16).view(int16)
        """
        return f.join(*(self.narrow(f, x, "bfloat") for x in (low, high)))

    # -- matrix registers --------------------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Why the operating system does not let this process use what the machine has; None if it does. Asks it."""
        return None

    def enter(self, f: Function) -> None:
        """What a native call does before its first use of matrix registers."""

    def leave(self, f: Function) -> None:
        """What it does after the last."""

    def tile_registers(self, f: Function) -> TileRegisters:
        """Those of a function under construction, at its beginning, where the machine has ``tiles``."""
        raise NotImplementedError(self.name)

    def vector_of(self, element_: str) -> str:
        """The type of one full register."""
        return vector(self.lanes(element_), element_)


def _half_to_float(f: Function, bits: Value) -> Value:
    """Shift exponent and mantissa into place and rescale; a maximal exponent becomes fp32's.  Exact."""
    i32 = like(bits.type, "i32")
    word = f.cast("zext", bits, i32)
    magnitude = word & 0x7FFF
    scaled = f.bitcast(f.bitcast(magnitude << 13, "float") * 2.0**112, "i32")
    special = (magnitude << 13) | 0x7F800000
    value = f.select(magnitude < 0x7C00, scaled, special)
    return f.bitcast(value | ((word & 0x8000) << 16), "float")


def _float_to_half(f: Function, x: Value) -> Value:
    """Round to nearest even in integers; results below the normal range are rounded by an fp32 addition."""
    word = f.bitcast(x, "i32")
    sign = (word >> 16) & 0x8000
    magnitude = word & 0x7FFFFFFF
    odd = (magnitude >> 13) & 1
    normal = (magnitude + (0xFFF - (112 << 23)) + odd) >> 13
    tiny = f.bitcast(f.bitcast(magnitude, "float") + 0.5, "i32") - 0x3F000000
    large = f.select(magnitude > 0x7F800000, f.const(word.type, 0x7E00), f.const(word.type, 0x7C00))
    value = f.select(magnitude < 0x38800000, tiny, normal)
    value = f.select(magnitude < 0x477FF000, value, large)  # from 65520 on: inf
    return f.cast("trunc", value | sign, like(x.type, "i16"))


def _float_to_bfloat(f: Function, x: Value) -> Value:
    word = f.bitcast(x, "i32")
    rounded = (word + ((word >> 16) & 1) + 0x7FFF) >> 16
    quiet = (word >> 16) | 0x40
    return f.cast("trunc", f.select(x.isnan(), quiet, rounded), like(x.type, "i16"))
