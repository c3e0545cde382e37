"""Segments that machine code finds from values that come with a call: those of the plan's map, which Python makes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashtile.arrays import address_of
from flashtile.kernels.cpu import config_of
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes import reach as pass_
from flashtile.kernels.cpu.reach import SEGMENT_BYTES, is_blind, reach_of
from flashtile.kernels.cpu.score_values import COVERAGE_KEYS
from flashtile.score.capture import Unread
from flashtile.score.captures import Block
from flashtile.score.coverage import FULL, PARTIAL, coverage
from flashtile.score.program import Program
from flashtile.spec import AttentionSpec

pytestmark = pytest.mark.core

BATCH, HEADS, ROWS, KEYS = 2, 3, 150, 200
Rule = Callable[[Any, Any], Any]  # of two arrays of integers, one element a batch: a mask
# Rules of limits alone, and those that say more.
LIMITS: dict[str, Rule] = {
    "keys": lambda m, n: lambda b, h, i, j: j < n[b],
    "rows": lambda m, n: lambda b, h, i, j: i < m[b],
    "both": lambda m, n: lambda b, h, i, j: (i < m[b]) & (j < n[b]),
    "from": lambda m, n: lambda b, h, i, j: (m[b] <= j) & (j <= n[b]) & (n[b] - i >= m[b] - 20),
    "window": lambda m, n: lambda b, h, i, j: (j - i <= 20) & (j - i >= -30) & (j < n[b]),
    "shifted": lambda m, n: lambda b, h, i, j: (j <= i + m[b]) & (i + j < n[b] + h),
}
OTHERS: dict[str, Rule] = {
    "either": lambda m, n: lambda b, h, i, j: (j < n[b]) & ((j < 8) | (i + 3 < m[b])),
    "unlike": lambda m, n: lambda b, h, i, j: (j < n[b]) & (i != m[b]) & (i + i < 2 * n[b]),
}
FARTHEST = np.iinfo(np.int32)
# Two elements each: ragged, on the edges of tiles and panels, of none and of all, beyond both ends, and what wraps.
VALUES = [
    *([a, b] for a, b in np.random.default_rng(0).integers(-5, 210, (12, 2))),
    *([0, 200], [150, 16], [48, 128], [64, 127], [-1, 1], [199, 200]),
    [FARTHEST.min, FARTHEST.max],
]


def unread() -> tuple[Unread, Unread]:
    return Unread((BATCH,), "int32"), Unread((BATCH,), "int32")


def found_by(rule: Rule, values: tuple[np.ndarray, np.ndarray], c: Config) -> tuple[np.ndarray, Program]:
    """The tiles that machine code finds, as Coverage.tiles, and the program with its values."""
    shape = BATCH, HEADS, ROWS, KEYS
    program = Program.of(shape, mask=rule(*values))
    found = reach_of(Program.of(shape, mask=rule(*unread())), c)
    assert found is not None
    captures = Block(program.slots).pack(program.captures)
    items = len(found.rows)  # one more than there are panels
    segments = np.full((found.bytes // SEGMENT_BYTES, 4), -1, np.int64)
    own = {"captures": address_of(captures), "segments": address_of(segments), "items": items}
    block = pass_.CALL.pack({**found.words, **own})
    for begin, end in ((0, items // 3), (items // 3, items)):
        assert found.function(ctypes.c_char_p(block), begin, end, None) == 0
    assert (segments[:, 0] <= segments[:, 2]).all() and (segments[:, 3] <= segments[:, 1]).all()
    start = np.arange(0, KEYS, COVERAGE_KEYS)
    stop = np.minimum(start + COVERAGE_KEYS, KEYS)
    some_from, some_to, all_from, all_to = segments.T[:, :, None]
    tiles = np.where((some_from < stop) & (start < some_to), PARTIAL, 0)
    tiles[(all_from <= start) & (stop <= all_to) & (all_from < all_to)] = FULL
    return tiles.reshape(*(found.words[x] for x in ("batches", "heads", "panels")), len(start)), program


def configured(rule: Rule) -> Config:
    c = config_of(AttentionSpec(BATCH, HEADS, HEADS, ROWS, KEYS, 16, 16, "float32", "ieee", None, 0, 1.0))
    shape = BATCH, HEADS, ROWS, KEYS
    return replace(c, code=Program.of(shape, mask=rule(*unread())).code)


@pytest.mark.parametrize("name", [*LIMITS, *OTHERS])
def test_what_machine_code_finds(name: str) -> None:
    """Of limits alone the plan's very map, but where sums wrap; always one that hides nothing that is seen."""
    rule = {**LIMITS, **OTHERS}[name]
    c = configured(rule)
    for first, second in zip(VALUES, VALUES[::-1], strict=True):
        values = np.array(first, np.int32), np.array(second, np.int32)
        tiles, program = found_by(rule, values, c)
        wraps = name in ("from", "shifted") and any(abs(np.int64(x)).max() > 1 << 30 for x in values)
        if name in LIMITS and not wraps:
            np.testing.assert_array_equal(tiles, coverage(program, c.panel, COVERAGE_KEYS).tiles(), str(values))
        rows, keys = np.arange(ROWS)[:, None], np.arange(KEYS)
        for b, h, n in np.ndindex(tiles.shape[:3]):
            panel = slice(n * c.panel, (n + 1) * c.panel)
            seen = np.broadcast_to(program.visible(b, h, rows[panel], keys), (len(rows[panel]), KEYS))
            kind = np.repeat(tiles[b, h, n], COVERAGE_KEYS)[:KEYS]
            assert not seen[:, kind == 0].any() and seen[:, kind == FULL].all(), (values, b, h, n)


def test_masks_that_need_a_look_at_their_values() -> None:
    """Those with rules that are no limits, unless their arrays have an element for each pair, or the call is small."""
    (lengths, _), dense = unread(), Unread((ROWS, KEYS), "bool")
    rules: dict[str, tuple[Any, bool]] = {
        "limits": (LIMITS["both"](lengths, lengths), False),
        "with an array": (lambda b, h, i, j: dense[i, j] & (j < lengths[b]), False),
        "others": (OTHERS["either"](lengths, lengths), True),
        "no limit": (lambda b, h, i, j: lengths[b] > 3, True),
    }
    c = configured(LIMITS["both"])
    for name, (rule, blind) in rules.items():
        program = Program.of((BATCH, HEADS, ROWS, KEYS), mask=rule)
        assert is_blind(program, c) == blind, name
        assert (reach_of(program, c) is None) == (name == "no limit")
        small = Program.of((BATCH, HEADS, 5, 20), mask=LIMITS["both"](lengths, lengths))
        assert not is_blind(small, c) and reach_of(small, c) is None
