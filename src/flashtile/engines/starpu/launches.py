"""What programs launch on GPUs: machine code that `flashtile aot` made, told to the launcher (launch.h).

A kernel of Triton works on arrays; to a task, its tile is the whole array: so many heads, rows and keys counted from
the tile's first. What anchors a band moves along, so a mask cuts the tile as it cuts the whole. Nothing of Triton is
needed here, and no Python runs in a worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.manifest import SCRATCH, Entry, Kernels
from flashtile.errors import UnavailableError, wrong
from flashtile.kernels.triton.host import OPEN, bits, drawing
from flashtile.kernels.triton.specialisation import Memory, Specialisation, Tile
from flashtile.score.keep import KEYS_A_CALL
from flashtile.spec import AttentionSpec, Band

if TYPE_CHECKING:
    from flashtile.engines.starpu.runtime import Runtime
    from flashtile.score.options import Scoring

DRIVER = "libcuda.so.1"
DRIVER_VARIABLE = "FLASHTILE_CUDA_DRIVER"  # names another file
# A task's `sizes`: rows and keys of its tiles, what anchors the band in them; where its keys stand in a row of stored
# scores, in bytes, and how many with their padding; how many heads it has, of queries and of keys; the batch, head, row
# and key that it begins with, and that head's place among the sinks, in bytes.
ROWS, KEYS, ANCHOR, COLUMN, COLUMNS, HEADS, KV_HEADS, *FIRSTS, SINK = range(12)
ANY_TILE = Tile(16, 16)  # the manifest's kernel says which it has
NO_KERNELS = "no kernels for GPUs were given: flashtile.starpu.init(cuda_kernels=...)"
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
# Of each axis (one of `sizes`, "queries" or "keys" of the kernel's tile: the unit), or (-1, how many programs).
Grid = tuple[tuple[int, str | int], ...]


@dataclass(frozen=True)
class Launches:
    """What a program launches on a GPU: an ft_kernels, what it points to, the bytes of scratch that it writes, and
    arrays that are further handles of its tasks, after those of its tiles."""

    data: Any
    keep: Any
    scratch_bytes: int
    arrays: tuple[np.ndarray, ...] = ()


class Stage(NamedTuple):
    """One kernel of a task: what it must be compiled for, its arguments by name, and what its grid counts."""

    what: Specialisation
    values: Mapping[str, Value]
    grid: Grid
    spec: AttentionSpec | None = None  # where no folder has it: what to compile it for


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


def marks_of(heads: int, rows: int) -> Callable[[Entry], int]:
    """Bytes of marks, one a work item: whether its sums were not finite."""
    return lambda entry: 4 * heads * -(-rows // entry.queries)


def one_tile(spec: AttentionSpec) -> AttentionSpec:
    return replace(spec, batch=1, heads=1, kv_heads=1, offset=0)


def bands(spec: AttentionSpec) -> list[AttentionSpec]:
    """The spec whose kernel is best, then one whose kernel takes every band: with both sides, however far they are."""
    if spec.band is None or None not in (spec.band.left, spec.band.right):
        return [spec]
    left, right = (OPEN if side is None else side for side in (spec.band.left, spec.band.right))
    return [spec, replace(spec, band=Band(left, right))]


def memories(spec: AttentionSpec) -> list[Memory]:
    """What may be said of tiles on a device, the better first: StarPU allocates them aligned, row upon row."""
    whole = spec.head_size % 16 == 0 and spec.value_size % 16 == 0
    return [Memory(aligned=True), Memory(aligned=False)] if whole else [Memory(aligned=False)]


def strides(
    spec: AttentionSpec, handles: Mapping[str, int], itemsize: int = 0, whole: bool = False
) -> dict[str, Value]:
    """Strides of tensors that are one tile: between rows, heads and batches as the handle has them. itemsize: if not
    that of the spec's dtype; whole: arrays (heads, rows, columns) of the spec without gaps, whatever handles say."""
    unit, values = itemsize or DTYPES[spec.dtype].itemsize, dict[str, Value]()
    for name, handle in handles.items():
        columns = spec.value_size if name in ("v", "o", "do", "dv") else spec.head_size
        keys = name[-1] in "kv"
        if whole:
            plane = columns * (spec.kv_len if keys else spec.q_len)
            values |= {f"{name}_b": 0, f"{name}_h": plane, f"{name}_s": columns}
            continue
        values[f"{name}_b"] = Source("PLANE", handle, spec.kv_heads if keys else spec.heads, unit)
        values[f"{name}_h"] = Source("PLANE", handle, 1, unit)
        values[f"{name}_s"] = Source("ROW", handle, -1, unit, columns)
    return values


def counts(spec: AttentionSpec, heads: int) -> dict[str, Value]:
    """Sizes of tasks of so many heads: of one batch, or of several whole ones."""
    return {
        "first": 0,
        "heads": min(heads, spec.heads),
        "group": min(heads, spec.group),
        "q_len": Source("SIZE", ROWS),
        "kv_len": Source("SIZE", KEYS),
        "head_size": spec.head_size,
        "value_size": spec.value_size,
    }


def changes(spec: AttentionSpec) -> dict[str, Value]:
    """Scale and band."""
    values: dict[str, Value] = {"scale": bits(spec.scale), "offset": Source("SIZE", ANCHOR)}
    if spec.band is not None:
        sides = {"left": spec.band.left, "right": spec.band.right}
        values |= {name: OPEN if side is None else min(side, OPEN) for name, side in sides.items()}
    return values


def drawn(spec: AttentionSpec, scoring: Scoring | None, tile_k: int) -> dict[str, Value] | str:
    """What decides which weights dropout keeps; or why a GPU cannot draw them in tiles of so many keys."""
    if not spec.dropout:
        return {}
    if tile_k % KEYS_A_CALL and tile_k < spec.kv_len:
        return f"dropout in tiles of {tile_k} keys, no multiple of {KEYS_A_CALL}, is drawn on CPUs only"
    assert scoring is not None and scoring.keep is not None
    return dict(drawing(scoring.keep))


def launches(
    runtime: Runtime,
    cases: list[list[list[Stage]]],
    *,
    which: tuple[int, int] = (-1, -1),
    dense: Mapping[int, int] | None = None,
    packed: Mapping[int, int] | None = None,
    scratch: Callable[[Entry], int] = lambda entry: 0,
    arrays: tuple[np.ndarray, ...] = (),
) -> Launches | str:
    """Cases of launches of alternatives: of each launch the first alternative that the manifest has. The case of a task
    is 1 if the first of its values named by `which` is not 0, and 2 more if the second is not."""
    if runtime.kernels is None:
        return NO_KERNELS
    wanted = runtime.workers("cuda") > 0
    if wanted:
        open_driver(runtime)
    ffi, most, keep = runtime.ffi, 0, []
    data = ffi.new("ft_kernels *")
    data.which = which
    for handle, row_bytes in (dense or {}).items():
        data.dense[handle] = row_bytes
    for handle, row_bytes in (packed or {}).items():
        data.packed[handle] = row_bytes
    for case, case_launches in enumerate(cases):
        data.launches[case] = len(case_launches)
        for n, alternatives in enumerate(case_launches):
            found = _first(runtime.kernels, alternatives, wanted)
            if isinstance(found, str):
                return found
            stage, entry = found
            kernel, image = _kernel(runtime, stage, entry)
            data.kernel[case][n] = kernel
            keep += [kernel, image]
            most = max(most, scratch(entry))
    return Launches(data, keep, most, arrays)


def _first(kernels: Kernels, alternatives: list[Stage], wanted: bool) -> tuple[Stage, Entry] | str:
    """wanted: whether what no folder has is worth the compiler's seconds."""
    for stage in alternatives:
        entry = kernels.find(stage.what)
        if entry is not None:
            return (stage, entry) if entry.refusal is None else entry.refusal
    what = alternatives[-1].what
    spec = alternatives[-1].spec
    if wanted and spec is not None and (entry := kernels.compiled(what, spec)) is not None:
        return alternatives[-1], entry
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
        data.grid_size[n], data.grid_unit[n] = size, counted if isinstance(counted, int) else units[counted]
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
