"""delta of the rows of a query tile, and what they give to their head's sink: the part of a backward that knows no key.

    delta = rowsum(dO * O) - dlse,   dsink = -sum(exp(sink - lse) delta)

A work item b * heads + h is one head; its sums are added to what dsinks holds, where a call has one head. Engines that
hold the arrays as tiles run it once a query tile, before the tiles that use delta (backward.py, where the configuration
says tile).
"""

from __future__ import annotations

import math

from flashtile.kernels.cpu.block import DELTA
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.differentiate import (
    RowState,
    SinkSums,
    emit_finish_sink,
    emit_row_state,
    emit_sink_sums,
)
from flashtile.llvm.blocks import Areas
from flashtile.llvm.ir import Module
from flashtile.llvm.lines import Rows
from flashtile.llvm.routines import entry

EXPORTS = ("delta",)


def areas(c: Config) -> Areas:
    """Scratch memory: of one panel, and of the sums of a head."""
    return Areas({"at_state": RowState.LINES * c.line.bytes, "at_dsink": SinkSums.LINES * c.line.bytes})


def delta_text(c: Config) -> str:
    """LLVM IR of the module that exports delta (routines.entry)."""
    module = Module()
    row_state = emit_row_state(module, c)
    sink_sums, finish_sink = emit_sink_sums(module, c), emit_finish_sink(module, c)
    f = entry(module, "delta")
    block, begin, end, scratch = f.parameters
    p = DELTA.load(f, block)
    state, sums = RowState(scratch + p.at_state, c.line), SinkSums(scratch + p.at_dsink, c.line)
    element = f.const("i64", c.element)
    with f.range(begin, end) as number:
        at = p.sinks + (number // p.heads * p.sink_b + number % p.heads * p.sink_h)
        none = f.const(c.acc, -math.inf)
        sink = f.value_when(f.is_null(p.sinks).eq(0), lambda: f.load(c.acc, at), none)
        sunk = f.is_null(p.dsinks).eq(0) & sink.ne(-math.inf)
        sums.fill(0.0, SinkSums.LINES)
        with f.range(0, p.row_count, c.panel) as panel:
            count, here = f.minimum(p.row_count - panel, c.panel), panel * c.size
            do, o = (
                Rows(getattr(p, name) + (number * head + panel * stride), stride, element, count, p.value_size)
                for name, head, stride in (("do", p.do_h, p.do_s), ("o", p.o_h, p.o_s))
            )
            here = number * p.lse_h + here
            dlse = f.select(f.is_null(p.dlse), p.dlse, p.dlse + here)
            row_state(f, do=do, o=o, out=state, lse=p.lse + here, dlse=dlse, sink=sink)
            with f.when(sunk):
                sink_sums(f, state=state, sums=sums, sink=sink)
            with f.range(0, count) as lane:
                value = f.load(c.acc, state.lane(lane).line(2).at)
                f.store(value, p.delta + (here + lane * c.size), align=1)
        with f.when(sunk):
            finish_sink(f, sums=sums, out=p.dsinks)
    f.ret(f.const("i32", 0))
    return module.text()
