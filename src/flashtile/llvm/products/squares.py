"""Products of small squares in vector registers: 2 rows of four bf16 by 2 lanes of four, Arm's bfmmla.

A register of sums is 2 rows by 2 lanes, so it meets each register of either operand twice as often as a dot of pairs
does. To the kernels this is a product like those of matrix registers, whose sums land in memory as lines: rows of
either operand are read as they lie, brought together by twos in registers, and sums of two lanes become lines again
when a tile is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.lines import Words
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.products.tiles import Step, Tiles
from flashtile.llvm.types import vector

_SIDE = 4  # words of a register, lanes of a register of a line
_ROWS, _WORDS = 2 * _SIDE, vector(_SIDE, "i32")
_SUMS = vector(_SIDE, "float")


class Squares(Tiles):
    """Words are the dot's; a tile is 4 x 4 squares of sums, in 16 registers."""

    def unavailable(self, isa: ISA) -> str | None:
        return None if isa.squares else f"{isa.name} multiplies no squares of bf16"

    def multiply(
        self,
        f: Function,
        isa: ISA,
        step: Step,
        out: Words,
        depth: Value,
        registers: int,
        *,
        apart: tuple[Value, Value] | None = None,
        onto: bool = False,
        streamed: Literal["left", "right"] = "left",
        beside: Callable[[Value, int], None] | None = None,
    ) -> None:
        """As tiles do; there are no parts, and nothing can pass by a cache."""
        assert apart is None and beside is None
        places = [(r, j) for r in range(0, _ROWS, 2) for j in range(registers)]

        def lines(r: int, j: int) -> list[Value]:
            return [out.row(r + n).at + j * isa.vector_bytes for n in range(2)]

        squares = [f.const(_SUMS, 0.0)] * (2 * len(places))
        if onto:
            pairs = ([f.load(_SUMS, at, align=isa.vector_bytes) for at in lines(*place)] for place in places)
            squares = [square for pair in pairs for square in _halves(f, *pair)]

        def one_step(word: Value, squares: list[Value]) -> list[Value]:
            left, right = step(word)
            rows = [f.load(_WORDS, left.row(r).at, align=4) for r in range(_ROWS)]
            lefts = [_halves(f, rows[r], rows[r + 1]) for r in range(0, _ROWS, 2)]
            for half in range(2):  # two words of depth
                for j in range(registers):
                    words = (right.row(2 * half + n).at + j * isa.vector_bytes for n in range(2))
                    rights = f.interleave(*(f.load(_WORDS, at, align=isa.vector_bytes) for at in words))
                    for n, (r, at) in enumerate(places):
                        for lane, lanes in enumerate(rights if at == j else ()):
                            place = 2 * n + lane
                            squares[place] = isa.multiply_squares(f, squares[place], lefts[r // 2][half], lanes)
            return squares

        squares = f.fold(0, depth, self.words, squares, lambda word, sums: one_step(word, list(sums)))
        for n, place in enumerate(places):
            for line, at in zip(_halves(f, *squares[2 * n : 2 * n + 2]), lines(*place), strict=True):
                f.store(line, at, align=isa.vector_bytes)


def _halves(f: Function, a: Value, b: Value) -> tuple[Value, Value]:
    """The lower halves of two registers, and the upper ones: two rows of four words as two of two words each, and two
    lines of two lanes each as squares, or the reverse."""
    half = _SIDE // 2
    lower = [*range(half), *range(_SIDE, _SIDE + half)]
    return f.shuffle(a, b, lower), f.shuffle(a, b, [n + half for n in lower])


PRODUCT = Squares(
    "squares",
    depth=2,
    operand="bfloat",
    rows=_ROWS,
    lanes=2 * _SIDE,
    words=_SIDE,
    left="tile",
    right="tile",
    lands="memory",
)
PRODUCTS = (PRODUCT,)
