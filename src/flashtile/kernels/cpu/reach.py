"""Segments that a call's first step finds in machine code, from values that come with it (passes/reach.py)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes import reach
from flashtile.kernels.cpu.score_values import COVERAGE_KEYS, is_small, is_unread
from flashtile.llvm import jit
from flashtile.llvm.products import FMA
from flashtile.score.coverage import is_stored, unseen
from flashtile.score.limits import limits_of

if TYPE_CHECKING:
    from flashtile.llvm.jit import Library
    from flashtile.score.program import Program

SEGMENT_BYTES = 32
_AN_ITEM = 256  # panels: some 5 microseconds


class Reach(NamedTuple):
    """The step, the words of its block, and the segments of panels: one each."""

    function: Callable[..., int]
    words: dict[str, int]
    rows: np.ndarray

    @property
    def bytes(self) -> int:
        """Of the segments."""
        return SEGMENT_BYTES * (len(self.rows) - 1)


def reach_of(program: Program, c: Config) -> Reach | None:
    """Of a mask that has limits and whose values come later; None where all segments are known, or none would help."""
    mask = program.mask
    if mask is None or not is_unread(program) or is_small(program, c) or not limits_of(mask).limits:
        return None
    batches, heads, panels, _ = unseen(program.shape, mask.variables, c.panel, COVERAGE_KEYS).shape
    words = {
        "captures": 0,
        "segments": 0,
        "batches": batches,
        "heads": heads,
        "panels": panels,
        "items": max(1, batches * heads * panels // _AN_ITEM),
        "q_len": program.shape[2],
        "kv_len": program.shape[3],
        "panel": c.panel,
        "tile": COVERAGE_KEYS,
    }
    own = replace(c, product=FMA, partial=False, dropout=False, arrays=())
    return Reach(_entry(own), words, np.arange(batches * heads * panels + 1, dtype=np.int64))


def is_blind(program: Program, c: Config) -> bool:
    """Whether the step, or the lack of one, leaves tiles to compute that a look at values may skip: of rules that are
    no limits, and no array of an element for each pair, which nobody looks through."""
    mask = program.mask
    if mask is None or not is_unread(program) or is_small(program, c):
        return False
    return not all(map(is_stored, limits_of(mask).others))


@functools.cache
def library_of(c: Config) -> Library:
    return jit.load(lambda: reach.reach_text(c), f"reach {c!r}", c.isa, reach.EXPORTS)


@functools.cache
def _entry(c: Config) -> Callable[..., int]:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    return library_of(c).function("reach", ctypes.c_int32, ctypes.c_char_p, integer, integer, pointer)
