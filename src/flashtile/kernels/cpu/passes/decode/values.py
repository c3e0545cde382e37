"""Outputs of a few queries: lanes run over value columns, and each value is read once for all the rows of a tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.decode.rows import CACHE_LINE, Slots, bytes_ahead, prefetch
from flashtile.kernels.cpu.passes.decode.scores import ROW_TILES, accumulators, each_row_tile
from flashtile.kernels.cpu.passes.decode.softmax import RowState, state_line
from flashtile.kernels.cpu.steps.pack import read
from flashtile.kernels.cpu.steps.spans import add_sum
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Line, Scores, Weights, Words
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import vector

WIDEST = 16  # registers of value columns in a tile; half as many of pairs, which take registers to be made in


class Outputs(Words):
    """Rows of sums in slots, each a row's outputs and then what they have lost to rounding."""

    def row(self, n: Value | int) -> Outputs:
        return self.moved(n * self.stride)

    def moved(self, nbytes: Value | int) -> Outputs:
        return Outputs(self.at + nbytes, self.stride)

    def add(self, c: Config, alpha: Value, block: Value) -> None:
        """A register of a block's sums joins the first of the first row."""
        f = self.function
        before, lost = (f.load(c.vector, place, align=c.register) for place in self._places)
        self._store(c, *add_sum(f, c, before, lost, alpha, block))

    def begin(self, c: Config, block: Value) -> None:
        """The same where there is nothing yet: as if it joined zeros, whose sum with -0.0 is 0.0."""
        self._store(c, block + 0.0, self.function.const(c.vector, 0.0))

    @property
    def _places(self) -> tuple[Value, Value]:
        return self.at, self.at + self.stride // 2

    def _store(self, c: Config, *numbers: Value) -> None:
        for number, place in zip(numbers, self._places, strict=True):
            self.function.store(number, place, align=c.register)


def widths(c: Config, rows: int) -> list[int]:
    """Registers of value columns in a tile of so many rows, the widest first: powers of two down to 1."""
    widest = min(WIDEST // c.per_word, accumulators(c) // rows)
    return [1 << n for n in reversed(range(widest.bit_length()))]


def _kinds(c: Config) -> dict[str, Any]:
    """A block of ``count`` keys joins outputs: values from a tile's first column on, weights and scores of the rows.
    ``fresh``: there are no outputs yet, nor zeros in their place."""
    tile = {"outputs": Outputs.kind(), "states": RowState.of(state_line(c)), "values": Words.kind()}
    weights, scores = Weights.of(Line(c.word, c.key_block)), Scores.of(Line(c.acc, c.key_block))
    return tile | {"weights": weights, "scores": scores, "count": "i64", "fresh": "i64"}


def emit_values(module: Module, c: Config, rows: int, vectors: int, contained: Routine) -> Routine:
    """outputs = alpha outputs + weights values, for ``rows`` queries and ``vectors`` registers of value columns. The
    sums of one block are accumulated separately and then added to what was there: blocked summation.

    A hidden key's weight is 0, but 0 * NaN is NaN.  So a block whose sums are not all finite, as happens with broken
    data only, is summed again by ``contained``, which leaves hidden keys out; finite data costs one test a block.
    """
    f = Routine(module, f"values_{rows}_{vectors}", **_kinds(c))
    outputs, states, values, weights, scores, count, fresh = f.parameters
    totals = _weighted_sums(f, c, rows, vectors)
    broken = _any_nonfinite(f, c, totals)
    row_outputs, row_states = [outputs.row(r) for r in range(rows)], [states.row(r) for r in range(rows)]

    def add() -> None:
        for r in range(rows):
            alpha = f.splat(row_states[r].read("alpha"), c.lanes)
            for j in range(vectors):
                row_outputs[r].moved(j * c.register).add(c, alpha, totals[r * vectors + j])

    def begin() -> None:
        for r in range(rows):
            for j in range(vectors):
                row_outputs[r].moved(j * c.register).begin(c, totals[r * vectors + j])

    def contain() -> None:
        with f.range(0, rows) as r, f.range(0, vectors) as j:
            here = outputs.row(r).moved(j * c.register)
            with f.when(fresh.ne(0)):
                here.begin(c, f.const(c.vector, 0.0))
            contained(
                f,
                outputs=here,
                states=states.row(r),
                values=Words(values.at + j * (c.lanes * c.element), values.stride),
                weights=weights.line(r),
                scores=scores.line(r),
                count=count,
                fresh=f.const("i64", 0),
            )

    f.either(broken, contain, lambda: f.either(fresh.ne(0), begin, add))
    f.ret()
    return f


def _weighted_sums(f: Routine, c: Config, rows: int, vectors: int) -> list[Value]:
    """The block's sums of weights times values, row by row."""
    _, _, values, weights, _, count, _ = f.parameters
    ahead = bytes_ahead(c, values.stride, vectors * c.lanes * c.element, count, rows)

    def step(word: Value, totals: list[Value], keys: int = c.per_word) -> list[Value]:
        first = word * c.per_word
        at = [values.row(first + u).at for u in range(keys)]
        for line in range(0, vectors * c.lanes * c.element, CACHE_LINE):
            for row in at:
                prefetch(c, row + (ahead + line))
        factors, totals = [f.splat(weights.load(r, word), c.lanes) for r in range(rows)], list(totals)
        for j, column in enumerate(_words(f, c, at, vectors)):
            for r, factor in enumerate(factors):
                n = r * vectors + j
                totals[n] = c.product.multiply_add(f, c.isa, totals[n], factor, column)
        return totals

    def steps(word: Value, totals: list[Value]) -> list[Value]:
        for u in range(c.unroll):
            totals = step(word + u, totals)
        return totals

    words = count // c.per_word
    whole = words - words % c.unroll
    totals = f.fold(0, whole, c.unroll, [f.const(c.vector, 0.0)] * (rows * vectors), steps)
    totals = f.fold(whole, words, 1, totals, step)
    if c.per_word > 1:  # a last key without a partner: the weight beside its own is 0
        totals = f.fold(words, words + count % c.per_word, 1, totals, lambda word, x: step(word, x, keys=1))
    return totals


def _any_nonfinite(f: Function, c: Config, totals: Sequence[Value]) -> Value:
    first, *others = totals
    zero = sum((x * 0.0 for x in others), first * 0.0)  # NaN where a sum is not finite
    return f.cast("bitcast", zero.isnan(), f"i{c.lanes}").ne(0)


def _words(f: Function, c: Config, rows: Sequence[Value], vectors: int) -> Iterator[Value]:
    """Registers of value columns in words, of the keys at these addresses (of one, with itself): each read when it is
    asked for."""
    for j in range(vectors):
        yield _join(f, c, [_bits(f, c, row + j * (c.lanes * c.element)) for row in rows])


def _bits(f: Function, c: Config, at: Value) -> Value:
    """A register of value columns of one key as words hold it: accumulators, or as it lies in memory."""
    return read(f, c, at, c.lanes) if c.product.operand is None else f.load(vector(c.lanes, c.memory), at, align=1)


def _join(f: Function, c: Config, keys: Sequence[Value]) -> Value:
    """Words of value columns of a key, or of two keys, the first one's low."""
    if c.per_word == 1:
        return keys[0]
    order = [lane for t in range(c.lanes) for lane in (t, c.lanes + t)]
    return f.cast("bitcast", f.shuffle(keys[0], keys[-1], order), c.words)


def emit_contained_values(module: Module, c: Config) -> Routine:
    """As ``emit_values`` for one row and one register, but keys with score -inf are left out.

    The order of additions is the same, so a row that sees only finite values gets the bits of the fast function.  A
    value that is not finite enters unweighted: its weight is positive, however small it was rounded.
    """
    f = Routine(module, "contained_values", **_kinds(c))
    outputs, states, values, weights, scores, count, _ = f.parameters

    def step(word: Value, totals: list[Value]) -> list[Value]:
        first = word * c.per_word
        (total,), clean = totals, []
        for u in range(c.per_word):
            at = values.row(f.minimum(first + u, count - 1) if u else first).at
            value = read(f, c, at, c.lanes)
            seen = f.splat(scores.load(0, first + u).ne(-math.inf), c.lanes)
            nonfinite = (value * 0.0).isnan()
            total = f.select(seen & nonfinite, total + value, total)
            bits = value if c.product.operand is None else _bits(f, c, at)
            zero = f.const(bits.type, 0)
            clean.append(f.select(seen, f.select(nonfinite, zero, bits), zero))
        weight = f.splat(weights.load(0, word), c.lanes)
        return [c.product.multiply_add(f, c.isa, total, weight, _join(f, c, clean))]

    words = (count + (c.per_word - 1)) // c.per_word
    (total,) = f.fold(0, words, 1, [f.const(c.vector, 0.0)], step)
    outputs.add(c, f.splat(states.read("alpha"), c.lanes), total)
    f.ret()
    return f


def emit_value_tiles(module: Module, c: Config) -> Routine:
    """A block joins the outputs of all ``rows``, ``size`` columns each: in tiles of as many registers as accumulators
    allow, and of half as many, and so on, for what is left: memory is read fastest where a tile has whole rows."""
    contained = emit_contained_values(module, c)
    tiles = {(n, w): emit_values(module, c, n, w, contained) for n in ROW_TILES for w in widths(c, n)}
    f = Routine(module, "value_tiles", **_kinds(c), size="i64", rows="i64")
    outputs, states, values, weights, scores, count, fresh, size, rows = f.parameters
    slots = Slots.of(size, c.lanes)

    def row_tile(n: int, row: Value) -> None:
        line = row * weights.shape.bytes

        def tile(vectors: int, slot: Value, column: Value) -> None:
            here, state = outputs.row(row).moved(slot * c.register), states.row(row)
            columns = Words(values.at + column * c.element, values.stride)
            tiles[n, vectors](
                f,
                outputs=here,
                states=state,
                values=columns,
                weights=weights.moved(line),
                scores=scores.moved(line),
                count=count,
                fresh=fresh,
            )

        edge = f.const("i64", 0)
        for wide in widths(c, n)[:-1]:
            first, edge = edge, slots.whole // wide * wide
            with f.range(first, edge, wide) as slot:
                tile(wide, slot, slot * c.lanes)
        with f.range(edge, slots.count) as slot:
            tile(1, slot, f.minimum(slot * c.lanes, slots.padded - c.lanes))

    each_row_tile(f, rows, row_tile)
    f.ret()
    return f
