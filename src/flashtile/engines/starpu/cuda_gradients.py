"""Launches of the gradients' codelets on GPUs: delta, the pairs of tiles, and what rounds sums to 16 bits. Kernels
that no folder has are compiled when a call first wants them (made.py).

A pair of tiles is two kernels where the CPU has one: dQ, then dK and dV, seven products in all. Each is two launches,
the second for what is not finite. Sums are in accumulators, and each launch adds to what they hold. Gradients of
captured arrays follow: two launches, of two products each, for each load, the first of which finds the largest term, so
that the second adds whole numbers, in any order (backward_arrays.py); the sums of a task then join those of its box.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from flashtile.arrays import contiguous
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.boxes import Boxes
from flashtile.engines.starpu.cuda_scores import captured, sinks_of
from flashtile.engines.starpu.launches import (
    ANY_TILE,
    HEADS,
    KEYS,
    KV_HEADS,
    NO_KERNELS,
    QUERY_TILES,
    ROWS,
    SINK,
    Launches,
    Source,
    Stage,
    Value,
    changes,
    counts,
    drawn,
    launches,
    memories,
    one_tile,
    strides,
)
from flashtile.engines.starpu.manifest import Entry
from flashtile.engines.starpu.units import of_keys
from flashtile.kernels.triton import backward_forms as forms
from flashtile.kernels.triton.host import places
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.engines.starpu.runtime import Runtime
    from flashtile.score.options import Scoring

KEY_TILES = ((KV_HEADS, ""), (KEYS, "keys"))  # a grid of one program a tile of keys
MOST_LAUNCHES = 16  # FT_LAUNCHES of launch.h
_WORD = 4  # bytes of what `clear` writes


def delta(
    runtime: Runtime,
    spec: AttentionSpec,
    at: Mapping[str, int],
    heads: int,
    whole: bool = False,
    scoring: Scoring | None = None,
) -> Launches | str:
    """Of the codelet `delta`. at: the handles of do, o, lse, delta, and maybe dlse and dsinks, by name; whole: see
    `strides`. What rows give to their sink is a second launch, which adds to the head's sum."""
    if runtime.kernels is None:
        return NO_KERNELS
    wide = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    values: dict[str, Value] = {
        **_addresses(at),
        **strides(spec, {name: at[name] for name in ("o", "do")}, whole=whole),
        **counts(spec, heads),
        "query_tiles": Source("TILES", ROWS),
    }
    tile = one_tile(spec)
    stages = [[Stage(forms.row_deltas(tile, "dlse" in at, m), values, QUERY_TILES, tile) for m in memories(spec)]]
    arrays: tuple[np.ndarray, ...] = ()
    if "dsinks" in at:
        sinks = sinks_of(scoring)
        if isinstance(sinks, str):
            return sinks
        arrays, values["sinks"] = (sinks,), Source("ADDRESS", len(at), SINK)
        stages.append([Stage(forms.sink_sums(tile), values, ((HEADS, ""),), tile)])
    packed = {at[name]: wide for name in ("lse", "delta", "dlse") if name in at}
    return launches(runtime, [stages], packed=packed, arrays=arrays)


def backward(
    runtime: Runtime,
    spec: AttentionSpec,
    at: Mapping[str, int],
    heads: int,
    tile_q: int,
    tile_k: int,
    whole: bool = False,
    scoring: Scoring | None = None,
    boxes: tuple[Boxes, ...] = (),
) -> Launches | str:
    """Of the codelet `backward`. at: the handles of q, k, v, do, lse, delta and of wanted sums, by name; with `whole`
    maybe that of a mask, last, whose dtype `scoring` knows. boxes: of arrays with gradients; their handles follow those
    of `at` and one that only orders tasks."""
    if runtime.kernels is None:
        return NO_KERNELS
    first = len(at) + 1 + len(boxes) if boxes else at.get("mask", len(at))
    draw = drawn(spec, scoring, tile_k)
    found = captured(spec, scoring, first, itself="mask" in at)
    if isinstance(draw, str):
        return draw
    if isinstance(found, str):
        return found
    wide = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    sums = ArrayStages(spec, boxes, len(at) + 1)
    values: dict[str, Value] = {
        **_addresses(at),
        "odd": Source("SCRATCH", sums.nbytes),
        **strides(spec, {name: at[name] for name in ("q", "k", "v", "do")}, whole=whole),
        **strides(spec, {name: at[name] for name in ("dq", "dk", "dv") if name in at}, wide, whole=whole),
        **counts(spec, heads),
        **changes(spec),
        **found.values,
        **draw,
        "items": Source("PROGRAMS"),
        "query_tiles": Source("TILES", ROWS),
        "key_tiles": Source("TILES", KEYS),
    }
    tile, keys, case = one_tile(spec), of_keys(heads, spec.group), list[list[Stage]]()
    both = (False, True)
    if "dq" in at:
        case += [
            [
                Stage(forms.backward_q(tile, ANY_TILE, contain=contain, part=True, memory=m), values, QUERY_TILES, tile)
                for m in memories(spec)
            ]
            for contain in both
        ]
    if "dk" in at or "dv" in at:
        wanted = {name: name in at for name in ("dk", "dv")}
        case += [
            [
                Stage(
                    forms.backward_kv(tile, ANY_TILE, contain=contain, part=True, **wanted, memory=m),
                    values,
                    KEY_TILES,
                    tile,
                )
                for m in memories(spec)
            ]
            for contain in both
        ]

    case += sums.stages(values)
    if len(case) > MOST_LAUNCHES:
        return f"{len(case)} launches, for so many loads of arrays with gradients, are more than a task has"

    def marks(entry: Entry) -> int:
        return sums.nbytes + 4 * max(heads * -(-tile_q // entry.queries), keys * -(-tile_k // entry.keys))

    packed = {at["lse"]: wide, at["delta"]: wide}
    return launches(runtime, [case], scratch=marks, packed=packed, arrays=found.arrays)


class ArrayStages:
    """The launches of gradients of captured arrays, of tasks of one head. Their workspace begins the scratch memory."""

    def __init__(self, spec: AttentionSpec, boxes: tuple[Boxes, ...], first: int) -> None:
        """first: the handle of the first array's boxes."""
        self._spec, self._boxes, self._first = spec, boxes, first
        words = forms.words_of(spec)
        counts = (n for box in boxes for n in (8, 8 * words * box.elements, 4 * box.elements))
        *self._places, self.nbytes = places(counts)

    def stages(self, given: Mapping[str, Value]) -> list[list[Stage]]:
        """given: the arguments of the kernels of dQ."""
        if not self._boxes:
            return []
        tile, blocks = one_tile(self._spec), -(-self.nbytes // (_WORD * forms.BLOCK))
        zeros: dict[str, Value] = {"words": Source("SCRATCH"), "count": self.nbytes // _WORD, "first": 0}
        found = [[Stage(forms.clear(), zeros, ((-1, blocks),), tile)]]
        for n, box in enumerate(self._boxes):
            values: dict[str, Value] = {
                **given,
                **dict(zip(("largest", "totals", "flags"), self._scratch(n), strict=True)),
                "splits": 1,
                "split_keys": Source("SIZE", KEYS),
                "elements": box.elements,
                "terms_bits": max(box.terms - 1, 0).bit_length(),
                "out": Source("ADDRESS", self._first + n),
                **{f"box[{at}]": value for at, value in enumerate(box.values)},
            }
            found += [
                [
                    Stage(
                        forms.array_sums(tile, ANY_TILE, load, totals=totals, part=True, memory=m),
                        values,
                        QUERY_TILES,
                        tile,
                    )
                    for m in memories(self._spec)
                ]
                for totals in (False, True)
                for load in box.loads
            ]
            grid = ((-1, -(-box.elements // forms.BLOCK)),)
            found.append([Stage(forms.array_finish(tile, joins=True), values, grid, tile)])
        return found

    def _scratch(self, number: int) -> list[Source]:
        return [Source("SCRATCH", at) for at in self._places[3 * number : 3 * number + 3]]


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
