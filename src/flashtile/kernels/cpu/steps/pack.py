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


def read_some(f: Function, c: Config, at: Value, count: int, live: Value) -> Value:
    """The same of the first ``live`` elements, of which there may be none; 0 for the others, which are not read."""
    bits = f.load_some(vector(count, c.memory), at, live)
    return c.isa.widen(f, bits, c.storage) if c.memory == "i16" else bits


def write(f: Function, c: Config, value: Value, at: Value) -> None:
    """The reverse of ``read``: rounded to nearest even."""
    f.store(c.isa.narrow(f, value, c.storage) if c.memory == "i16" else value, at, align=1)


def words_of(f: Function, c: Config, elements: list[Value]) -> list[Value]:
    """A word of elements that came from memory: of each part."""
    return c.product.split(f, c.isa, elements, exact=c.storage == c.product.operand)


def emit_transpose(module: Module, c: Config, name: str, to: type[Lines], *, seldom: bool = False) -> Routine:
    """Rows as lanes: lane r of line w is word w of row r, times a sign; where words have several parts, lines of one
    follow those of another. Lanes of the last register without a row repeat the last row. ``seldom``: word by word, in
    a tenth of the code."""
    out_kind = Sums.of(c.line) if to is Sums else Panel.of(c.word_line)
    f = Routine(module, name, rows=Rows.kind(), words="i64", out=out_kind, sign=c.acc, **_range_kind(c))
    rows, words, out, sign, *held = f.parameters
    n = c.lanes
    lanes_used, own = (rows.count + (n - 1)) // n * n, _own_words(c, rows, words)
    whole, along = (f.const("i64", 0),) * 2 if seldom else _in_registers(f, c, rows, own)

    def square(lane: Value, word: Value, live: Value | None = None) -> None:
        """Of lanes x lanes words, through registers. Past a row's own words its last line is stored, again and again
        and at last with what it holds."""
        corner = rows.at + word * (c.per_word * c.element)
        at = [corner + f.minimum(lane + r, rows.count - 1) * rows.stride for r in range(n)]
        registers = [_register_of_words(f, c, x, sign, *held, live=live) for x in at]
        for part, of_part in enumerate(zip(*registers, strict=True)):
            for t, line in reversed(list(enumerate(f.transpose(of_part)))):
                place = word + t if live is None else f.minimum(word + t, own - 1)
                out.store(line, words * part + place, at=lane * c.size)

    if not seldom:
        with f.range(0, lanes_used, n) as lane:
            with f.range(0, whole, n) as word:
                square(lane, word)
            with f.when(whole < along):
                square(lane, whole, rows.size - whole * c.per_word)
    with f.range(0, lanes_used) as lane:
        start = rows.at + f.minimum(lane, rows.count - 1) * rows.stride
        with f.range(along, own) as word:
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


def _in_registers(f: Function, c: Config, rows: Rows, own: Value) -> tuple[Value, Value]:
    """How many words of a row whole registers hold, and how many go through registers: all that are its own, or none
    where elements lie apart."""
    adjacent, none = rows.adjacent(c.element), f.const("i64", 0)
    return f.select(adjacent, rows.size // (c.lanes * c.per_word) * c.lanes, none), f.select(adjacent, own, none)


def _register_of_words(
    f: Function, c: Config, at: Value, sign: Value, *held: Range, live: Value | None = None
) -> list[Value]:
    """A register of words from contiguous memory, of each part; of the first ``live`` elements, 0 for the others."""
    factor, k = f.splat(sign, c.lanes), c.per_word
    elements = []
    for h in range(k):
        here, first = at + h * c.lanes * c.element, h * c.lanes
        some = read(f, c, here, c.lanes) if live is None else read_some(f, c, here, c.lanes, live - first)
        elements.append(some * factor)
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
    own, one = _own_words(c, rows, words), f.const(c.acc, 1.0)
    whole, along = _in_registers(f, c, rows, own)
    with f.range(0, rows.count) as r:
        source, target = rows.at + r * rows.stride, out.row(r).at
        with f.range(0, whole, c.lanes) as word:
            at = source + word * (c.per_word * c.element)
            for part, register in enumerate(_register_of_words(f, c, at, one, *held)):
                f.store(register, target + (words * part + word) * c.size)
        with f.when(whole < along):
            at, live = source + whole * (c.per_word * c.element), rows.size - whole * c.per_word
            for part, register in enumerate(_register_of_words(f, c, at, one, *held, live=live)):
                f.store_some(register, target + (words * part + whole) * c.size, own - whole)
        with f.range(along, own) as word:
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
    and rows: up to a panel's, where tiles read them whole, and what is not finite as bf16. Where words have several
    parts, the columns of each follow those of the one before."""
    f = Routine(module, "pack_columns", "i64", rows=Rows.kind(), columns="i64", out=Words.kind())
    rows, columns, out = f.parameters
    adjacent, none = rows.adjacent(c.element), f.const("i64", 0)
    whole = f.select(adjacent, rows.size // c.lanes * c.lanes, none)
    along = f.select(adjacent, rows.size, none)
    held = Range.finite(f) if c.lands_in_memory else None

    def convert(row: Value, column: Value, count: int, poison: Value, live: Value | None = None) -> Value:
        found, poison = _rows_in_word(f, c, rows, row, column, count, poison, held, live=live)
        for part, register in enumerate(words_of(f, c, found)):
            target = out.row(row // c.per_word).at + (columns * part + column) * c.size
            if live is None:
                f.store(register, target, align=c.size)
            else:
                f.store_some(register, target, live)
        return poison

    def one_word(row: Value, poison: list[Value]) -> list[Value]:
        registers = f.fold(0, whole, c.lanes, poison[:1], lambda col, p: [convert(row, col, c.lanes, p[0])])
        rest = f.value_when(
            whole < along, lambda: convert(row, whole, c.lanes, registers[0], rows.size - whole), registers[0]
        )
        registers = [rest]
        scalars = f.fold(along, rows.size, 1, poison[1:], lambda col, p: [convert(row, col, 1, p[0])])
        with f.range(rows.size, columns) as column:
            for part in range(c.product.parts):
                f.store(f.const(c.word, 0), out.row(row // c.per_word).at + (columns * part + column) * c.size)
        return [*registers, *scalars]

    clean = [f.const(c.vector, 0.0), f.const(c.acc, 0.0)]
    found = any_nan(f, c, *f.fold(0, rows.count, c.per_word, clean, one_word))
    if c.lands_in_memory:
        words, nbytes = (rows.count + (c.per_word - 1)) // c.per_word, columns * (c.size * c.product.parts)
        with f.range(words, c.panel // c.per_word) as word, f.range(0, nbytes, c.size) as at:
            f.store(f.const(c.word, 0), out.row(word).at + at)
    f.ret(found)
    return f


def _rows_in_word(
    f: Function,
    c: Config,
    rows: Rows,
    row: Value,
    column: Value,
    count: int,
    poison: Value,
    held: Range | None = None,
    live: Value | None = None,
) -> tuple[list[Value], Value]:
    """What a word of a column, or of so many columns (of which the first ``live`` are there), is made of: as many rows
    as it holds from one on, which is there; 0 for what is not finite (not in a range) or not there. ``poison`` becomes
    NaN where something is not finite (not in the range)."""
    found = []
    for u in range(c.per_word):
        inside = row + u < rows.count
        source = rows.at + f.select(inside, row + u, row) * rows.stride
        at = source + column * rows.step
        value = read(f, c, at, count) if live is None else read_some(f, c, at, count, live)
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


def _as_they_lie(
    f: Function, c: Config, rows: Rows, row: Value, column: Value, poison: Value, held: Range
) -> tuple[Value, Value]:
    """The same for a register of columns of elements that words hold in just that form, of rows that are all there."""
    bits = []
    for u in range(c.per_word):
        at = rows.at + ((row + u) * rows.stride + column * rows.step)
        half = f.load(vector(c.lanes, c.memory), at, align=1)
        bits.append(f.cast("zext", half, c.words) << 16 * u)
    word = bits[0] | bits[1]
    halves = f.cast("bitcast", word, c.isa.vector_of("i16"))
    kept = f.cast("bitcast", f.select(held.holds_halves(halves), halves, f.const(halves.type, 0)), c.words)
    return kept, f.select(kept.ne(word), f.const(poison.type, math.nan), poison)


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
    # Squares of columns by words that have all their rows go through registers, the rest goes word by word.
    square = rows.count // c.per_word // n * n
    clean = [f.const(c.vector, 0.0), f.const(c.acc, 0.0)]
    held = Range.of_values(f, c) if ranged else Range.finite(f)

    def one_square(word: Value, column: Value, poison: Value) -> Value:
        registers = []
        for t in range(n):
            row = (word + t) * c.per_word
            if c.product.rounds and c.storage == c.product.operand:
                one, poison = _as_they_lie(f, c, rows, row, column, poison, held)
                registers.append([one])
            else:
                found, poison = _rows_in_word(f, c, rows, row, column, n, poison, held)
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
