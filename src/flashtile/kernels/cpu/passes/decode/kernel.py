"""The decode kernel: few queries on long keys.  K and V are read once for all rows that share them.

A work item is one part of the keys of one key/value head, for every query row that uses that head: the rows
of the GQA group, and a few positions of each.  With so few rows nothing is reused often enough to be worth
transposing, so lanes run over the head dimension, and the kernel is as fast as K and V come from memory.  A
row's arithmetic depends on where its key blocks stand in the whole problem only.

Source: Dao et al. 2023, Flash-Decoding; Shazeer 2019 for shared keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashtile.kernels.cpu.block import FRAME
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.decode.program import SeenKeys, emit_see
from flashtile.kernels.cpu.passes.decode.rows import Keys, Row, Slots, emit_copy, emit_mask, emit_query, slot_width
from flashtile.kernels.cpu.passes.decode.scores import KEY_TILE, ROW_TILES, each_row_tile, emit_score_tiles
from flashtile.kernels.cpu.passes.decode.softmax import RowState, emit_row_softmax, state_line
from flashtile.kernels.cpu.passes.decode.values import Outputs, emit_value_tiles
from flashtile.kernels.cpu.steps.band import OPEN
from flashtile.kernels.cpu.steps.finish import Whole
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.kernels.cpu.steps.pack import write
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.llvm.blocks import Areas, Block, integers, pointers, reals, strides_of
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Line, Panel, Rows, Scores, Sums, Weights, Words
from flashtile.llvm.routines import Routine, entry

EXPORTS = ("decode",)

# What changes with the number of keys. Parts of the keys, split_keys each; partial: o takes accumulators, to be merged;
# bytes between the results of two parts.
_OF_KEYS = strides_of("kvo") | integers("kv_len offset splits split_keys partial o_split lse_split")
OF_KEYS = tuple(_OF_KEYS)

CALL = Block(
    # captures: the program's capture block. sinks: accumulators; null where a merge takes them, or there are none.
    pointers("q k v o lse offsets captures sinks"),
    _OF_KEYS,
    strides_of("q"),
    # pack_k, pack_v: rows of K and V must be copied before they are read as slots.
    integers("heads kv_heads q_len head_size value_size left right pack_k pack_v sink_b sink_h"),
    # row_group: rows that walk the keys together.
    integers("row_group at_frame at_mask at_q at_state at_seen at_s at_p at_o at_k at_v"),
    reals("sign scale c_high c_low lse_scale"),
)

MOST_ROWS = 128  # that walk the keys together; beyond it their scores and outputs crowd the cache


def row_group(rows: int) -> int:
    """Rows that walk the keys together: all, or equal shares of whole row tiles."""
    groups = max(1, -(-rows // MOST_ROWS))
    tiles = -(-rows // (groups * ROW_TILES[0]))
    return min(rows, tiles * ROW_TILES[0])


def areas(c: Config, rows: int, head_size: int, value_size: int) -> Areas:
    """A thread's scratch memory, for so many rows that walk the keys together."""
    slots = -(-head_size // slot_width(c))
    columns = -(-value_size // c.lanes) * c.lanes
    return Areas(
        {
            "at_frame": FRAME.bytes,
            "at_mask": c.register,
            "at_q": rows * slots * c.register,
            "at_state": rows * state_line(c).bytes,
            "at_seen": rows * SeenKeys.bytes(c),
            "at_s": rows * c.key_block * c.size,
            "at_p": rows * c.key_block * c.size,
            "at_o": 2 * rows * columns * c.size,
            # and what a copied row may reach beyond its end
            "at_k": c.key_block * max(head_size, slot_width(c)) * c.element + c.register,
            "at_v": c.key_block * max(value_size, c.lanes) * c.element + c.register,
        }
    )


def key_step(c: Config) -> int:
    """Keys of which all or none are looked at: whole registers, and whole tiles of keys."""
    return max(KEY_TILE, c.lanes)


def decode_text(c: Config) -> str:
    """LLVM IR of the module that exports decode (routines.entry)."""
    module = Module()
    _Decode(module, c).emit()
    return module.text()


@dataclass
class _Item:
    """So many rows of a work item, from ``first`` on. Its row r is position r % q_len of head r // q_len of the group,
    which shares keys and values."""

    first: Value
    rows: Value
    b: Value
    first_head: Value
    k: Words
    v: Words


class _Decode:
    """Emits the exported function; the emitted functions that it calls are its fields."""

    def __init__(self, module: Module, c: Config) -> None:
        self.c = c
        self.load_query, self.mask, self.copy_rows = emit_query(module, c), emit_mask(module, c), emit_copy(module, c)
        self.score_tiles, self.row_softmax = emit_score_tiles(module, c), emit_row_softmax(module, c)
        self.value_tiles, self.store_row = emit_value_tiles(module, c), emit_store_row(module, c)
        if c.code and c.code.mask:
            self.see = emit_see(module, c)
            self.rows_differ = bool(c.code.mask.variables & {"h", "i"})  # by what the mask shows them
        self.f = entry(module, "decode")

    def emit(self) -> None:
        c, f, (block, begin, end, scratch) = self.c, self.f, self.f.parameters
        self.p = p = CALL.load(f, block)
        for name in ("sign", "c_high", "c_low", "lse_scale"):  # the score program's frame takes ``scale`` as it is
            setattr(p, name, f.cast("fptrunc", getattr(p, name), c.acc))
        self.factors = Factors(p.c_high, p.c_low)
        self.frame, self.seen = Frame(scratch + p.at_frame), SeenKeys(scratch + p.at_seen)
        self.at_mask, self.at_q = scratch + p.at_mask, scratch + p.at_q
        self.states = RowState(scratch + p.at_state, state_line(c))
        self.scores = Scores(scratch + p.at_s, Line(c.acc, c.key_block))
        self.weights = Weights(scratch + p.at_p, Line(c.word, c.key_block))
        at_o, self.at_k, self.at_v = scratch + p.at_o, scratch + p.at_k, scratch + p.at_v
        self.k_slots, self.v_slots = Slots.of_words(c, p.head_size), Slots.of(p.value_size, c.lanes)
        self.outputs = Outputs(at_o, self.v_slots.count * (2 * c.register))
        self.mask(f, size=p.head_size, out=self.at_mask)
        if c.code:
            self.frame.write(captures=p.captures, last_key=p.kv_len - 1, scale=p.scale)
        with f.range(begin, end) as number:
            self._item(number)
        f.ret(f.const("i32", 0))

    def _item(self, number: Value) -> None:
        f, p = self.f, self.p
        head, split = number // p.splits, number % p.splits
        b, kv_head = head // p.kv_heads, head % p.kv_heads
        group = p.heads // p.kv_heads
        rows, first_head = group * p.q_len, kv_head * group
        k = Words(p.k + b * p.k_b + kv_head * p.k_h, p.k_s)
        v = Words(p.v + b * p.v_b + kv_head * p.v_h, p.v_s)
        with f.range(0, rows, p.row_group) as first:
            self._rows(_Item(first, f.minimum(p.row_group, rows - first), b, first_head, k, v), split)

    def _rows(self, item: _Item, split: Value) -> None:
        """The keys of a part, block by block."""
        f, p, c = self.f, self.p, self.c
        if c.code:
            self.frame.write(b=item.b)
        per_batch = f.is_null(p.offsets).eq(0)
        shift = f.value_when(per_batch, lambda: f.load("i64", p.offsets + item.b * 8), p.offset)
        shift = f.clamp(shift, -OPEN, OPEN)
        low, high = shift - p.left, shift + p.right + 1  # keys that the first position sees
        start = f.maximum(low, split * p.split_keys)
        stop = f.minimum(high + p.q_len - 1, f.minimum((split + 1) * p.split_keys, p.kv_len))
        first = start // c.key_block * c.key_block
        self._start(item)
        if c.masked:
            self._clear(item)
        else:  # the first block will not look at what is there
            with f.when(first >= stop):
                self._clear(item)
        # The first block may begin late, but in step with the lanes: a weight is summed in the lane of its key.
        step = key_step(c)
        with f.range(first, stop, c.key_block) as block:
            begin = f.maximum(block, start // step * step)
            end = f.minimum(block + c.key_block, stop)
            if c.masked:
                self._masked_block(item, begin, end)
            else:
                fresh = f.cast("zext", block.eq(first), "i64")
                self._block(item, begin, end - begin, low - begin, high - begin, self.seen, fresh)
        self._finish(item, split)

    def _masked_block(self, item: _Item, begin: Value, end: Value) -> None:
        """The keys of a block from the first to the last that some row sees, by registers; none may."""
        f, c, keys = self.f, self.c, end - begin
        self.frame.write(block=begin)

        def look(row: Value, found: list[Value]) -> list[Value]:
            self._name_row(item, row)
            return [found[0] | self.see(f, frame=self.frame, count=keys, seen=self.seen.row(c, row))]

        different = item.rows if self.rows_differ else f.const("i64", 1)
        (registers,) = f.fold(0, different, 1, [f.const("i64", 0)], look)
        with f.when(registers.ne(0)):
            empty = [f.intrinsic(f"llvm.{way}.i64", "i64", [registers, f.const("i1", 0)]) for way in ("cttz", "ctlz")]
            first = empty[0] * c.lanes // key_step(c) * key_step(c)
            last = f.minimum((64 - empty[1]) * c.lanes, keys)
            low, high = (f.const("i64", side) for side in (-OPEN, OPEN))  # a band is a part of the mask
            seen, fresh = self.seen.key(c, first), f.const("i64", 0)
            self._block(item, begin + first, last - first, low, high, seen, fresh)

    def _start(self, item: _Item) -> None:
        """Queries laid out; sums 0, maxima -inf."""
        f, p, c = self.f, self.p, self.c

        def queries(n: int, first: Value) -> None:
            for r in range(n):
                query, apart = Row(self._row(item, first + r, "q"), p.q_d), f.const("i64", n * c.register)
                out = Words(self.at_q + (first * self.k_slots.count + r) * c.register, apart)
                self.load_query(f, query=query, size=p.head_size, out=out, sign=p.sign)

        each_row_tile(f, item.rows, queries)
        zero = f.const(c.acc, 0.0)
        with f.range(0, item.rows) as row:
            self.states.row(row).write(maximum=f.const(c.acc, -math.inf), sum=zero, lost=zero)

    def _clear(self, item: _Item) -> None:
        """Outputs 0."""
        f, c = self.f, self.c
        with f.range(0, item.rows * self.outputs.stride, c.register) as at:
            f.store(f.const(c.vector, 0.0), self.outputs.moved(at).at, align=c.register)

    def _row(self, item: _Item, row: Value, tensor: str) -> Value:
        """Where a row of q or o begins."""
        p = self.p
        at, b, h, s = (getattr(p, name) for name in (tensor, f"{tensor}_b", f"{tensor}_h", f"{tensor}_s"))
        head, i = self._head_and_position(item, row)
        return at + item.b * b + head * h + i * s

    def _head_and_position(self, item: _Item, row: Value) -> tuple[Value, Value]:
        row, q_len = item.first + row, self.p.q_len
        return item.first_head + row // q_len, row % q_len

    def _name_row(self, item: _Item, row: Value) -> None:
        """The row that the score program is about, if there is one."""
        if self.c.code is None:
            return
        head, i = self._head_and_position(item, row)
        self.frame.write(h=head, row=i)

    def _block(
        self, item: _Item, begin: Value, keys: Value, low: Value, high: Value, seen: SeenKeys, fresh: Value
    ) -> None:
        """One key block against all rows: scores, softmax, outputs, of which there are none yet if it is ``fresh``.
        Position i sees keys [low + i, high + i), and of these what a mask shows."""
        f, p, c = self.f, self.p, self.c
        self._scores(item, item.k.row(begin), keys)
        if c.scored:
            self.frame.write(block=begin)
        with f.range(0, item.rows) as row:
            self._name_row(item, row)
            i, line = (item.first + row) % p.q_len, row * self.scores.shape.bytes
            self.row_softmax(
                f,
                state=self.states.row(row),
                scores=self.scores.moved(line),
                weights=self.weights.moved(line),
                first=low + i,
                beyond=f.minimum(high + i, keys),
                count=keys,
                frame=self.frame,
                seen=seen.row(c, row) if c.masked and self.rows_differ else seen,
                factors=self.factors,
            )
        packed, values = p.pack_v.ne(0), item.v.row(begin)
        with f.when(packed):
            rows = Rows(values.at, p.v_s, p.v_d, keys, p.value_size)
            self.copy_rows(f, rows=rows, out=self.at_v, width=self.v_slots.padded)
        at = f.select(packed, self.at_v, values.at)
        values = Words(at, f.select(packed, self.v_slots.padded * c.element, p.v_s))
        self.value_tiles(
            f,
            outputs=self.outputs,
            states=self.states,
            values=values,
            weights=self.weights,
            scores=self.scores,
            count=keys,
            fresh=fresh,
            size=p.value_size,
            rows=item.rows,
        )

    def _scores(self, item: _Item, k: Words, keys: Value) -> None:
        """Scores of a block."""
        f, p, c = self.f, self.p, self.c
        packed, padded = p.pack_k.ne(0), self.k_slots.padded
        with f.when(packed):
            rows = Rows(k.at, p.k_s, p.k_d, keys, p.head_size)
            self.copy_rows(f, rows=rows, out=self.at_k, width=padded)
        at, stride = f.select(packed, self.at_k, k.at), f.select(packed, padded * c.element, p.k_s)
        block, queries = Keys(at, stride, padded, self.at_mask), Panel(self.at_q, Line(c.words, 1))
        counts = {"count": keys, "block_keys": keys, "rows": item.rows}
        self.score_tiles(f, queries=queries, keys=block, scores=self.scores, **counts)

    def _finish(self, item: _Item, split: Value) -> None:
        f, p, c = self.f, self.p, self.c
        with f.range(0, item.rows) as row:
            out = Row(self._row(item, row, "o") + split * p.o_split, p.o_d)
            flat = (item.b * p.heads + item.first_head) * p.q_len + item.first + row
            lse = f.select(f.is_null(p.lse), p.lse, p.lse + split * p.lse_split + flat * c.size)
            sums, state = Sums(self.outputs.row(row).at, Line(c.vector, 1)), self.states.row(row)
            self.store_row(
                f,
                sums=sums,
                state=state,
                size=p.value_size,
                out=out,
                partial=p.partial,
                lse=lse,
                nats=p.lse_scale,
                sink=self._sink(item, row),
            )

    def _sink(self, item: _Item, row: Value) -> Value:
        """The sink of the row's head; -inf if there is none."""
        f, p, acc = self.f, self.p, self.c.acc
        head, _ = self._head_and_position(item, row)
        at = p.sinks + item.b * p.sink_b + head * p.sink_h
        return f.value_when(f.is_null(p.sinks).eq(0), lambda: f.load(acc, at), f.const(acc, -math.inf))


def emit_store_row(module: Module, c: Config) -> Routine:
    """One row's normalised outputs, from slots of sums, and its lse where it is not null: a ``partial`` result in
    accumulators, or a final one of the storage type. A row that saw no key: 0 and its sink, -inf for none. ``nats`` is
    the factor from raw scores to nats."""
    kinds: dict[str, Any] = {"sums": Sums.of(Line(c.vector, 1)), "state": RowState.of(state_line(c)), "size": "i64"}
    f = Routine(module, "store_row", **kinds, out=Row.kind(), partial="i64", lse="ptr", nats=c.acc, sink=c.acc)
    sums, state, size, out, partial, lse, nats, sink = f.parameters
    top, total = (f.splat(x, c.lanes) for x in (state.read("maximum") * nats, state.read("sum")))
    whole = Whole.of(f, c, top, total, sink)
    half, inverse = f.extract(whole.half, 0), f.extract(whole.inverse, 0)
    with f.when(f.is_null(lse).eq(0)):
        f.store(f.extract(whole.lse(f, c), 0), lse, align=1)
    slots = Slots.of(size, c.lanes)

    def each(store: Callable[[Value, Value], None], width: int) -> None:
        """Whole registers where elements are adjacent and there are enough, else one by one."""

        def registers() -> None:
            with f.range(0, slots.count) as slot:
                x = sums.load(slot) * whole.half * whole.inverse
                store(x, out.at + f.minimum(slot * c.lanes, slots.last) * width)

        def elements() -> None:
            with f.range(0, size) as column:
                place = sums.moved(slots.place(column) * c.size).at
                store(f.load(c.acc, place) * half * inverse, out.row(column).at)

        f.either(out.stride.eq(width) & (size >= c.lanes), registers, elements)

    f.either(
        partial.ne(0),
        lambda: each(lambda x, at: f.store(x, at, align=1), c.size),
        lambda: each(lambda x, at: write(f, c, x, at), c.element),
    )
    f.ret()
    return f
