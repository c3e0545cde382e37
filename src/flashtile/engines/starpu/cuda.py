"""Kernels of the codelets for GPUs: machine code that `flashtile aot` made, told to the launcher (launch.h).

A kernel of Triton works on arrays; to a task, its tile is the whole array: one batch, one head, rows and keys counted
from the tile's first. What anchors a band moves along, so a mask cuts the tile as it cuts the whole. Nothing of Triton
is needed here, and no Python runs in a worker.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.arrays import contiguous
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.manifest import SCRATCH, Entry, Kernels
from flashtile.errors import UnavailableError, wrong
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.host import OPEN, bits
from flashtile.kernels.triton.specialisation import Memory, Specialisation, Tile
from flashtile.spec import AttentionSpec, Band

if TYPE_CHECKING:
    from flashtile.engines.starpu.runtime import Runtime

DRIVER = "libcuda.so.1"
DRIVER_VARIABLE = "FLASHTILE_CUDA_DRIVER"  # names another file
# A task's `sizes`: rows and keys of its tiles, what anchors the band in them; where its keys stand in a row of stored
# scores, in bytes, and how many with their padding; how many heads it has, of queries and of keys.
ROWS, KEYS, ANCHOR, COLUMN, COLUMNS, HEADS, KV_HEADS = range(7)
ANY_TILE = Tile(16, 16)  # the manifest's kernel says which it has
OF_THE_HOST = "score programs, sinks and dropout, whose values lie in the memory of the host, run on CPUs only"
NO_AXIS = (-1, "")
QUERY_TILES = ((HEADS, ""), (ROWS, "queries"))  # a grid of one program a tile of rows


@dataclass(frozen=True)
class Source:
    """Where a launch finds an argument: one of the FT_ constants of launch.h, and its numbers."""

    kind: str
    index: int = 0
    other: int = -1
    unit: int = 1
    otherwise: int = 0  # in the block, where the launcher leaves it


Value = int | Source


@dataclass(frozen=True)
class Launches:
    """What a program launches on a GPU: an ft_kernels, what it points to, and the bytes of scratch that it writes."""

    data: Any
    keep: Any
    scratch_bytes: int


class Stage(NamedTuple):
    """One kernel of a task: what it must be compiled for, its arguments by name, and what its grid counts."""

    what: Specialisation
    values: Mapping[str, Value]
    grid: tuple[tuple[int, str], ...]  # (one of `sizes`, "queries" or "keys" of the kernel's tile: the unit)


def open_driver(runtime: Runtime) -> None:
    """Open NVIDIA's driver for the launcher; a second time does nothing.

    Raises: SpecError for a FLASHTILE_CUDA_DRIVER that is no file's absolute path; UnavailableError if it is no driver.
    """
    path = os.environ.get(DRIVER_VARIABLE, DRIVER)
    if DRIVER_VARIABLE in os.environ and not (os.path.isabs(path) and os.path.isfile(path)):
        raise wrong(DRIVER_VARIABLE, repr(path), "the absolute path of a library that is there")
    why = runtime.ffi.new("char[256]")
    if runtime.lib.ft_driver_open(path.encode(), why, 256):
        text = runtime.ffi.string(why).decode(errors="replace")
        raise UnavailableError(f"starpu: NVIDIA's driver cannot be loaded: {text}")


def anchor_of(offsets: np.ndarray, batch: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """What anchors the band within tiles whose first row is `shift` beyond their first key; offsets (B,), or (1,)."""
    return np.clip(offsets[np.minimum(batch, len(offsets) - 1)], -OPEN, OPEN) + shift


def forward(runtime: Runtime, spec: AttentionSpec, tile_q: int, heads: int = 1) -> Launches | str:
    """Of the codelet `forward`, for so many heads: the state starts, or where values[0] says so continues; else why
    there is none."""
    if spec.program is not None or spec.sinks or spec.dropout:
        return OF_THE_HOST
    group, spec = spec.group, _one_tile(spec)
    wide = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    values: dict[str, Value] = {
        "q": Source("ADDRESS", 0),
        "k": Source("ADDRESS", 1),
        "v": Source("ADDRESS", 2),
        "o": Source("ADDRESS", 3),
        "lse": Source("ADDRESS", 4),
        "odd": Source("SCRATCH"),
        **_rows(spec, {"q": 0, "k": 1, "v": 2}),
        **_rows(spec, {"o": 3}, wide),
        "o_split": 0,
        "lse_split": 0,
        "splits": 1,
        "split_keys": Source("SIZE", KEYS),
        **_counts(spec, min(heads, group)),
        **_changes(spec),
        "items": Source("PROGRAMS"),
        "blocks": Source("SIZE", HEADS),
        "together": Source("SIZE", HEADS),
        "query_tiles": Source("TILES", ROWS),
    }
    memory = _memories(spec)
    cases = [
        [
            [
                Stage(special.forward(s, ANY_TILE, state=state, contain=contain, memory=m), values, QUERY_TILES)
                for s in _bands(spec)
                for m in memory
            ]
            for contain in (False, True)
        ]
        for state in (special.PARTIAL, special.CARRIED)
    ]
    marks = partial(_marks, heads, tile_q)
    return _launches(runtime, cases, which=0, scratch=marks, packed={4: wide})


def _marks(heads: int, rows: int, entry: Entry) -> int:
    """Bytes of marks, one a work item: whether its sums were not finite."""
    return 4 * heads * -(-rows // entry.queries)


def merge(runtime: Runtime, dtype: str, value_size: int) -> Launches | str:
    """Of the codelet `merge`, in a dtype of accumulators."""
    spec, size = _of_size(dtype, value_size), DTYPES[dtype].itemsize
    values: dict[str, Value] = {
        "parts_o": Source("ADDRESS", 0),
        "parts_lse": Source("ADDRESS", 1),
        "o": Source("ADDRESS", 0),
        "lse": Source("ADDRESS", 1),
        "o_b": 0,
        "o_h": Source("PLANE", 0, 1, size),
        "o_s": value_size,
        "o_split": Source("APART", 2, 0, size),
        "lse_split": Source("APART", 3, 1, size),
        **_counts(spec),
        "query_tiles": Source("TILES", ROWS),
        "splits": 2,
    }
    what = special.merge(spec, ANY_TILE, finished=False, memory=Memory(aligned=False))
    dense = {0: value_size * size, 2: value_size * size}
    packed = dense | {1: size, 3: size}
    return _launches(runtime, [[[Stage(what, values, QUERY_TILES)]]], dense=dense, packed=packed)


def finish(runtime: Runtime, dtype: str, value_size: int, rows: int) -> Launches | str:
    """Of the codelet `finish`: the merge of one part. Its lse, the state's bits again, goes into scratch memory."""
    spec, size = _of_size(dtype, value_size), DTYPES[DTYPES[dtype].accumulator].itemsize
    values: dict[str, Value] = {
        "parts_o": Source("ADDRESS", 0),
        "parts_lse": Source("ADDRESS", 1),
        "o": Source("ADDRESS", 2),
        "lse": Source("SCRATCH"),
        **_rows(spec, {"o": 2}),
        "o_split": 0,
        "lse_split": 0,
        **_counts(spec),
        "query_tiles": Source("TILES", ROWS),
        "splits": 1,
    }
    what = special.merge(spec, ANY_TILE, finished=True, memory=Memory(aligned=False))
    dense = {0: value_size * size}
    packed = dense | {1: size}
    stages = [[[Stage(what, values, QUERY_TILES)]]]
    return _launches(runtime, stages, dense=dense, packed=packed, scratch=lambda entry: rows * size)


def unfused(runtime: Runtime, spec: AttentionSpec, row: int) -> dict[str, Launches | str]:
    """Of the codelets `scores`, `softmax` and `output`, whose stored scores have rows of so many elements; padding, and
    weights of hidden keys, are told as kernels/cpu/passes/unfused.py does."""
    if spec.program is not None or spec.sinks:
        return dict.fromkeys(("scores", "softmax", "output"), OF_THE_HOST)
    spec = _one_tile(spec)
    wide = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    shared = {**_counts(spec), "query_tiles": Source("TILES", ROWS), "s_s": row, "p_s": row}
    scores: dict[str, Value] = {
        "q": Source("ADDRESS", 0),
        "k": Source("ADDRESS", 1),
        "s": Source("ADDRESS", 2, COLUMN),
        **shared,
        **_rows(spec, {"q": 0, "k": 1}),
        **_changes(spec),
        "columns": Source("SIZE", COLUMNS),
        "key_tiles": Source("TILES", COLUMNS),
    }
    softmax: dict[str, Value] = {
        **shared,
        "s": Source("ADDRESS", 0),
        "p": Source("ADDRESS", 0),
        "lse": Source("ADDRESS", 1),
        "kv_len": row,
    }
    output: dict[str, Value] = {
        "p": Source("ADDRESS", 0, COLUMN),
        "v": Source("ADDRESS", 1),
        "o": Source("ADDRESS", 2),
        **shared,
        **_rows(spec, {"v": 1}),
        **_rows(spec, {"o": 2}, wide),
    }
    memories, grid = _memories(spec), (*QUERY_TILES, (COLUMNS, "keys"))
    first = [Stage(special.scores(s, ANY_TILE, memory=m), scores, grid) for s in _bands(spec) for m in memories]
    second = [Stage(special.softmax(spec, ANY_TILE), softmax, QUERY_TILES)]
    third = [
        [[Stage(special.output(spec, ANY_TILE, state=state, memory=m), output, QUERY_TILES) for m in memories]]
        for state in (special.PARTIAL, special.CARRIED)
    ]
    return {
        "scores": _launches(runtime, [[first]]),
        "softmax": _launches(runtime, [[second]]),
        "output": _launches(runtime, third, which=0),
    }


def _one_tile(spec: AttentionSpec) -> AttentionSpec:
    return replace(spec, batch=1, heads=1, kv_heads=1, offset=0)


def _bands(spec: AttentionSpec) -> list[AttentionSpec]:
    """The spec whose kernel is best, then one whose kernel takes every band: with both sides, however far they are."""
    if spec.band is None or None not in (spec.band.left, spec.band.right):
        return [spec]
    left, right = (OPEN if side is None else side for side in (spec.band.left, spec.band.right))
    return [spec, replace(spec, band=Band(left, right))]


def _of_size(dtype: str, value_size: int) -> AttentionSpec:
    view = contiguous((1, 1, 1, value_size), dtype)
    return AttentionSpec.of(view, view, view)


def _memories(spec: AttentionSpec) -> list[Memory]:
    """What may be said of tiles on a device, the better first: StarPU allocates them aligned, row upon row."""
    whole = spec.head_size % 16 == 0 and spec.value_size % 16 == 0
    return [Memory(aligned=True), Memory(aligned=False)] if whole else [Memory(aligned=False)]


def _rows(spec: AttentionSpec, handles: Mapping[str, int], itemsize: int = 0) -> dict[str, Value]:
    """Strides of tensors that are one tile: between rows and heads as the handle has them."""
    unit, values = itemsize or DTYPES[spec.dtype].itemsize, dict[str, Value]()
    for name, handle in handles.items():
        length = spec.head_size if name in "qk" else spec.value_size
        values |= {f"{name}_b": 0, f"{name}_h": Source("PLANE", handle, 1, unit)}
        values[f"{name}_s"] = Source("ROW", handle, -1, unit, length)
    return values


def _counts(spec: AttentionSpec, group: int = 1) -> dict[str, Value]:
    return {
        "first": 0,
        "heads": Source("SIZE", HEADS),
        "group": group,
        "q_len": Source("SIZE", ROWS),
        "kv_len": Source("SIZE", KEYS),
        "head_size": spec.head_size,
        "value_size": spec.value_size,
    }


def _changes(spec: AttentionSpec) -> dict[str, Value]:
    """Scale and band."""
    values: dict[str, Value] = {"scale": bits(spec.scale), "offset": Source("SIZE", ANCHOR)}
    if spec.band is not None:
        sides = {"left": spec.band.left, "right": spec.band.right}
        values |= {name: OPEN if side is None else min(side, OPEN) for name, side in sides.items()}
    return values


def _launches(
    runtime: Runtime,
    cases: list[list[list[Stage]]],
    *,
    which: int = -1,
    dense: Mapping[int, int] | None = None,
    packed: Mapping[int, int] | None = None,
    scratch: Any = lambda entry: 0,
) -> Launches | str:
    """Cases of launches of alternatives: of each launch the first alternative that the manifest has."""
    if runtime.kernels is None:
        return "no kernels for GPUs were given: flashtile.starpu.init(cuda_kernels=...)"
    if runtime.workers("cuda"):
        open_driver(runtime)
    ffi, most, keep = runtime.ffi, 0, []
    data = ffi.new("ft_kernels *")
    data.which = which
    for handle, row_bytes in (dense or {}).items():
        data.dense[handle] = row_bytes
    for handle, row_bytes in (packed or {}).items():
        data.packed[handle] = row_bytes
    for case, launches in enumerate(cases):
        data.launches[case] = len(launches)
        for n, alternatives in enumerate(launches):
            found = _first(runtime.kernels, alternatives)
            if isinstance(found, str):
                return found
            stage, entry = found
            kernel, image = _kernel(runtime, stage, entry)
            data.kernel[case][n] = kernel
            keep += [kernel, image]
            most = max(most, scratch(entry))
    return Launches(data, keep, most)


def _first(kernels: Kernels, alternatives: list[Stage]) -> tuple[Stage, Entry] | str:
    for stage in alternatives:
        entry = kernels.find(stage.what)
        if entry is not None:
            return (stage, entry) if entry.refusal is None else entry.refusal
    what = alternatives[-1].what
    types = ", ".join(sorted({t for t in what.flat_types() if t[:2] in ("*f", "*b")}))
    constants = ", ".join(f"{name}={value}" for name, value in what.constants if name.isupper() and value is not None)
    return f"{kernels.folder} has no kernel {what.kernel} of {types} with {constants}"


def _kernel(runtime: Runtime, stage: Stage, entry: Entry) -> tuple[Any, Any]:
    """(ft_kernel, image) of a stage."""
    ffi, lib = runtime.ffi, runtime.lib
    image = ffi.from_buffer(entry.image())
    data = ffi.new("ft_kernel *")
    data.id, data.image, data.function = entry.id, int(ffi.cast("uintptr_t", image)), entry.function.encode()
    data.threads, data.cluster, data.shared, data.bytes = entry.threads, entry.cluster, entry.shared, entry.nbytes
    units = {"queries": entry.queries, "keys": entry.keys, "": 1}
    for n, (size, counted) in enumerate((*stage.grid, NO_AXIS, NO_AXIS)[:3]):
        data.grid_size[n], data.grid_unit[n] = size, units[counted]
    block, number = bytearray(entry.nbytes), 0
    for parameter in entry.parameters:
        value = 0 if parameter.name in SCRATCH else stage.values[parameter.name]
        fixed = value if isinstance(value, int) else value.otherwise
        block[parameter.offset : parameter.offset + parameter.size] = fixed.to_bytes(
            parameter.size, "little", signed=fixed < 0
        )
        if isinstance(value, Source):
            a, unit = data.argument[number], value.unit
            if value.kind == "TILES":
                unit = entry.queries if value.index == ROWS else entry.keys
            a.offset, a.size, a.source = parameter.offset, parameter.size, getattr(lib, f"FT_{value.kind}")
            a.index, a.other, a.unit, a.multiple = value.index, value.other, unit, parameter.multiple
            number += 1
    data.arguments = number
    ffi.memmove(data.block, bytes(block), len(block))
    return data, image
