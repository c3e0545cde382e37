"""What kernels work on in memory: rows as they lie, and lines of registers.

A panel is some lanes wide, a few registers; one value per lane is a line. A matrix of scores, of weights or of sums
is a stack of lines, and so is an operand that was transposed to meet them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashtile.llvm.ir import Value
from flashtile.llvm.routines import Kind, Operand
from flashtile.llvm.types import SIZES, element, sizeof


@dataclass(frozen=True)
class Rows(Operand):
    """Rows in memory as they lie: ``count`` rows of ``size`` elements, bytes between rows and between elements."""

    WORDS: ClassVar = {"at": "ptr", "stride": "i64", "step": "i64", "count": "i64", "size": "i64"}
    at: Value
    stride: Value
    step: Value
    count: Value
    size: Value

    def adjacent(self, width: int) -> Value:
        """Whether the elements of a row lie side by side, being so many bytes wide."""
        return self.step.eq(width)


@dataclass(frozen=True)
class Words(Operand):
    """Rows of words that a product reads in place: bytes between rows."""

    WORDS: ClassVar = {"at": "ptr", "stride": "i64"}
    at: Value
    stride: Value

    def row(self, n: Value | int) -> Words:
        return Words(self.at + n * self.stride, self.stride)


@dataclass(frozen=True)
class Line:
    """The geometry of a line: so many registers, each of this type."""

    register: str
    registers: int

    @property
    def step(self) -> int:
        """Bytes of a register."""
        return sizeof(self.register)

    @property
    def bytes(self) -> int:
        return self.registers * self.step

    @property
    def lane(self) -> int:
        """Bytes of a lane."""
        return SIZES[element(self.register)]

    def __str__(self) -> str:
        return f"{self.registers} x {self.register}"


@dataclass(frozen=True)
class Lines(Operand):
    """Lines one after the other, on addresses that whole registers can be loaded from."""

    WORDS: ClassVar = {"at": "ptr"}
    at: Value
    shape: Line

    @classmethod
    def of(cls, shape: Line) -> Kind:
        """The kind of a parameter that is such lines."""
        return cls.kind(shape=shape)

    def place(self, line: Value | int, register: int = 0, *, at: Value | int = 0) -> Value:
        """The address of a register of a line; ``at``: so many bytes further, where a loop goes over registers."""
        return self.at + (line * self.shape.bytes + register * self.shape.step + at)

    def load(self, line: Value | int, register: int = 0, *, at: Value | int = 0) -> Value:
        return self.function.load(self.shape.register, self.place(line, register, at=at), align=self.shape.step)

    def store(self, value: Value, line: Value | int, register: int = 0, *, at: Value | int = 0) -> None:
        self.function.store(value, self.place(line, register, at=at), align=self.shape.step)

    def moved(self, nbytes: Value | int) -> Lines:
        """The same lines seen from so many bytes on: from another line, register or lane."""
        return type(self)(self.at + nbytes, self.shape)

    def line(self, n: Value | int) -> Lines:
        """These lines from the n-th on."""
        return self.moved(n * self.shape.bytes)

    def lane(self, n: Value | int) -> Lines:
        """These lines from a lane on."""
        return self.moved(n * self.shape.lane)

    def fill(self, number: float, count: Value | int) -> None:
        """The same number in every lane of so many lines."""
        f = self.function
        value = f.const(self.shape.register, number)
        with f.range(0, count * self.shape.bytes, self.shape.step) as at:
            self.store(value, 0, at=at)


class Panel(Lines):
    """An operand of a product, transposed: a line for each word of depth."""


class Scores(Lines):
    """Scores, before the softmax: line r, lane i is how much i likes r."""


class Weights(Lines):
    """Weights, after the softmax, as the words of the next product."""


class Sums(Lines):
    """Accumulated outputs: a line for each column."""


class State(Lines):
    """The state of an online softmax: a line of maxima, a line of sums of weights."""

    @property
    def totals(self) -> Lines:
        return Lines(self.at, self.shape).line(1)
