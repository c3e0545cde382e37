"""A product of matrix registers beside weights: a few products, then a few lines of the softmax, in turns.

Matrix registers work for 16 cycles on a product, and vector registers are free meanwhile; but a processor looks some
500 instructions ahead, and the weights of a block are thousands. So each step of depth of a product, or each of its
terms where there are several, is followed by its share of the weights of other keys. Nothing is computed otherwise than
by either alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.product import factor_kinds, multiply
from flashtile.kernels.cpu.steps.range import any_lane
from flashtile.kernels.cpu.steps.softmax import SUM_LINES, Factors, Softmax, softmax_kinds
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Lines, Scores
from flashtile.llvm.routines import Operand, Routine


@dataclass(frozen=True)
class Share(Operand):
    """``lines`` of scores are weighed beside ``steps`` of depth, of which this product does those from ``first`` on."""

    WORDS: ClassVar = {"lines": "i64", "first": "i64", "steps": "i64"}
    lines: Value
    first: Value
    steps: Value


def beside_kinds(c: Config) -> dict[str, Any]:
    """What every function here takes of a softmax: as the softmax itself and, in several parts, a line for the sums of
    pieces of it that are not whole."""
    begun = {"begun": Lines.of(c.line)} if c.product.parts > 1 else {}
    return {**softmax_kinds(c), "factors": Factors.of(c), **begun}


def softmax_of(c: Config, v: SimpleNamespace, scores: Scores) -> dict[str, Any]:
    """That, of some of a panel's scores. ``v``: what the panel is given, by name."""
    begun = {"begun": v.work.landed} if c.product.parts > 1 else {}
    named = {"state": v.state, "tops": v.work.tops, "alpha": v.work.alpha, "factors": v.factors}
    return {**named, "scores": scores, **begun}


def emit_multiply_beside(module: Module, c: Config, width: int, *, onto: bool) -> Routine:
    """As `emit_multiply`, with its share of the weights of a full panel: between `emit_softmax_edge`'s functions."""
    name, operands = f"{'add_product' if onto else 'multiply'}_beside_{width}", factor_kinds(c)
    f = Routine(module, name, **operands, **beside_kinds(c), share=Share.kind())
    factors, (*of_softmax, share) = f.parameters[: len(operands)], f.parameters[len(operands) :]
    softmax, *begun = _softmax(f, c, of_softmax)
    weigh = _by_words(f, c, width, softmax, share, *begun) if begun else _by_pieces(f, c, width, softmax, share)
    multiply(f, c, width, *factors, onto=onto, beside=weigh)
    f.ret()
    return f


def _softmax(f: Routine, c: Config, of_softmax: Sequence[Any]) -> tuple[Any, ...]:
    """The steps of the softmax, and the line of what is begun, if there is one."""
    state, tops, alpha, scores, factors, *begun = of_softmax
    return Softmax(f, c, state, tops, alpha, scores, factors), *begun


def _by_pieces(f: Routine, c: Config, width: int, softmax: Softmax, share: Share) -> Callable[[Value, int], None]:
    """After the four products of a step, its share of pieces, each some lines of one register."""
    pieces = (share.lines + (SUM_LINES - 1)) // SUM_LINES * width

    def weigh(word: Value, _: int) -> None:
        step = share.first + word // c.product.words
        with f.range(step * pieces // share.steps, (step + 1) * pieces // share.steps) as piece:
            at, line = piece % width * c.register, piece // width * SUM_LINES
            softmax.weigh(softmax.maximum(at), at, line, f.minimum(line + SUM_LINES, share.lines))

    return weigh


def _by_words(
    f: Routine, c: Config, width: int, softmax: Softmax, share: Share, begun: Lines
) -> Callable[[Value, int], None]:
    """After the four products of every term of a step, its share of words: after all 12 or 24 of a step, a piece would
    come too late to be looked at."""
    turns = len(c.product.terms)
    # Words a turn, times 2^16, rounded up: too little to reach one more, for as many turns as there may be.
    every = share.steps * turns
    pace = ((share.lines // c.per_word << 16) + (every - 1)) // every
    safe = [softmax.maximum(f.const("i64", j * c.register)) for j in range(width)]

    def weigh(word: Value, term: int) -> None:
        turn = (share.first + word // c.product.words) * turns + term
        with f.range(turn * pace >> 16, (turn + 1) * pace >> 16) as n:
            softmax.weigh_word(safe, n * c.per_word, begun)

    return weigh


def emit_weigh(module: Module, c: Config, width: int) -> Routine:
    """The weights of the first ``lines`` lines, whole pieces, beside nothing."""
    f = Routine(module, f"weigh_{width}", **beside_kinds(c), lines="i64")
    *of_softmax, lines = f.parameters
    softmax, *_ = _softmax(f, c, of_softmax)
    with f.range(0, width * c.register, c.register) as at:
        safe = softmax.maximum(at)
        with f.range(0, lines, SUM_LINES) as line:
            softmax.weigh(safe, at, line, line + SUM_LINES)
    f.ret()
    return f


def emit_softmax_edge(module: Module, c: Config, width: int, step: str) -> Routine:
    """What of the softmax comes before the first weight ("begin" or "go_on"), or after the last ("end")."""
    f = Routine(module, f"softmax_{step}_{width}", **beside_kinds(c))
    softmax, *begun = _softmax(f, c, f.parameters)
    with f.range(0, width * c.register, c.register) as at:
        getattr(softmax, step)(at)
        for line in begun if step != "end" else ():
            line.store(f.const(c.vector, 0.0), 0, at=at)
    f.ret()
    return f


def emit_exceeded(module: Module, c: Config, width: int) -> Routine:
    """Whether weights that went on without a maximum are of no use (Softmax.exceeded); their sums are, then, too."""
    f = Routine(module, f"softmax_exceeded_{width}", "i1", **beside_kinds(c))
    softmax, *_ = _softmax(f, c, f.parameters)

    def look(at: Value, found: list[Value]) -> list[Value]:
        return [found[0] | any_lane(f, softmax.exceeded(at))]

    (found,) = f.fold(0, width * c.register, c.register, [f.const("i1", 0)], look)
    with f.when(found):
        softmax.tops.fill(-math.inf, 1)
    f.ret(found)
    return f
