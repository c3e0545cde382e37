"""Parameters of calls whose arrays come later (kernels.Template), from the blocks that kernels are called with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flashtile.kernels import Inside, Step, Template
from flashtile.kernels.cpu.score_values import NO_SCORES, ScoreValues
from flashtile.llvm.blocks import WORD, Block
from flashtile.score.capture import ArrayCapture
from flashtile.score.captures import Block as Captures

if TYPE_CHECKING:
    from flashtile.kernels.cpu.parts import Merge
    from flashtile.score.options import Scoring

_EMPTY: Mapping[str, int] = {}


def template(
    layout: Block,
    tail: bytes,
    scores: ScoreValues,
    scoring: Scoring | None,
    steps: tuple[Step, ...],
    operands: Collection[str],
    behind: bytes = b"",
    fixed: Mapping[str, int] = _EMPTY,
) -> Template:
    """That of a block: its leading pointers are `operands`, what scores need, `fixed` addresses, or null. `behind` it
    follows what steps after the first are called with."""
    names = [name for name, type_ in layout.types.items() if type_ == "ptr"]
    known = {"rows": scores.rows, "segments": scores.segments, "keep": scores.keep, **fixed}
    memory = layout.head(*(known.get(name, 0) for name in names)) + tail + behind
    wanted = {*operands, *(("sinks",) if scoring is not None and scoring.sinks is not None else ())}
    places: list[tuple[int, str | int | Inside]] = [(WORD * layout.index[x], x) for x in names if x in wanted]
    if scoring is not None and scoring.program is not None:
        program, at = scoring.program, len(memory)
        captured = Captures(program.slots)
        places.append((WORD * layout.index["captures"], Inside(at)))
        arrays = (slot for slot, x in zip(program.slots, program.captures, strict=True) if isinstance(x, ArrayCapture))
        places += [(at + WORD * captured.word(slot), slot.number) for slot in arrays]
        memory += captured.pack(program.captures).tobytes()
    return Template(memory, tuple(places), steps, scores)


def in_parts(
    layout: Block, tail: bytes, scores: ScoreValues, scoring: Scoring | None, step: Step, merge: Merge | None
) -> Template:
    """That of a forward block, whose results `merge` puts together where keys come in parts: sinks join there."""
    if merge is None:
        return template(layout, tail, scores, scoring, (step,), ("q", "k", "v", "o", "lse"))
    parts = None if scoring is None else replace(scoring, sinks=None)
    found = template(layout, tail, replace(scores, sinks=0), parts, (step,), ("q", "k", "v"))
    return merge.template(found, layout, scoring is not None and scoring.sinks is not None)


def scores_of(scoring: Scoring | None, config: object, mapped: bool = True) -> ScoreValues:
    """Those of a call whose arrays are not known."""
    return NO_SCORES if scoring is None else ScoreValues.of(scoring, config, mapped=mapped)  # type: ignore[arg-type]
