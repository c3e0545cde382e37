"""Philox4x32 in machine code: for each lane's counter the random words of eight keys, and which weights they keep.

Lanes run over queries, as everywhere; one call of the generator serves eight keys. A round is two products of 32 by 32
bits that keep all 64. x86 multiplies so in lanes of 64 bits (vpmuludq) only, and every target that has less can split
such lanes, so a vector of n queries is its even and its odd lanes, n / 2 each, from the first round to the last: what
stands in the upper half of a lane is not looked at, and words need to be put together once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..llvm.types import lanes, vector
from .philox import MULTIPLIERS, ROUNDS, WEYL, WORD

if TYPE_CHECKING:
    from ..llvm.ir import Function, Value

Key = list[tuple["Value", "Value"]]  # of each round, i64


def round_keys(f: Function, low: Value, high: Value) -> Key:
    """The key of every round from the seed's halves, two i32 scalars; emitted outside loops."""
    halves = tuple(zip((low, high), WEYL, strict=True))
    bumped = ([half + f.const("i32", n * weyl & WORD) for half, weyl in halves] for n in range(ROUNDS))
    return [(f.cast("zext", first, "i64"), f.cast("zext", second, "i64")) for first, second in bumped]


def words(f: Function, group: Value, rows: Value, head: Value, key: Key) -> list[Value]:
    """The four words of each lane: i32 vectors like `rows`.

    group, head  scalars, i32: j // 8, and b * H + h
    rows         i of each lane, an i32 vector of an even number of lanes
    """
    even, odd = (_rounds(f, group, half, head, key) for half in _halves(f, rows))
    return [_joined(f, a, b) for a, b in zip(even, odd, strict=True)]


def keeps(f: Function, drawn: Sequence[Value], threshold: Value) -> list[Value]:
    """Which weights of eight keys are kept: the words, and the threshold as an i32 scalar, to eight i1 vectors."""
    bound = f.splat(threshold, lanes(drawn[0].type))
    low = 0xFFFF
    halves = [half for word in drawn for half in (word & low, word >> 16)]
    return [half >= bound for half in halves]  # 16 bits in 32: signed comparison is as good


def _halves(f: Function, x: Value) -> tuple[Value, Value]:
    """The even and the odd lanes of i32, as the lower halves of 64-bit lanes."""
    pairs = f.cast("bitcast", x, vector(lanes(x.type) // 2, "i64"))
    return pairs, pairs >> 32


def _joined(f: Function, even: Value, odd: Value) -> Value:
    """`_halves` undone."""
    pairs = (even & WORD) | (odd << 32)
    return f.cast("bitcast", pairs, vector(2 * lanes(even.type), "i32"))


def _rounds(f: Function, group: Value, rows: Value, head: Value, key: Key) -> tuple[Value, Value, Value, Value]:
    """Every round on 64-bit lanes, of which the lower halves count.

    What is the same for all lanes stays a scalar until it meets a vector: of the first three rounds' six products four
    are scalar, and one of the others depends on the rows alone, so that it leaves a loop over keys.
    """
    c0, c2 = (f.cast("zext", x, "i64") for x in (group, head))
    c1, c3 = rows, f.const("i64", 0)
    for k0, k1 in key:
        p0, p1 = ((c & WORD) * f.const(c.type, m) for c, m in zip((c0, c2), MULTIPLIERS, strict=True))
        c0, c1, c2, c3 = _xor(f, p1 >> 32, c1, k0), p1, _xor(f, p0 >> 32, c3, k1), p0
    return c0, c1, c2, c3


def _xor(f: Function, *terms: Value) -> Value:
    """The exclusive or of scalars and vectors, those of a kind first."""
    scalars = [x for x in terms if x.type == "i64"]
    vectors = [x for x in terms if x.type != "i64"]
    if scalars:
        same = functools.reduce(lambda a, b: a ^ b, scalars)
        vectors = [*vectors, f.splat(same, lanes(vectors[0].type))] if vectors else [same]
    return functools.reduce(lambda a, b: a ^ b, vectors)
