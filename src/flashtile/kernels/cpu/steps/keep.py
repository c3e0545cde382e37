"""Dropout: the weights of one panel in place, those that are not kept to 0; between the softmax and the accumulation.

The sum of weights has been taken, so lse is without dropout; what is kept stays as it is, and the division by the share
that is kept comes once, with the division by that sum (finish.py). One call of the generator serves eight rows for each
lane. Its calls begin at rows that are multiples of eight in the whole problem, wherever the first line stands: what
lies before the first line and behind the last is margin, and is changed with the rest of its eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.softmax import words_seen
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Weights
from flashtile.llvm.routines import Operand, Routine
from flashtile.llvm.types import lanes, like, vector
from flashtile.score import emit_philox
from flashtile.score.keep import KEYS_A_CALL


@dataclass(frozen=True)
class Draw(Operand):
    """What decides which weights are kept: the seed's halves, the threshold of 16 bits, the number of the head in the
    batch, and the positions of the first lane and the first row in the whole problem."""

    WORDS: ClassVar = {"low": "i32", "high": "i32", "threshold": "i32", "head": "i32", "lane": "i32", "row": "i64"}
    low: Value
    high: Value
    threshold: Value
    head: Value
    lane: Value
    row: Value

    def further(self, rows: Value) -> Draw:
        """The same from a row further on."""
        return Draw(self.low, self.high, self.threshold, self.head, self.lane, self.row + rows)

    def words(self, c: Config, row: Value, at: Value) -> list[Value]:
        """The generator's four words for the eight rows that ``row`` belongs to, counted from the first, and for the
        lanes of the register that lies so many bytes into a line."""
        f = self.function
        key = emit_philox.round_keys(f, self.low, self.high)
        group = f.cast("trunc", (self.row + row) >> 3, "i32")
        type_ = vector(c.lanes, "i32")
        first = self.lane + f.cast("trunc", at // c.size, "i32")
        return emit_philox.words(f, group, f.splat(first, c.lanes) + f.iota(type_), self.head, key)

    def keeps(self, c: Config, row: Value, at: Value) -> Value:
        """Whether the weight of one row is kept, for the lanes of a register: for the few that are asked for singly."""
        f = self.function
        place = f.cast("trunc", (self.row + row) & (KEYS_A_CALL - 1), "i32")
        kept = emit_philox.keeps(f, self.words(c, row, at), self.threshold)
        found = kept[0]
        for n, keep in enumerate(kept[1:], 1):
            here = place.eq(n)
            found = f.select(f.splat(here, c.lanes), keep, found)
        return found


def emit_keep(module: Module, c: Config, width: int) -> Routine:
    """Of ``count`` lines of weights, of which the first register of lanes may see ``reach``, as in accumulate.py. Where
    words hold several rows, the first row is the first of its word in the whole problem, too."""
    f = Routine(module, f"keep_{width}", weights=Weights.of(c.word_line), draw=Draw.kind(), count="i64", reach="i64")
    weights, draw, count, reach = f.parameters
    first = draw.row & (KEYS_A_CALL - 1)
    with f.range(0, width * c.register, c.register) as at:
        last = words_seen(f, c, reach + at // c.size, count) * c.per_word
        with f.range(0 - first, last, KEYS_A_CALL) as line:
            drawn = draw.words(c, line, at)
            for n, kept in enumerate(_kept(f, c, drawn, draw.threshold)):
                word = line // c.per_word + n
                weight = f.cast("bitcast", weights.load(word, at=at), like(kept.type, _part(c)))
                weight = f.select(kept, weight, f.const(weight.type, 0))
                weights.store(f.cast("bitcast", weight, c.words), word, at=at)
    f.ret()
    return f


def _part(c: Config) -> str:
    """What a word of weights is made of, one for each row."""
    return c.word if c.per_word == 1 else f"i{8 * c.size // c.per_word}"


def _kept(f: Function, c: Config, drawn: list[Value], threshold: Value) -> list[Value]:
    """Which parts of eight rows' words are kept. The halves that decide about a pair lie as the pair does."""
    if c.per_word == 1:
        return emit_philox.keeps(f, drawn, threshold)
    parts = vector(c.per_word * c.lanes, _part(c))
    bound = f.splat(f.cast("trunc", threshold, _part(c)), lanes(parts))
    return [f.cast("bitcast", word, parts).uge(bound) for word in drawn]
