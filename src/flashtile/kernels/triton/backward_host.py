"""The host side of a backward call: delta, dQ, dK and dV, then the gradients of arrays, one launch after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import wrong
from flashtile.kernels import Stage
from flashtile.kernels.triton import backward_forms as forms
from flashtile.kernels.triton import backward_parts
from flashtile.kernels.triton.backward_tiles import of_arrays
from flashtile.kernels.triton.device import Bound, Device, Pointer
from flashtile.kernels.triton.host import (
    MOST_TABLES,
    band_values,
    bits,
    captured,
    check_lengths,
    drawing,
    lse_type,
    places,
    sinks_at,
    sizes_of,
    table_values,
)
from flashtile.kernels.triton.specialisation import ELEMENTS, Memory, Tile
from flashtile.kernels.triton.tables import Table, table_of, turned
from flashtile.plan import Plan
from flashtile.plan.tiling import flops_of
from flashtile.score.capture import ScalarCapture

if TYPE_CHECKING:
    from flashtile.kernels import ArrayShapes, BackwardLayout
    from flashtile.score.derivative import ArrayGradient
    from flashtile.score.options import Scoring
    from flashtile.score.program import Program
    from flashtile.spec import AttentionSpec

_AXES = "bhsd"
_OPERANDS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
_GRADIENTS = ("dq", "dk", "dv")
_TIMES_FORWARD = 7, 2  # seven products where the forward has two: S and dP are formed for dQ, and again for dK and dV
_WORD = 4  # bytes of what `clear` writes


class Launch(NamedTuple):
    """One kernel of a call, and how many programs of it."""

    kernel: Bound
    grid: int
    values: Mapping[str, Any]


class Call(NamedTuple):
    """A call's launches, in order, and the gradients of arrays that they leave, by slot."""

    launches: tuple[Launch, ...]
    arrays: Mapping[int, Any]


class Backward:
    """The backward kernels bound to one spec and layout: a `kernels.CompiledBackward`. One work item is all of a call.

    tile_q of dQ, and of gradients of arrays, with fewer rows; tile_kv of dK and dV.
    Raises: SpecError for strides that are not whole elements, and for lengths beyond int32.
    """

    scratch_bytes = 0
    merge_stage: Stage | None = None

    def __init__(
        self,
        spec: AttentionSpec,
        layout: BackwardLayout,
        arrays: ArrayShapes,
        tile_q: Tile,
        tile_kv: Tile,
        device: Device,
    ) -> None:
        self._spec, self._arrays, self._device = spec, arrays, device
        self._tile_q, self._tile_kv = tile_q, tile_kv
        self._tile_arrays = of_arrays(tile_q)
        self._key_tiles = -(-spec.kv_len // tile_kv.tile_k)
        heads, kv_heads = spec.batch * spec.heads, spec.batch * spec.kv_heads
        items_q, items_kv = heads * -(-spec.q_len // tile_q.tile_q), kv_heads * self._key_tiles
        items_arrays = heads * -(-spec.q_len // self._tile_arrays.tile_q)
        check_lengths(spec, max(items_arrays, items_kv))
        busy = device.processors()
        self._keys = backward_parts.parts_of_keys(items_q, spec.kv_len, tile_q.tile_k, busy)
        self._keys_of_arrays = backward_parts.parts_of_keys(items_arrays, spec.kv_len, tile_q.tile_k, busy)
        self._rows = backward_parts.parts_of_rows(items_kv, spec.group, spec.q_len, tile_kv.tile_q, busy)
        self._items_q, self._items_kv = items_q * self._keys.count, items_kv * self._rows.count
        self._items_arrays = items_arrays * self._keys_of_arrays.count
        of_keys = spec.kv_heads, spec.kv_len
        self._shapes = {
            "dq": (spec.heads, spec.q_len, spec.head_size),
            "dk": (*of_keys, spec.head_size),
            "dv": (*of_keys, spec.value_size),
        }
        self._strides = _strides_of(layout, spec)
        self._element, self._accumulator = ELEMENTS[spec.dtype], ELEMENTS[lse_type(spec)]
        times, over = _TIMES_FORWARD
        self.plan = Plan(1, 1, 1, 1, spec.q_len, spec.kv_len, flops_of(spec) * times // over, at_once=True)
        size = DTYPES[lse_type(spec)].itemsize
        of_q, of_k, of_v = (
            0 if count == 1 else size * count * self._elements(name)
            for name, count in (("dq", self._keys.count), ("dk", self._rows.count), ("dv", self._rows.count))
        )
        counts = size * heads * spec.q_len, _WORD * self._items_q, _WORD * self._items_kv, of_q, of_k, of_v
        self._delta_at, self._odd_q_at, self._odd_kv_at, *parts_at, self._workspace_bytes = places(counts)
        self._parts_at = dict(zip(("dq", "dk", "dv"), parts_at, strict=True))
        self._bound: dict[Any, Bound] = {}
        self._tables: dict[Any, Table] = {}

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
    ) -> Call:
        """The launches of one call; see `CompiledBackward.pack`. Addresses on the device."""
        at = {"q": q, "k": k, "v": v, "o": o, "do": do, "dq": dq, "dk": dk, "dv": dv}
        memory = self._memory(tuple(at.values()))
        work = self._device.empty(self._workspace_bytes, "u8")
        values: dict[str, Any] = {name: Pointer(x, self._element) for name, x in at.items()}
        rows = {"lse": lse, "dlse": dlse, "dsinks": dsinks}
        values |= {name: Pointer(x, self._accumulator) for name, x in rows.items()}
        values["delta"] = Pointer(work.address + self._delta_at, self._accumulator, work.keep)
        values["offsets"] = Pointer(offsets, "i64")
        if scoring is not None:
            values |= self._score_values(scoring)
        launches = [self._deltas(values, memory)]
        if dsinks:
            assert scoring is not None
            values["sinks"] = sinks_at(scoring.sinks, self._accumulator, self._device)
            launches.append(Launch(self._kernel(forms.sink_sums), self._spec.batch * self._spec.heads, values))
        program = None if scoring is None else scoring.program
        if dq:
            marks = Pointer(work.address + self._odd_q_at, "i32", work.keep)
            given = values | self._table(program, self._tile_q) | {"odd": marks, "items": self._items_q}
            launches += self._sums(forms.backward_q, self._tile_q, ("dq",), given, work, memory)
        if dk or dv:
            marks = Pointer(work.address + self._odd_kv_at, "i32", work.keep)
            given = values | self._table(program, self._tile_kv, keys_first=True)
            given |= {"odd": marks, "items": self._items_kv}
            names = tuple(name for name, x in (("dk", dk), ("dv", dv)) if x)
            wanted = {"dk": bool(dk), "dv": bool(dv)}
            launches += self._sums(forms.backward_kv, self._tile_kv, names, given, work, memory, **wanted)
        arrays: dict[int, Any] = {}
        if self._arrays:
            values |= self._table(program, self._tile_arrays)
        for number, shape in self._arrays:
            out = self._device.array(shape, self._accumulator)
            launches += self._array(number, shape, out, values, memory)
            arrays[number] = out.keep
        return Call(tuple(x for x in launches if x.grid), arrays)

    def run(self, params: Call, begin: int, end: int, scratch: int) -> int:
        """Launch the call."""
        if begin < end:
            for kernel, grid, values in params.launches:
                kernel(grid, values)
        return 0

    def totals(self, params: Call) -> dict[int, Any]:
        """The gradients of captured arrays, arrays of the device's library."""
        return dict(params.arrays)

    # -- launches --------------------------------------------------------------------------------------

    def _kernel(self, form: Any, *parts: Any, **how: Any) -> Bound:
        """A kernel with what is alike at every call of its."""
        key = form, parts, tuple(how.items())
        bound = self._bound.get(key)
        if bound is None:
            spec = self._spec
            tile = next((x for x in parts if isinstance(x, Tile)), None)
            rows = forms.ROWS if tile is None else tile.tile_q
            fixed = {
                **self._strides,
                **sizes_of(spec),
                **band_values(spec),
                "first": 0,
                "scale": bits(spec.scale),
                "key_tiles": self._key_tiles,
                "query_tiles": -(-spec.q_len // rows),
                **self._cut(form, how),
            }
            given = parts if form is forms.clear else (spec, *parts)
            specialisation = form(*given, **how)
            names = frozenset(specialisation.names)
            fixed = {name: x for name, x in fixed.items() if name in names and x is not None}
            bound = self._bound[key] = self._device.bind(specialisation, fixed)
        return bound

    def _deltas(self, values: Mapping[str, Any], memory: Memory) -> Launch:
        spec = self._spec
        kernel = self._kernel(forms.row_deltas, bool(values["dlse"].address), memory)
        return Launch(kernel, spec.batch * spec.heads * -(-spec.q_len // forms.ROWS), values)

    def _cut(self, form: Any, how: Mapping[str, Any]) -> dict[str, int]:
        """What tells a kernel which part of the keys, or rows, a work item has, and where its sums go."""
        keys, rows = self._keys_of_arrays if form is forms.array_sums else self._keys, self._rows
        values = {"splits": rows.count if form is forms.backward_kv else keys.count, "split_keys": keys.length}
        values |= {"row_parts": rows.row_parts, "split_rows": rows.rows, "split_heads": rows.heads}
        for name in _GRADIENTS if how.get("parts") else ():
            heads, length, size = self._shapes[name]
            values[f"{name}_split"] = self._elements(name)
            outer = heads * length * size, length * size, size, 1
            values |= {f"{name}_{axis}": stride for axis, stride in zip(_AXES, outer, strict=True)}
        return values

    def _elements(self, name: str) -> int:
        """How many a gradient has."""
        return self._spec.batch * math.prod(self._shapes[name])

    def _sums(
        self,
        form: Any,
        tile: Tile,
        names: tuple[str, ...],
        values: dict[str, Any],
        work: Pointer,
        memory: Memory,
        **wanted: bool,
    ) -> list[Launch]:
        """The two launches of a kernel, the second for what is not finite; and where it computes parts, their sums."""
        parts, sums = (self._rows if form is forms.backward_kv else self._keys).count > 1, []
        if parts:
            found = {name: work.address + self._parts_at[name] for name in names}
            apart = {name: Pointer(at, self._accumulator, work.keep) for name, at in found.items()}
            sums = [self._joined(name, apart[name], values[name]) for name in names]
            values = values | apart
            sizes = (self._shapes[name][2] for name in names)
            memory = replace(memory, aligned=memory.aligned and not any(size % 16 for size in sizes))
        how = {"parts": parts, "memory": memory, **wanted}
        grids = values["items"], min(values["items"], self._device.processors())
        kernels = (self._kernel(form, tile, contain=contain, **how) for contain in (False, True))
        return [*(Launch(kernel, grid, values) for kernel, grid in zip(kernels, grids, strict=True)), *sums]

    def _joined(self, name: str, parts: Pointer, out: Pointer) -> Launch:
        """The launch that adds parts of a gradient up."""
        heads, length, size = self._shapes[name]
        tiles = -(-length // forms.ROWS)
        key = forms.add_parts, name
        bound = self._bound.get(key)
        if bound is None:
            fixed = {f"out_{axis}": self._strides[f"{name}_{axis}"] for axis in _AXES}
            fixed |= {"first": 0, "heads": heads, "length": length, "size": size, "tiles": tiles}
            fixed |= {"split": self._elements(name), "splits": (self._keys if name == "dq" else self._rows).count}
            bound = self._bound[key] = self._device.bind(forms.add_parts(self._spec, size), fixed)
        return Launch(bound, self._spec.batch * heads * tiles, {"parts": parts, "out": out})

    def _array(
        self, number: int, shape: tuple[int, ...], out: Pointer, values: Mapping[str, Any], memory: Memory
    ) -> list[Launch]:
        """The launches of one captured array's gradient."""
        spec, elements = self._spec, math.prod(shape)
        assert spec.program is not None
        loads = [n for n, x in enumerate(spec.program.array_gradients) if x.slot.number == number]
        terms = sum(self._terms(spec.program.array_gradients[n]) for n in loads)
        counts = 8, 8 * elements * forms.words_of(spec), 4 * elements
        largest, totals, flags, nbytes = places(counts)
        work = self._device.empty(nbytes, "u8")
        given: dict[str, Any] = {
            **values,
            "largest": Pointer(work.address + largest, "i64", work.keep),
            "totals": Pointer(work.address + totals, "i64", work.keep),
            "flags": Pointer(work.address + flags, "i32", work.keep),
            "words": Pointer(work.address, "i32", work.keep),
            "count": nbytes // _WORD,
            "elements": elements,
            "terms_bits": max(terms - 1, 0).bit_length(),
            "out": out,
        }
        launches = [Launch(self._kernel(forms.clear), -(-nbytes // (_WORD * forms.BLOCK)), given)]
        for totalled in (False, True):
            for n in loads:
                kernel = self._kernel(forms.array_sums, self._tile_arrays, n, totals=totalled, memory=memory)
                launches.append(Launch(kernel, self._items_arrays, given))
        return [*launches, Launch(self._kernel(forms.array_finish), -(-elements // forms.BLOCK), given)]

    def _terms(self, gradient: ArrayGradient) -> int:
        """Scores that may have read one element: of those that lie along axes that its indices do not name."""
        spec = self._spec
        lengths = {"b": spec.batch, "h": spec.heads, "i": spec.q_len, "j": spec.kv_len}
        plain = {x.data for x in gradient.index if x.operation.name == "var"}
        return math.prod(n for name, n in lengths.items() if name not in plain)

    # -- values ----------------------------------------------------------------------------------------

    def _memory(self, addresses: tuple[int, ...]) -> Memory:
        """What can be said of a call's arrays; those that are absent have addresses and strides of 0."""
        outer = (stride for name, stride in self._strides.items() if name[-1] != "d")
        inner = (self._strides[f"{name}_d"] for name, x in zip(_OPERANDS, addresses, strict=True) if x)
        aligned = all(x % 16 == 0 for x in (*addresses, *outer))
        return Memory(contiguous=all(stride == 1 for stride in inner), aligned=aligned)

    def _score_values(self, scoring: Scoring) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if scoring.keep is not None:
            values |= drawing(scoring.keep)
        if scoring.program is not None:
            values["captures"] = captured(scoring.program.captures, self._device)
        return values

    def _table(self, program: Program | None, tile: Tile, keys_first: bool = False) -> dict[str, Any]:
        """The coverage of a mask as dQ's kernel walks it, or, keys first, as that of dK and dV does."""
        if program is None or program.mask is None:
            return {}
        return table_values(self._coverage(program, tile, keys_first), self._device)

    def _coverage(self, program: Program, tile: Tile, keys_first: bool) -> Table:
        """Kept where it follows from captured numbers, without arrays, whose values may be other ones now."""
        from flashtile.score.coverage import coverage

        numbers = tuple(bits(x.value) for x in program.captures if isinstance(x, ScalarCapture))
        settled = len(numbers) == len(program.captures)
        table = self._tables.get((tile, keys_first, numbers)) if settled else None
        if table is None:
            found = coverage(program, tile.tile_q, tile.tile_k, np.dtype(lse_type(self._spec)))
            table = turned(found, self._spec.q_len, self._spec.kv_len) if keys_first else table_of(found)
            if settled:
                if len(self._tables) >= MOST_TABLES:
                    self._tables.clear()
                self._tables[tile, keys_first, numbers] = table
        return table


def _strides_of(layout: BackwardLayout, spec: AttentionSpec) -> dict[str, int]:
    """Strides in elements. Raises: SpecError for those that are not whole elements."""
    size, strides = dtype_of(spec.dtype).itemsize, {}
    for name in _OPERANDS:
        for axis, stride in zip(_AXES, getattr(layout, name), strict=True):
            if stride % size:
                raise wrong(name, f"strides of {getattr(layout, name)} bytes", f"multiples of {size} bytes")
            strides[f"{name}_{axis}"] = stride // size
    return strides
