"""A work item of the forward kernel: a tile of queries of one head, or of all that share its keys, cut into panels, and
the sums of each panel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

from flashtile.kernels.cpu.block import KEEP, NEXT
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.scratch import Work
from flashtile.kernels.cpu.steps.band import OPEN
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.kernels.cpu.steps.keep import Draw
from flashtile.kernels.cpu.steps.range import Range
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.kernels.cpu.steps.spans import BLOCKS, LEVELS
from flashtile.kernels.cpu.steps.tiny import Tiny
from flashtile.llvm.ir import Function, Value
from flashtile.llvm.lines import Lines, Panel, Rows, State, Sums
from flashtile.score.keep import STEPS


@dataclass
class Item:
    """Its rows from ``first`` on, K and V of its head, the keys it may look at, and where its results go.

    Panels are numbered by rows, head after head: ``whole`` of them a head, as many as fill panels.
    """

    b: Value
    h: Value
    first: Value
    rows: Value
    q: Value
    k: Value
    v: Value
    o: Value
    lse: Value
    first_key: Value
    last_key: Value
    heads: Value | None = None  # None: it has one
    whole: Value | None = None

    @property
    def end(self) -> Value:
        """Where its last panel ends."""
        return self.rows if self.heads is None or self.whole is None else self.heads * self.whole

    def row(self, panel: Value) -> Value:
        """The first row of a panel, counted from the item's."""
        return panel if self.whole is None else panel % self.whole

    def head(self, panel: Value) -> Value | int:
        """The panel's head, counted from the item's."""
        return 0 if self.whole is None else panel // self.whole

    def lanes(self, c: Config, panel: Value) -> Value:
        """Rows of a panel."""
        return self.h.function.minimum(self.rows - self.row(panel), c.panel)


class Call:
    """What every part of the kernel works with: the function under construction, the words of the parameter block and
    scratch memory.

    ``spans``: there may be sums of earlier spans (spans.py) beside those of the span at hand. ``share``: of the
    weights, what dropout keeps.
    """

    def __init__(self, f: Function, c: Config, p: SimpleNamespace, scratch: Value) -> None:
        self.f, self.c, self.p, self.work = f, c, p, Work(scratch, c)
        self.spans = (p.kv_len > BLOCKS * c.key_block) | p.carry.ne(0)
        self.start_dropout()

    def start_dropout(self) -> None:
        f, c = self.f, self.c
        self.share = f.const(c.acc, 1.0)
        if c.dropout:
            self.keep = KEEP.load(f, self.p.keep)
            self.share = f.cast("sitofp", STEPS - self.keep.threshold, c.acc) / STEPS

    def item(self, number: Value) -> Item:
        """Work item ((b * heads + h) * query_tiles + tile) * splits + split."""
        f, p, c = self.f, self.p, self.c
        first_key, last_key = f.const("i64", 0), p.kv_len
        split = number % p.splits
        if c.partial:
            number = number // p.splits
            first_key = split * p.split_keys
            last_key = f.minimum(first_key + p.split_keys, last_key)
        head = number // p.query_tiles
        if c.shares:
            head = head * p.head_block
        b, h = head // p.heads, head % p.heads
        first = number % p.query_tiles * p.tile_q
        rows = f.minimum(p.q_len - first, p.tile_q)
        several = (p.head_block, (rows + (c.panel - 1)) // c.panel * c.panel) if c.shares else ()

        def at(tensor: str, head: Value, row: Value | int) -> Value:
            base = getattr(p, tensor)
            for index, axis in zip((b, head, row), "bhs", strict=True):
                base = base + getattr(p, f"{tensor}_{axis}") * index
            return base

        k, v = (at(x, h // p.group, 0) for x in "kv")
        o, lse = at("o", h, first), self.advance(p.lse, head * p.q_len + first)
        if c.partial:
            o, lse = o + split * p.o_split, lse + split * p.lse_split
        return Item(b, h, first, rows, at("q", h, first), k, v, o, lse, first_key, last_key, *several)

    def advance(self, lse: Value, rows: Value) -> Value:
        """The lse of a row further on; null, if it is not wanted, stays null."""
        return self.f.select(self.f.is_null(lse), lse, lse + rows * self.c.size)

    @property
    def factors(self) -> Factors:
        return Factors(self.p.c_high, self.p.c_low)

    @property
    def frame(self) -> Frame:
        return Frame(self.work.frame)

    def queries(self, panel: Value) -> Panel:
        """Transposed queries of the panel that begins at this row of the item."""
        c, p = self.c, self.p
        return Panel(self.work.at + (p.at_q + panel * p.key_words * (c.size * c.product.parts)), c.word_line)

    @property
    def held(self) -> dict[str, Range]:
        """The further argument of what packs Q and K, where their parts do not hold every number."""
        return {"held": Range.of_scores(self.f, self.p.least)} if self.c.guarded else {}

    def lane_flags(self, panel: Value) -> Lines:
        """Which queries of the panel that begins at this row hold what parts cannot: a word each."""
        c = self.c
        return Lines(self.work.at + (self.p.at_lane_flags + panel * c.size), c.word_line)

    def tiny(self, panel: Value) -> Tiny:
        """Which queries of a panel saw tiny values, and room for what tiles would take for 0."""
        p, at = self.p, self.work.at
        return Tiny(at + (p.at_tiny_lanes + panel * self.c.size), at + p.at_tiny)

    def query_rows(self, item: Item, panel: Value) -> Rows:
        """The queries of a panel as they lie."""
        p = self.p
        at = item.q + item.head(panel) * p.q_h + item.row(panel) * p.q_s
        return Rows(at, p.q_s, p.q_d, item.lanes(self.c, panel), p.head_size)

    def sums(self, panel: Value, level: str = "") -> tuple[State, Sums]:
        """State and outputs of a panel: of the span at hand; of earlier spans and of what was carried ("earlier_"); or
        what these have lost to rounding ("lost_")."""
        c, p, scratch = self.c, self.p, self.work.at
        o = scratch + (getattr(p, f"at_{level}o") + panel * p.value_columns * c.size)
        state = scratch + (getattr(p, f"at_{level}state") + panel * (2 * c.size))
        return State(state, c.line), Sums(o, c.line)

    def levels(self, panel: Value) -> dict[str, State | Sums]:
        """State and sums of every level, as ``join_span`` takes them."""
        found: dict[str, State | Sums] = {}
        for level in LEVELS:
            found[f"{level}state"], found[f"{level}sums"] = self.sums(panel, level)
        return found

    def output(self, item: Item, panel: Value) -> Rows:
        """Where a panel's outputs lie."""
        p = self.p
        at = item.o + item.head(panel) * p.o_h + item.row(panel) * p.o_s
        return Rows(at, p.o_s, p.o_d, item.lanes(self.c, panel), p.value_size)

    def lse(self, item: Item, panel: Value) -> Value:
        """Where its lse lies; null, if it is not wanted."""
        return self.advance(item.lse, item.head(panel) * self.p.q_len + item.row(panel))

    def band(self, b: Value, row: Value) -> tuple[Value, Value]:
        """The first and the last key that a row sees."""
        f, p = self.f, self.p
        per_batch = f.is_null(p.offsets).eq(0)
        offset = f.value_when(per_batch, lambda: f.load("i64", p.offsets + b * 8), p.offset)
        offset = f.clamp(offset, -OPEN, OPEN)
        return row + offset - p.left, row + offset + p.right

    def sink(self, item: Item, further: Value | int = 0) -> Value:
        """The sink of a head, so much ``further`` than the item's first; -inf if there is none."""
        f, p = self.f, self.p
        none = f.const(self.c.acc, -math.inf)
        at = p.sinks + item.b * p.sink_b + (item.h + further) * p.sink_h
        return f.value_when(f.is_null(p.sinks).eq(0), lambda: f.load(self.c.acc, at), none)

    def draw(self, item: Item, panel: Value, start: Value) -> Draw:
        """What decides which weights of a panel are kept, and of a block that starts with this key."""
        f, p, seed = self.f, self.p, self.keep.seed
        words = seed, seed >> 32, self.keep.threshold, item.b * p.heads + item.h, item.first + panel
        low, high, threshold, head, lane = (f.cast("trunc", x, "i32") for x in words)
        return Draw(low, high, threshold, head, lane, start)

    def note_next(self, item: Item, first: Value) -> None:
        """The block that begins with this key is what memory is to be asked for (panel.ask)."""
        f, p, c = self.f, self.p, self.c
        rows = {"k": item.k + first * p.k_s, "v": item.v + first * p.v_s, "k_s": p.k_s, "v_s": p.v_s}
        sizes = {"k_bytes": p.head_size * c.element, "v_bytes": p.value_size * c.element}
        NEXT.write(f, self.work.next, **rows, **sizes, count=f.minimum(first + c.key_block, item.last_key) - first)

    def open_frame(self, item: Item) -> None:
        """What the score program needs of this head, for every tile."""
        p = self.p
        dense = self.work.at + p.at_dense
        self.frame.write(
            captures=p.captures,
            b=item.b,
            h=item.h,
            last_row=p.q_len - 1,
            last_key=p.kv_len - 1,
            scale=p.scale,
            dense=dense,
        )
