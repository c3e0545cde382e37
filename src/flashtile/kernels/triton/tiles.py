"""Tile configurations: one table, a row for each architecture, kind of operand and head size.

Each row was chosen from what the compiled kernel uses (`flashtile aot` prints it): no spills, shared memory within the
device's, and as many warps as tensor cores of the architecture want. Speed was not measured: no GPU was at hand.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import NamedTuple

from flashtile.dtypes import DTYPES
from flashtile.errors import UnavailableError
from flashtile.kernels.triton.specialisation import Tile, padded
from flashtile.spec import AttentionSpec

# The architecture of Triton's interpreter: a tile costs the same there whatever its size, so few large ones are fast,
# but tests look at small problems.
INTERPRETER = "interpreter"

MAX_HEAD_SIZE = 256


class Row(NamedTuple):
    """A tile, and the most that its forward kernels use, with a band or without, by compiling them with Triton 3.9
    (tests/gpu/test_triton_code.py holds the numbers against the machine code)."""

    tile: Tile
    registers: int
    spills: int  # instructions that store to the stack or load from it
    shared: int  # bytes
    contained_spills: int  # of the second launch, which runs for data that is not finite only


def row(
    queries: int, keys: int, warps: int, stages: int, registers: int, spills: int, shared: int, contained: int
) -> Row:
    """A row as it stands in the table."""
    return Row(Tile(queries, keys, warps, stages), registers, spills, shared, contained)


def described(*numbers: int) -> Row:
    """A row whose kernel cuts tiles of K and V out by descriptors."""
    found = row(*numbers)
    return found._replace(tile=replace(found.tile, described=True))


# Rows by architecture and kind of operand, for head sizes up to 64, 128 and 256.
HEADS = (64, 128, MAX_HEAD_SIZE)

TABLE: dict[tuple[str, str], tuple[Row, Row, Row]] = {
    # queries, keys, warps, stages; registers, spills, shared memory, spills of the second launch
    ("sm_80", "bfloat16"): (
        row(128, 64, 8, 2, 186, 0, 32768, 14),
        row(128, 64, 8, 2, 242, 0, 65536, 967),
        row(32, 32, 4, 2, 246, 0, 51200, 12),
    ),
    ("sm_80", "float16"): (
        row(128, 64, 8, 2, 186, 0, 32768, 10),
        row(128, 64, 8, 2, 242, 0, 65536, 293),
        row(32, 32, 4, 2, 246, 0, 51200, 32),
    ),
    ("sm_80", "float32"): (
        row(32, 32, 4, 2, 128, 0, 28800, 2),
        row(32, 32, 8, 2, 103, 0, 53248, 0),
        row(32, 16, 8, 1, 238, 0, 67584, 0),
    ),
    ("sm_80", "float32 tf32"): (
        row(128, 32, 8, 2, 181, 0, 49152, 2),
        row(128, 32, 8, 2, 174, 0, 98304, 106),
        row(32, 32, 8, 1, 181, 0, 69632, 0),
    ),
    ("sm_80", "float32 bf16"): (
        row(128, 32, 8, 2, 158, 0, 32768, 0),
        row(128, 32, 8, 2, 167, 0, 65536, 327),
        row(32, 32, 8, 1, 174, 0, 49152, 0),
    ),
    ("sm_80", "float32 fp16"): (
        row(128, 32, 8, 2, 158, 0, 32768, 0),
        row(128, 32, 8, 2, 167, 0, 65536, 1082),
        row(32, 32, 8, 1, 174, 0, 49152, 0),
    ),
    ("sm_80", "float64"): (
        row(64, 32, 8, 2, 157, 0, 65536, 567),
        row(32, 32, 8, 1, 218, 0, 73728, 0),
        row(16, 16, 8, 1, 168, 0, 67584, 2),
    ),
    ("sm_90", "bfloat16"): (
        row(128, 64, 4, 3, 253, 0, 65536, 91),
        row(128, 64, 8, 3, 209, 0, 131072, 94),
        row(128, 32, 8, 2, 252, 0, 131072, 1228),
    ),
    ("sm_90", "float16"): (
        row(128, 64, 4, 3, 253, 0, 65536, 91),
        row(128, 64, 8, 3, 209, 0, 131072, 94),
        row(128, 32, 8, 2, 252, 0, 131072, 1216),
    ),
    ("sm_90", "float32"): (
        row(32, 32, 4, 2, 238, 0, 28800, 0),
        row(32, 16, 4, 2, 220, 0, 34944, 22),
        row(32, 16, 8, 1, 232, 0, 67584, 0),
    ),
    ("sm_90", "float32 tf32"): (
        row(128, 32, 8, 2, 168, 0, 65536, 0),
        row(128, 32, 8, 2, 214, 0, 131072, 116),
        row(64, 16, 8, 2, 240, 0, 131072, 413),
    ),
    ("sm_90", "float32 bf16"): (
        row(128, 32, 8, 2, 130, 0, 36864, 0),
        row(128, 32, 8, 2, 210, 0, 73728, 46),
        row(64, 16, 8, 2, 232, 0, 73728, 305),
    ),
    ("sm_90", "float32 fp16"): (
        row(128, 32, 8, 2, 130, 0, 36864, 0),
        row(128, 32, 8, 2, 210, 0, 73728, 46),
        row(64, 16, 8, 2, 232, 0, 73728, 305),
    ),
    ("sm_90", "float64"): (
        row(64, 32, 8, 2, 182, 0, 65536, 166),
        row(32, 32, 8, 1, 240, 0, 73728, 0),
        row(16, 16, 8, 1, 196, 0, 67584, 4),
    ),
    ("sm_100", "bfloat16"): (
        row(128, 128, 8, 2, 236, 0, 82944, 199),
        row(128, 64, 8, 2, 232, 0, 98848, 449),
        row(64, 32, 8, 2, 164, 0, 98848, 488),
    ),
    ("sm_100", "float16"): (
        row(128, 128, 8, 2, 236, 0, 82944, 203),
        row(128, 64, 8, 2, 232, 0, 98848, 449),
        row(64, 32, 8, 2, 164, 0, 98848, 488),
    ),
    ("sm_100", "float32"): (
        row(32, 32, 4, 2, 234, 0, 28800, 16),
        row(32, 16, 4, 2, 210, 0, 34944, 38),
        row(32, 16, 8, 1, 220, 0, 67584, 51),
    ),
    ("sm_100", "float32 tf32"): (
        row(128, 32, 8, 2, 123, 0, 66080, 56),
        row(128, 32, 8, 2, 182, 0, 131616, 560),
        row(64, 16, 8, 2, 167, 0, 131616, 652),
    ),
    ("sm_100", "float32 bf16"): (
        row(128, 32, 8, 2, 122, 0, 40992, 40),
        row(128, 32, 8, 2, 174, 0, 81952, 443),
        row(64, 32, 8, 1, 215, 0, 65536, 500),
    ),
    ("sm_100", "float32 fp16"): (
        row(128, 32, 8, 2, 122, 0, 40992, 26),
        row(128, 32, 8, 2, 174, 0, 81952, 443),
        row(64, 32, 8, 1, 215, 0, 65536, 498),
    ),
    ("sm_100", "float64"): (
        row(64, 32, 8, 2, 122, 0, 65536, 102),
        row(32, 32, 8, 1, 218, 0, 73728, 0),
        row(16, 16, 8, 1, 168, 0, 67584, 10),
    ),
    ("gfx942", "bfloat16"): (
        row(128, 64, 4, 2, 250, 0, 16384, 0),
        row(128, 32, 8, 1, 177, 0, 32768, 0),
        row(64, 16, 8, 1, 127, 0, 32768, 0),
    ),
    ("gfx942", "float16"): (
        row(128, 64, 4, 2, 242, 0, 16384, 0),
        row(128, 32, 8, 1, 177, 0, 32768, 0),
        row(64, 16, 8, 1, 127, 0, 32768, 0),
    ),
    ("gfx942", "float32"): (
        row(64, 32, 4, 1, 191, 0, 16384, 0),
        row(64, 32, 8, 1, 254, 0, 32768, 8),
        row(32, 16, 8, 1, 158, 0, 32768, 0),
    ),
    ("gfx942", "float32 tf32"): (
        row(64, 32, 4, 1, 169, 0, 16384, 0),
        row(64, 16, 4, 1, 148, 0, 32768, 0),
        row(32, 16, 8, 1, 204, 0, 32768, 0),
    ),
    ("gfx942", "float32 bf16"): (
        row(64, 32, 4, 1, 168, 0, 8192, 0),
        row(64, 16, 4, 1, 151, 0, 16384, 0),
        row(32, 16, 8, 1, 179, 0, 16384, 0),
    ),
    ("gfx942", "float32 fp16"): (
        row(64, 32, 4, 1, 146, 0, 8192, 0),
        row(64, 16, 4, 1, 146, 0, 16384, 0),
        row(32, 16, 8, 1, 171, 0, 16384, 0),
    ),
    ("gfx942", "float64"): (
        row(64, 32, 4, 1, 239, 0, 32768, 0),
        row(32, 16, 4, 1, 241, 0, 32768, 0),
        row(16, 16, 4, 1, 305, 0, 32768, 0),
    ),
}

# What 16-bit kernels take instead, by architecture and head size, where K and V lie so that tensor descriptors can cut
# tiles out of them: aligned, rows without gaps between elements. A tile of it has as many queries as the table's, and
# keys that those of the table's divide, since the arrays of a planned call may be of either kind.
DESCRIBED: dict[tuple[str, int], Row] = {
    ("sm_90", 64): described(128, 64, 4, 3, 210, 0, 66560, 91),  # small: two programs on a processor
    ("sm_90", 128): described(128, 128, 8, 2, 234, 0, 164864, 356),
    ("sm_100", 64): described(128, 128, 8, 2, 218, 0, 82944, 198),
    ("sm_100", 128): described(128, 64, 8, 3, 175, 0, 132096, 449),
    ("sm_100", 256): described(64, 32, 8, 2, 128, 0, 98880, 487),
}

# Other rows for the same arrays, which a short timing on the device may prefer.
TIMED: dict[tuple[str, int], tuple[Row, ...]] = {
    ("sm_90", 64): (described(128, 128, 8, 2, 237, 0, 82944, 42),),
    ("sm_90", 128): (described(128, 64, 8, 3, 163, 0, 132096, 94),),
}

# Rows in place of the table's where the Triton at hand is older than a version and its kernels would spill: with 3.7
# those of the table have 178 spills in bfloat16, with 3.8, too, 33 in bf16 products of float32.
OLDER: dict[tuple[str, str, int], tuple[tuple[int, int], Row]] = {
    ("sm_90", "bfloat16", 256): ((3, 8), row(64, 32, 8, 2, 196, 0, 98304, 268)),
    ("sm_90", "float16", 256): ((3, 8), row(64, 32, 8, 2, 196, 0, 98304, 268)),
    ("sm_90", "float32 bf16", 256): ((3, 9), row(32, 32, 8, 1, 180, 0, 49152, 0)),
    ("sm_90", "float32 fp16", 256): ((3, 9), row(32, 32, 8, 1, 180, 0, 49152, 0)),
}

# Other architectures, by a pattern: whose rows they take. Rows of sm_80 fit into 99 KB of shared memory, which is what
# sm_86, sm_89 and sm_120 have.
FALLBACK = (
    (r"sm_8\d", "sm_80"),
    (r"sm_9\d", "sm_90"),
    (r"sm_1[01]\d", "sm_100"),
    (r"sm_12\d", "sm_80"),
    (r"gfx9[45].", "gfx942"),
)

# Tiles in place of the rows' where drawing what dropout keeps would spill beside what they hold.
DROPPING: dict[tuple[str, str, int], Tile] = {
    **dict.fromkeys((("sm_80", "bfloat16", 128), ("sm_80", "float16", 128)), Tile(128, 32, 8, 2)),
    ("sm_80", "float32", 64): Tile(32, 32, 8, 2),
    **dict.fromkeys((("sm_90", "bfloat16", 64), ("sm_90", "float16", 64)), Tile(128, 64, 8, 3)),
    **dict.fromkeys((("sm_90", "bfloat16", 256), ("sm_90", "float16", 256)), Tile(64, 32, 8, 2)),
    **{("sm_90", f"float32 {precision}", 256): Tile(32, 32, 8, 1) for precision in ("tf32", "bf16", "fp16")},
    **dict.fromkeys((("sm_100", "bfloat16", 64), ("sm_100", "float16", 64)), Tile(128, 64, 8, 3)),
}

# The first Triton that compiles the forward kernel for an architecture, where that is not the first of all: those
# before 3.8 fail in their layouts of Blackwell's tensor memory.
NEEDS = {"sm_100": (3, 8)}

# With so few rows a key/value head, they are the whole tile: the least that tensor cores take.
FEW_ROWS = 16


@functools.cache
def rows_of(arch: str) -> str | None:
    """The architecture whose rows another takes; None if there are none."""
    return next((to for pattern, to in FALLBACK if re.fullmatch(pattern, arch)), None)


def kind_of(spec: AttentionSpec) -> str:
    """What the two products read, as in the table: a dtype, or float32 with a precision."""
    return spec.dtype if spec.precision == "ieee" else f"{spec.dtype} {spec.precision}"


def head_of(head_size: int) -> int:
    """The head size of the row that computes one; beyond the largest, the largest."""
    return next((most for most in HEADS if head_size <= most), HEADS[-1])


def row_of(arch: str, kind: str, head_size: int) -> Row:
    """The table's row of an architecture in FALLBACK; beyond the largest head size, that of the largest."""
    place = next((n for n, most in enumerate(HEADS) if head_size <= most), -1)
    rows = rows_of(arch)
    if rows is None:
        raise UnavailableError(f"no tile configuration for {arch}")
    older, instead = OLDER.get((rows, kind, HEADS[place]), ((0, 0), None))
    return instead if instead is not None and installed() < older else TABLE[rows, kind][place]


def installed() -> tuple[int, ...]:
    """The version of the Triton at hand, which chooses among rows; where there is none, the table stands."""
    from flashtile.kernels.triton import release

    return release() or (99,)


def cautious_tile(spec: AttentionSpec, few: bool = False) -> Tile:
    """What takes the place of a row that failed its self-test: small, few warps, no pipeline, no descriptors."""
    size, wide = max(padded(spec.head_size), padded(spec.value_size)), DTYPES[spec.dtype].itemsize == 8
    large = size <= HEADS[0] or size <= HEADS[1] and not wide
    return Tile(FEW_ROWS if few or not large else 32, 32 if size <= HEADS[0] else 16, 4, 1)


def vanilla_tile(spec: AttentionSpec, arch: str) -> Tile:
    """The tile of the baseline's three stages: at head size 64 none spills."""
    if arch == INTERPRETER:
        return Tile(32, 32)
    wide = DTYPES[spec.dtype].itemsize > 2 or max(spec.head_size, spec.value_size) > HEADS[1]
    # Of tiles of 64 rows Triton 3.9 fails to compile the product with V for Blackwell.
    return Tile(32, 32, 4, 1) if wide or rows_of(arch) == "sm_100" else Tile(64, 32, 4, 1)


def described_row(arch: str, spec: AttentionSpec) -> Row | None:
    """The row of DESCRIBED for a call; None if there is none."""
    rows = rows_of(arch)
    if rows is None or arch.startswith("sm_12") or DTYPES[spec.dtype].itemsize != 2:
        return None
    return DESCRIBED.get((rows, _described_size(spec)))


def timed_tiles(spec: AttentionSpec, arch: str) -> tuple[Tile, ...]:
    """The tiles by descriptors that may be faster than the table's, where those are taken."""
    if described_row(arch, spec) is None:
        return ()
    return tuple(row.tile for row in TIMED.get((str(rows_of(arch)), _described_size(spec)), ()))


def _described_size(spec: AttentionSpec) -> int:
    size = max(padded(spec.head_size), padded(spec.value_size))
    return next((most for most in HEADS if size <= most), 0)


def forward_tile(spec: AttentionSpec, arch: str, few: bool = False, described: bool = False) -> Tile:
    """The tile of the forward kernel; with few rows a key/value head a tile holds no more than FEW_ROWS.

    described: the one by tensor descriptors, where there is one. An architecture without rows gets those of sm_80; the
    family says that it does not compute there.
    """
    if arch == INTERPRETER:
        return Tile(FEW_ROWS if few else 32, 32)
    if described and not few and (found := described_row(arch, spec)) is not None:
        return found.tile
    size = max(padded(spec.head_size), padded(spec.value_size))
    arch, kind = arch if rows_of(arch) else "sm_80", kind_of(spec)
    tile = row_of(arch, kind, size).tile
    if spec.dropout:
        tile = DROPPING.get((str(rows_of(arch)), kind, head_of(size)), tile)
    return tile if not few else Tile(FEW_ROWS, tile.tile_k, 4, tile.num_stages)
