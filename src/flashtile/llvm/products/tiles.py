"""Products of matrix registers: tiles of bf16 pairs, whose sums land in memory as lines."""

from __future__ import annotations

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.lines import Lines, Words
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.products.pairs import Pairs

_SIDE = 16  # rows, lanes and words of depth of one register
_LEFT, _RIGHT = 4, 6  # the first registers of either operand; before them are the sums


class Tiles(Pairs):
    """Words are the dot's; two by two registers of sums take 16 words of depth a step."""

    def unavailable(self, isa: ISA) -> str | None:
        return None if isa.tiles else f"{isa.name} has no matrix registers"

    def multiply_add(self, f: Function, isa: ISA, total: Value, left: Value, right: Value) -> Value:
        raise NotImplementedError("sums of tiles land in memory: multiply()")

    def multiply(
        self, f: Function, isa: ISA, left: Words, right: Lines, out: Lines, depth: Value, registers: int
    ) -> None:
        """out[row][lane] = sum over depth of left[row][depth] * right[depth][lane]: ``rows`` rows, so many registers of
        lanes, ``depth`` words, a multiple of ``words``.

        Each operand is read once and then not again for long: the left one, the larger, passes by the nearest cache.
        """
        tiles, line = isa.tile_registers(f), f.const("i64", right.shape.bytes)
        assert self.rows is not None
        pairs = [(r, j) for r in range(self.rows // _SIDE) for j in range(registers)]
        for n in range(len(pairs)):
            tiles.zero(n)
        with f.range(0, depth, self.words) as word:
            for r in range(self.rows // _SIDE):
                tiles.load(_LEFT + r, left.row(r * _SIDE).at + word * 4, left.stride, streamed=True)
            for j in range(registers):
                tiles.load(_RIGHT + j, right.place(word, j), line)
            for n, (r, j) in enumerate(pairs):
                tiles.dot_pairs(n, _LEFT + r, _RIGHT + j)
        for n, (r, j) in enumerate(pairs):
            tiles.store(n, out.place(r * _SIDE, j), line)


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
