"""What a product is: a micro-kernel as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashtile.llvm.ir import Function, Value
from flashtile.llvm.machines.base import ISA


@dataclass(frozen=True)
class Product:
    """sums[row][lane] += sum over depth of left[row][depth] * right[depth][lane], for a tile of rows x lanes x depth.

    Operands are made of words: what one step of depth takes from a row or a lane. A product multiplies words of one
    kind and may cost accuracy, so a kernel's configuration names it; a machine says which it has (`unavailable`).

    name, depth   a word holds ``depth`` elements
    operand       the element that words hold; None: the accumulator's own type
    rows, lanes   of a tile; None: as many as the machine's registers hold (ISA.rows, ISA.vectors)
    words         of depth that a step takes: operands are filled up with zeros to a multiple
    left          "broadcast": a word of a row is read from memory into all lanes; "tile": rows are loaded together
    right         "lines": a line of words for each step of depth; "tile": the same, loaded together
    lands         where sums are when a tile is done: "registers" or "memory"
    parts         an operand is the sum of so many, each of type ``operand``, the largest first
    terms         (i, j): the product of part i of the left operand and part j of the right one, added in this order
    permission    what the operating system must grant a process before its first use; None: nothing

    left, right and permission describe the products of matrix registers; the vector kernels take "broadcast", "lines",
    "registers" and one term for granted.
    """

    name: str
    depth: int = 1
    operand: str | None = None
    rows: int | None = None
    lanes: int | None = None
    words: int = 1
    left: str = "broadcast"
    right: str = "lines"
    lands: str = "registers"
    parts: int = 1
    terms: tuple[tuple[int, int], ...] = ((0, 0),)
    permission: str | None = None

    def __repr__(self) -> str:
        return self.name  # it stands in cache keys: the sources' digest speaks for the rest

    def unavailable(self, isa: ISA) -> str | None:
        """Why the machine does not have it; None if it does."""
        return None

    def word(self, accumulator: str) -> str:
        """The LLVM type of a word."""
        return accumulator

    def shape(self, isa: ISA, accumulator: str) -> tuple[int, int, int]:
        """(rows, lanes, depth) of a tile on a machine."""
        registers = isa.vectors * isa.lanes(accumulator)
        return self.rows or isa.rows, self.lanes or registers, self.depth

    def multiply_add(self, f: Function, isa: ISA, total: Value, left: Value, right: Value) -> Value:
        """total + left * right over the elements of one word of each."""
        raise NotImplementedError(self.name)

    def join(self, f: Function, isa: ISA, elements: Sequence[Value], *, exact: bool = False) -> Value:
        """A word (or a register of them) from ``depth`` accumulators, rounded to what it holds; ``exact``: they are of
        that type already."""
        raise NotImplementedError(self.name)

    def split(
        self, f: Function, isa: ISA, elements: Sequence[Value], *, exact: bool = False, cut: bool = False
    ) -> list[Value]:
        """The words of every part of what `join` takes, the largest part first. ``cut``: where there are several, they
        may be cut off rather than rounded, which is faster; what is left out of products is then of one sign."""
        return [self.join(f, isa, elements, exact=exact)]

    @property
    def rounds(self) -> bool:
        """Whether operands are rounded to 16 bits."""
        return self.operand is not None and self.parts == 1

    @property
    def coarse(self) -> bool:
        """Whether operands have no more than 16 bits, all parts taken together: weights then need no more accuracy."""
        return self.operand is not None and self.parts <= 2
