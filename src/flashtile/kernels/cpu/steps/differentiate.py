"""Between the products of the backward, line by line: scores and dP become weights and dS.

    P = exp(S - lse),   dS = P (dP - delta),   delta = rowsum(dO * O) - dlse

Source: Dao 2023, FlashAttention-2, section 3.1.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext
from functools import partial
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.pack import read
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.kernels.cpu.steps.spans import add_sum
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Rows, Scores, Weights
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import lanes as lanes_of
from flashtile.llvm.types import like, vector

TILE_ROWS = 8  # lines past the last that the exchange may read, and that are 0


class RowState(Lines):
    """What the backward knows of a panel's rows: lines of lse log2(e) in two parts, high and low, and of delta."""

    LINES = 3


class SinkSums(Lines):
    """What rows give to the gradient of their head's sink, summed lane by lane, and what that has lost to rounding."""

    LINES = 2


def emit_row_state(module: Module, c: Config) -> Routine:
    """lse and delta of the rows of a panel. A row without a key, and a lane without a row, has an lse of +inf: all
    weights are 0 there. With a sink (-inf: none) a row without a key has the sink for its lse, and an output of 0
    that depends on nothing: what its dO holds does not matter."""
    kinds: dict[str, Any] = {"do": Rows.kind(), "o": Rows.kind(), "out": RowState.of(c.line)}
    f = Routine(module, "row_state", **kinds, lse="ptr", dlse="ptr", sink=c.acc)
    do, o, out, lse, dlse, sink = f.parameters
    given = f.is_null(dlse).eq(0)
    for number, line in ((math.inf, 0), (0.0, 1), (0.0, 2)):
        out.line(line).fill(number, 1)
    n = c.lanes
    both = do.adjacent(c.element) & o.adjacent(c.element)
    chunks = f.select(both, do.size // n * n, f.const("i64", 0))
    with f.range(0, do.count) as lane:
        ours, theirs = (x.at + lane * x.stride for x in (do, o))

        def add(count: int, ours: Value = ours, theirs: Value = theirs) -> Callable[..., list[Value]]:
            def step(column: Value, carry: list[Value]) -> list[Value]:
                a, b = (read(f, c, at + column * x.step, count) for at, x in ((ours, do), (theirs, o)))
                return [c.isa.multiply_add(f, a, b, carry[0]), carry[1] | b.ne(0.0)]

            return step

        none = [f.const(type_, 0) for type_ in (like(c.vector, "i1"), "i1")]
        registers = f.fold(0, chunks, n, [f.const(c.vector, 0.0), none[0]], add(n))
        rest = f.fold(chunks, do.size, 1, [f.const(c.acc, 0.0), none[1]], add(1))
        delta = _across(f, registers[0]) + rest[0]
        any_output = f.cast("bitcast", registers[1], f"i{n}").ne(0) | rest[1]
        at = lane * c.size
        known = f.value_when(given, partial(f.load, c.acc, dlse + at, 1), f.const(c.acc, 0.0))
        nats = f.load(c.acc, lse + at, align=1)
        high, low = _octaves(f, c, nats)
        nothing = nats.eq(-math.inf)
        delta = f.select(nats.ne(sink) | any_output, delta, f.const(c.acc, 0.0))
        f.store(f.select(nothing, f.const(c.acc, math.inf), high), out.lane(lane).at)
        f.store(f.select(nothing, f.const(c.acc, 0.0), low), out.lane(lane).line(1).at)
        f.store(delta - known, out.lane(lane).line(2).at)
    f.ret()
    return f


def emit_known_state(module: Module, c: Config) -> Routine:
    """The same for rows whose delta is known: of lse and delta, one number a row."""
    f = Routine(module, "known_state", out=RowState.of(c.line), lse="ptr", delta="ptr", count="i64")
    out, lse, delta, count = f.parameters
    for number, line in ((math.inf, 0), (0.0, 1), (0.0, 2)):
        out.line(line).fill(number, 1)
    with f.range(0, count) as lane:
        at = lane * c.size
        nats = f.load(c.acc, lse + at, align=1)
        high, low = _octaves(f, c, nats)
        nothing = nats.eq(-math.inf)
        f.store(f.select(nothing, f.const(c.acc, math.inf), high), out.lane(lane).at)
        f.store(f.select(nothing, f.const(c.acc, 0.0), low), out.lane(lane).line(1).at)
        f.store(f.load(c.acc, delta + at, align=1), out.lane(lane).line(2).at)
    f.ret()
    return f


def _across(f: Function, register: Value) -> Value:
    """The sum of a register's lanes."""
    n = lanes_of(register.type)
    while n > 1:
        n //= 2
        register = f.shuffle(register, register, range(n)) + f.shuffle(register, register, range(n, 2 * n))
    return f.extract(register, 0)


def _octaves(f: Function, c: Config, nats: Value) -> tuple[Value, Value]:
    """nats times log2(e), as high + low: an lse of hundreds would else cost every weight of its row as many ulp."""
    if c.acc == "float":
        exact = f.cast("fpext", nats, "double") * (1 / math.log(2))
        high = f.cast("fptrunc", exact, "float")
        return high, f.cast("fptrunc", exact - f.cast("fpext", high, "double"), "float")
    with localcontext() as context:
        context.prec = 60
        log2e = 1 / Decimal(2).ln()
        rest = float(log2e - Decimal(float(log2e)))
    factor = f.const(c.acc, float(log2e))
    high = nats * factor
    if c.isa.fused:
        return high, f.fma(nats, factor, 0.0 - high) + nats * rest
    # The exact product of halves of 26 bits. Source: Dekker 1971, A floating-point technique for extending precision.
    halves = []
    for x in (nats, factor):
        big = x * (2.0**27 + 1)
        upper = big - (big - x)
        halves.append((upper, x - upper))
    (a, b), (p, q) = halves
    return high, ((a * p - high) + a * q + b * p) + b * q + nats * rest


def emit_sink_sums(module: Module, c: Config) -> Routine:
    """The rows of a panel join the gradient of their head's sink: -exp(sink - lse) delta."""
    f = Routine(module, "sink_sums", state=RowState.of(c.line), sums=SinkSums.of(c.line), sink=c.acc)
    state, sums, sink = f.parameters
    sink_high, sink_low = (f.splat(x, c.lanes) for x in _octaves(f, c, sink))
    with f.range(0, c.line.bytes, c.register) as at:
        high, low, delta = (state.load(n, at=at) for n in range(RowState.LINES))
        weight = vmath.weight(f, c.isa, (sink_high - high) + (sink_low - low))
        before, lost = (sums.load(n, at=at) for n in range(SinkSums.LINES))
        total, lost = add_sum(f, c, before, lost, f.const(c.vector, 1.0), weight * (0.0 - delta))
        sums.store(total, 0, at=at)
        sums.store(lost, 1, at=at)
    f.ret()
    return f


def emit_finish_sink(module: Module, c: Config) -> Routine:
    """The sum over lanes, added to the head's element."""
    f = Routine(module, "finish_sink", sums=SinkSums.of(c.line), out="ptr")
    sums, out = f.parameters
    zero = [f.const(c.acc, 0.0)] * SinkSums.LINES

    def add(at: Value, found: list[Value]) -> list[Value]:
        return [total + _across(f, sums.load(n, at=at)) for n, total in enumerate(found)]

    total, lost = f.fold(0, c.line.bytes, c.register, zero, add)
    f.store(f.load(c.acc, out) + (total + lost), out)
    f.ret()
    return f


class Weighing:
    """P and dS of scores and dP, for the lanes of one register."""

    def __init__(self, f: Function, c: Config, state: RowState, factors: Factors, at: Value | int) -> None:
        self.f, self.c = f, c
        self.high, self.low, self.delta = (state.load(n, at=at) for n in range(RowState.LINES))
        self.c_high, self.c_low = (f.splat(x, c.lanes) for x in (factors.high, factors.low))

    def __call__(self, score: Value, slope: Value) -> tuple[Value, Value, Value]:
        """(P, dS, whether the score is seen): both 0 where it is not, whatever dP holds."""
        f, c = self.f, self.c
        zero = f.const(c.vector, 0.0)
        # The large terms cancel first, with one rounding; c_low is positive, so -inf stays.
        near = c.isa.multiply_add(f, score, self.c_high, 0.0 - self.high)
        exponent = near + c.isa.multiply_add(f, score, self.c_low, 0.0 - self.low)
        weight = vmath.weight(f, c.isa, exponent, coarse=c.product.coarse)
        seen = score.ne(-math.inf)
        weight = f.select(seen, weight, zero)
        return weight, f.select(seen, weight * (slope - self.delta), zero), seen


def emit_differentiate(module: Module, c: Config, width: int) -> Routine:
    """The first ``count`` lines of scores become weights, those of ``slopes``, which are dP, become dS; both 0 where
    a score is -inf: it was hidden, or counts as that. As many lines as a tile of the exchange may reach further are 0.
    Of the lines, the first register of lanes may see ``reach``, as in accumulate.py.

    Where a product's words hold several lanes, weights and dS are stored as such words, each line where it began; and
    dS also as ``words`` of several lines each, for the product that goes along lines.
    """
    line = c.line
    kinds: dict[str, Any] = {
        "scores": Scores.of(line),
        "slopes": Scores.of(line),
        "words": Weights.of(c.word_line),
        "state": RowState.of(line),
    }
    f = Routine(module, f"differentiate_{width}", **kinds, count="i64", reach="i64", factors=Factors.of(c))
    scores, slopes, words, state, count, reach, factors = f.parameters
    k = c.per_word
    whole = (count + (k - 1)) // k * k
    if k > 1:
        with f.when(whole > count), f.range(0, width * c.register, c.register) as at:
            scores.store(f.const(c.vector, -math.inf), count, at=at)
    with f.range(0, width * c.register, c.register) as at:
        stop = f.clamp(reach + (at // c.size + TILE_ROWS + (k - 1)), 0, whole) // k * k
        weigh = Weighing(f, c, state, factors, at)
        lane = at // k  # where a line of narrow words has what this register holds

        with f.range(0, stop, k) as first:
            weights, differences = [], []
            for u in range(k):
                weight, difference, _ = weigh(*(x.load(first + u, at=at) for x in (scores, slopes)))
                weights.append(weight)
                differences.append(difference)
            store_line(f, c, weights, scores, first, lane)
            joined = store_line(f, c, differences, slopes, first, lane)
            if k > 1:
                words.store(joined, first // k, at=at)
    for lines in (scores, slopes):
        clear_rest(f, c, width, lines, whole)
    f.ret()
    return f


def clear_rest(f: Function, c: Config, width: int, lines: Lines, whole: Value) -> None:
    """0 in the lines that a tile of the exchange may reach after ``whole`` words of them."""
    k = c.per_word
    zeros = [f.const(c.vector, 0.0)] * k
    with f.range(0, width * c.register, c.register) as at, f.range(whole, whole + TILE_ROWS, k) as first:
        store_line(f, c, zeros, lines, first, at // k)


def store_line(f: Function, c: Config, values: list[Value], lines: Lines, first: Value, lane: Value) -> Value:
    """Registers of as many lines as a word holds, as what the exchange broadcasts; returns them as words."""
    words = c.product.join(f, c.isa, values)
    if c.per_word == 1:
        lines.store(words, first, at=lane)
        return words
    narrow = like(words.type, f"i{8 * c.size // c.per_word}")
    for u in range(c.per_word):
        bits = f.cast("trunc", words >> (8 * c.size // c.per_word * u), narrow)
        f.store(bits, lines.place(first + u, at=lane), align=c.register // c.per_word)
    return words


def clear_lines(c: Config, lines: Sequence[Lines], words: Weights, first: Value, last: Value) -> None:
    """0 in the lines [first, last), whole words of them, that tiles read and that no row stands for; in every part."""
    for part in range(c.product.parts):
        for each in lines:
            each.moved(part * c.held_part).line(first).fill(0, last - first)
        words.moved(part * c.pairs_part).line(first // c.per_word).fill(0, (last - first) // c.per_word)


def clear_lanes(f: Function, c: Config, lines: Sequence[Lines], count: Value, lanes: Value) -> None:
    """0 in the lanes that no row stands for, of ``count`` lines that tiles read: what these hold may be anything."""
    there = f.iota(vector(c.panel, "i16")) < f.splat(f.cast("trunc", lanes, "i16"), c.panel)
    with f.when(lanes < c.panel), f.range(0, count) as row:
        for each in lines:
            for part in range(c.product.parts):
                at = each.place(row, at=part * c.held_part)
                halves = f.load(vector(c.panel, "i16"), at, align=c.register)
                f.store(f.select(there, halves, f.const(halves.type, 0)), at, align=c.register)


def store_pair(
    f: Function, c: Config, pair: Sequence[Sequence[Value]], lines: Lines, first: Value
) -> list[tuple[Value, Value]]:
    """The registers of two lines, rounded, as lines that tiles read. Returns, of each part, the words that the two
    lines make for the even lanes, and those for the odd ones: halves are shifted and blended, no lane is moved."""
    found = []
    for n, registers in enumerate(pair):
        low, high = (*registers, f.const(c.vector, 0.0))[:2]
        words = []
        for part, of_part in enumerate(_parts(f, c, [low, high])):
            halves = c.isa.narrow_both(f, *of_part)
            f.store(halves, lines.place(first + n, at=part * c.held_part), align=c.register)
            words.append(f.cast("bitcast", halves, c.words))
        found.append(words)
    return [(_blend(f, a, b << 16), _blend(f, a >> 16, b)) for a, b in zip(*found, strict=True)]


def _parts(f: Function, c: Config, registers: list[Value]) -> Iterator[list[Value]]:
    """Registers as sums of so many, the largest first: cut to what a half holds, all but the last, which is rounded."""
    for _ in range(c.product.parts - 1):
        tops = [f.bitcast(f.bitcast(x, "i32") & -(1 << 16), "float") for x in registers]
        yield tops
        registers = [x - top for x, top in zip(registers, tops, strict=True)]  # exact
    yield registers


def _blend(f: Function, low: Value, high: Value) -> Value:
    """Words with the lower halves of one and the upper halves of the other."""
    n = lanes_of(low.type)
    a, b = (f.cast("bitcast", x, vector(2 * n, "i16")) for x in (low, high))
    order = [half for word in range(n) for half in (2 * word, 2 * n + 2 * word + 1)]
    return f.cast("bitcast", f.shuffle(a, b, order), low.type)


def weight_at(f: Function, c: Config, lines: Lines, row: Value, lane: Value) -> Value:
    """One weight, or dS, as it was stored."""
    at = lines.line(row).at + lane * (c.size // c.per_word)
    if c.product.operand is None:
        return f.load(c.acc, at)
    return c.isa.widen(f, f.load("i16", at), c.product.operand)
