"""Tile configurations of the backward's kernels: a row for each architecture, kind of operand and head size, as
tiles.py has those of the forward. Chosen by what the compiled kernels use; speed was not measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from flashtile.kernels.triton.specialisation import Tile, padded
from flashtile.kernels.triton.tiles import HEADS, INTERPRETER, installed, kind_of, rows_of
from flashtile.spec import AttentionSpec


class Row(NamedTuple):
    """A tile, and the most that its kernel uses on clean data, with a band, by compiling it with Triton 3.9."""

    tile: Tile
    registers: int
    spills: int  # instructions that store to the stack or load from it
    shared: int  # bytes


def row(
    queries: int, keys: int, warps: int, stages: int, registers: int, spills: int, shared: int, limit: int | None = None
) -> Row:
    """A row as it stands in the table; limit: of registers."""
    return Row(Tile(queries, keys, warps, stages, registers=limit), registers, spills, shared)


ARRAY_ROWS = 64  # most rows of a tile of those that gradients of arrays walk

Rows = tuple[Row | None, ...]  # for head sizes up to 64, 128 and 256; None: no tile leaves room

# (architecture, kind of operand): the rows of dQ, and those of dK and dV.
TABLE: dict[tuple[str, str], tuple[Rows, Rows]] = {
    ("sm_80", "bfloat16"): (
        (row(64, 64, 8, 2, 254, 0, 32768), row(64, 64, 8, 2, 235, 0, 73728), row(64, 32, 8, 1, 255, 0, 98304)),
        (row(64, 32, 4, 2, 255, 0, 29184), row(64, 32, 8, 2, 255, 0, 53760), row(32, 32, 8, 1, 243, 0, 81920)),
    ),
    ("sm_80", "float32"): (
        (row(32, 32, 8, 2, 80, 0, 36864), row(32, 32, 8, 1, 128, 0, 65536), row(32, 16, 8, 1, 146, 0, 98304)),
        (row(32, 32, 4, 1, 255, 0, 40960), row(32, 32, 8, 1, 255, 0, 73728), row(16, 16, 8, 1, 167, 0, 67584)),
    ),
    ("sm_80", "float32 tf32"): (
        (row(32, 32, 8, 2, 158, 0, 40960), row(32, 32, 8, 2, 164, 0, 81920), row(32, 16, 8, 1, 240, 0, 98304)),
        (row(32, 32, 8, 2, 182, 0, 41216), row(32, 32, 8, 2, 252, 0, 82176), row(16, 16, 8, 1, 231, 0, 81920)),
    ),
    ("sm_80", "float32 bf16"): (
        (row(32, 32, 8, 2, 126, 0, 26624), row(32, 32, 8, 2, 156, 0, 51200), row(32, 16, 8, 1, 248, 0, 65536)),
        (row(32, 32, 8, 2, 187, 0, 26880), row(32, 32, 8, 2, 255, 0, 51456), row(16, 16, 8, 1, 248, 0, 49152)),
    ),
    ("sm_80", "float64"): (
        (row(32, 32, 8, 1, 174, 0, 65536), row(32, 16, 8, 1, 236, 0, 98304), None),
        (row(32, 32, 8, 1, 238, 0, 81920), row(16, 16, 8, 1, 238, 0, 81920), None),
    ),
    ("sm_90", "bfloat16"): (
        (row(128, 64, 8, 2, 170, 0, 65536), row(128, 64, 8, 2, 222, 0, 131072), row(32, 32, 8, 1, 170, 0, 65536)),
        (row(32, 128, 8, 2, 231, 0, 49408), row(64, 32, 8, 1, 172, 0, 65536), row(64, 32, 8, 1, 244, 0, 131072)),
    ),
    ("sm_90", "float32"): (
        (row(32, 32, 8, 2, 70, 0, 36864), row(32, 16, 8, 1, 80, 0, 49152), row(32, 16, 8, 1, 138, 0, 98304)),
        (row(32, 32, 8, 2, 162, 0, 41216), row(32, 16, 8, 1, 120, 0, 53248), row(32, 16, 8, 1, 182, 0, 102400)),
    ),
    ("sm_90", "float32 tf32"): (
        (row(32, 32, 8, 2, 160, 0, 40960), row(32, 32, 8, 2, 162, 0, 81920), row(32, 16, 8, 1, 222, 0, 98304)),
        (row(32, 32, 8, 2, 180, 0, 41216), row(32, 32, 8, 2, 242, 0, 82176), row(32, 16, 8, 1, 210, 0, 131072)),
    ),
    ("sm_90", "float32 bf16"): (
        (row(32, 32, 8, 2, 124, 0, 26624), row(32, 32, 8, 2, 164, 0, 51200), row(32, 16, 8, 1, 226, 0, 65536)),
        (row(32, 32, 8, 2, 230, 0, 26880), row(32, 32, 8, 2, 255, 0, 51456), row(32, 16, 8, 1, 252, 0, 81920)),
    ),
    ("sm_90", "float64"): (
        (row(32, 32, 8, 1, 180, 0, 65536), row(32, 16, 8, 1, 226, 0, 98304), None),
        (row(32, 32, 8, 1, 220, 0, 81920), row(32, 16, 8, 1, 230, 0, 131072), None),
    ),
    ("sm_100", "bfloat16"): (
        # In Ampere's form: Triton 3.9 fails in the second launch of tiles with 64 rows or more.
        (row(32, 32, 8, 2, 98, 0, 18432), row(32, 32, 8, 1, 156, 0, 32768), row(32, 16, 8, 1, 160, 0, 49152)),
        (row(32, 32, 8, 2, 182, 0, 18688), row(32, 32, 8, 1, 166, 0, 40960), row(64, 32, 8, 1, 232, 0, 131072)),
    ),
    ("sm_100", "float32"): (
        (row(32, 32, 8, 2, 72, 0, 36864), row(32, 16, 8, 1, 80, 0, 49152), row(32, 16, 8, 1, 136, 0, 98304)),
        (row(32, 32, 8, 2, 164, 0, 41216), row(32, 16, 8, 1, 126, 0, 53248), row(32, 16, 8, 1, 196, 0, 102400)),
    ),
    ("sm_100", "float32 tf32"): (
        (row(32, 32, 8, 2, 156, 0, 40960), row(32, 32, 8, 2, 162, 0, 81920), row(32, 16, 8, 1, 222, 0, 98304)),
        (row(32, 32, 8, 2, 180, 0, 41216), row(32, 32, 8, 2, 238, 0, 82176), row(32, 16, 8, 1, 209, 0, 131072)),
    ),
    ("sm_100", "float32 bf16"): (
        (row(32, 32, 8, 2, 124, 0, 26624), row(32, 32, 8, 2, 164, 0, 51200), row(32, 16, 8, 1, 226, 0, 65536)),
        (row(32, 32, 8, 2, 224, 0, 26880), row(32, 32, 8, 2, 255, 0, 51456), row(32, 16, 8, 1, 252, 0, 81920)),
    ),
    ("sm_100", "float64"): (
        (row(32, 32, 8, 1, 162, 0, 65536), row(32, 16, 8, 1, 204, 0, 98304), None),
        (row(32, 32, 8, 1, 186, 0, 81920), row(32, 16, 8, 1, 212, 0, 131072), None),
    ),
    ("gfx942", "bfloat16"): (
        (row(32, 32, 4, 1, 167, 0, 8192), row(32, 32, 4, 1, 264, 0, 8192), None),
        (row(32, 32, 4, 1, 247, 0, 8192), row(32, 32, 4, 1, 343, 0, 8192), None),
    ),
    ("gfx942", "float32"): (
        (row(32, 32, 4, 1, 238, 0, 8192), row(32, 32, 4, 1, 414, 0, 16384), None),
        (row(32, 32, 4, 1, 348, 0, 8192), row(32, 32, 4, 1, 494, 0, 16384), None),
    ),
    ("gfx942", "float64"): (
        (row(32, 32, 4, 1, 272, 0, 16384), row(32, 32, 4, 1, 439, 0, 32768), None),
        (row(32, 32, 4, 1, 428, 0, 16384), row(16, 16, 4, 1, 413, 0, 16384), None),
    ),
}

# Kinds of operand that compile to as much.
ALIKE = {"float16": "bfloat16", "float32 fp16": "float32 bf16"}


# Another row of dQ, and of dK and dV, which a short timing on the device may prefer; None: there is none.
TIMED: dict[tuple[str, str, int], tuple[Row | None, Row | None]] = {
    ("sm_80", "bfloat16", 64): (row(128, 32, 8, 2, 174, 0, 40960), row(32, 64, 8, 2, 255, 0, 24832)),
    ("sm_80", "bfloat16", 128): (row(32, 64, 8, 2, 160, 0, 53248), row(32, 64, 8, 2, 255, 0, 53504)),
    # Of dK and dV at 64 no other tile goes without spills: 64 x 64 has 78, 32 x 64 30, 64 x 128 129.
    ("sm_90", "bfloat16", 64): (row(64, 64, 4, 2, 206, 0, 49152), None),
    ("sm_90", "bfloat16", 128): (row(64, 64, 8, 2, 216, 0, 98304), row(16, 64, 8, 2, 226, 0, 49280)),
}

# Rows in place of the table's where the Triton at hand is older than a version and kernels would spill, by direction:
# dQ, or dK and dV. Most have the table's tile and a limit: by itself the assembler stops at 128 registers in them.
OLDER: dict[tuple[str, str, int, str], tuple[tuple[int, int], Row]] = {
    ("sm_90", "bfloat16", 64, "kv"): ((3, 7), row(32, 128, 8, 1, 206, 0, 40960)),
    ("sm_90", "float32", 64, "q"): ((3, 9), row(32, 32, 8, 2, 109, 0, 36864, limit=255)),
    ("sm_90", "float32", 64, "kv"): ((3, 8), row(32, 16, 8, 1, 74, 0, 28672)),
    ("sm_90", "float32", 256, "q"): ((3, 9), row(32, 16, 8, 1, 172, 0, 98304, limit=255)),
    ("sm_90", "float32", 256, "kv"): ((3, 8), row(16, 16, 8, 1, 176, 0, 67584, limit=255)),
    ("sm_90", "float64", 128, "q"): ((3, 8), row(16, 16, 8, 1, 202, 0, 65536)),
    ("sm_80", "bfloat16", 256, "q"): ((3, 8), row(32, 32, 8, 1, 184, 0, 65536)),
    ("sm_80", "float32", 64, "q"): ((3, 8), row(32, 32, 8, 2, 124, 0, 36864, limit=255)),
    ("sm_80", "float32", 64, "kv"): ((3, 8), row(32, 32, 4, 1, 255, 0, 40960, limit=255)),
    ("sm_80", "float32", 256, "q"): ((3, 8), row(32, 16, 8, 1, 180, 0, 98304, limit=255)),
}


def rows_for(arch: str, kind: str, head_size: int) -> tuple[Row, Row] | None:
    """The rows of dQ, and of dK and dV; None if there are none."""
    rows, kind = str(rows_of(arch)), ALIKE.get(kind, kind)
    found = TABLE.get((rows, kind))
    place = next((n for n, most in enumerate(HEADS) if head_size <= most), -1)
    if found is None or place < 0:
        return None
    of_q, of_kv = found[0][place], found[1][place]
    if of_q is None or of_kv is None:
        return None
    which = rows, kind, HEADS[place]
    return _of_version((*which, "q"), of_q), _of_version((*which, "kv"), of_kv)


def _of_version(which: tuple[str, str, int, str], table: Row) -> Row:
    below, instead = OLDER.get(which, ((0, 0), table))
    return instead if installed() < below else table


def timed_pairs(spec: AttentionSpec, arch: str) -> tuple[tuple[Tile, Tile], ...]:
    """Tiles of dQ, and of dK and dV, that may be faster than the table's: one other, or both."""
    found = backward_tiles(spec, arch)
    size = max(padded(spec.head_size), padded(spec.value_size))
    head = next((most for most in HEADS if size <= most), 0)
    kind = ALIKE.get(kind_of(spec), kind_of(spec))
    other = TIMED.get((str(rows_of(arch)), kind, head))
    if found is None or other is None:
        return ()
    of_q, of_kv = (found[n] if row is None else row.tile for n, row in enumerate(other))
    pairs = (of_q, found[1]), (found[0], of_kv), (of_q, of_kv)
    return tuple(pair for pair in dict.fromkeys(pairs) if pair != found)


def cautious_tiles(spec: AttentionSpec) -> tuple[Tile, Tile]:
    """What takes the place of rows that failed their self-test: small, without a pipeline."""
    size, wide = max(padded(spec.head_size), padded(spec.value_size)), spec.dtype == "float64"
    if size <= HEADS[0]:
        return Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)
    return Tile(16 if wide else 32, 16, 4, 1), Tile(16, 16, 4, 1)


def of_arrays(tile: Tile) -> Tile:
    """The tile of gradients of arrays, from that of dQ: places take registers, too."""
    return replace(tile, tile_q=min(tile.tile_q, ARRAY_ROWS))


def backward_tiles(spec: AttentionSpec, arch: str) -> tuple[Tile, Tile] | None:
    """The tiles of dQ, and of dK and dV; None where there is no backward."""
    if arch == INTERPRETER:
        return Tile(16, 32), Tile(16, 16)
    found = rows_for(arch, kind_of(spec), max(padded(spec.head_size), padded(spec.value_size)))
    return None if found is None else (found[0].tile, found[1].tile)
