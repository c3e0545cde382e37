"""The accumulation: sums[column][lane] = alpha sums + sum over rows of rows[row][column] * weights[row][lane]."""

from __future__ import annotations

from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.product import apart, outer
from flashtile.kernels.cpu.steps.range import any_lane
from flashtile.kernels.cpu.steps.softmax import words_seen
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Lines, Sums, Weights, Words
from flashtile.llvm.routines import Routine


def _kinds(c: Config) -> dict[str, Any]:
    return {
        "sums": Sums.of(c.line),
        "alpha": Lines.of(c.line),
        "rows": Words.kind(),
        "weights": Weights.of(c.word_line),
    }


def emit_accumulate_tile(
    module: Module,
    c: Config,
    width: int,
    multiply: Routine,
    *,
    between: int | None = None,
    name: str = "accumulate",
) -> Routine:
    """The same where products land in memory: ``rows`` are transposed, a row for each column. Every register of lanes
    takes all ``count`` rows, whole tiles of them: what it does not see weighs 0. Where operands are ``coarse``, sums
    have been multiplied by alpha before (rescale), and ``multiply`` adds to them. ``between``: bytes between the parts
    of weights, if not those of the softmax."""
    f = Routine(module, f"{name}_{width}", **_kinds(c), landed=Lines.of(c.line), count="i64")
    sums, alpha, rows, weights, landed, count = f.parameters
    if c.product.coarse:
        landed = Lines(sums.at, c.line)
    bytes_ = apart(c, f.const("i64", c.value_part), f.const("i64", between or c.weights_part))
    words = Lines(weights.at, weights.shape)
    multiply(f, left=rows, right=words, out=landed, depth=count // c.per_word, **bytes_)
    if not c.product.coarse:
        factors = [alpha.load(0, j) for j in range(width)]
        with f.range(0, c.rows) as row:
            for j, factor in enumerate(factors):
                sums.store(c.isa.multiply_add(f, sums.load(row, j), factor, landed.load(row, j)), row, j)
    f.ret()
    return f


def emit_rescale(module: Module, c: Config, width: int) -> Routine:
    """Sums times alpha, unless it is 1 in every lane, as it is wherever no maximum rose: a product by 1 changes no bit,
    so what one lane does not need does not depend on another's need of it."""
    f = Routine(module, f"rescale_{width}", sums=Sums.of(c.line), alpha=Lines.of(c.line), columns="i64")
    sums, alpha, columns = f.parameters
    factors = [alpha.load(0, j) for j in range(width)]
    rose = any_lane(f, factors[0].ne(1.0))
    for factor in factors[1:]:
        rose = rose | any_lane(f, factor.ne(1.0))
    with f.when(rose), f.range(0, columns) as column:
        for j, factor in enumerate(factors):
            sums.store(sums.load(column, j) * factor, column, j)
    f.ret()
    return f


def emit_accumulate(module: Module, c: Config, width: int) -> Routine:
    """One tile of columns, from where ``sums`` and ``rows`` begin. The first register of lanes may see ``reach`` of the
    ``count`` rows; each further register those of ``lanes`` more. The sums of one block are accumulated separately and
    then added to what was there: blocked summation, whose error grows with the number of blocks, not of rows.

    Along a diagonal the first registers are done while the others go on: each one's rows end where all its weights are
    0, which saves a tenth of the products of a causal call with 512 keys.
    """
    f = Routine(module, f"accumulate_{width}", **_kinds(c), count="i64", reach="i64")
    sums, alpha, rows, weights, count, reach = f.parameters

    def add(first: Value, stop: Value, totals: list[Value], live: range) -> list[Value]:
        """The products of the words [first, stop) for the registers ``live``."""

        def left(word: Value, column: int) -> Value:
            return f.load(c.word, rows.row(word).at + column * c.size, align=1)

        def step(word: Value, totals: list[Value]) -> list[Value]:
            return outer(f, c, word, left, weights.load, totals, live)

        def steps(word: Value, totals: list[Value]) -> list[Value]:
            for u in range(c.unroll):
                totals = step(word + u, totals)
            return totals

        whole = stop - (stop - first) % c.unroll
        totals = f.fold(first, whole, c.unroll, totals, steps)
        return f.fold(whole, stop, 1, totals, step)

    done = f.const("i64", 0)
    totals = [f.const(c.vector, 0.0)] * (c.rows * width)
    for j in range(width):
        stop = words_seen(f, c, reach + j * c.lanes, count)
        live = range(j, width)
        totals = add(done, stop, totals, live)
        factor = alpha.load(0, j)
        for r in range(c.rows):
            sums.store(c.isa.multiply_add(f, sums.load(r, j), factor, totals[r * len(live)]), r, j)
        totals = [total for n, total in enumerate(totals) if n % len(live)]
        done = stop
    f.ret()
    return f
