"""Products of matrix registers: tiles of bf16 pairs, whose sums land in memory as lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.lines import Words
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.products.pairs import Pairs

_SIDE = 16  # rows, lanes and words of depth of one register
_ROW = 4 * _SIDE  # bytes of a row of one
_LEFT, _RIGHT = 4, 6  # the first registers of either operand; before them are the sums


# The rows of words of either operand that a step of depth multiplies: of the left one ``rows``, of the right ``words``.
Step = Callable[[Value], tuple[Words, Words]]


class Tiles(Pairs):
    """Words are the dot's; two by two registers of sums take 16 words of depth a step."""

    def unavailable(self, isa: ISA) -> str | None:
        return None if isa.tiles else f"{isa.name} has no matrix registers"

    def multiply_add(self, f: Function, isa: ISA, total: Value, left: Value, right: Value) -> Value:
        raise NotImplementedError("sums of tiles land in memory: multiply()")

    def multiply(
        self,
        f: Function,
        isa: ISA,
        step: Step,
        out: Words,
        depth: Value,
        registers: int,
        *,
        onto: bool = False,
        streamed: Literal["left", "right"] = "left",
    ) -> None:
        """out[row][lane] = sum over depth of left[row][depth] * right[depth][lane]: ``rows`` rows, so many registers of
        lanes, ``depth`` words, a multiple of ``words``. ``step`` says where both operands lie from a word on;
        ``onto``: what ``out`` holds is added.

        Of the operands the larger one, ``streamed``, is read once and then not again for long, and passes by the
        nearest cache.
        """
        tiles = isa.tile_registers(f)
        assert self.rows is not None
        pairs = [(r, j) for r in range(self.rows // _SIDE) for j in range(registers)]
        sums = [out.row(r * _SIDE).at + j * _ROW for r, j in pairs]
        for n, at in enumerate(sums):
            if onto:
                tiles.load(n, at, out.stride)
            else:
                tiles.zero(n)
        with f.range(0, depth, self.words) as word:
            left, right = step(word)
            for r in range(self.rows // _SIDE):
                tiles.load(_LEFT + r, left.row(r * _SIDE).at, left.stride, streamed=streamed == "left")
            for j in range(registers):
                tiles.load(_RIGHT + j, right.at + j * _ROW, right.stride, streamed=streamed == "right")
            for n, (r, j) in enumerate(pairs):
                tiles.dot_pairs(n, _LEFT + r, _RIGHT + j)
        for n, at in enumerate(sums):
            tiles.store(n, at, out.stride)


PRODUCT = Tiles(
    "tiles",
    depth=2,
    operand="bfloat",
    rows=2 * _SIDE,
    lanes=2 * _SIDE,
    words=_SIDE,
    left="tile",
    right="tile",
    lands="memory",
    permission="amx",
)
