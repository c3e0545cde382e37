"""A call of the backward kernel as it is emitted: its query heads, and its areas of scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.item import Call, Item
from flashtile.kernels.cpu.scratch import Work, held_at, work_bytes
from flashtile.kernels.cpu.steps.differentiate import RowState, SinkSums
from flashtile.kernels.cpu.steps.held import Held
from flashtile.kernels.cpu.steps.range import Range
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.kernels.cpu.steps.spans import PANELS
from flashtile.llvm.ir import Function, Value
from flashtile.llvm.lines import Panel, Rows, Sums, Words


@dataclass(kw_only=True)
class QueryHead(Item):
    """One query head of a work item: also dO, its dlse (null: 0), and where gradients go (null: not wanted)."""

    do: Value
    dlse: Value
    dq: Value
    dk: Value
    dv: Value
    begins: Value  # it is the first of the query heads that share K and V
    ends: Value  # it is the last one
    number: Value  # of the copy of the accumulators of arrays that it adds to
    dsink: Value  # null: not wanted
    delta: Value  # of a tile


class BackwardCall(Call):
    """A backward call: the parameter block, and the areas of scratch memory of each panel or block."""

    def __init__(self, f: Function, c: Config, p: SimpleNamespace, scratch: Value) -> None:
        self.f, self.c, self.p = f, c, p
        self.work, self.second = Work(scratch, c), Work(scratch + work_bytes(c), c)
        self.start_dropout()

    def head(self, number: Value, n: Value) -> QueryHead:
        """The n-th query head of work item (b * kv_heads + kv_head) * splits + split."""
        f, p, c = self.f, self.p, self.c
        item, split, number = number, number % p.splits, number // p.splits
        b, kv_head = number // p.kv_heads, number % p.kv_heads
        h = kv_head * p.group + n

        def at(tensor: str, head: Value) -> Value:
            base = getattr(p, tensor)
            found = base + (b * getattr(p, f"{tensor}_b") + head * getattr(p, f"{tensor}_h"))
            return f.select(f.is_null(base), base, found)

        first_row = (b * p.heads + h) * (p.q_len * c.size)
        first, rows, delta = f.const("i64", 0), p.q_len, p.delta
        if c.tile:  # whose rows stand where the pointers say
            item, first, rows, first_row = p.copy, p.first_row, p.row_count, (b * p.heads + h) * p.lse_h
            delta = delta + first_row
            bounds = [p.first_key, p.kv_len]
        else:
            bounds = [f.load("i64", p.parts + (split + n) * 8) for n in range(2)]
        q, o, do, dq = (at(name, h) for name in ("q", "o", "do", "dq"))
        k, v, dk, dv = (at(name, kv_head) for name in ("k", "v", "dk", "dv"))
        dlse = f.select(f.is_null(p.dlse), p.dlse, p.dlse + first_row)
        return QueryHead(
            b=b,
            h=h,
            first=first,
            rows=rows,
            q=q,
            k=k,
            v=v,
            o=o,
            lse=p.lse + first_row,
            first_key=bounds[0],
            last_key=bounds[1],
            do=do,
            dlse=dlse,
            dq=f.select(f.is_null(dq), dq, dq + split * p.dq_split),
            dk=dk,
            dv=dv,
            begins=n.eq(0),
            ends=n.eq(p.group - 1),
            number=item,
            dsink=f.select(f.is_null(p.dsinks), p.dsinks, p.dsinks + (b * p.heads + h) * c.size),
            delta=delta,
        )

    def rows(self, head: QueryHead, tensor: str, first: Value, count: Value) -> Rows:
        """Rows of a tensor from one on."""
        size = self.p.value_size if tensor in ("v", "o", "do", "dv") else self.p.head_size
        stride, step = (getattr(self.p, f"{tensor}_{axis}") for axis in "sd")
        return Rows(getattr(head, tensor) + first * stride, stride, step, count, size)

    def area(self, name: str, row: Value | int = 0, step: Value | int = 0) -> Value:
        return self.work.at + (getattr(self.p, f"at_{name}") + row * step)

    def panel(self, name: str, panel: Value) -> Panel:
        """Transposed rows of Q or dO of the panel that begins at this row."""
        return Panel(self.area(name, panel, getattr(self.p, f"{name}_step")), self.c.word_line)

    def range_of(self, name: str) -> dict[str, Range]:
        """The further argument of what packs Q, K, V or dO, where their parts do not hold every number."""
        if name in ("q", "k") or not self.c.guarded:
            return self.held
        return {"held": Range.of_slopes(self.f, name)}

    def packed(self, name: str, panel: Value) -> Words:
        """Rows of Q or dO of a panel as words along columns."""
        if self.c.lands_in_memory:  # they stay for the exchange of their span
            panel = self.f.select(self.p.kept.ne(0), panel, panel % (PANELS * self.c.panel))
        at = self.area(f"{name}_rows", panel // self.c.per_word, getattr(self.p, f"{name}_kept"))
        return Words(at, getattr(self.p, f"{name}_row"))

    def state(self, panel: Value) -> RowState:
        return RowState(self.area("state", panel, RowState.LINES * self.c.size), self.c.line)

    def flag(self, name: str, panel: Value) -> Value:
        """Where it is noted whether the rows of a panel hold anything that is not finite."""
        return self.area("flags", panel // self.c.panel, 16) + 8 * (name == "do")

    @property
    def panels_held(self) -> Held:
        """What panels leave for the exchange, if they hold it."""
        return Held(self.work.at + held_at(self.c), self.c)

    @property
    def key_columns(self) -> Words:
        """K of a block for dQ: words along columns, or a row of them for each column."""
        c, p = self.c, self.p
        at = self.area("k_columns")
        return Words(at, self.f.const("i64", c.value_row(0)) if c.lands_in_memory else p.columns * c.size)

    @property
    def dsink(self) -> SinkSums:
        return SinkSums(self.area("dsink"), self.c.line)

    def dq(self, panel: Value) -> Sums:
        return Sums(self.area("dq", panel, self.p.columns * self.c.size), self.c.line)

    def gradient(self, name: str, row: Value | int = 0) -> Words:
        """Sums at hand of dK or dV of a block ("dk"), or its totals ("dk_totals")."""
        stride = getattr(self.p, f"{name[:2]}_row")
        return Words(self.area(name, row, stride), stride)

    @property
    def factors(self) -> Factors:
        return Factors(self.p.c_high, self.p.c_low)
