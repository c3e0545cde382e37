"""What options need at run time, as addresses: captured values, segments of visible keys, sinks, dropout's seed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtile.arrays import address_of
from flashtile.kernels.cpu.config import Config
from flashtile.plan.segments import segments_of
from flashtile.score.capture import ArrayCapture, ScalarCapture
from flashtile.score.coverage import coverage, is_stored, unseen

if TYPE_CHECKING:
    from flashtile.plan.segments import Segments
    from flashtile.score.options import Scoring
    from flashtile.score.program import Program
    from flashtile.spec import AttentionSpec

# A map takes some 0.4 ms; one panel against so few keys is small beside that, however many heads there are.
UNMAPPED_KEYS = 32
COVERAGE_KEYS = 16  # keys of a tile that the plan classifies: finer than a key block, so that edges cost little


class _Block(bytes):
    """A parameter block that keeps alive the arrays whose addresses it holds."""

    arrays: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class ScoreValues:
    """Addresses of the capture block, the segments' rows and keys, the sinks, and what decides dropout; 0 where there
    are none."""

    arrays: tuple[object, ...] = ()
    captures: int = 0
    rows: int = 0
    segments: int = 0
    sinks: int = 0
    keep: int = 0

    @property
    def addresses(self) -> tuple[int, ...]:
        """In the order of the forward's block."""
        return self.captures, self.rows, self.segments, self.sinks, self.keep

    @classmethod
    def of(cls, scoring: Scoring, c: Config, *, mapped: bool = True) -> ScoreValues:
        """The values of one call, read as they are now: where the kernel walks a map of the mask (``mapped``), O(S) for
        one that depends on captured arrays."""
        captures = rows = keys = None
        if scoring.program is not None:
            from flashtile.score.captures import Block

            program = scoring.program
            captures = Block(program.slots).pack(program.captures)
            if c.masked and mapped:
                segments = _segments(program, c)
                rows, keys = segments.rows, segments.keys
        keep = None if scoring.keep is None else np.array([scoring.keep.threshold, scoring.keep.seed], np.uint64)
        sinks = None if isinstance(scoring.sinks, ArrayCapture) else scoring.sinks  # else it comes later
        arrays = captures, rows, keys, sinks, keep
        return cls((*arrays, scoring), *(0 if x is None else address_of(x) for x in arrays))

    def hold(self, block: bytes) -> bytes:
        """The block, with the arrays for as long as it lives."""
        if not self.arrays:
            return block
        held = _Block(block)
        held.arrays = self.arrays
        return held


def _segments(program: Program, c: Config) -> Segments:
    """Which keys each panel sees: mapped anew where arrays that the mask reads have changed, or are large, and where
    that may be worth its time."""
    mask = program.mask
    assert mask is not None
    if program.code.mask_slots and (is_small(program, c) or is_stored(mask) or is_unread(program)):
        return _unmapped(program.shape, mask.variables, c.panel, c.key_block)
    values = _contents(program)
    if values is None:
        return _mapped(program, c.panel, c.key_block, c.acc)
    key = program.shape, program.code, values, c.panel, c.key_block, c.acc
    found = _kept.get(key)
    if found is None:
        found = _mapped(program, c.panel, c.key_block, c.acc)
        if len(_kept) >= KEPT:
            with contextlib.suppress(RuntimeError, StopIteration, KeyError):  # another thread was faster
                del _kept[next(iter(_kept))]
        _kept[key] = found
    return found


def is_small(program: Program, c: Config) -> bool:
    """Whether a map takes longer than the pairs that it may save."""
    return program.shape[2] <= c.panel and program.shape[3] <= UNMAPPED_KEYS


def is_unread(program: Program) -> bool:
    """Whether elements that the mask reads come later."""
    read = (program.captures[n] for n in program.code.mask_slots)
    return any(isinstance(x, ArrayCapture) and x.place is not None for x in read)


# The layers of a model call with one mask: of one that reads little, the map is kept by what it reads.
KEPT, KEPT_BYTES = 64, 1 << 16
_kept: dict[Hashable, Segments] = {}


def _contents(program: Program) -> Hashable | None:
    """All that decides which keys a mask shows, beside its structure; None where that is much."""
    read = [program.captures[n] for n in sorted(program.code.mask_slots)]
    if sum(x.array.nbytes for x in read if isinstance(x, ArrayCapture)) > KEPT_BYTES:
        return None
    return tuple(
        (float(x.value).hex(), x.type) if isinstance(x, ScalarCapture) else (x.array.shape, x.array.tobytes())
        for x in read
    )


@functools.lru_cache(maxsize=64)
def _unmapped(shape: Any, variables: frozenset[str], panel: int, key_block: int) -> Segments:
    """All of them: each pair of query and key asks the mask."""
    return segments_of(unseen(shape, variables, panel, COVERAGE_KEYS), key_block)


def _mapped(program: Program, panel: int, key_block: int, accumulator: str) -> Segments:
    real = np.float64 if accumulator == "double" else np.float32
    return segments_of(coverage(program, panel, COVERAGE_KEYS, real), key_block)


NO_SCORES = ScoreValues()


def score_steps(c: Config, spec: AttentionSpec) -> dict[str, int]:
    """Panels between the segments of two batches and two heads, bytes between their sinks."""
    panels = -(-spec.q_len // c.panel)
    used = c.code.mask.variables if c.code and c.code.mask else frozenset()
    heads = spec.heads if "h" in used else 1
    return {
        "segment_b": heads * panels if "b" in used else 0,
        "segment_h": panels if "h" in used else 0,
        **sink_steps(c, spec.heads),
    }


def sink_steps(c: Config, heads: int) -> dict[str, int]:
    """Bytes between the sinks of two batches and of two heads."""
    return {"sink_b": heads * c.size, "sink_h": c.size}
