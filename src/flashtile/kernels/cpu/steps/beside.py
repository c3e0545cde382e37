"""A product of matrix registers beside weights: a few products, then a few lines of the softmax, in turns.

Matrix registers work for 16 cycles on a product, and vector registers are free meanwhile; but a processor looks some
500 instructions ahead, and the weights of a block are thousands. So each step of depth of a product is followed by its
share of another panel's, or another half block's, weights. Nothing is computed otherwise than by either alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.product import factor_kinds, multiply
from flashtile.kernels.cpu.steps.softmax import SUM_LINES, Factors, Softmax, softmax_kinds
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.routines import Operand, Routine


@dataclass(frozen=True)
class Share(Operand):
    """``lines`` of scores are weighed beside ``steps`` of depth, of which this product does those from ``first`` on."""

    WORDS: ClassVar = {"lines": "i64", "first": "i64", "steps": "i64"}
    lines: Value
    first: Value
    steps: Value


def emit_multiply_beside(module: Module, c: Config, width: int, *, onto: bool) -> Routine:
    """As `emit_multiply`, with its share of the weights of a full panel: between `emit_softmax_edge`'s functions."""
    name = f"{'add_product' if onto else 'multiply'}_beside_{width}"
    kinds: dict[str, Any] = {**softmax_kinds(c), "factors": Factors.of(c), "share": Share.kind()}
    f = Routine(module, name, **factor_kinds(c), **kinds)
    left, right, out, depth, *between, state, tops, alpha, scores, factors, share = f.parameters
    softmax = Softmax(f, c, state, tops, alpha, scores, factors)
    pieces = (share.lines + (SUM_LINES - 1)) // SUM_LINES * width

    def weigh(word: Value) -> None:
        step = share.first + word // c.product.words
        with f.range(step * pieces // share.steps, (step + 1) * pieces // share.steps) as piece:
            at, line = piece % width * c.register, piece // width * SUM_LINES
            softmax.weigh(softmax.maximum(at), at, line, f.minimum(line + SUM_LINES, share.lines))

    multiply(f, c, width, left, right, out, depth, *between, onto=onto, beside=weigh)
    f.ret()
    return f


def emit_softmax_edge(module: Module, c: Config, width: int, *, end: bool) -> Routine:
    """What of the softmax comes before the first weight, or (``end``) after the last."""
    name = f"softmax_{'end' if end else 'begin'}_{width}"
    f = Routine(module, name, **softmax_kinds(c), factors=Factors.of(c))
    softmax = Softmax(f, c, *f.parameters)
    with f.range(0, width * c.register, c.register) as at:
        if end:
            softmax.end(at)
        else:
            softmax.begin(at)
    f.ret()
    return f
