"""Changes of layout: queries in, and K or V where the kernels cannot read them as they lie.

Only queries (and outputs, finish.py) are transposed, once a panel, by shuffles.  K and V are read in place unless their
type needs widening (or pairing), their innermost axis is not contiguous, or V holds something non-finite;
then one key block at a time is converted into scratch memory.
"""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.llvm.ir import SIZES, Function, Module, Value, like, vector


def read(f: Function, c: Config, at: Value, count: int = 1) -> Value:
    """``count`` elements of memory as accumulators (16-bit floats widened); a scalar if count is 1."""
    bits = f.load(vector(count, c.memory) if count > 1 else c.memory, at, align=1)
    return c.isa.widen(f, bits, c.storage) if c.memory == "i16" else bits


def write(f: Function, c: Config, value: Value, at: Value) -> None:
    """The reverse of ``read``: rounded to nearest even."""
    f.store(c.isa.narrow(f, value, c.storage) if c.memory == "i16" else value, at, align=1)


def word_of(f: Function, c: Config, even: Value, odd: Value) -> Value:
    """Two accumulators (or vectors of them) as one word of bf16 pairs."""
    if even.type[0] == "<" and c.storage != "bfloat":
        return c.isa.narrow_pairs(f, even, odd)
    wide = like(even.type, "i32")
    low, high = (f.cast("zext", c.isa.narrow(f, x, "bfloat"), wide) for x in (even, odd))
    return low | (high << 16)


def emit_load_queries(module: Module, c: Config, name: str = "load_queries") -> str:
    """A function that transposes a panel of queries (or carried outputs): out[word][query]; its name.

    Arguments: queries, bytes between rows, bytes between elements, rows there are, elements, words, out, sign
    (multiplies every query).  Lanes of the last register without a row repeat the last row.
    """
    f = Function(module, name, "void", ["ptr", "i64", "i64", "i64", "i64", "i64", "ptr", c.acc],
                 names=["q", "stride", "step", "rows", "size", "words", "out", "sign"], internal=True)  # fmt: skip
    q, stride, step, rows, size, words, out, sign = f.args
    n = c.lanes
    contiguous = step.eq(SIZES[c.memory])
    # Squares of lanes x lanes words go through registers; the words of a row that are left over go one by one.
    lanes_used = (rows + (n - 1)) // n * n
    whole_words = f.select(contiguous, size // (n * c.per_word) * n, f.const("i64", 0))
    with f.range(0, lanes_used, n) as lane, f.range(0, whole_words, n) as word:
        corner = q + word * (c.per_word * SIZES[c.memory])
        columns = [_query_words(f, c, corner + f.minimum(lane + r, rows - 1) * stride, sign) for r in range(n)]
        for t, column in enumerate(f.transpose(columns)):
            f.store(column, out + ((word + t) * c.line + lane * c.size), align=c.register)

    with f.range(0, lanes_used) as lane:
        start = q + f.minimum(lane, rows - 1) * stride
        with f.range(whole_words, words) as word:
            f.store(_query_word(f, c, start, word, step, size, sign), out + (word * c.line + lane * c.size))
    f.ret()
    return f.name


def _query_words(f: Function, c: Config, at: Value, sign: Value) -> Value:
    """One register of words from contiguous memory."""
    factor = f.splat(sign, c.lanes)
    if not c.pairs:
        return read(f, c, at, c.lanes) * factor
    low, high = (read(f, c, at + h * c.lanes * SIZES[c.memory], c.lanes) * factor for h in range(2))
    even, odd = (f.shuffle(low, high, range(first, 2 * c.lanes, 2)) for first in range(2))
    return word_of(f, c, even, odd)


def _query_word(f: Function, c: Config, start: Value, word: Value, step: Value, size: Value, sign: Value) -> Value:
    """One word from memory of any stride; the missing half of a last pair is 0."""
    if not c.pairs:
        return read(f, c, start + word * step) * sign
    even, odd = _pair(f, c, start, word * 2, step, size)
    return word_of(f, c, even * sign, odd * sign)


def _pair(f: Function, c: Config, start: Value, index: Value, step: Value, size: Value) -> tuple[Value, Value]:
    """Elements ``index`` and ``index + 1`` of a row; 0 in place of one past its end, which is not read."""
    even = read(f, c, start + index * step)
    inside = index + 1 < size
    odd = read(f, c, start + f.select(inside, index + 1, index) * step)
    return even, f.select(inside, odd, f.const(odd.type, 0.0))


def emit_pack_keys(module: Module, c: Config) -> str:
    """A function that converts a block of keys to rows of words; its name.

    Arguments: keys, bytes between rows, bytes between elements, rows, elements, words, out, bytes of an out row.
    """
    f = Function(module, "pack_keys", "void", ["ptr", "i64", "i64", "i64", "i64", "i64", "ptr", "i64"], internal=True,
                 names=["k", "stride", "step", "rows", "size", "words", "out", "row"])  # fmt: skip
    k, stride, step, rows, size, words, out, row = f.args
    chunks = f.select(step.eq(SIZES[c.memory]), size // (c.lanes * c.per_word) * c.lanes, f.const("i64", 0))
    one = f.const(c.acc, 1.0)
    with f.range(0, rows) as r:
        source, target = k + r * stride, out + r * row
        with f.range(0, chunks, c.lanes) as word:
            at = source + word * (c.per_word * SIZES[c.memory])
            f.store(_query_words(f, c, at, one), target + word * c.size)
        with f.range(chunks, words) as word:
            f.store(_query_word(f, c, source, word, step, size, one), target + word * c.size)
    f.ret()
    return f.name


def emit_pack_values(module: Module, c: Config) -> str:
    """A function that converts a block of values to rows of words; returns whether any was non-finite; its name.

    Arguments: values, bytes between rows, bytes between elements, rows, elements, columns (elements rounded up
    to whole tiles), out, bytes of an out row.  Non-finite values become 0 (forward.py says why), missing
    columns too.  With ``pairs`` an out row holds two keys, a word a column; a missing last key is 0.
    """
    f = Function(module, "pack_values", "i64", ["ptr", "i64", "i64", "i64", "i64", "i64", "ptr", "i64"],
                 names=["v", "stride", "step", "rows", "size", "columns", "out", "row"], internal=True)  # fmt: skip
    v, stride, step, rows, size, columns, out, row = f.args
    chunks = f.select(step.eq(SIZES[c.memory]), size // c.lanes * c.lanes, f.const("i64", 0))

    def convert(key: Value, column: Value, count: int, bad: Value) -> Value:
        found = []
        for u in range(c.per_word):
            inside = key + u < rows
            source = v + f.select(inside, key + u, key) * stride
            value = read(f, c, source + column * step, count)
            if u:
                inside = f.splat(inside, count) if count > 1 else inside
                value = f.select(inside, value, f.const(value.type, 0.0))
            zero = value * 0.0  # NaN where the value is not finite
            bad = bad + zero
            found.append(f.select(zero.eq(0.0), value, f.const(value.type, 0.0)))
        target = out + (key // c.per_word * row + column * c.size)
        f.store(word_of(f, c, *found) if c.pairs else found[0], target, align=c.size)
        return bad

    def one_row(key: Value, bad: list[Value]) -> list[Value]:
        vectors = f.fold(0, chunks, c.lanes, bad[:1], lambda col, b: [convert(key, col, c.lanes, b[0])])
        scalars = f.fold(chunks, size, 1, bad[1:], lambda col, b: [convert(key, col, 1, b[0])])
        with f.range(size, columns) as column:
            f.store(f.const(c.word, 0), out + (key // c.per_word * row + column * c.size))
        return [*vectors, *scalars]

    clean = [f.const(c.vector, 0.0), f.const(c.acc, 0.0)]
    f.ret(any_nan(f, c, *f.fold(0, rows, c.per_word, clean, one_row)))
    return f.name


def any_nan(f: Function, c: Config, register: Value, scalar: Value) -> Value:
    """1 if any lane or the scalar is NaN, else 0."""
    bits = f.cast("bitcast", register.isnan(), f"i{c.lanes}")
    return f.cast("zext", bits.ne(0) | scalar.isnan(), "i64")
