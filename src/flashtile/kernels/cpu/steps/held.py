"""What panels leave for the exchange where a tile's sums lie in memory: weights and dS, until many panels are there.

Each call of such a product loads its sums and stores them, so it had better meet many lanes at once, while a panel is
one step of its depth. What the panels of a span leave therefore stays until the span or the block is done, and each
strip of rows, a tile's, keeps a list of the panels that saw some of it: the others add nothing and cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flashtile.kernels.cpu.steps.spans import PANELS
from flashtile.llvm.blocks import WORD, Areas
from flashtile.llvm.ir import Value
from flashtile.llvm.lines import Scores
from flashtile.llvm.routines import Kind, Operand

if TYPE_CHECKING:
    from flashtile.kernels.cpu.config import Config

# Of a panel on a strip's list, four addresses: what it left, lines of weights and of dS, and the rows of dO and of Q
# that these meet.
WEIGHTS, SLOPES, OUTPUT_ROWS, QUERY_ROWS = range(4)
ENTRY = 4 * WORD


@dataclass(frozen=True)
class Held(Operand):
    """Scratch memory for the panels of a span, by their number in it."""

    WORDS: ClassVar = {"at": "ptr"}
    at: Value
    c: Config

    @classmethod
    def of(cls, c: Config) -> Kind:
        return cls.kind(c=c)

    @staticmethod
    def strips(c: Config) -> int:
        """Of a block."""
        return c.key_block // c.rows

    @classmethod
    def _lists(cls, c: Config) -> Areas:
        strips = cls.strips(c)
        return Areas({"counts": strips * WORD, "lists": strips * PANELS * ENTRY})

    @staticmethod
    def _lines_bytes(c: Config) -> int:
        """Of one panel's weights, or of its dS."""
        return c.held_part * c.product.parts

    @classmethod
    def nbytes(cls, c: Config, panels: int) -> int:
        """Of so many panels, or of a whole span, if they are more."""
        return cls._lists(c).bytes + 2 * min(panels, PANELS) * cls._lines_bytes(c)

    def _area(self, name: str) -> Value:
        return self.at + self._lists(self.c).at[name]

    def lines(self, name: str, panel: Value) -> Scores:
        """The lines of a panel's "weights" or "slopes", one for each row of the block: of their largest part, each
        further one `Config.held_part` bytes on."""
        c, size = self.c, self._lines_bytes(self.c)
        first = self._lists(c).bytes + ("weights", "slopes").index(name) * size
        return Scores(self.at + first + panel * (2 * size), c.weight_line)

    def _count_at(self, strip: Value) -> Value:
        return self._area("counts") + strip * WORD

    def count(self, strip: Value) -> Value:
        """Panels on a strip's list."""
        return self.function.load("i64", self._count_at(strip))

    def list_of(self, strip: Value) -> Value:
        """Where it begins."""
        return self._area("lists") + strip * (PANELS * ENTRY)

    def clear(self) -> None:
        """No panel on any list."""
        f = self.function
        with f.range(0, self.strips(self.c)) as strip:
            f.store(f.const("i64", 0), self._count_at(strip))

    def note(self, panel: Value, first: Value, last: Value, output_rows: Value, query_rows: Value) -> None:
        """A panel joins the lists of the strips that hold the rows [first, last)."""
        f, c = self.function, self.c
        with f.range(first // c.rows, (last + (c.rows - 1)) // c.rows) as strip:
            count = self.count(strip)
            entry = self.list_of(strip) + count * ENTRY
            left = (self.lines(name, panel).line(strip * c.rows).at for name in ("weights", "slopes"))
            for n, at in enumerate((*left, output_rows, query_rows)):
                f.store(at, entry + n * WORD)
            f.store(count + 1, self._count_at(strip))
