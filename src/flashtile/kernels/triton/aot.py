"""Kernels compiled ahead of time: machine code for chosen specialisations, and a manifest that says how to launch them.

A program without Python loads a file with cuModuleLoadData, fills one block of parameters at the offsets that the
manifest gives, and calls cuLaunchKernel(Ex) with it: CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE, or pointers to the same
values in order. `flashtile aot` is this as a command; no GPU or driver is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashtile.arrays import contiguous
from flashtile.dtypes import dtype_of
from flashtile.errors import UnavailableError, wrong
from flashtile.kernels.triton import backward_forms as forms
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton import tiles, too_old
from flashtile.kernels.triton.backward_tiles import backward_tiles, of_arrays
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.host import MERGE_ROWS
from flashtile.kernels.triton.parameters import flat_names, layout_of, size_of
from flashtile.kernels.triton.resources import Resources, resources_of
from flashtile.kernels.triton.specialisation import Memory, Specialisation, Tile
from flashtile.spec import AttentionSpec
from flashtile.version import __version__

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest

# How many programs a launch takes, in sizes of the call: B, H and so on as in the documentation. They are numbered from
# `first`, so a launch may also take a part of them.
GRIDS = {
    "forward": "B * H / head_block * query_tiles * splits; query_tiles = ceil(S_q / queries), head_block = 1, or where "
    "packed H / H_kv (and query_tiles = 1)",
    "merge": "B * H * query_tiles; query_tiles = ceil(S_q / queries)",
    "row_deltas": "B * H * query_tiles; query_tiles = ceil(S_q / queries)",
    "sink_sums": "B * H",
    "backward_q": "B * H * query_tiles * splits; query_tiles = ceil(S_q / queries), splits = 1 unless partial",
    "backward_kv": "B * H_kv * key_tiles * splits; key_tiles = ceil(S_kv / keys), splits = row_parts * "
    "ceil(H / H_kv / split_heads), 1 unless partial",
    "add_parts": "B * heads * tiles; tiles = ceil(length / queries)",
    "array_sums": "B * H * query_tiles * splits; query_tiles = ceil(S_q / queries)",
    "array_finish": f"ceil(elements / {forms.BLOCK})",
    "clear": f"ceil(count / {forms.BLOCK})",
    "scores": "B * H * query_tiles * key_tiles; query_tiles = ceil(S_q / queries), key_tiles = ceil(S_kv / keys)",
    "softmax": "B * H * query_tiles; query_tiles = ceil(S_q / queries)",
    "output": "B * H * query_tiles; query_tiles = ceil(S_q / queries)",
}
KERNELS = ("forward", "merge", "backward", "scores", "softmax", "output")  # backward: all that gradients take
SUMS = (special.FINISHED, special.PARTIAL, special.CARRIED)  # what gradients are: see `choose`
# What rows see by their position: a band of which either side may be open; keys up to a bound, in fewer instructions;
# everything.
BANDS: dict[str, dict[str, Any]] = {"band": {"window": (1, 1)}, "causal": {"causal": True}, "open": {}}


@dataclass(frozen=True)
class Chosen:
    """One kernel to compile: its name among files, what it is, and of which attention it is a part."""

    name: str
    specialisation: Specialisation
    spec: AttentionSpec
    tile: Tile


def choose(
    arch: str,
    dtypes: Iterable[str],
    head_sizes: Iterable[int],
    *,
    precision: str = "ieee",
    kernels: Iterable[str] = ("forward", "merge"),
    states: Iterable[str] = (special.FINISHED,),
    bands: Iterable[str] = BANDS,
    aligned: bool = True,
) -> Iterator[Chosen]:
    """The kernels of every combination.

    bands    "band" for causal and windowed calls, "causal" for those without a window alone, "open" for those where
             every row sees every key
    states   of o and lse before and after: see specialisation.STATES. Gradients join what their arrays hold, of carried
             calls sums in accumulators; or of partial ones are sums of parts. One more kernel adds such sums up
    aligned  addresses are multiples of 16 bytes, and strides of 16 elements
    Raises:  SpecError for a name that is not known, UnavailableError if Triton is too old for the architecture.
    """
    kernels, states, bands, head_sizes = tuple(kernels), tuple(states), tuple(bands), tuple(head_sizes)
    for argument, names, known in (
        ("kernels", kernels, KERNELS),
        ("states", states, special.STATES),
        ("bands", bands, BANDS),
    ):
        for name in names:
            if name not in known:
                raise wrong(argument, repr(name), "some of " + ", ".join(known))
    if "backward" in kernels and not set(SUMS) & set(states):
        raise wrong("states", ", ".join(states), f"one of {', '.join(SUMS)} among them, for gradients")
    if tiles.rows_of(arch) is None:
        raise wrong("arch", repr(arch), "an architecture with tile configurations: sm_80 and newer, gfx942, gfx950")
    if (reason := too_old(arch)) is not None:
        raise UnavailableError(f"aot: {reason}")
    memory = Memory(contiguous=True, aligned=aligned)
    seen = set()  # most kernels do not know of the band
    for dtype in dtypes:
        for size in head_sizes:
            if not 1 <= size <= tiles.MAX_HEAD_SIZE:
                raise wrong("head_sizes", size, f"1 to {tiles.MAX_HEAD_SIZE}")
            view = contiguous((1, 1, 1, size), dtype_of(dtype).name)
            for band in bands:
                spec = AttentionSpec.of(view, view, view, **BANDS[band], precision=precision)
                for one in _kernels(spec, arch, band, kernels, states, memory):
                    if one.name not in seen:
                        seen.add(one.name)
                        yield one


def _kernels(
    spec: AttentionSpec, arch: str, band: str, kernels: tuple[str, ...], states: tuple[str, ...], memory: Memory
) -> Iterator[Chosen]:
    tile, rows, unfused = tiles.forward_tile(spec, arch), Tile(MERGE_ROWS, MERGE_ROWS), tiles.vanilla_tile(spec, arch)
    base = f"{tiles.kind_of(spec).replace(' ', '-')}-d{spec.head_size}"
    if "forward" in kernels:
        for state in states:
            for contain in (False, True):
                what = special.forward(spec, tile, state=state, contain=contain, memory=memory)
                yield Chosen(f"forward-{base}-{band}-{state}" + "-contain" * contain, what, spec, tile)
    if "merge" in kernels:
        for finished in sorted({state == special.FINISHED for state in states}):
            what = special.merge(spec, rows, finished=finished, memory=Memory(memory.contiguous, aligned=False))
            yield Chosen(f"merge-{base}-{special.FINISHED if finished else special.PARTIAL}", what, spec, rows)
    if "backward" in kernels:
        yield from _gradients(spec, arch, base, states, memory)
    if "scores" in kernels:
        yield Chosen(f"scores-{base}-{band}", special.scores(spec, unfused, memory=memory), spec, unfused)
    if "softmax" in kernels:
        yield Chosen(f"softmax-{base}", special.softmax(spec, unfused), spec, unfused)
    if "output" in kernels:
        for state in (x for x in states if x != special.UPDATED):  # its sums are in accumulators
            name = f"output-{base}" + (state != special.FINISHED) * f"-{state}"
            yield Chosen(name, special.output(spec, unfused, state=state, memory=memory), spec, unfused)


def _gradients(spec: AttentionSpec, arch: str, base: str, states: tuple[str, ...], memory: Memory) -> Iterator[Chosen]:
    """The kernels of a backward call, in order; those of a band take every band.

    Raises: UnavailableError where there are no tiles for it.
    """
    found = backward_tiles(spec, arch)
    if found is None:
        what = f"{tiles.kind_of(spec)} with head size {spec.head_size}"
        raise UnavailableError(f"aot: got gradients of {what}, expected what {arch} has tiles for")
    rows, sides = Tile(forms.ROWS, forms.ROWS), "open" if spec.band is None else "band"
    for dlse in (False, True):
        yield Chosen(f"row_deltas-{base}" + "-dlse" * dlse, forms.row_deltas(spec, dlse, memory), spec, rows)
    for state in (x for x in SUMS if x in states):
        for contain in (False, True):
            last = "-contain" * contain
            how: dict[str, Any] = {"contain": contain, "memory": memory}
            how |= {"parts": state == special.PARTIAL, "part": state == special.CARRIED}
            of_q, of_kv = forms.backward_q(spec, found[0], **how), forms.backward_kv(spec, found[1], **how)
            yield Chosen(f"backward_q-{base}-{sides}-{state}{last}", of_q, spec, found[0])
            yield Chosen(f"backward_kv-{base}-{sides}-{state}{last}", of_kv, spec, found[1])
    if {special.PARTIAL, special.CARRIED} & set(states):
        yield Chosen(f"add_parts-{base}", forms.add_parts(spec, spec.head_size), spec, rows)


def build(folder: Path, arch: str, chosen: Iterable[Chosen]) -> Iterator[dict[str, Any]]:
    """Compile kernels into a folder, which is made; yield each one's entry of the manifest, which is written last.

    Raises: UnavailableError if Triton is not here, interprets, or cannot compile one; OSError.
    """
    entries = []
    for one in chosen:
        entry, machine_code = compile_one(one, arch)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / entry["file"]).write_bytes(machine_code)
        entries.append(entry)
        yield entry
    text = json.dumps(manifest(arch, entries), indent=1)
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, folder / MANIFEST)


def manifest(arch: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What a manifest holds: versions, the architecture, one entry per kernel."""
    import triton

    return {
        "format": FORMAT,
        "flashtile": __version__,
        "triton": triton.__version__,
        "arch": arch,
        "numbers": "scale, and every captured float, is an i64 with the bits of the double",
        "kernels": entries,
    }


def compile_one(chosen: Chosen, arch: str) -> tuple[dict[str, Any], bytes]:
    """A kernel's entry of the manifest, and its machine code. Raises: UnavailableError."""
    kernel = compiled(chosen.specialisation, arch)
    suffix = "cubin" if "cubin" in kernel.asm else "hsaco"
    machine_code, used = kernel.asm[suffix], resources_of(kernel)
    return entry_of(chosen, f"{chosen.name}.{suffix}", machine_code, kernel.metadata, used), machine_code


def entry_of(chosen: Chosen, file: str, machine_code: bytes, meta: Any, used: Resources) -> dict[str, Any]:
    """One kernel in the manifest: what it computes, how it is launched, what it uses."""
    what, spec = chosen.specialisation, chosen.spec
    constants = dict(what.constants)
    return {
        "name": chosen.name,
        "file": file,
        "sha256": hashlib.sha256(machine_code).hexdigest(),
        "function": meta.name,
        "kernel": what.kernel,
        "dtype": spec.dtype,
        "accumulator": dtype_of(spec.dtype).accumulator,
        "precision": spec.precision,
        "program": program_of(what),
        "head_size": spec.head_size,
        "value_size": spec.value_size,
        "queries": chosen.tile.tile_q,
        "keys": chosen.tile.tile_k,
        "constants": {name: constants[name] for name in sorted(constants)},
        "launch": {
            "grid_x": GRIDS[what.kernel],
            "grid_y": 1,
            "grid_z": 1,
            "block": [meta.warp_size * meta.num_warps, 1, 1],
            "cluster": [meta.num_ctas, 1, 1],
            "dynamic_shared": meta.shared,
            "cooperative": bool(getattr(meta, "launch_cooperative_grid", False)),
            "programmatic_dependent": bool(getattr(meta, "launch_pdl", False)),
        },
        "parameters": parameters_of(what),
        "parameter_bytes": layout_of(what).size,
        "scratch": {
            "global_bytes_a_program": meta.global_scratch_size,
            "global_align": meta.global_scratch_align,
            "profile_bytes_a_program": meta.profile_scratch_size,
            "profile_align": meta.profile_scratch_align,
        },
        "uses": {
            "registers": used.registers,
            "stack": used.stack,
            "spill_stores": used.local_stores,
            "spill_loads": used.local_loads,
            "static_shared": used.static_shared,
        },
        "tensor_instructions": used.tensor,
        "instructions": used.instructions,
    }


def program_of(what: Specialisation) -> str | None:
    """By which a manifest knows a score program: a digest of its structure; None without one."""
    return None if what.code is None else hashlib.sha256(what.code.structure.encode()).hexdigest()


def laid_out(what: Specialisation, spec: AttentionSpec, arch: str) -> Chosen:
    """A kernel of the forward or of gradients as it is compiled for an architecture, whatever its tile was.

    Raises: UnavailableError where there are no tiles for it.
    """
    constants, found = dict(what.constants), backward_tiles(spec, arch)
    if what.kernel in ("row_deltas", "sink_sums", "add_parts", "array_finish", "clear"):
        return Chosen(what.kernel, what, spec, Tile(forms.ROWS, forms.ROWS))
    if what.kernel != "forward" and found is None:
        raise UnavailableError(f"aot: got {what.kernel} of {tiles.kind_of(spec)}, for which {arch} has no tiles")
    by_kernel = {} if found is None else dict(zip(("backward_q", "backward_kv"), found, strict=True))
    if found is not None:
        by_kernel["array_sums"] = of_arrays(found[0])
    tile = by_kernel.get(what.kernel) or tiles.forward_tile(spec, arch)
    if constants.get("CONTAIN"):
        tile = special.contained(tile)
    sized = tuple((constants | {"TILE_Q": tile.tile_q, "TILE_K": tile.tile_k}).items())
    warps, stages = tile.num_warps, tile.num_stages
    made = replace(what, constants=sized, num_warps=warps, num_stages=stages, registers=tile.registers)
    return Chosen(what.kernel, made, spec, tile)


def parameters_of(what: Specialisation) -> list[dict[str, Any]]:
    """Every parameter in order: name, type, offset and size in the block, bytes, and what it must be a multiple of.

    Strides are in elements. The two pointers at the end are Triton's: NULL where the scratch of that name has no bytes.
    """
    rows, offset = [], 0
    for name, type_ in [*flat_names(what), ("global_scratch", "*u8"), ("profile_scratch", "*u8")]:
        size = size_of(type_)
        offset = -(-offset // size) * size
        row: dict[str, Any] = {"name": name, "type": type_, "offset": offset, "size": size}
        if name in what.divisible:
            row["multiple_of"] = 16
        rows.append(row)
        offset += size
    return rows


def summary(entry: dict[str, Any]) -> str:
    """A line of what a kernel uses."""
    uses, launch = entry["uses"], entry["launch"]
    tensor = ", ".join(f"{n} {name}" for name, n in entry["tensor_instructions"].items()) or "no tensor instruction"
    spills = uses["spill_stores"] + uses["spill_loads"]
    return (
        f"{entry['name']:<46} {launch['block'][0]:4} threads {uses['registers']:4} registers {spills:4} spills "
        f"{launch['dynamic_shared']:7} B shared  {tensor}"
    )
