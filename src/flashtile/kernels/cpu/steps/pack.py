"""Changes of layout: lanes in, and rows where the products cannot read them as they lie.

Only what stands in lanes is transposed, once a panel, by shuffles. Rows are read in place unless their type needs
widening (or pairing), their innermost axis is not contiguous, or they hold something non-finite; then one block at a
time is converted into scratch memory.
"""

from __future__ import annotations

import math
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.range import Range
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Panel, Rows, Sums, Words
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import vector


def read(f: Function, c: Config, at: Value, count: int = 1) -> Value:
    """``count`` elements of memory as accumulators (16-bit floats widened); a scalar if count is 1."""
    bits = f.load(vector(count, c.memory) if count > 1 else c.memory, at, align=1)
    return c.isa.widen(f, bits, c.storage) if c.memory == "i16" else bits


def write(f: Function, c: Config, value: Value, at: Value) -> None:
    """The reverse of ``read``: rounded to nearest even."""
    f.store(c.isa.narrow(f, value, c.storage) if c.memory == "i16" else value, at, align=1)


def words_of(f: Function, c: Config, elements: list[Value]) -> list[Value]:
    """A word of elements that came from memory: of each part."""
    return c.product.split(f, c.isa, elements, exact=c.storage == c.product.operand)


def emit_transpose(module: Module, c: Config, name: str, to: type[Lines]) -> Routine:
    """Rows as lanes: lane r of line w is word w of row r, times a sign; where words have several parts, lines of one
    follow those of another. Lanes of the last register without a row repeat the last row."""
    out_kind = Sums.of(c.line) if to is Sums else Panel.of(c.word_line)
    f = Routine(module, name, rows=Rows.kind(), words="i64", out=out_kind, sign=c.acc, **_range_kind(c))
    rows, words, out, sign, *held = f.parameters
    n = c.lanes
    # Squares of lanes x lanes words go through registers; the words of a row that are left over go one by one.
    lanes_used = (rows.count + (n - 1)) // n * n
    whole_words = f.select(rows.adjacent(c.element), rows.size // (n * c.per_word) * n, f.const("i64", 0))
    with f.range(0, lanes_used, n) as lane, f.range(0, whole_words, n) as word:
        corner = rows.at + word * (c.per_word * c.element)
        registers = [
            _register_of_words(f, c, corner + f.minimum(lane + r, rows.count - 1) * rows.stride, sign, *held)
            for r in range(n)
        ]
        for part, of_part in enumerate(zip(*registers, strict=True)):
            for t, line in enumerate(f.transpose(of_part)):
                out.store(line, words * part + word + t, at=lane * c.size)
    with f.range(0, lanes_used) as lane:
        start = rows.at + f.minimum(lane, rows.count - 1) * rows.stride
        own = _own_words(c, rows, words)
        with f.range(whole_words, own) as word:
            for part, value in enumerate(_one_word(f, c, start, word, rows, sign, *held)):
                f.store(value, out.place(words * part + word, at=lane * c.size))
        if own is not words:
            for part in range(c.product.parts):
                with f.range(own, words) as word:
                    f.store(f.const(c.word, 0), out.place(words * part + word, at=lane * c.size))
    f.ret()
    return f


def _range_kind(c: Config) -> dict[str, Any]:
    """The further parameter of what packs operands whose parts do not hold every number: those become 0."""
    return {"held": Range.kind()} if c.guarded else {}


def _own_words(c: Config, rows: Rows, words: Value) -> Value:
    """Of the words of a row, those that hold elements: where a product takes several a step, zeros follow."""
    return words if c.product.words == 1 else (rows.size + (c.per_word - 1)) // c.per_word


def _register_of_words(f: Function, c: Config, at: Value, sign: Value, *held: Range) -> list[Value]:
    """A register of words from contiguous memory: of each part."""
    factor, k = f.splat(sign, c.lanes), c.per_word
    elements = [read(f, c, at + h * c.lanes * c.element, c.lanes) * factor for h in range(k)]
    if k > 1:  # element u of every word
        elements = [f.shuffle(elements[0], elements[-1], range(u, k * c.lanes, k)) for u in range(k)]
    for range_ in held:
        elements = [range_.or_zero(x) for x in elements]
    return words_of(f, c, elements)


def _one_word(f: Function, c: Config, start: Value, word: Value, rows: Rows, sign: Value, *held: Range) -> list[Value]:
    """A word of a row of any stride, of each part; 0 in place of an element past its end, which is not read."""
    elements, first = [], word * c.per_word
    for u in range(c.per_word):
        inside = first + u < rows.size if u else None
        at = first + u if inside is None else f.select(inside, first + u, first)
        value = read(f, c, start + at * rows.step)
        elements.append(value if inside is None else f.select(inside, value, f.const(value.type, 0.0)))
    elements = [element * sign for element in elements]
    for range_ in held:
        elements = [range_.or_zero(x) for x in elements]
    return words_of(f, c, elements)


def emit_pack_rows(module: Module, c: Config) -> Routine:
    """Rows to rows of words; where these have several parts, a row of each follows the one before."""
    f = Routine(module, "pack_rows", rows=Rows.kind(), words="i64", out=Words.kind(), **_range_kind(c))
    rows, words, out, *held = f.parameters
    whole = rows.size // (c.lanes * c.per_word) * c.lanes
    chunks = f.select(rows.adjacent(c.element), whole, f.const("i64", 0))
    one = f.const(c.acc, 1.0)
    with f.range(0, rows.count) as r:
        source, target = rows.at + r * rows.stride, out.row(r).at
        with f.range(0, chunks, c.lanes) as word:
            at = source + word * (c.per_word * c.element)
            for part, register in enumerate(_register_of_words(f, c, at, one, *held)):
                f.store(register, target + (words * part + word) * c.size)
        own = _own_words(c, rows, words)
        with f.range(chunks, own) as word:
            for part, value in enumerate(_one_word(f, c, source, word, rows, one, *held)):
                f.store(value, target + (words * part + word) * c.size)
        if own is not words:
            for part in range(c.product.parts):
                with f.range(own, words) as word:
                    f.store(f.const(c.word, 0), target + (words * part + word) * c.size)
    f.ret()
    return f


def emit_pack_values(module: Module, c: Config) -> Routine:
    """Values as the accumulation reads them, where it cannot read them as they lie."""
    return _emit_pack_transposed(module, c) if c.lands_in_memory else emit_pack_columns(module, c)


def emit_pack_columns(module: Module, c: Config) -> Routine:
    """Rows to rows of words along columns: one word holds as many rows' elements of a column. Returns whether any
    element was non-finite. Such elements become 0 (contain.py says why); so do missing columns, up to ``columns``,
    and rows: up to a panel's, where tiles read them whole, and what is not finite as bf16."""
    f = Routine(module, "pack_columns", "i64", rows=Rows.kind(), columns="i64", out=Words.kind())
    rows, columns, out = f.parameters
    chunks = f.select(rows.adjacent(c.element), rows.size // c.lanes * c.lanes, f.const("i64", 0))

    held = Range.finite(f) if c.lands_in_memory else None

    def convert(row: Value, column: Value, count: int, poison: Value) -> Value:
        found, poison = _rows_in_word(f, c, rows, row, column, count, poison, held)
        target = out.row(row // c.per_word).at + column * c.size
        (register,) = words_of(f, c, found)
        f.store(register, target, align=c.size)
        return poison

    def one_word(row: Value, poison: list[Value]) -> list[Value]:
        registers = f.fold(0, chunks, c.lanes, poison[:1], lambda col, p: [convert(row, col, c.lanes, p[0])])
        scalars = f.fold(chunks, rows.size, 1, poison[1:], lambda col, p: [convert(row, col, 1, p[0])])
        with f.range(rows.size, columns) as column:
            f.store(f.const(c.word, 0), out.row(row // c.per_word).at + column * c.size)
        return [*registers, *scalars]

    clean = [f.const(c.vector, 0.0), f.const(c.acc, 0.0)]
    found = any_nan(f, c, *f.fold(0, rows.count, c.per_word, clean, one_word))
    if c.lands_in_memory:
        words = (rows.count + (c.per_word - 1)) // c.per_word
        with f.range(words, c.panel // c.per_word) as word, f.range(0, columns * c.size, c.size) as at:
            f.store(f.const(c.word, 0), out.row(word).at + at)
    f.ret(found)
    return f


def _rows_in_word(
    f: Function, c: Config, rows: Rows, row: Value, column: Value, count: int, poison: Value, held: Range | None = None
) -> tuple[list[Value], Value]:
    """What a word of a column, or of so many columns, is made of: as many rows as it holds from one on, which is there;
    0 for what is not finite (not in a range) or not there. ``poison`` becomes NaN where something is not finite (not in
    the range)."""
    found = []
    for u in range(c.per_word):
        inside = row + u < rows.count
        source = rows.at + f.select(inside, row + u, row) * rows.stride
        value = read(f, c, source + column * rows.step, count)
        if u:
            inside = f.splat(inside, count) if count > 1 else inside
            value = f.select(inside, value, f.const(value.type, 0.0))
        if held is not None:
            inside = held.holds(value)
            poison = f.select(inside, poison, math.nan)
        else:
            zero = value * 0.0  # NaN where the value is not finite
            poison, inside = poison + zero, zero.eq(0.0)
        found.append(f.select(inside, value, f.const(value.type, 0.0)))
    return found, poison


def emit_pack_key_columns(module: Module, c: Config) -> Routine:
    """Keys as tiles sum them for dQ: likewise, but that only what is not finite as bf16 becomes 0."""
    return _emit_pack_transposed(module, c, ranged=False)


def _emit_pack_transposed(module: Module, c: Config, *, ranged: bool = True) -> Routine:
    """The same with columns as rows: row n of what comes out is column n, a word for as many rows as it holds, part
    after part; rows are filled up with zeros to whole tiles. What the parts cannot hold becomes 0, and is found, as
    what is not finite; unless ``ranged``, what is not finite as bf16."""
    f = Routine(module, "pack_transposed", "i64", rows=Rows.kind(), columns="i64", out=Words.kind())
    rows, columns, out = f.parameters
    n, words = c.lanes, (rows.count + (c.per_word - 1)) // c.per_word
    whole = (rows.count + (c.rows - 1)) // c.rows * c.rows // c.per_word
    chunks = f.select(rows.adjacent(c.element), rows.size // n * n, f.const("i64", 0))
    square = words // n * n  # squares of columns by words go through registers, the rest goes word by word
    clean = [f.const(c.vector, 0.0), f.const(c.acc, 0.0)]
    held = Range.of_values(f, c) if ranged else Range.finite(f)

    def one_square(word: Value, column: Value, poison: Value) -> Value:
        registers = []
        for t in range(n):
            found, poison = _rows_in_word(f, c, rows, (word + t) * c.per_word, column, n, poison, held)
            registers.append(words_of(f, c, found))
        for part, of_part in enumerate(zip(*registers, strict=True)):
            for t, line in enumerate(f.transpose(of_part)):
                f.store(line, out.row(column + t).at + (word * c.size + part * c.value_part), align=c.size)
        return poison

    def one_by_one(first: Value | int, last: Value, column: Value, poison: Value) -> Value:
        def one_word(word: Value, poison: list[Value]) -> list[Value]:
            found, bad = _rows_in_word(f, c, rows, word * c.per_word, column, 1, poison[0], held)
            for part, value in enumerate(words_of(f, c, found)):
                f.store(value, out.row(column).at + (word * c.size + part * c.value_part))
            return [bad]

        return f.fold(first, last, 1, [poison], one_word)[0]

    def of_squares(column: Value, poison: list[Value]) -> list[Value]:
        (register,) = f.fold(0, square, n, poison[:1], lambda word, p: [one_square(word, column, p[0])])
        (scalar,) = f.fold(
            column, column + n, 1, poison[1:], lambda single, p: [one_by_one(square, words, single, p[0])]
        )
        return [register, scalar]

    poison = f.fold(0, chunks, n, clean, of_squares)
    poison[1:] = f.fold(chunks, rows.size, 1, poison[1:], lambda column, p: [one_by_one(0, words, column, p[0])])
    with f.range(0, columns) as column, f.range(f.select(column < rows.size, words, 0), whole) as word:
        for part in range(c.product.parts):
            f.store(f.const(c.word, 0), out.row(column).at + (word * c.size + part * c.value_part))
    f.ret(any_nan(f, c, *poison))
    return f


def any_nan(f: Function, c: Config, register: Value, scalar: Value) -> Value:
    """1 if any lane or the scalar is NaN, else 0."""
    bits = f.cast("bitcast", register.isnan(), f"i{c.lanes}")
    return f.cast("zext", bits.ne(0) | scalar.isnan(), "i64")
