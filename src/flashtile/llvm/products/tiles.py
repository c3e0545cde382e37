"""Products of matrix registers: tiles of bf16 pairs, whose sums land in memory as lines.

A number of more bits than bf16 has is the sum of two or three bf16, and a product of two such sums is a few products of
their parts: fp16 is exact in two parts, fp32 in three, and what is left out is no more than fp32 rounds off.
Source: Henry, Tang, Heinecke 2019, Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.lines import Words
from flashtile.llvm.machines.base import ISA
from flashtile.llvm.products.pairs import Pairs, upper_halves

_SIDE = 16  # rows, lanes and words of depth of one register
_ROW = 4 * _SIDE  # bytes of a row of one
_LEFT, _RIGHT = 4, 6  # the first registers of either operand; before them are the sums
_UPPER = -(1 << 16)  # of a word, as a signed literal


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
        apart: tuple[Value, Value] | None = None,
        onto: bool = False,
        streamed: Literal["left", "right"] = "left",
        beside: Callable[[Value, int], None] | None = None,
    ) -> None:
        """out[row][lane] = sum over depth of left[row][depth] * right[depth][lane]: ``rows`` rows, so many registers of
        lanes, ``depth`` words, a multiple of ``words``. ``step`` says where both operands lie from a word on, ``apart``
        how many bytes the parts of either are apart; ``onto``: what ``out`` holds is added.

        Of the operands the larger one, ``streamed``, is read once and then not again for long, and passes by the
        nearest cache. ``beside`` emits what runs beside the products of a term of a step, given the step's first word
        and the term's number.
        """
        tiles = isa.tile_registers(f)
        assert self.rows is not None
        rows, pairs = range(self.rows // _SIDE), [(r, j) for r in range(self.rows // _SIDE) for j in range(registers)]
        sums = [out.row(r * _SIDE).at + j * _ROW for r, j in pairs]
        for n, at in enumerate(sums):
            if onto:
                tiles.load(n, at, out.stride)
            else:
                tiles.zero(n)
        with f.range(0, depth, self.words) as word:
            left, right = step(word)
            held: tuple[int | None, int | None] = None, None  # the part of each operand that registers hold
            for number, term in enumerate(self.terms):
                lefts, rights = left.at, right.at
                if apart is not None:
                    lefts, rights = (
                        x + part * bytes_ for x, part, bytes_ in zip((lefts, rights), term, apart, strict=True)
                    )
                for r in rows if held[0] != term[0] else ():
                    tiles.load(_LEFT + r, lefts + r * _SIDE * left.stride, left.stride, streamed=streamed == "left")
                for j in range(registers) if held[1] != term[1] else ():
                    tiles.load(_RIGHT + j, rights + j * _ROW, right.stride, streamed=streamed == "right")
                held = term
                for n, (r, j) in enumerate(pairs):
                    tiles.dot_pairs(n, _LEFT + r, _RIGHT + j)
                if beside is not None:
                    beside(word, number)
        for n, at in enumerate(sums):
            tiles.store(n, at, out.stride)

    def split(
        self, f: Function, isa: ISA, elements: Sequence[Value], *, exact: bool = False, cut: bool = False
    ) -> list[Value]:
        if self.parts == 1:
            return super().split(f, isa, elements, exact=exact, cut=cut)
        words, rest = [], list(elements)
        while True:
            words.append(upper_halves(f, *rest) if cut else self.join(f, isa, rest))
            if len(words) == self.parts:
                return words
            parts = words[-1] << 16, words[-1] & _UPPER
            rest = [x - f.bitcast(part, "float") for x, part in zip(rest, parts, strict=True)]  # exact


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
# Of a step of depth the largest product comes last, and no more than one operand's part changes from term to term.
IN_TWO = replace(PRODUCT, name="tiles2", parts=2, terms=((1, 0), (0, 0), (0, 1)))
IN_THREE = replace(PRODUCT, name="tiles3", parts=3, terms=((2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)))
PRODUCTS = (PRODUCT, IN_TWO, IN_THREE)
