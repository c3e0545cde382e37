"""The host side of a call: from addresses and layouts to launches, on any `Device`."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import wrong
from flashtile.kernels import Layout, Stage
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.device import Bound, Device, Pointer
from flashtile.kernels.triton.specialisation import ELEMENTS, Memory, Tile
from flashtile.kernels.triton.tables import Table, table_of
from flashtile.score.capture import ArrayCapture, ScalarCapture

if TYPE_CHECKING:
    from flashtile.plan import Plan
    from flashtile.score.keep import Keep
    from flashtile.score.options import Scoring
    from flashtile.score.program import Program
    from flashtile.spec import AttentionSpec

# A side of a band that is open; positions, offsets and distances stay below half of it.
OPEN = 2**61
# Rows and keys are counted in int32, and a tile may reach beyond the last.
LONGEST = 2**30
MERGE_ROWS = 16  # rows of a program that merges partial results
MOST_TABLES = 16  # of one mask with several captured numbers that are kept
_AXES = "bhsd"


class Launches(NamedTuple):
    """Kernels that follow one another, and the arguments that they share: all but which work items."""

    kernels: tuple[Bound, ...]
    values: Mapping[str, Any]


class Call(NamedTuple):
    """The launches of one call, in order, by stage: over the plan's work items, and over the tiles of a merge; and the
    memory that they have beside the arrays."""

    stages: tuple[Launches, ...]
    work: Any = None


class Forward:
    """The flash kernel bound to one spec, plan and layout: a `kernels.CompiledKernel`.

    The plan's tiles are the kernel's: plan.tile_q and plan.tile_k are the tile's. Where that wants tensor descriptors
    and the arrays lie otherwise, `plain` is taken, whose keys divide them. A merge follows the last work items
    in the same stream, so there is no stage of it for an engine to wait for.
    Raises: SpecError for strides that are not whole elements, and for lengths beyond int32.
    """

    scratch_bytes = 0
    merge_stage: Stage | None = None

    def __init__(
        self, spec: AttentionSpec, plan: Plan, layout: Layout, tile: Tile, device: Device, plain: Tile | None = None
    ):
        self._spec, self._plan, self._tile, self._device = spec, plan, tile, device
        self._plain = replace(tile, described=False) if plain is None else plain
        check_lengths(spec, plan.items)
        self._layout = Elements.of(layout, spec)
        self._packed = plan.head_block > 1
        self._split = plan.splits > 1
        self._rows = spec.batch * spec.heads * spec.q_len
        self._accumulator = ELEMENTS[DTYPES[spec.dtype].accumulator]
        self._merge_tiles = -(-spec.q_len // MERGE_ROWS)
        self._kernels: dict[bool, tuple[tuple[Bound, ...], ...]] = {}  # by whether the arrays are aligned
        self._tables: dict[tuple[Any, ...], Table] = {}
        size = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
        o_split, lse_split = (spec.value_size * self._rows, self._rows) if self._split else (0, 0)
        # The workspace, bytes from where the first launch's scratch memory ends: marks of the work items, an lse that
        # is not wanted, partial results.
        counts = (4 * plan.items, size * self._rows, plan.splits * size * o_split, plan.splits * size * lse_split)
        self._odd_at, self._lse_at, self._parts_o_at, self._parts_lse_at, self.workspace_bytes = places(counts)

    def pack(self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None) -> Call:
        """The launches of one call. Addresses on the device; lse 0 if it is not wanted."""
        device, aligned = self._device, not (q | k | v | o) % 16
        kernels = self._kernels.get(aligned)
        if kernels is None:
            kernels = self._kernels[aligned] = self._bind(aligned)
        scratch = kernels[0][0].scratch_bytes(self._plan.items)
        work = device.empty(scratch + self.workspace_bytes, "u8")
        at = work.address + scratch
        wanted = lse or at + self._lse_at
        values: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "o": o,
            "lse": wanted,
            "odd": at + self._odd_at,
            "offsets": offsets,
            "scratch": work.address,
        }
        sinks = None
        if scoring is not None:
            values.update(self._score_values(scoring))
            if scoring.keep is not None:
                values.update(drawing(scoring.keep))
            if scoring.sinks is not None:
                sinks = values["sinks"] = sinks_at(scoring.sinks, self._accumulator, device)
        if not self._split:
            return Call((Launches(kernels[0], values),), work)
        parts_o, parts_lse = at + self._parts_o_at, at + self._parts_lse_at
        merging = {"parts_o": parts_o, "parts_lse": parts_lse, "o": o, "lse": wanted, "sinks": sinks}
        values.update({"o": parts_o, "lse": parts_lse})
        return Call((Launches(kernels[0], values), Launches(kernels[1], merging)), work)

    def run(self, params: Call, begin: int, end: int, scratch: int) -> int:
        """Launch work items [begin, end), and after the last of them the merge."""
        if begin >= end:
            return 0
        first, contain = params.stages[0].kernels
        values = {**params.stages[0].values, "first": begin, "items": end - begin}
        first(end - begin, values)
        values["scratch"] = 0  # which is the first one's
        contain(min(end - begin, self._device.processors()), values)
        if self._split and end == self._plan.items:
            (merge,), merging = params.stages[1]
            merge(self._spec.batch * self._spec.heads * self._merge_tiles, {**merging, "first": 0})
        return 0

    def _bind(self, aligned: bool) -> tuple[tuple[Bound, ...], ...]:
        """The kernels of the forward's two launches, and of the merge if there is one, with what is alike for all
        calls."""
        spec, plan, layout, row = self._spec, self._plan, self._layout, self._spec.value_size
        memory = replace(layout.memory(()), aligned=aligned and layout.memory(()).aligned)
        splits: dict[str, Any] = {"o_split": 0, "lse_split": 0, "splits": plan.splits}
        strides = layout.values("o")
        if self._split:
            splits |= {"o_split": self._rows * row, "lse_split": self._rows}
            inner = (spec.heads * spec.q_len * row, spec.q_len * row, row, 1)
            strides = dict(zip(("o_b", "o_h", "o_s", "o_d"), inner, strict=True))
        fixed = {
            **layout.values("qkv"),
            **strides,
            **splits,
            **sizes_of(spec),
            **band_values(spec),
            **order_of(spec, plan, self._device.cache_bytes()),
            "query_tiles": plan.query_tiles,
            "split_keys": plan.split_keys or spec.kv_len,
            "scale": bits(spec.scale),
        }
        tile = self._tile if memory.contiguous and memory.aligned and layout.can_be_described() else self._plain
        how: dict[str, Any] = {
            "state": special.PARTIAL if self._split else special.FINISHED,
            "packed": self._packed,
            "spans": special.has_spans(spec, tile, plan.split_keys or spec.kv_len),
            "memory": replace(memory, aligned=memory.aligned and row % 16 == 0) if self._split else memory,
        }
        both = tuple(special.forward(spec, tile, contain=contain, **how) for contain in (False, True))
        bound = tuple(self._device.bind(kernel, fixed) for kernel in both)
        if not self._split:
            return (bound,)
        merge = special.merge(spec, Tile(MERGE_ROWS, MERGE_ROWS), memory=replace(memory, aligned=False))
        merging = {**layout.values("o"), **splits, **sizes_of(spec), "query_tiles": self._merge_tiles}
        return bound, (self._device.bind(merge, merging),)

    def _score_values(self, scoring: Scoring) -> dict[str, Any]:
        """Captured values, and the coverage of a mask, as they are now: O(S) for one that depends on arrays."""
        program = scoring.program
        if program is None:
            return {}
        values: dict[str, Any] = {"captures": captured(program.captures, self._device)}
        if program.mask is not None:
            values |= table_values(self._table(program), self._device)
        return values

    def _table(self, program: Program) -> Table:
        """The coverage of a mask as the kernels walk it: kept where it follows from captured numbers, without arrays,
        whose values may be other ones now."""
        numbers = tuple(bits(x.value) for x in program.captures if isinstance(x, ScalarCapture))
        settled = len(numbers) == len(program.captures)
        table = self._tables.get(numbers) if settled else None
        if table is None:
            from flashtile.score.coverage import coverage

            rows = self._spec.q_len if self._packed else self._plan.tile_q
            table = table_of(coverage(program, max(1, rows), self._plan.tile_k, np.dtype(lse_type(self._spec))))
            if settled:
                if len(self._tables) >= MOST_TABLES:
                    self._tables.clear()
                self._tables[numbers] = table
        return table


def table_values(table: Table, device: Device) -> dict[str, Any]:
    """A coverage table as kernels take it, on the device."""
    place = device.keep(table.both, "i32")
    return {
        "rows": place,  # which keeps it there
        "runs": place.address + 4 * table.rows.size,
        "rows_b": table.rows_b,
        "rows_h": table.rows_h,
    }


def places(counts: Iterable[int]) -> tuple[int, ...]:
    """Where parts of so many bytes begin that follow one another, each at a multiple of 16; and where the last ends."""
    found, at = [], 0
    for count in counts:
        found.append(at)
        at += -(-count // 16) * 16
    return (*found, at)


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

    def can_be_described(self) -> bool:
        """Whether a tensor descriptor holds the steps between rows of k and v: 40 bits, of bytes, and no sign."""
        return all(0 < self.strides[name] * self.itemsize < 1 << 40 for name in ("k_s", "v_s"))

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
        "heads": spec.heads,
        "group": spec.group,
        "q_len": spec.q_len,
        "kv_len": spec.kv_len,
        "head_size": spec.head_size,
        "value_size": spec.value_size,
    }


def order_of(spec: AttentionSpec, plan: Plan, cache_bytes: int) -> dict[str, int]:
    """How the kernel numbers the work items of a causal call: `rows.longest_first`."""
    blocks = spec.batch * spec.heads // plan.head_block
    shared = max(1, spec.group // plan.head_block)  # blocks that read the same keys and values
    read = spec.kv_len * (spec.head_size + spec.value_size) * dtype_of(spec.dtype).itemsize
    together = cache_bytes // 2 * shared // max(1, read)
    return {"blocks": blocks, "together": max(1, min(together, blocks))}


def band_values(spec: AttentionSpec) -> dict[str, Any]:
    """Distances and anchor of the spec's band; None for an anchor that is an array, which a call has."""
    if spec.band is None:
        return {"left": None, "right": None, "offset": None}
    left, right = (OPEN if side is None else min(side, OPEN) for side in (spec.band.left, spec.band.right))
    return {"left": left, "right": right, "offset": spec.offset}


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


def drawing(keep: Keep) -> dict[str, int]:
    """What decides which weights dropout keeps."""
    return {"threshold": keep.threshold, "seed": keep.seed - ((keep.seed >> 63) << 64)}


def bits(number: float) -> int:
    """The bits of a double, as the signed integer that carries them to a kernel."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def lse_type(spec: AttentionSpec) -> str:
    return DTYPES[spec.dtype].accumulator
