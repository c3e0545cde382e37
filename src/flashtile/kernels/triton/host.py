"""The host side of a call: from addresses and layouts to launches, on any `Device`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import wrong
from flashtile.kernels import Layout, Stage
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.device import Device, Pointer
from flashtile.kernels.triton.specialisation import ELEMENTS, Memory, Specialisation, Tile
from flashtile.kernels.triton.tables import table_of
from flashtile.score.capture import ArrayCapture, ScalarCapture

if TYPE_CHECKING:
    from flashtile.plan import Plan
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

# A side of a band that is open; positions, offsets and distances stay below half of it.
OPEN = 2**61
# Rows and keys are counted in int32, and a tile may reach beyond the last.
LONGEST = 2**30
MERGE_ROWS = 16  # rows of a program that merges partial results
MERGE_WORK = 4  # operations an output element and part
_AXES = "bhsd"


class Launch(NamedTuple):
    """A kernel with its run-time arguments, all but which work items."""

    specialisation: Specialisation
    values: Mapping[str, Any]


class Call(NamedTuple):
    """The launches of one call, in order, by stage: over the plan's work items, and over the tiles of a merge."""

    stages: tuple[tuple[Launch, ...], ...]


class Forward:
    """The flash kernel bound to one spec, plan and layout: a `kernels.CompiledKernel`.

    The plan's tiles are the kernel's: plan.tile_q and plan.tile_k are the tile's.
    Raises: SpecError for strides that are not whole elements, and for lengths beyond int32.
    """

    scratch_bytes = 0

    def __init__(self, spec: AttentionSpec, plan: Plan, layout: Layout, tile: Tile, device: Device):
        self._spec, self._plan, self._tile, self._device = spec, plan, tile, device
        check_lengths(spec, plan.items)
        self._layout = Elements.of(layout, spec)
        self._packed = plan.head_block > 1
        self._split = plan.splits > 1
        self._rows = spec.batch * spec.heads * spec.q_len
        self._element, self._accumulator = ELEMENTS[spec.dtype], ELEMENTS[DTYPES[spec.dtype].accumulator]
        self.merge_stage: Stage | None = None
        if self._split:
            self._merge_tiles = -(-spec.q_len // MERGE_ROWS)
            size = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
            self.merge_stage = Stage(
                items=spec.batch * spec.heads * self._merge_tiles,
                run=self._run_stage(1),
                work=MERGE_WORK * self._rows * spec.value_size * plan.splits,
                workspace_bytes=plan.splits * self._rows * (spec.value_size + 1) * size,
            )
        self.run = self._run_stage(0)

    def pack(self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None) -> Call:
        """The launches of one call. Addresses on the device; lse 0 if it is not wanted."""
        spec, plan, device = self._spec, self._plan, self._device
        wanted = Pointer(lse, self._accumulator) if lse else device.empty(self._rows, self._accumulator)
        out = Pointer(o, self._element)
        layout, memory = self._layout, self._layout.memory((q, k, v, o))
        values: dict[str, Any] = {
            "q": Pointer(q, self._element),
            "k": Pointer(k, self._element),
            "v": Pointer(v, self._element),
            **layout.values("qkv"),
            "odd": device.empty(plan.items, "i32"),
            "first": 0,
            **sizes_of(spec),
            "query_tiles": plan.query_tiles,
            "splits": plan.splits,
            "split_keys": plan.split_keys or spec.kv_len,
            "scale": bits(spec.scale),
            **band_values(spec, offsets),
            "rows": None, "runs": None, "rows_b": 0, "rows_h": 0,
            "sinks": None,
            "captures": None,
        }  # fmt: skip
        sinks = None
        if scoring is not None:
            values.update(self._score_values(scoring))
            if scoring.sinks is not None:
                sinks = sinks_at(scoring.sinks, self._accumulator, device)
        if not self._split:
            values.update({"o": out, "lse": wanted, **layout.values("o"), "o_split": 0, "lse_split": 0})
            values["sinks"] = sinks
            return Call((self._forward(special.FINISHED, memory, values),))
        o_split, lse_split = self._rows * spec.value_size, self._rows
        parts_o = device.empty(plan.splits * o_split, self._accumulator)
        parts_lse = device.empty(plan.splits * lse_split, self._accumulator)
        row = spec.value_size
        inner = dict(zip(("o_b", "o_h", "o_s", "o_d"), (spec.heads * spec.q_len * row, spec.q_len * row, row, 1),
                         strict=True))  # fmt: skip
        steps = {"o_split": o_split, "lse_split": lse_split}
        values.update({"o": parts_o, "lse": parts_lse, **inner, **steps})
        merging: dict[str, Any] = {
            "parts_o": parts_o, "parts_lse": parts_lse, "o": out, "lse": wanted, **layout.values("o"), **steps,
            "first": 0, **sizes_of(spec), "query_tiles": self._merge_tiles, "splits": plan.splits, "sinks": sinks,
        }  # fmt: skip
        merge = special.merge(spec, Tile(MERGE_ROWS, MERGE_ROWS), memory=Memory(memory.contiguous, aligned=False))
        parts_memory = Memory(memory.contiguous, aligned=memory.aligned and row % 16 == 0)
        return Call((self._forward(special.PARTIAL, parts_memory, values), (Launch(merge, merging),)))

    def _forward(self, state: str, memory: Memory, values: Mapping[str, Any]) -> tuple[Launch, ...]:
        """The two launches of the forward kernel."""
        spans = special.has_spans(self._spec, self._tile, self._plan.split_keys or self._spec.kv_len)
        how: dict[str, Any] = {"state": state, "packed": self._packed, "spans": spans, "memory": memory}
        return tuple(
            Launch(special.forward(self._spec, self._tile, contain=contain, **how), values) for contain in (False, True)
        )

    def _run_stage(self, stage: int) -> Any:
        def run(params: Call, begin: int, end: int, scratch: int) -> int:
            for launch in params.stages[stage] if begin < end else ():
                self._device.launch(launch.specialisation, end - begin, {**launch.values, "first": begin})
            return 0

        return run

    def _score_values(self, scoring: Scoring) -> dict[str, Any]:
        """Captured values, and the coverage of a mask, as they are now: O(S) for one that depends on arrays."""
        program, spec = scoring.program, self._spec
        if program is None:
            return {}
        values: dict[str, Any] = {"captures": captured(program.captures, self._device)}
        if program.mask is not None:
            from flashtile.score.coverage import coverage

            rows = spec.q_len if self._packed else self._plan.tile_q
            table = table_of(coverage(program, max(1, rows), self._plan.tile_k, np.dtype(lse_type(spec))))
            values["rows"] = self._device.place(table.rows, "i32").pointer
            values["runs"] = self._device.place(table.runs, "i32").pointer
            values["rows_b"], values["rows_h"] = table.rows_b, table.rows_h
        return values


@dataclass(frozen=True)
class Elements:
    """The strides of q, k, v, o in elements along (B, H, S, D)."""

    strides: Mapping[str, int]
    itemsize: int

    @classmethod
    def of(cls, layout: Layout, spec: AttentionSpec) -> Elements:
        """Raises: SpecError for strides that are not whole elements."""
        size, strides = dtype_of(spec.dtype).itemsize, {}
        for tensor in "qkvo":
            for axis, stride in zip(_AXES, getattr(layout, tensor), strict=True):
                if stride % size:
                    name = "out" if tensor == "o" else tensor
                    raise wrong(name, f"strides of {getattr(layout, tensor)} bytes", f"multiples of {size} bytes")
                strides[f"{tensor}_{axis}"] = stride // size
        return cls(strides, size)

    def values(self, tensors: str) -> dict[str, int]:
        return {f"{t}_{a}": self.strides[f"{t}_{a}"] for t in tensors for a in _AXES}

    def memory(self, addresses: tuple[int, ...]) -> Memory:
        """What can be said of a call's arrays."""
        outer = (stride for name, stride in self.strides.items() if name[2] != "d")
        return Memory(
            contiguous=all(self.strides[f"{t}_d"] == 1 for t in "qkvo"),
            aligned=all(address % 16 == 0 for address in addresses) and all(stride % 16 == 0 for stride in outer),
        )


def check_lengths(spec: AttentionSpec, items: int) -> None:
    """Raise SpecError for what does not fit the kernels' int32 counts."""
    for name, length in (("q", spec.q_len * spec.group), ("k", spec.kv_len)):
        if length > LONGEST:
            raise wrong(name, f"length {length}", f"at most {LONGEST} on a GPU")
    if items > 2**31 - 1:
        raise wrong("q", f"{items} tiles of queries", f"at most {2**31 - 1} on a GPU")


def sizes_of(spec: AttentionSpec) -> dict[str, int]:
    return {
        "heads": spec.heads, "group": spec.group, "q_len": spec.q_len, "kv_len": spec.kv_len,
        "head_size": spec.head_size, "value_size": spec.value_size,
    }  # fmt: skip


def band_values(spec: AttentionSpec, offsets: int) -> dict[str, Any]:
    """Distances and anchor of the spec's band; offsets is the address of (B,) int64, where the anchor is an array."""
    if spec.band is None:
        return {"left": None, "right": None, "offset": None, "offsets": None}
    left, right = (OPEN if side is None else min(side, OPEN) for side in (spec.band.left, spec.band.right))
    return {"left": left, "right": right, "offset": spec.offset, "offsets": Pointer(offsets, "i64")}


def captured(captures: Any, device: Device) -> tuple[Any, ...] | None:
    """A program's captured values in the order of `specialisation.capture_types`; None if there are none."""
    values: list[Any] = []
    for value in captures:
        if isinstance(value, ScalarCapture):
            values.append(int(value.value) if value.type == "int" else bits(value.value))
            continue
        element = special.pointee(value.element)
        if value.place is None:
            pointer, strides = device.place(value.array, element)
        else:  # it lies on the device already
            pointer = Pointer(value.place.address, element, value.source)
            strides = tuple(stride // value.array.itemsize for stride in value.place.strides)
        values.append(pointer)
        values += [n for axis in zip(value.array.shape, strides, strict=True) for n in axis]
    return tuple(values) or None


def sinks_at(sinks: Any, element: str, device: Device) -> Pointer:
    """Sinks (B, H) in the accumulator's type: an array of the host, or a capture that lies on the device already."""
    if isinstance(sinks, ArrayCapture) and sinks.place is not None:
        return Pointer(sinks.place.address, element, sinks.source)
    return device.place(sinks, element).pointer


def bits(number: float) -> int:
    """The bits of a double, as the signed integer that carries them to a kernel."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def lse_type(spec: AttentionSpec) -> str:
    return DTYPES[spec.dtype].accumulator
