"""The compiled backward kernel: one plan and layout, as the direct engine runs it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.arrays import address_of
from flashtile.kernels import Area, Inside, NativeRun, Stage, Step, Strides, Template
from flashtile.kernels.cpu import backward_config, scratch
from flashtile.kernels.cpu.array_sums import ArrayPlan, ArraySums, Items
from flashtile.kernels.cpu.block import BACKWARD, band_of, scores_in_nats, split_scale
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes import add_parts
from flashtile.kernels.cpu.passes.backward import EXPORTS, backward_text
from flashtile.kernels.cpu.readings import readings
from flashtile.kernels.cpu.score_values import NO_SCORES, ScoreValues, score_steps
from flashtile.kernels.cpu.steps.range import least_of_scores
from flashtile.llvm import jit
from flashtile.llvm.blocks import ALIGNMENT, WORD
from flashtile.plan import Plan
from flashtile.plan.tiling import flops_of

if TYPE_CHECKING:
    from flashtile.kernels import ArrayShapes, BackwardLayout
    from flashtile.llvm.jit import Library
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

_AXES = "bhsd"
TENSORS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
# Heads are the work items. Where there are few, each is cut into parts of its keys, every one with a dQ of its own.
_ENOUGH_ITEMS, _MOST_PARTS = 8, 4
_KEPT_BYTES = 12 << 20  # Q and dO of a head are made ready once, up to this size; beyond it at every key block
_TIMES_FORWARD = 5, 2  # five products where the forward has two


@functools.cache
def library_of(c: Config) -> Library:
    return jit.load(lambda: backward_text(c), f"backward {c!r}", c.isa, EXPORTS)


@functools.cache
def _entry(c: Config) -> Callable[..., int]:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    return library_of(c).function("backward", ctypes.c_int32, ctypes.c_char_p, integer, integer, pointer)


@functools.cache
def adding_library(c: Config) -> Library:
    """See passes/add_parts.py."""
    return jit.load(lambda: add_parts.add_parts_text(c), f"add_parts {c!r}", c.isa, add_parts.EXPORTS)


@functools.cache
def _adding(c: Config) -> Callable[..., int]:
    """The function that adds the parts of dQ."""
    library = adding_library(c)
    _libraries.append(library)
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    return library.function("add_parts", ctypes.c_int32, ctypes.c_char_p, integer, integer, pointer)


_libraries: list[Library] = []  # keeps their code in memory


class Params(NamedTuple):
    """The parameters of a call whose dQ comes in parts, or that has gradients of arrays."""

    items: bytes
    merge: bytes
    workspace: np.ndarray | None
    sums: ArraySums


class Backward:
    """A compiled backward kernel with the parameter block of one spec and layout."""

    def __init__(self, spec: AttentionSpec, layout: BackwardLayout, arrays: ArrayShapes = ()):
        c = replace(backward_config(spec), arrays=tuple(n for n, _ in arrays))
        bounds = parts_of(spec, c.key_block, _at_once(spec, c, arrays))
        self._config = c = replace(c, partial=len(bounds) > 2 and c.memory != c.acc)  # else dQ's parts are as dQ
        self._spec, self._layout = spec, layout
        self._parts = np.array(bounds, np.int64)
        self.plan = plan_of(spec, len(bounds) - 1, c)
        self.run = _entry(c)
        self.merge_stage: Stage | None = None
        self._dq = layout.dq
        splits = self.plan.splits
        items = Items(spec.batch, spec.kv_heads, splits)
        self._arrays = ArrayPlan(readings(c.code, c.arrays), dict(arrays), c, items)
        self._no_sums = None if arrays else ArraySums(self._arrays)
        if splits > 1 or arrays:
            self.run = self._arrays.run(NativeRun(self.run, Params._fields.index("items")))
        if splits > 1:
            self._split(splits)
        self.plan = _chained(self.plan, self._arrays.shared)
        values = _values(c, spec, layout, splits)
        values |= {f"dq_{a}": n for a, n in zip(_AXES, self._dq, strict=True)}
        values |= ready(c, values, spec.q_len)
        kept = values["kept"]
        longest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        areas = scratch.backward(
            c,
            values,
            slots=-(-spec.q_len // c.panel) if kept else 1,
            keys=longest if spec.group > 1 else c.key_block,
        )
        self.scratch_bytes = areas.bytes
        factors = (scores_in_nats if c.scored else split_scale)(spec.scale, c.acc)
        self._tail = BACKWARD.tail({**values, **areas.at, **factors})

    def _split(self, splits: int) -> None:
        """dQ of each part into a workspace of accumulators, row-major, from which a second stage adds them up."""
        c, spec = self._config, self._spec
        row = spec.head_size * c.size
        rows = spec.batch * spec.heads * spec.q_len
        self._dq = (spec.heads * spec.q_len * row, spec.q_len * row, row, c.size)
        self._add = _adding(replace(c, code=None, partial=False, arrays=(), dropout=False, across=False))
        self.merge_stage = Stage(
            items=rows,
            run=NativeRun(self._add, Params._fields.index("merge")),
            work=rows * spec.head_size * splits,
            workspace_bytes=splits * rows * row,
        )

    def pack(
        self,
        q: int,
        k: int,
        v: int,
        o: int,
        lse: int,
        do: int,
        dlse: int,
        dq: int,
        dk: int,
        dv: int,
        offsets: int,
        scoring: Scoring | None = None,
        dsinks: int = 0,
    ) -> bytes | Params:
        """The parameters of one call; see engines.PackBackward."""
        scores = ScoreValues.of(scoring, self._config) if scoring else NO_SCORES
        sums = self._no_sums or ArraySums(self._arrays)
        own = *scores.addresses, address_of(self._parts), address_of(sums.words), dsinks, 0

        def block(dq: int) -> bytes:
            return scores.hold(BACKWARD.head(q, k, v, o, lse, do, dlse, dq, dk, dv, offsets, *own) + self._tail)

        stage = self.merge_stage
        if stage is None:
            return Params(block(dq), b"", None, sums) if self._config.arrays else block(dq)
        workspace = np.zeros(stage.workspace_bytes if dq else 0, np.uint8)
        at = address_of(workspace) if dq else 0
        return Params(block(at), add_parts.CALL.pack(self._merge_words(at, dq)), workspace, sums)

    def _merge_words(self, parts: int, dq: int) -> dict[str, int]:
        """The words of the second stage's block."""
        spec, splits = self._spec, len(self._parts) - 1
        assert self.merge_stage is not None
        return {
            "parts": parts,
            "dq": dq,
            **{f"dq_{a}": n for a, n in zip(_AXES, self._layout.dq, strict=True)},
            "heads": spec.heads,
            "q_len": spec.q_len,
            "head_size": spec.head_size,
            "splits": splits,
            "split": self.merge_stage.workspace_bytes // splits,
        }

    def template(self, scoring: Scoring | None) -> Template | None:
        """See kernels.Runnable, of the gradients of q, k, v, and of sinks where there are some, their elements side by
        side; of arrays' there is none."""
        from flashtile.kernels.cpu.templates import scores_of, template

        given = (self._layout.dq, self._layout.dk, self._layout.dv)
        if self._config.arrays or any(strides[3] != self._config.element for strides in given):
            return None
        scores, sums = scores_of(scoring, self._config), ArraySums(self._arrays)
        own = {"parts": address_of(self._parts), "sums": sums.address}
        operands = ["q", "k", "v", "o", "lse", "do", "dq", "dk", "dv"]
        operands += ["dsinks"] if scoring is not None and scoring.sinks is not None else []
        steps = [Step(_entry(self._config), self.plan.items)]
        stage, behind = self.merge_stage, b""
        if stage is not None:
            operands.remove("dq")
            steps.append(Step(self._add, stage.items, BACKWARD.bytes))
            behind = add_parts.CALL.pack(self._merge_words(0, 0))
        found = template(BACKWARD, self._tail, scores, scoring, tuple(steps), operands, behind, own)
        if stage is not None:
            memory = found.memory.ljust(-(-len(found.memory) // ALIGNMENT) * ALIGNMENT, b"\0")
            workspace, at = Inside(len(memory)), BACKWARD.bytes
            parts, dq = (at + WORD * add_parts.CALL.index[x] for x in ("parts", "dq"))
            places = (*found.places, (WORD * BACKWARD.index["dq"], workspace), (parts, workspace), (dq, "dq"))
            found = found._replace(memory=memory, room=stage.workspace_bytes, places=places)
        fresh = self._fresh("dq" if stage is None else Inside(len(found.memory)), scoring)
        return found._replace(kept=(scores, sums, self), fresh=fresh)

    def _fresh(self, dq: str | Inside, scoring: Scoring | None) -> tuple[tuple[Area, ...], ...]:
        """See Template.fresh; dq: an operand, or where its parts are."""
        c, spec, bounds = self._config, self._spec, self._parts.tolist()
        splits, group, found = len(bounds) - 1, spec.group, []
        parts = spec.batch * spec.heads * spec.q_len * spec.head_size * c.size if splits > 1 else 0
        element = c.element if splits == 1 else c.size
        for number in range(spec.batch * spec.kv_heads * splits):
            head, split = divmod(number, splits)
            b, h = divmod(head, spec.kv_heads)
            keys = bounds[split + 1] - bounds[split]
            rows = (b, h * group, 0), group, spec.q_len
            areas = _rows(dq, self._dq, *rows, spec.head_size * element, split * parts)
            if splits > 1 and split == 0:  # to which the second step adds
                areas += _rows("dq", self._layout.dq, *rows, spec.head_size * c.element)
            for name, size in (("dk", spec.head_size), ("dv", spec.value_size)):
                areas += _rows(name, getattr(self._layout, name), (b, h, bounds[split]), 1, keys, size * c.element)
            if scoring is not None and scoring.sinks is not None and split == 0:
                areas.append(Area("dsinks", (b * spec.heads + h * group) * c.size, 1, group * c.size, 0))
            found.append(tuple(areas))
        return tuple(found)

    def totals(self, params: Any) -> dict[int, np.ndarray]:
        """The gradients of captured arrays, by their slots, when a call is done."""
        return params.sums.totals() if self._config.arrays else {}


def _rows(
    of: str | Inside, strides: Strides, at: tuple[int, int, int], heads: int, rows: int, size: int, offset: int = 0
) -> list[Area]:
    """Rows of `size` bytes of heads from (b, h, row) on."""
    offset += sum(n * stride for n, stride in zip(at, strides, strict=False))
    _, of_head, of_row, _ = strides
    if heads == 1 or of_head == size:
        heads, size = 1, heads * size
    if of_row == size:
        rows, size = 1, rows * size
    return [Area(of, offset + n * of_head, rows, size, of_row) for n in range(heads)]


def _chained(plan: Plan, shared: frozenset[str]) -> Plan:
    """The plan whose work items are chains of those of another one."""
    return replace(
        plan,
        batch=1 if "b" in shared else plan.batch,
        head_block=plan.heads if "h" in shared else plan.head_block,
        splits=1 if "j" in shared else plan.splits,
    )


def plan_of(spec: AttentionSpec, splits: int, c: Config) -> Plan:
    """The work items: one for each head of K and V and part of its keys."""
    times, over = _TIMES_FORWARD
    rows = max(1, -(-spec.q_len // c.panel)) * c.panel
    flops = flops_of(spec) * times // over
    return Plan(spec.batch, spec.heads, 1, splits, rows, c.key_block, flops, 0, spec.group)


def _at_once(spec: AttentionSpec, c: Config, arrays: ArrayShapes) -> int:
    """Heads of K and V that may run at the same time. Those that share a large array may not, but parts of their keys
    may, where these have other elements of it."""
    items = Items(spec.batch, spec.kv_heads, 2)
    plan = ArrayPlan(readings(c.code, c.arrays), dict(arrays), c, items)
    return spec.batch * spec.kv_heads if "j" in plan.shared else len(plan.chains) // items.parts


def parts_of(spec: AttentionSpec, key_block: int, heads: int | None = None) -> list[int]:
    """The first key of every part, and the end of the last: equal shares of what rows see, by shapes alone. ``heads``
    of K and V run at the same time, if not all do."""
    blocks = -(-spec.kv_len // key_block)
    heads = max(1, spec.batch * spec.kv_heads if heads is None else heads)
    parts = min(_MOST_PARTS, -(-_ENOUGH_ITEMS // heads), blocks)
    if parts < 2:
        return [0, spec.kv_len]
    starts = np.arange(blocks) * key_block
    middle = np.minimum(starts + key_block // 2, spec.kv_len - 1)
    seen = np.cumsum(_rows_that_see(spec, middle))
    bounds = [0]
    for n in range(1, parts):
        block = int(np.searchsorted(seen, seen[-1] * n / parts)) + 1
        bounds.append(min(max(block, bounds[-1] + 1), blocks - (parts - n)))
    return [n * key_block for n in bounds] + [spec.kv_len]


def _rows_that_see(spec: AttentionSpec, keys: np.ndarray) -> np.ndarray:
    """How many rows see each of these keys by the band; all of them where offsets come with the call."""
    if spec.band is None or spec.offset is None:
        return np.full(len(keys), spec.q_len)
    low, high = np.zeros(len(keys), np.int64), np.full(len(keys), spec.q_len)
    if spec.band.right is not None:  # i + offset + right >= j
        low = np.clip(keys - spec.offset - spec.band.right, 0, spec.q_len)
    if spec.band.left is not None:  # i + offset - left <= j
        high = np.clip(keys - spec.offset + spec.band.left + 1, 0, spec.q_len)
    return np.maximum(high - low, 0)


def ready(c: Config, values: dict[str, int], rows: int) -> dict[str, int]:
    """The words that say whether Q and dO of so many rows are made ready at once."""
    kept = -(-rows // c.panel) * c.panel * _ready_bytes(c, values) <= _KEPT_BYTES
    found = {"kept": int(kept)}
    step = kept * c.size * c.product.parts
    found |= {"q_step": values["key_words"] * step, "do_step": values["value_words"] * step}
    stay = kept or c.lands_in_memory  # until the exchange of their span (steps/held.py)
    return found | {f"{x}_kept": stay * values[f"pack_{x}"] * values[f"{x}_row"] for x in ("q", "do")}


def _ready_bytes(c: Config, values: dict[str, int]) -> int:
    """Bytes of a row of Q and dO that are made ready."""
    found = (values["key_words"] + values["value_words"]) * (c.size * c.product.parts)
    return found + sum(values[f"{x}_row"] // c.per_word for x in ("q", "do") if values[f"pack_{x}"])


def _values(c: Config, spec: AttentionSpec, layout: BackwardLayout, splits: int) -> dict[str, int]:
    """The words of the parameter block, but for pointers and areas."""
    depth, value_depth = c.key_words(spec.head_size), c.key_words(spec.value_size)
    columns = c.padded(spec.head_size)
    wide, value_wide = (-(-size // c.lanes) * c.lanes for size in (spec.head_size, spec.value_size))
    tensors = {name: getattr(layout, name) for name in TENSORS if name != "dq"}
    foreign = c.memory != c.acc  # elements that the multiply-add cannot read from memory
    in_words = c.storage == c.product.operand

    def loose(name: str) -> bool:
        return tensors[name][3] != c.element

    def unlike_words(name: str, size: int) -> bool:
        return loose(name) or (not in_words or size != c.key_words(size) * c.per_word if c.product.operand else foreign)

    def unlike_columns(name: str, size: int, columns: int) -> bool:
        return loose(name) or c.per_word > 1 or foreign or columns != size

    return {
        **{f"{t}_{a}": n for t, strides in tensors.items() for a, n in zip(_AXES, strides, strict=True)},
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "group": spec.group,
        "q_len": spec.q_len,
        "kv_len": spec.kv_len,
        "head_size": spec.head_size,
        "value_size": spec.value_size,
        "key_words": depth,
        "value_words": value_depth,
        "splits": splits,
        "dq_split": spec.batch * spec.heads * spec.q_len * spec.head_size * c.size,
        "columns": columns,
        "q_columns": wide,
        "do_columns": value_wide,
        "key_registers": wide // c.lanes,
        "value_registers": value_wide // c.lanes,
        **band_of(spec),
        **score_steps(c, spec),
        "pack_k": int(unlike_words("k", spec.head_size)),
        "pack_v": int(unlike_words("v", spec.value_size)),
        "pack_k_columns": int(unlike_columns("k", spec.head_size, columns)),
        "pack_q": int(unlike_columns("q", spec.head_size, wide)),
        "pack_do": int(unlike_columns("do", spec.value_size, value_wide)),
        "k_row": depth * c.size * c.product.parts,
        "v_row": value_depth * c.size * c.product.parts,
        "q_row": wide * c.size * c.product.parts,
        "do_row": value_wide * c.size * c.product.parts,
        "dk_row": wide * c.size,
        "dv_row": value_wide * c.size,
        "least": least_of_scores(c, spec.scale),
        **dict.fromkeys(("first_row", "row_count", "first_key", "copy", "lse_h"), 0),  # of tiles (tiles.py)
    }
