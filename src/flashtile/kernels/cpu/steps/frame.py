"""The frame of a score program: what it needs of the tile at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashtile.kernels.cpu.block import FRAME
from flashtile.kernels.cpu.config import Config
from flashtile.llvm.ir import Function, Value
from flashtile.llvm.routines import Operand
from flashtile.score.captures import Block as Captures
from flashtile.score.emit import Emission


@dataclass(frozen=True)
class Frame(Operand):
    """A block of words that forward.py fills in."""

    WORDS: ClassVar = {"at": "ptr"}
    at: Value

    def read(self, name: str) -> Value:
        return FRAME.read(self.function, self.at, name)

    def write(self, **values: Value) -> None:
        FRAME.write(self.function, self.at, **values)

    def integer(self, name: str) -> Value:
        """A word as the language's integers are."""
        return self.function.cast("trunc", self.read(name), "i32")

    def program(self, f: Function, c: Config) -> Emission:
        """The place in the code where batch and head are known."""
        assert c.code is not None
        batch, head = (self.integer(name) for name in "bh")
        captures = self.read("captures")
        return Emission(f, c.isa, c.acc, c.lanes, Captures(c.code.slots), captures, {"b": batch, "h": head})
