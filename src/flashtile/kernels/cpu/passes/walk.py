"""Which keys an item meets, and in which order: by its band, or by the plan's segments. One visitor serves both.

A visitor gets each key block and each panel that sees some of it; where a span of blocks ends (spans.py), it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flashtile.kernels.cpu.passes.item import Call, Item
from flashtile.kernels.cpu.steps.band import FAR, Seen
from flashtile.kernels.cpu.steps.spans import BLOCKS
from flashtile.llvm.ir import Value

SEGMENT = 4  # words of a segment: keys some_from, some_to, all_from, all_to


class Visitor(Protocol):
    """What is done on the way."""

    def end_span(self) -> None:
        """The keys that follow belong to another span."""

    def block(self, start: Value, stop: Value) -> Callable[[Value, Seen], None]:
        """A block of keys; returns what attends one panel of the item to what it sees of it."""

    def end_block(self) -> None:
        """Every panel has had the block."""


def by_band(call: Call, item: Item, visitor: Visitor) -> None:
    """Every key block between the first key that the first row sees and the last that the last row sees."""
    f, c = call.f, call.c
    low, high = call.band(item.b, item.first)
    start = f.maximum(low, item.first_key)
    stop = f.minimum(high + item.rows, item.last_key)
    start = start // c.key_block * c.key_block
    with f.range(start, stop, c.key_block) as begin:
        with f.when(_span(call, begin).ne(_span(call, f.maximum(begin - c.key_block, start)))):
            visitor.end_span()
        first, last = f.maximum(begin, item.first_key), f.minimum(begin + c.key_block, stop)
        attend = visitor.block(first, last)
        with f.range(0, item.end, c.panel) as panel:
            row, rows = item.row(panel), item.lanes(c, panel)
            attend(panel, _seen_by_band(call, low + row, high + row, rows, first, last))
        visitor.end_block()


def _seen_by_band(call: Call, low: Value, high: Value, rows: Value, start: Value, stop: Value) -> Seen:
    """What the band shows of the keys [start, stop) to a panel whose first row sees low ... high.

    Row i sees i further. The first key is cut down to a whole tile, so that words of keys stay together.
    """
    f, c = call.f, call.c
    some_from = f.maximum(low - start, 0) // c.rows * c.rows
    some_to = f.minimum(high + rows - start, stop - start)
    all_from = f.maximum(low + rows - 1 - start, some_from)
    all_to = f.minimum(high + 1 - start, some_to)
    near = [f.cast("trunc", f.clamp(x - start, -FAR // 2, FAR // 2), "i32") for x in (high, low)]
    return Seen(some_from, some_to, all_from, all_to, *near)


def by_segments(call: Call, item: Item, visitor: Visitor) -> None:
    """The key blocks that the plan's segments name (plan/segments.py), skipping those that no panel sees.

    Each panel has a cursor into its segments. While it does one block, the item notes where the next one begins: the
    least of where its panels go on.
    """
    f, p, c = call.f, call.p, call.c
    cursors = call.work.at + p.at_cursor
    next_key = cursors + (item.rows + (c.panel - 1)) // c.panel * 8
    table = p.rows + (item.b * p.segment_b + item.h * p.segment_h + item.first // c.panel) * 8
    f.store(item.last_key, next_key)
    with f.range(0, item.rows, c.panel) as panel:
        at = panel // c.panel * 8
        first = f.load("i64", table + at)
        f.store(_skip(call, first, f.load("i64", table + at + 8), item.first_key, next_key), cursors + at)

    def one_block(walk: list[Value]) -> list[Value]:
        key = f.maximum(walk[0], item.first_key)
        span = _span(call, key)
        with f.when(span.ne(walk[1])):
            visitor.end_span()
        stop = f.minimum(key // c.key_block * c.key_block + c.key_block, item.last_key)
        start = f.maximum(key // c.key_block * c.key_block, item.first_key)
        attend = visitor.block(start, stop)
        f.store(item.last_key, next_key)
        with f.range(0, item.rows, c.panel) as panel:
            at = panel // c.panel * 8
            cursor, end = f.load("i64", cursors + at), f.load("i64", table + at + 8)
            with f.when(cursor < end):
                attend(panel, _seen_by_segment(call, cursor, start, stop))
                f.store(_skip(call, cursor, end, stop, next_key), cursors + at)
        visitor.end_block()
        return [f.load("i64", next_key), span]

    first = f.load("i64", next_key)
    f.repeat([first, _span(call, first)], lambda walk: walk[0] < item.last_key, one_block)


def _span(call: Call, key: Value) -> Value:
    """The number of the span that a key lies in."""
    return key // (BLOCKS * call.c.key_block)


def _segment(call: Call, cursor: Value, field: int) -> Value:
    return call.f.load("i64", call.p.segments + cursor * (8 * SEGMENT) + 8 * field)


def _skip(call: Call, cursor: Value, end: Value, key: Value, next_key: Value) -> Value:
    """The first segment from the cursor on that reaches beyond the key; notes where it goes on."""
    f = call.f

    def behind(cursors: list[Value]) -> Value:
        # Past the last segment there is nothing to load: the first one stands in.
        at = f.select(cursors[0] < end, cursors[0], 0)
        inside = f.select(cursors[0] < end, f.const("i64", 1), 0).ne(0)
        return inside & (_segment(call, at, 1) <= key)

    cursor = f.repeat([cursor], behind, lambda cursors: [cursors[0] + 1])[0]
    with f.when(cursor < end):
        begins = f.maximum(_segment(call, cursor, 0), key)
        f.store(f.minimum(f.load("i64", next_key), begins), next_key)
    return cursor


def _seen_by_segment(call: Call, cursor: Value, start: Value, stop: Value) -> Seen:
    """A segment's keys that lie in a block; a band of its own it has not."""
    f, size = call.f, stop - start
    some_from, some_to, all_from, all_to = (_segment(call, cursor, n) - start for n in range(SEGMENT))
    zero = f.const("i32", 0)
    if call.c.lands_in_memory:  # tiles are whole from the block's first row on
        some_from = some_from // call.c.rows * call.c.rows
    return Seen(
        f.maximum(some_from, 0), f.minimum(some_to, size), f.maximum(all_from, 0), f.minimum(all_to, size), zero, zero
    )
