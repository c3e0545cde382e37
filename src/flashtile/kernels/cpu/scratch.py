"""Scratch memory of a thread: areas of known size first, then those whose size depends on the call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flashtile.kernels.cpu.block import FRAME, NEXT
from flashtile.kernels.cpu.readings import tiles
from flashtile.kernels.cpu.steps.differentiate import TILE_ROWS, RowState, SinkSums
from flashtile.kernels.cpu.steps.held import Held
from flashtile.kernels.cpu.steps.keep import Kept
from flashtile.kernels.cpu.steps.spans import LEVELS, PANELS
from flashtile.llvm.blocks import Areas
from flashtile.llvm.ir import Value
from flashtile.llvm.lines import Lines, Scores, Weights
from flashtile.llvm.routines import Kind, Operand

if TYPE_CHECKING:
    from flashtile.kernels.cpu.config import Config


@dataclass(frozen=True)
class Work(Operand):
    """What every step of a panel works on: the frame of the score program, the running maximum of the block, the factor
    for older sums, and the scores."""

    WORDS: ClassVar = {"at": "ptr"}
    at: Value
    c: Config

    @classmethod
    def of(cls, c: Config) -> Kind:
        return cls.kind(c=c)

    @property
    def frame(self) -> Value:
        return self.at + fixed(self.c).at["frame"]

    @property
    def next(self) -> Value:
        return self.at + fixed(self.c).at["next"]

    @property
    def tops(self) -> Lines:
        return Lines(self.at + fixed(self.c).at["tops"], self.c.line)

    @property
    def alpha(self) -> Lines:
        return Lines(self.at + fixed(self.c).at["alpha"], self.c.line)

    @property
    def landed(self) -> Lines:
        """Where a tile of weighted rows lands before it joins the sums."""
        return Lines(self.at + fixed(self.c).at["landed"], self.c.line)

    @property
    def scores(self) -> Scores:
        return Scores(self.at + fixed(self.c).at["scores"], self.c.line)

    @property
    def weights(self) -> Weights:
        """Words of the largest part, in the scores' place; each further part lies `Config.weights_part` bytes on."""
        return Weights(self.scores.at, self.c.word_line)


def dense_bytes(c: Config) -> int:
    """Bytes of one dense load's tile: a line for each key, as the scores."""
    return c.score_lines * c.line.bytes


def fixed(c: Config) -> Areas:
    """The areas whose size is known when the kernel is generated."""
    line = c.line.bytes
    margin = c.margin * line  # on either side: weights are dropped in groups (steps/keep.py)
    scores = c.product.parts * c.weights_part
    areas = {"frame": FRAME.bytes, "tops": line, "alpha": line, "margin": margin, "scores": scores}
    if c.lands_in_memory:
        areas["landed"] = c.rows * line
    if c.asks:
        areas["next"] = NEXT.bytes
    return Areas(areas)


def work_bytes(c: Config) -> int:
    """Bytes of one `Work` of the backward, whose scores have lines of zeros after them."""
    return fixed(c).bytes + TILE_ROWS * c.line.bytes


def held_at(c: Config) -> int:
    """Where a backward has its `Held`: after both `Work`."""
    return 2 * work_bytes(c)


def backward(c: Config, values: Mapping[str, int], slots: int, keys: int) -> Areas:
    """The areas of a backward call, by the words of its parameter block. ``slots``: of panels whose Q and dO are made
    ready at a time; ``keys``: that dK and dV have totals for."""
    panels, line = -(-values["q_len"] // c.panel), c.line.bytes
    block, pairs = c.key_block, -(-c.panel // c.per_word)
    areas = {
        "state": panels * RowState.LINES * line,
        "flags": panels * 16,
        "dq": panels * values["columns"] * line,
        "k": block * values["k_row"],
        "v": block * values["v_row"],
        "k_columns": c.value_rows(values["head_size"]) * c.value_row(values["head_size"]),
        "words": c.pairs_part * c.product.parts if c.per_word > 1 else 0,
        "cursor": 8 * (panels + 1),
        "dense": (len(c.code.dense_loads) + tiles(c.code, c.arrays)) * dense_bytes(c) if c.code else 0,
        "dsink": SinkSums.LINES * line,
        "kept": Kept.nbytes(c) if c.dropout else 0,
        "key_flags": block * 4 if c.guarded else 0,
        "lane_flags": panels * line if c.guarded else 0,
        "wide_q": values["head_size"] * line if c.guarded else 0,
        "wide_do": values["value_size"] * line if c.guarded else 0,
    }
    held = Held.nbytes(c, panels) if c.lands_in_memory else 0
    rows = max(slots, min(panels, PANELS)) if c.lands_in_memory else slots  # those of a span stay (steps/held.py)
    for name, words in (("q", "key_words"), ("do", "value_words")):
        areas[name] = slots * values[words] * line * c.product.parts
        areas[f"{name}_rows"] = (rows if values[f"pack_{name}"] else 1) * pairs * values[f"{name}_row"]
    for name in ("dk", "dv"):
        areas[name] = (block + TILE_ROWS) * values[f"{name}_row"]
        areas[f"{name}_totals"] = keys * values[f"{name}_row"]
    return Areas({f"at_{name}": size for name, size in areas.items()}, start=held_at(c) + held)


@functools.lru_cache(maxsize=256)
def sized(c: Config, head_size: int, value_size: int, panels: int) -> Areas:
    """The areas whose size depends on the call; their offsets ride in the parameter block, as ``at_`` and their
    name."""
    columns, line = c.padded(value_size), c.line.bytes
    areas = {
        "q": panels * c.key_words(head_size) * line * c.product.parts,
        **{f"{level}o": panels * columns * line for level in LEVELS},
        **{f"{level}state": panels * 2 * line for level in LEVELS},
        "k": c.key_block * c.key_words(head_size) * c.size * c.product.parts,
        "v": c.value_rows(value_size) * c.value_row(value_size),
        "extra": columns * line,
        "cursor": 8 * (panels + 1),
        "dense": len(c.code.dense_loads) * dense_bytes(c) if c.code else 0,
        "key_flags": c.key_block * 4 if c.guarded else 0,
        "lane_flags": panels * line if c.guarded else 0,
        "wide": head_size * line if c.guarded else 0,
        "tiny_lanes": panels * line if c.tiles_add else 0,
        "tiny": columns * line if c.tiles_add else 0,
    }
    return Areas({f"at_{name}": size for name, size in areas.items()}, start=fixed(c).bytes)
