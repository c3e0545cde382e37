"""One panel of scores against one block, by the backward's program pass alone: to hold it against its definition."""

from __future__ import annotations

import ctypes

import numpy as np

from flashtile.kernels.cpu.array_sums import ArrayPlan, ArraySums, Items
from flashtile.kernels.cpu.block import scores_in_nats, split_scale
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.readings import readings
from flashtile.kernels.cpu.scratch import Work, dense_bytes, fixed
from flashtile.kernels.cpu.steps.band import FAR, Band
from flashtile.kernels.cpu.steps.dense import emit_dense
from flashtile.kernels.cpu.steps.derivative import emit_derivative
from flashtile.kernels.cpu.steps.differentiate import RowState
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.llvm import jit
from flashtile.llvm.blocks import Block, integers, pointers, reals
from flashtile.llvm.ir import Module
from flashtile.llvm.lines import Lines, Scores, Weights
from flashtile.llvm.routines import entry
from flashtile.score.captures import Block as Captures

PARAMS = Block(
    pointers("captures sums slopes state dense"),
    integers("b h row last_row block last_key first count lanes item"),
    reals("scale c_high c_low"),
)


class Panel:
    """The pass for one program on one machine; `gradients` names the slots whose gradients are wanted."""

    def __init__(self, program, isa, storage: str, wanted, items: Items) -> None:
        self.program, self.items = program, items
        self.c = c = Config(isa, storage, code=program.code)
        self.reads = readings(program.code, wanted)
        self.real = np.dtype(np.float64 if c.acc == "double" else np.float32)
        module = Module()
        dense = [emit_dense(module, c, n) for n in range(len(c.code.dense_loads))]
        derivative = emit_derivative(module, c, isa.vectors, self.reads, edge=True)
        f = entry(module, "panel")
        block, _, _, scratch = f.parameters
        p = PARAMS.load(f, block)
        work = Work(scratch, c)
        names = ["captures", "b", "h", "row", "last_row", "block", "last_key", "scale", "dense", "sums", "item"]
        Frame(work.frame).write(**{name: getattr(p, name) for name in names})
        for n, lay_out in enumerate(dense):
            out = Lines(p.dense + n * dense_bytes(c), c.line)
            lay_out(f, frame=Frame(work.frame), first=p.first, count=p.count, lanes=p.lanes, out=out)
        lines = {"slopes": Scores(p.slopes, c.line), "words": Weights(p.slopes, c.word_line)}
        lines["state"] = RowState(p.state, c.line)
        factors = Factors(*(f.cast("fptrunc", x, c.acc) for x in (p.c_high, p.c_low)))
        near = [f.const("i32", FAR), f.const("i32", -FAR)]
        rows = {"first": p.first, "last": p.first + p.count, "origin": p.first}
        derivative(f, work=work, **lines, **rows, band=Band(*near), factors=factors)
        f.ret(f.const("i32", 0))
        self.library = jit.Library(jit.object_code(module.text(), isa), ("panel",))
        self.run = self.library.function(
            "panel", ctypes.c_int32, ctypes.c_char_p, *[ctypes.c_int64] * 2, ctypes.c_void_p
        )
        self.sums = ArraySums(ArrayPlan(self.reads, {n: program.captures[n].array.shape for n in wanted}, c, items))

    def __call__(self, raw, dp, lse, delta, *, b, h, row, block, scale, item=0):
        """(P, dS before the program) of raw products (rows, keys); what arrays are given joins `sums`."""
        c, (lanes, count) = self.c, raw.shape
        memory = aligned(fixed(c).bytes, np.uint8)
        lines = memory[fixed(c).at["scores"] :].view(self.real)[: count * c.panel].reshape(count, c.panel)
        slopes = aligned((count + c.rows) * c.panel, self.real).reshape(-1, c.panel)[:count]
        for target, values in ((lines, raw), (slopes, dp)):  # lanes that stand for no query repeat the last
            target[:] = values[np.minimum(np.arange(c.panel), lanes - 1)].T
        state = aligned(3 * c.panel, self.real).reshape(3, c.panel)
        state[0] = np.inf
        octaves = lse.astype(np.longdouble) / np.log(np.longdouble(2))
        state[0, :lanes] = octaves
        state[1, :lanes], state[2, :lanes] = octaves - state[0, :lanes], delta
        dense = aligned((1 + len(c.code.dense_loads) + len(self.reads)) * dense_bytes(c), np.uint8)
        captures = Captures(self.program.slots).pack(self.program.captures)
        _, _, q_len, kv_len = self.program.shape
        factors = (scores_in_nats if c.scored else split_scale)(scale, c.acc)
        params = PARAMS.pack(
            {
                **{"captures": captures.ctypes.data, "sums": self.sums.words.ctypes.data, "dense": dense.ctypes.data},
                **{"slopes": slopes.ctypes.data, "state": state.ctypes.data},
                **{"b": b, "h": h, "row": row, "last_row": q_len - 1, "block": block, "last_key": kv_len - 1},
                **{"first": 0, "count": count, "lanes": lanes, "item": item},
                **{name: factors[name] for name in ("scale", "c_high", "c_low")},
            }
        )
        assert self.run(params, 0, 1, memory.ctypes.data) == 0
        return lines[:, :lanes].T, slopes[:, :lanes].T


def aligned(count, dtype):
    room = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + count * np.dtype(dtype).itemsize].view(dtype)
