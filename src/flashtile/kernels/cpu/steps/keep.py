"""Dropout: lines of one panel in place, 0 where they are not kept.

In the forward these are weights, between the softmax and the accumulation. Their sum has been taken, so lse is without
dropout; what is kept stays as it is, and the division by the share that is kept comes once, with the division by that
sum (finish.py). In the backward it is dP first, before it becomes dS, and then the weights that enter dV: what is kept
is drawn once and noted.

One call of the generator serves eight rows for each lane. Its calls begin at rows that are multiples of eight in the
whole problem, wherever the first line stands: what lies before the first line and behind the last is margin, and is
changed with the rest of its eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.softmax import words_seen
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Scores, Weights
from flashtile.llvm.routines import Kind, Operand, Routine
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
                for part in range(c.product.parts):
                    words, word = weights.moved(part * c.weights_part), line // c.per_word + n
                    weight = f.cast("bitcast", words.load(word, at=at), like(kept.type, _part(c)))
                    weight = f.select(kept, weight, f.const(weight.type, 0))
                    words.store(f.cast("bitcast", weight, c.words), word, at=at)
    f.ret()
    return f


@dataclass(frozen=True)
class Kept(Operand):
    """Which weights of a block are kept, a bit each; a register's lanes in two bytes. There is room for eight lines
    before the first."""

    BYTES: ClassVar = 2
    WORDS: ClassVar = {"at": "ptr"}
    at: Value
    c: Config

    @classmethod
    def of(cls, c: Config) -> Kind:
        return cls.kind(c=c)

    @classmethod
    def nbytes(cls, c: Config) -> int:
        """Of a block, the rows before and after it included."""
        return (c.key_block + 2 * KEYS_A_CALL) * c.isa.vectors * cls.BYTES

    def place(self, line: Value, at: Value) -> Value:
        c = self.c
        return self.at + ((line + KEYS_A_CALL) * (c.isa.vectors * self.BYTES) + at // c.register * self.BYTES)

    def store(self, bits: Value, line: Value, at: Value) -> None:
        f, c = self.function, self.c
        whole = f.cast("zext", f.cast("bitcast", bits, f"i{c.lanes}"), "i16")
        f.store(whole, self.place(line, at))

    def load(self, line: Value, at: Value) -> Value:
        f, c = self.function, self.c
        bits = f.cast("trunc", f.load("i16", self.place(line, at)), f"i{c.lanes}")
        return f.cast("bitcast", bits, vector(c.lanes, "i1"))


def emit_draw(module: Module, c: Config, width: int) -> Routine:
    """``count`` lines of dP: 0 where a weight is not kept, times ``inverse`` where it is; and which are, for `drop`."""
    kinds: dict[str, Any] = {"slopes": Scores.of(c.line), "kept": Kept.of(c), "draw": Draw.kind()}
    f = Routine(module, f"draw_{width}", **kinds, inverse=c.acc, count="i64", reach="i64")
    slopes, kept, draw, inverse, count, reach = f.parameters
    first, factor = draw.row & (KEYS_A_CALL - 1), f.splat(inverse, c.lanes)
    with f.range(0, width * c.register, c.register) as at:
        last = words_seen(f, c, reach + at // c.size, count) * c.per_word
        with f.range(0 - first, last, KEYS_A_CALL) as line:
            for n, keep in enumerate(emit_philox.keeps(f, draw.words(c, line, at), draw.threshold)):
                kept.store(keep, line + n, at)
                slope = slopes.load(line + n, at=at) * factor
                slopes.store(f.select(keep, slope, f.const(c.vector, 0.0)), line + n, at=at)
    f.ret()
    return f


def emit_drop(module: Module, c: Config, width: int) -> Routine:
    """``count`` lines of weights as differentiate.py stores them: -0 where `draw` did not keep them. The sign tells
    what was dropped from what is hidden, which is 0 and stays so (put_back, in exchange.py); so does NaN, 0 times which
    it would be."""
    f = Routine(module, f"drop_{width}", weights=Scores.of(c.weight_line), kept=Kept.of(c), count="i64", reach="i64")
    weights, kept, count, reach = f.parameters
    type_, k = vector(c.lanes, _part(c)), c.per_word
    nothing = f.const(type_, -0.0 if k == 1 else -(1 << 8 * c.size // k - 1))
    with f.range(0, width * c.register, c.register) as at:
        last = words_seen(f, c, reach + at // c.size, count) * k
        with f.range(0, last) as line:
            for part in range(c.product.parts):
                place = weights.place(line, at=at // k + part * c.held_part)
                weight = f.load(type_, place, align=c.register // k)
                stays = kept.load(line, at) | weight.eq(0) | _nan(weight)
                f.store(f.select(stays, weight, nothing), place, align=c.register // k)
    f.ret()
    return f


def _nan(weight: Value) -> Value:
    """Of floats, or of the bits of bf16."""
    return weight.isnan() if weight.is_float else (weight & 0x7FFF) > 0x7F80


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
