"""What the backward's kernels are compiled for, as `Specialisation`s; see specialisation.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.specialisation import Constant, Memory, Specialisation, Tile, Type, padded

if TYPE_CHECKING:
    from flashtile.spec import AttentionSpec

ROWS = 16  # of a program that multiplies dO and O row by row
BLOCK = 1024  # elements of a program that goes along an array
MOST_REGISTERS = 255  # that a thread can name, on NVIDIA; 8 warps can have as many


def row_deltas(spec: AttentionSpec, dlse: bool, memory: Memory) -> Specialisation:
    """delta of every row (backward.py); dlse: whether lse has a gradient."""
    element, accumulator = special._elements(spec)
    arguments: dict[str, Type | None] = {
        "o": f"*{element}",
        "do": f"*{element}",
        "dlse": f"*{accumulator}" if dlse else None,
        "delta": f"*{accumulator}",
        **special._strides(("o", "do"), memory),
        **special._sizes("first", "heads", "q_len", "value_size", "query_tiles"),
    }
    constants: dict[str, Constant] = {"TILE_Q": ROWS, "VALUE": padded(spec.value_size)}
    return special._specialisation("row_deltas", arguments, constants, memory, Tile(ROWS, ROWS, 4, 1))


def sink_sums(spec: AttentionSpec) -> Specialisation:
    """The gradients of sinks (backward.py)."""
    _, accumulator = special._elements(spec)
    arguments: dict[str, Type | None] = dict.fromkeys(("lse", "delta", "sinks", "dsinks"), f"*{accumulator}")
    arguments |= special._sizes("first", "q_len")
    return special._specialisation("sink_sums", arguments, {"TILE_Q": BLOCK}, Memory(aligned=False), Tile(1, 1, 4, 1))


def add_parts(spec: AttentionSpec, size: int) -> Specialisation:
    """The sum of partial gradients with rows of `size`, added to an array of the storage type (backward.py)."""
    element, accumulator = special._elements(spec)
    arguments: dict[str, Type | None] = {
        "parts": f"*{accumulator}",
        "out": f"*{element}",
        **{f"out_{axis}": "i64" for axis in "bhsd"},
        "split": "i64",
        **special._sizes("first", "heads", "length", "size", "tiles", "splits"),
    }
    constants: dict[str, Constant] = {"TILE_Q": ROWS, "VALUE": padded(size)}
    return special._specialisation("add_parts", arguments, constants, Memory(aligned=False), Tile(ROWS, ROWS, 4, 1))


def backward_q(
    spec: AttentionSpec, tile: Tile, *, contain: bool, parts: bool = False, part: bool = False, memory: Memory
) -> Specialisation:
    """The kernel of dQ (backward_q.py). contain: the second launch of a call, as `specialisation.forward` has it.

    parts: each work item has a part of the keys, and dq is the parts' sums, in accumulators. part: as that of the
    forward, the arrays are tiles of larger ones; dq is then a sum in accumulators that this one joins.
    """
    element, accumulator = special._elements(spec)
    arguments = {
        **_inputs(spec),
        "dq": f"*{accumulator if parts or part else element}",
        "odd": "*i32",
        **special._strides(("q", "k", "v", "do", "dq"), memory),
        **special._sizes("first", "items", "heads", "group", "q_len", "kv_len", "head_size", "value_size"),
        **special._sizes("query_tiles"),
        **_of_parts(parts, ("splits", "split_keys"), ("dq_split",)),
        **_scores(spec, part),
    }
    constants = {**_constants(spec, tile), "PARTS": parts, "CONTAIN": contain}
    tile = _contained(tile) if contain else tile
    return special._specialisation("backward_q", arguments, constants, memory, tile, spec.program)


def backward_kv(
    spec: AttentionSpec,
    tile: Tile,
    *,
    contain: bool,
    parts: bool = False,
    part: bool = False,
    dk: bool = True,
    dv: bool = True,
    memory: Memory,
) -> Specialisation:
    """The kernel of dK and dV, either of which may be absent (backward_kv.py).

    parts: as `backward_q`, of rows; part: as `backward_q`.
    """
    element, accumulator = special._elements(spec)
    written = accumulator if parts or part else element
    strides = special._strides(("q", "k", "v", "do", "dk", "dv"), memory)
    absent = [name for name, there in (("dk", dk), ("dv", dv)) if not there]
    strides = {name: None if name[:2] in absent else t for name, t in strides.items()}
    arguments: dict[str, Type | None] = {
        **_inputs(spec),
        "dk": f"*{written}" if dk else None,
        "dv": f"*{written}" if dv else None,
        "odd": "*i32",
        **strides,
        **special._sizes("first", "items", "heads", "group", "q_len", "kv_len", "head_size", "value_size"),
        **special._sizes("key_tiles"),
        **_of_parts(
            parts,
            ("splits", "row_parts", "split_rows", "split_heads"),
            [f"{name}_split" for name in ("dk", "dv") if name not in absent],
        ),
        **{f"{name}_split": None for name in absent},
        **_scores(spec, part),
    }
    constants = {**_constants(spec, tile), "PARTS": parts, "CONTAIN": contain}
    tile = _contained(tile) if contain else tile
    return special._specialisation("backward_kv", arguments, constants, memory, tile, spec.program)


def array_sums(
    spec: AttentionSpec, tile: Tile, number: int, *, totals: bool, part: bool = False, memory: Memory
) -> Specialisation:
    """One of a program's gradients of arrays (backward_arrays.py): the largest term, or with totals their sums.

    part: as `backward_q`; the sums are those of a box of the array's elements.
    """
    assert spec.program is not None
    gradient = spec.program.array_gradients[number]
    names = frozenset[str]().union(*(index.variables for index in gradient.index))
    arguments: dict[str, Type | None] = {
        **_inputs(spec),
        "largest": "*i64",
        "totals": "*i64" if totals else None,
        "flags": "*i32" if totals else None,
        **special._strides(("q", "k", "v", "do"), memory),
        **special._sizes("first", "heads", "group", "q_len", "kv_len", "head_size", "value_size", "query_tiles"),
        **special._sizes("splits", "split_keys"),
        "elements": "i64" if totals else None,
        "terms_bits": "i32" if totals else None,
        **_scores(spec, part),
        "box": ("i64",) * (2 * len(gradient.index)) if totals and part and gradient.index else None,
    }
    constants = {
        **_constants(spec, tile),
        "GIVES": number,
        "PLACE": number,
        "BY_ROW": bool(names & {"i", "s"}),
        "BY_KEY": bool(names & {"j", "s"}),
        "WORDS": words_of(spec),
    }
    del constants["SLOPE"]
    return special._specialisation("array_sums", arguments, constants, memory, tile, spec.program)


def array_finish(spec: AttentionSpec, joins: bool = False) -> Specialisation:
    """Sums of arrays as floats; joins: added to those that are there."""
    arguments: dict[str, Type | None] = {
        "largest": "*i64",
        "totals": "*i64",
        "flags": "*i32",
        "out": f"*{special._elements(spec)[1]}",
        "elements": "i64",
        "terms_bits": "i32",
        **special._sizes("first"),
    }
    constants: dict[str, Constant] = {"WORDS": words_of(spec), "JOINS": joins, "BLOCK": BLOCK}
    return special._specialisation("array_finish", arguments, constants, Memory(aligned=False), Tile(1, 1, 4, 1))


def clear() -> Specialisation:
    """Zeros."""
    arguments: dict[str, Type | None] = {"words": "*i32", "count": "i64", "first": "i32"}
    return special._specialisation("clear", arguments, {"BLOCK": BLOCK}, Memory(aligned=False), Tile(1, 1, 4, 1))


def _contained(tile: Tile) -> Tile:
    """The tile of a second launch. In fp32 most spill whatever they have; left to itself the assembler then stops at 32
    registers, with two to seven times the spills (10,923 where there are 4,452)."""
    return replace(special.contained(tile), registers=MOST_REGISTERS)


def _of_parts(parts: bool, sizes: Iterable[str], distances: Iterable[str]) -> dict[str, Type | None]:
    """Arguments that say which part a work item has, and how far parts lie from one another; without parts, none."""
    return {
        **{name: "i32" if parts else None for name in sizes},
        **{name: "i64" if parts else None for name in distances},
    }


def words_of(spec: AttentionSpec) -> int:
    """Words of 64 bits that an array's sums have: one has at least the bits of a float32."""
    return 2 if special._elements(spec)[1] == "fp64" else 1


def _inputs(spec: AttentionSpec) -> dict[str, Type | None]:
    element, accumulator = special._elements(spec)
    return {
        **dict.fromkeys(("q", "k", "v", "do"), f"*{element}"),
        **dict.fromkeys(("lse", "delta"), f"*{accumulator}"),
    }


def _scores(spec: AttentionSpec, part: bool = False) -> dict[str, Type | None]:
    """The arguments of everything that changes scores or weights, as the forward has them, but for sinks."""
    return {
        "scale": "i64",
        **special._band(spec),
        **(dict.fromkeys(special._tables(spec)) if part else special._tables(spec)),
        "captures": special._captures(spec.program),
        "origin": special._origin(spec, part),
        "threshold": "i32" if spec.dropout else None,
        "seed": "i64" if spec.dropout else None,
    }


def _constants(spec: AttentionSpec, tile: Tile) -> dict[str, Constant]:
    scored = spec.program is not None and spec.program.score is not None
    return {
        **special._program(spec.program),
        "SLOPE": scored,
        **special._shapes(spec, tile),
        "BAND": spec.band is not None,
    }
