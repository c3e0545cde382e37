"""What a compiled kernel depends on, and what follows from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from flashtile.llvm.lines import Line
from flashtile.llvm.machines import ISA
from flashtile.llvm.processors import Ahead
from flashtile.llvm.products import FMA, Product
from flashtile.llvm.types import SIZES, vector
from flashtile.score.keep import KEYS_A_CALL

if TYPE_CHECKING:
    from flashtile.score.code import Code


@dataclass(frozen=True)
class Config:
    """Everything that decides the machine code; all else is a run-time parameter.

    storage     element in memory: "float", "double", "half", "bfloat"
    product     the micro-kernel of both products
    key_block   keys whose scores are held at a time: 128 lines of scores fit the first-level cache
    unroll      contraction steps emitted per loop iteration
    asks        of a forward: memory is asked for the block of keys that follows
    partial     attend a part of the keys: outputs and lse in the accumulator's type, to be merged or carried on
    code        the score program, if there is one
    dropout     some weights are dropped: which, the seed and the threshold of the call say
    arrays      of a backward: the slots of captured arrays whose gradients are wanted
    across      of a backward: sums over head sizes are those of passes/decode, whose lse it begins with
    ahead       of a decode: how memory is asked for keys and values
    tile        of a backward: some rows on some keys, with delta given; dQ, dK and dV are accumulators
    """

    isa: ISA
    storage: str
    product: Product = FMA
    key_block: int = 128
    unroll: int = 2
    partial: bool = False
    code: Code | None = None
    dropout: bool = False
    arrays: tuple[int, ...] = ()
    across: bool = False
    ahead: Ahead = Ahead()
    tile: bool = False
    asks: bool = False

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Every call at a new length looks up half a dozen things by its configuration."""
        return hash(tuple(getattr(self, x.name) for x in fields(self)))

    @property
    def masked(self) -> bool:
        """The program hides keys: which, the plan's segments say, and in part tiles its mask."""
        return self.code is not None and self.code.mask is not None

    @property
    def scored(self) -> bool:
        """The program changes scores, so they are scaled before it sees them."""
        return self.code is not None and self.code.score is not None

    @property
    def acc(self) -> str:
        """Type that sums are kept in."""
        return "double" if self.storage == "double" else "float"

    @property
    def output(self) -> Config:
        """The configuration of memory that outputs are written to: accumulators where others are to be added."""
        return replace(self, storage=self.acc, product=self.elements) if self.partial or self.tile else self

    @property
    def elements(self) -> Product:
        """The product of accumulators in this one's geometry: its words are elements, its lines as long."""
        return replace(FMA, rows=self.product.rows, lanes=self.product.lanes)

    @property
    def memory(self) -> str:
        """Type that elements are loaded and stored as; 16-bit floats travel as their bits."""
        return "i16" if self.storage in ("half", "bfloat") else self.storage

    @property
    def element(self) -> int:
        """Bytes of an element in memory."""
        return SIZES[self.memory]

    @property
    def word(self) -> str:
        """Type of one step of a product: an element, or two bf16 in 32 bits."""
        return self.product.word(self.acc)

    @property
    def lands_in_memory(self) -> bool:
        """Sums of a product are lines in memory, which a pass of their own bands."""
        return self.product.lands == "memory"

    @property
    def tiles_add(self) -> bool:
        """Matrix registers add to a panel's sums, and take what is not normal for 0 (steps/tiny.py)."""
        return self.lands_in_memory and self.product.coarse

    @property
    def shares(self) -> bool:
        """A work item has all heads that share keys and values, for which these are made ready once: where that takes
        long beside the products, and nothing but a sink tells heads apart."""
        return self.lands_in_memory and self.code is None and not self.dropout

    @property
    def interleaved(self) -> bool:
        """Products run beside weights of other keys, on registers of their own (passes/turns.py; in three parts,
        products of values alone, passes/strips.py)."""
        return self.lands_in_memory and self.product.permission is not None

    @property
    def guarded(self) -> bool:
        """Products are sums of products of parts, which cannot hold every number (steps/unheld.py)."""
        return self.product.parts > 1

    @property
    def per_word(self) -> int:
        return self.product.depth

    @property
    def size(self) -> int:
        """Bytes of an accumulator, and of a word."""
        return SIZES[self.acc]

    @property
    def lanes(self) -> int:
        """Lanes of one register."""
        return self.isa.lanes(self.acc)

    @property
    def panel(self) -> int:
        """Queries that a micro-kernel works on at once: one per lane, ``registers`` of them."""
        return self.product.shape(self.isa, self.acc)[1]

    @property
    def registers(self) -> int:
        """Registers of a full panel."""
        return self.panel // self.lanes

    @property
    def rows(self) -> int:
        """Keys of a score tile, and value columns of an output tile."""
        return self.product.shape(self.isa, self.acc)[0]

    @property
    def vector(self) -> str:
        """A register of accumulators."""
        return vector(self.lanes, self.acc)

    @property
    def words(self) -> str:
        """A register of words."""
        return vector(self.lanes, self.word)

    @property
    def register(self) -> int:
        """Bytes of a register."""
        return self.isa.vector_bytes

    @property
    def line(self) -> Line:
        """One accumulator for each query of the panel."""
        return Line(self.vector, self.registers)

    @property
    def word_line(self) -> Line:
        """One word for each query of the panel."""
        return Line(self.words, self.registers)

    @property
    def weight_line(self) -> Line:
        """A line of weights as the exchange reads it: where the scores stood or, for tiles, one that weights fill."""
        return Line(vector(self.lanes, "i16"), self.registers) if self.lands_in_memory else self.line

    @property
    def score_lines(self) -> int:
        """Lines of the scores of a block, the last tile's whole."""
        return self.key_block + self.rows

    @property
    def margin(self) -> int:
        """Lines before and after scores, where weights are dropped: in groups of keys (steps/keep.py)."""
        return KEYS_A_CALL if self.dropout else 0

    @property
    def weights_part(self) -> int:
        """Bytes between the parts of weights; those of the largest take the scores' place."""
        return (self.score_lines + self.margin) * self.line.bytes

    @property
    def held_part(self) -> int:
        """Bytes between the parts of what a panel of the backward holds for the exchange (steps/held.py)."""
        return self.key_block * self.weight_line.bytes

    @property
    def pairs_part(self) -> int:
        """Bytes between the parts of dS as words of several lines."""
        return (self.key_block // self.per_word + 1) * self.line.bytes

    def padded(self, value_size: int) -> int:
        """Value columns rounded up to whole output tiles."""
        return -(-value_size // self.rows) * self.rows

    def value_row(self, value_size: int) -> int:
        """Bytes of a row of converted values: of columns, or, where they are a tile's left operand, a column's keys."""
        if self.lands_in_memory:
            return self.value_part * self.product.parts
        return self.padded(value_size) * self.size

    @property
    def value_part(self) -> int:
        """Bytes between the parts of such a row of keys."""
        return self.key_block // self.per_word * self.size

    def value_rows(self, value_size: int) -> int:
        """How many such rows there are for a block."""
        return self.padded(value_size) if self.lands_in_memory else self.key_block // self.per_word + 1

    def key_words(self, head_size: int) -> int:
        """Words of a query or key row, rounded up to whole steps."""
        return -(-head_size // (self.per_word * self.product.words)) * self.product.words
