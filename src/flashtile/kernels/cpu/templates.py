"""Parameters of calls whose arrays come later (kernels.Template), from the blocks that kernels are called with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from flashtile.arrays import address_of
from flashtile.kernels import Inside, Step, Template
from flashtile.kernels.cpu.passes import reach as pass_
from flashtile.kernels.cpu.reach import Reach, is_blind, reach_of
from flashtile.kernels.cpu.score_values import NO_SCORES, ScoreValues
from flashtile.llvm.blocks import WORD, Block
from flashtile.score.capture import ArrayCapture
from flashtile.score.captures import Block as Captures

if TYPE_CHECKING:
    from flashtile.kernels.cpu.config import Config
    from flashtile.kernels.cpu.parts import Merge
    from flashtile.score.options import Scoring

_EMPTY: Mapping[str, int] = {}


class Scores(NamedTuple):
    """What is known of a call's scores: addresses, how its first step finds segments, where it has such a step, and
    Template.blind."""

    values: ScoreValues = NO_SCORES
    reach: Reach | None = None
    blind: bool = False


def scores_of(scoring: Scoring | None, c: Config, mapped: bool = True) -> Scores:
    """Those of a call whose arrays may not be known; mapped: its kernel walks segments."""
    if scoring is None:
        return Scores()
    program = scoring.program if mapped else None
    reach = None if program is None else reach_of(program, c)
    values = ScoreValues.of(scoring, c, mapped=mapped and reach is None)
    return Scores(values, reach, program is not None and is_blind(program, c))


def template(
    layout: Block,
    tail: bytes,
    scores: Scores,
    scoring: Scoring | None,
    steps: tuple[Step, ...],
    operands: Collection[str],
    behind: bytes = b"",
    fixed: Mapping[str, int] = _EMPTY,
) -> Template:
    """That of a block: its leading pointers are `operands`, what scores need, `fixed` addresses, or null. `behind` it
    follows what steps after the first are called with."""
    names, values = [name for name, type_ in layout.types.items() if type_ == "ptr"], scores.values
    rows = values.rows if scores.reach is None else address_of(scores.reach.rows)
    known = {"rows": rows, "segments": values.segments, "keep": values.keep, **fixed}
    memory = layout.head(*(known.get(name, 0) for name in names)) + tail + behind
    wanted = {*operands, *(("sinks",) if scoring is not None and scoring.sinks is not None else ())}
    places: list[tuple[int, str | int | Inside]] = [(WORD * layout.index[x], x) for x in names if x in wanted]
    at = len(memory)
    if scoring is not None and scoring.program is not None:
        program = scoring.program
        captured = Captures(program.slots)
        places.append((WORD * layout.index["captures"], Inside(at)))
        arrays = (slot for slot, x in zip(program.slots, program.captures, strict=True) if isinstance(x, ArrayCapture))
        places += [(at + WORD * captured.word(slot), slot.number) for slot in arrays]
        memory += captured.pack(program.captures).tobytes()
    found = Template(memory, tuple(places), steps, scores, blind=scores.blind)
    if scores.reach is None:
        return found
    return _reaching(found, scores.reach, at, WORD * layout.index["segments"])


def _reaching(found: Template, reach: Reach, captures: int, segments: int) -> Template:
    """A template with the step that finds segments in front of its kernel; captures: where they lie; segments: the word
    of the block that points to these."""
    at, block = len(found.memory), pass_.CALL
    inside = Inside(at + block.bytes)
    own = {"captures": Inside(captures), "segments": inside}
    places = (*found.places, (segments, inside), *((at + WORD * block.index[name], x) for name, x in own.items()))
    return found._replace(
        memory=found.memory + block.pack(reach.words) + bytes(reach.bytes),
        places=places,
        steps=(Step(reach.function, reach.words["items"], at), *found.steps),
        kernel=1,
    )


def in_parts(
    layout: Block, tail: bytes, scores: Scores, scoring: Scoring | None, step: Step, merge: Merge | None
) -> Template:
    """That of a forward block, whose results `merge` puts together where keys come in parts: sinks join there."""
    if merge is None:
        return template(layout, tail, scores, scoring, (step,), ("q", "k", "v", "o", "lse"))
    parts = None if scoring is None else replace(scoring, sinks=None)
    scores = scores._replace(values=replace(scores.values, sinks=0))
    found = template(layout, tail, scores, parts, (step,), ("q", "k", "v"))
    return merge.template(found, layout, scoring is not None and scoring.sinks is not None)
