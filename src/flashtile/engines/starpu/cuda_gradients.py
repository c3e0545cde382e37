"""Launches of the gradients' codelets on GPUs: delta, the pairs of tiles, and what rounds sums to 16 bits. Kernels
that no folder has are compiled when a call first wants them (made.py).

A pair of tiles is two kernels where the CPU has one: dQ, then dK and dV, seven products in all. Each is two launches,
the second for what is not finite. Sums are in accumulators, and each launch adds to what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flashtile.arrays import contiguous
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.launches import (
    ANY_TILE,
    KEYS,
    KV_HEADS,
    NO_DROPOUT,
    NO_KERNELS,
    QUERY_TILES,
    ROWS,
    Launches,
    Source,
    Stage,
    Value,
    changes,
    counts,
    launches,
    memories,
    one_tile,
    strides,
)
from flashtile.engines.starpu.manifest import Entry
from flashtile.engines.starpu.units import of_keys
from flashtile.kernels.triton import backward_forms as forms
from flashtile.kernels.triton.specialisation import Specialisation
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.engines.starpu.runtime import Runtime

KEY_TILES = ((KV_HEADS, ""), (KEYS, "keys"))  # a grid of one program a tile of keys


def delta(
    runtime: Runtime, spec: AttentionSpec, at: Mapping[str, int], heads: int, whole: bool = False
) -> Launches | str:
    """Of the codelet `delta`. at: the handles of do, o, delta, and maybe dlse, by name; whole: see `strides`."""
    if runtime.kernels is None:
        return NO_KERNELS
    if "dsinks" in at:
        return "gradients of sinks are summed on CPUs only"
    wide = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    values: dict[str, Value] = {
        **_addresses(at),
        **strides(spec, {name: at[name] for name in ("o", "do")}, whole=whole),
        **counts(spec, heads),
        "query_tiles": Source("TILES", ROWS),
    }
    tile = one_tile(spec)
    stages = [Stage(forms.row_deltas(tile, "dlse" in at, m), values, QUERY_TILES, tile) for m in memories(spec)]
    packed = {at[name]: wide for name in ("delta", "dlse") if name in at}
    return launches(runtime, [[stages]], packed=packed)


def backward(
    runtime: Runtime,
    spec: AttentionSpec,
    at: Mapping[str, int],
    heads: int,
    tile_q: int,
    tile_k: int,
    whole: bool = False,
) -> Launches | str:
    """Of the codelet `backward`. at: the handles of q, k, v, do, lse, delta and of wanted sums, by name."""
    if runtime.kernels is None:
        return NO_KERNELS
    if spec.dropout:
        return NO_DROPOUT
    if spec.program is not None:
        return "gradients through score programs are computed on CPUs only"
    wide = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    values: dict[str, Value] = {
        **_addresses(at),
        "odd": Source("SCRATCH"),
        **strides(spec, {name: at[name] for name in ("q", "k", "v", "do")}, whole=whole),
        **strides(spec, {name: at[name] for name in ("dq", "dk", "dv") if name in at}, wide, whole=whole),
        **counts(spec, heads),
        **changes(spec),
        "items": Source("PROGRAMS"),
        "query_tiles": Source("TILES", ROWS),
        "key_tiles": Source("TILES", KEYS),
    }
    tile, keys, case = one_tile(spec), of_keys(heads, spec.group), list[list[Stage]]()
    both = (False, True)
    if "dq" in at:
        case += [
            [
                Stage(_summed(forms.backward_q(tile, ANY_TILE, contain=contain, memory=m)), values, QUERY_TILES, tile)
                for m in memories(spec)
            ]
            for contain in both
        ]
    if "dk" in at or "dv" in at:
        wanted = {name: name in at for name in ("dk", "dv")}
        case += [
            [
                Stage(
                    _summed(forms.backward_kv(tile, ANY_TILE, contain=contain, **wanted, memory=m)),
                    values,
                    KEY_TILES,
                    tile,
                )
                for m in memories(spec)
            ]
            for contain in both
        ]

    def marks(entry: Entry) -> int:
        return 4 * max(heads * -(-tile_q // entry.queries), keys * -(-tile_k // entry.keys))

    return launches(runtime, [case], scratch=marks, packed={at["lse"]: wide, at["delta"]: wide})


def add(runtime: Runtime, dtype: str, size: int, heads: int = 1) -> Launches | str:
    """Of the codelet `add`: rows of sums, the first handle, join those of a gradient, the second."""
    if runtime.kernels is None:
        return NO_KERNELS
    view, wide = contiguous((1, heads, 1, size), dtype), DTYPES[DTYPES[dtype].accumulator].itemsize
    spec = AttentionSpec.of(view, view, view)
    at = strides(spec, {"o": 1})
    values: dict[str, Value] = {
        "parts": Source("ADDRESS", 0),
        "out": Source("ADDRESS", 1),
        **{f"out_{axis}": at[f"o_{axis}"] for axis in "bhs"},
        "out_d": 1,
        "split": 0,
        "first": 0,
        "heads": heads,
        "length": Source("SIZE", ROWS),
        "size": size,
        "tiles": Source("TILES", ROWS),
        "splits": 1,
    }
    tile = one_tile(spec)
    stage = Stage(forms.add_parts(tile, size), values, QUERY_TILES, tile)
    return launches(runtime, [[[stage]]], dense={0: size * wide}, packed={0: size * wide})


def _addresses(at: Mapping[str, int]) -> dict[str, Value]:
    return {name: Source("ADDRESS", handle) for name, handle in at.items()}


def _summed(what: Specialisation) -> Specialisation:
    """The kernel whose gradients are sums in accumulators, as lse is."""
    types = dict(what.signature)
    sums = {name: types["lse"] for name in ("dq", "dk", "dv") if name in types}
    return replace(what, signature=tuple((types | sums).items()))
