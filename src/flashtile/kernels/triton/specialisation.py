"""What a Triton kernel is compiled for: a frozen value from which compiler, manifest and launcher all work.

Lengths, head sizes within one power of two, strides, scale, window, offsets and captured values are run-time arguments.
A `Specialisation` says what is left: which kernel, the types of its run-time arguments in order, its compile-time
constants, which arguments are known to be multiples of 16, and how many warps and pipeline stages. It imports nothing
of Triton; `jit.py` turns it into a function and the dictionaries that `triton.compile` takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flashtile.dtypes import DTYPES

if TYPE_CHECKING:
    from flashtile.score.capture import Slot
    from flashtile.score.code import Code
    from flashtile.spec import AttentionSpec

# Triton's names of element types.
ELEMENTS = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

# The type that a precision request on fp32 inputs gives to the operands of the two products, in Triton's names.
OPERANDS = {"ieee": "fp32", "tf32": "fp32", "bf16": "bf16", "fp16": "fp16"}

# What a forward kernel leaves in o and lse, and finds there.
FINISHED = "finished"  # the result: o in the storage type, sinks included
PARTIAL = "partial"  # (o normalised, lse) in accumulators, of one part of the keys or of several
CARRIED = "carried"  # the same, continuing the state that o and lse already hold
UPDATED = "updated"  # carried, with o in the storage type: rounded at every launch
STATES = (FINISHED, PARTIAL, CARRIED, UPDATED)

SPAN = 128  # key tiles whose sums are accumulated separately

Type = str | tuple[str, ...]  # of an argument: "i32", "i64", "*bf16", ...; a tuple's elements follow one another
Constant = bool | int | str | None


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is laid out on a machine: query rows and keys of a tile, warps of a program, pipeline stages.

    registers  of a thread, at most; None: as many as the assembler likes, which stops at 128 in some versions, and
               spills what is left
    """

    tile_q: int
    tile_k: int
    num_warps: int = 4
    num_stages: int = 2
    described: bool = False  # tiles of K and V are cut out by tensor descriptors, where the arrays are aligned
    registers: int | None = None


def contained(tile: Tile) -> Tile:
    """The tile of the second launch, which computes what is not finite: the same, or the bits of rows that see nothing
    of it would differ; but without a pipeline, as it needs shared memory for more products, and by plain loads."""
    return replace(tile, num_stages=1, described=False)


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known of the arrays q, k, v, o of a call when its kernel is compiled.

    contiguous  every innermost stride is 1
    aligned     every address is a multiple of 16 bytes and every other stride of 16 elements
    """

    contiguous: bool = True
    aligned: bool = True


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One compiled kernel.

    kernel      name of the kernel: its function is `jit.FUNCTIONS[kernel]`
    signature   (name, Triton type) of every run-time argument, in the order in which they are passed; a tuple of types
                is an argument whose elements are passed one after the other
    constants   (name, value) of every other parameter; None stands for an argument that this variant does not read
    divisible   names of the arguments that are multiples of 16 (addresses in bytes, integers as they are)
    code        the score program that SCORE and MASK are made of, or None
    """

    kernel: str
    signature: tuple[tuple[str, Type], ...]
    constants: tuple[tuple[str, Constant], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    code: Code | None = field(default=None)
    registers: int | None = None  # of a thread, at most; see Tile

    @property
    def names(self) -> tuple[str, ...]:
        """The run-time arguments in order."""
        return tuple(name for name, _ in self.signature)

    @property
    def fuses(self) -> bool:
        """Whether multiply-adds may be fused. Not where a mask multiplies floats: what a tile shows is worked out with
        products that are rounded, and the elements must agree with it."""
        from flashtile.score.expr import postorder

        mask = self.code.mask if self.code is not None else None
        return mask is None or not any(
            x.type == "float" and x.operation.name in ("mul", "mod") for x in postorder([mask])
        )

    def flat_types(self) -> tuple[str, ...]:
        """The types of what is really passed, tuples opened."""
        return tuple(t for _, types in self.signature for t in ((types,) if isinstance(types, str) else types))


def padded(size: int) -> int:
    """The power of two, 16 at least, that a head size is computed as: columns beyond it are masked."""
    return max(16, 1 << (size - 1).bit_length())


def capture_types(slots: Iterable[Slot]) -> tuple[str, ...]:
    """What the captured values of a program are passed as.

    A number is one integer: an int32, or the bits of a double. An array is its address, then for each axis its length
    (i32) and its stride in elements (i64). A bool array is read as bytes.
    """
    types: list[str] = []
    for slot in slots:
        if slot.rank < 0:
            types.append("i32" if slot.type == "int" else "i64")
        else:
            types += ["*" + pointee(slot.element), *("i32", "i64") * slot.rank]
    return tuple(types)


def pointee(element: str) -> str:
    """Triton's name of a captured array's elements."""
    return _POINTEES.get(element, element)


_POINTEES = {"bool": "u8", "f16": "fp16", "bf16": "bf16", "f32": "fp32", "f64": "fp64"}

_AXES = "bhsd"


def has_spans(spec: AttentionSpec, tile: Tile, keys: int) -> bool:
    """Whether sums over so many keys would round too often, one key tile after another, for the precision they have.

    Products of 16-bit or tf32 operands have no such precision, and a call of a few tiles has no use for it.
    """
    exact = spec.dtype == DTYPES[spec.dtype].accumulator and spec.precision == "ieee"
    return exact and keys > SPAN * tile.tile_k


def forward(
    spec: AttentionSpec,
    tile: Tile,
    *,
    state: str = FINISHED,
    packed: bool = False,
    contain: bool = False,
    spans: bool = False,
    part: bool = False,
    last: bool = False,
    memory: Memory = Memory(),
) -> Specialisation:
    """The flash forward kernel (forward.py) of a call.

    state    one of STATES: what o and lse hold before and after
    packed   a tile of queries holds the rows of all query heads that share a key/value head
    contain  the second launch of a call, which computes the work items that the first has marked as not finite
    spans    the sums of every SPAN key tiles are accumulated separately: see `has_spans`
    part     the arrays are tiles of larger ones: a program knows them by an origin, and no table tells what it shows
    last     no key follows, so that sinks are counted in a state, too
    """
    element, accumulator = _elements(spec)
    written = element if state in (FINISHED, UPDATED) else accumulator
    arguments: dict[str, Type | None] = {
        "q": f"*{element}",
        "k": f"*{element}",
        "v": f"*{element}",
        "o": f"*{written}",
        "lse": f"*{accumulator}",
        "odd": "*i32",
        **_strides("qkvo", memory),
        "o_split": "i64",
        "lse_split": "i64",
        **_sizes(
            "first", "items", "blocks", "together", "heads", "group", "q_len", "kv_len", "head_size", "value_size"
        ),
        **_sizes("query_tiles", "splits", "split_keys"),
        "scale": "i64",
        **_sides(spec),
        **(dict.fromkeys(_tables(spec)) if part else _tables(spec)),
        "sinks": f"*{accumulator}" if spec.sinks and (last or state == FINISHED) else None,
        "captures": _captures(spec.program),
        "origin": _origin(spec, part),
        "threshold": "i32" if spec.dropout else None,
        "seed": "i64" if spec.dropout else None,
    }
    constants: dict[str, Constant] = {
        **_program(spec.program),
        **_shapes(spec, tile),
        "NEGATIVE": spec.scale < 0,
        "BAND": spec.band is not None,
        "STATE": CARRIED if state == UPDATED else state,
        "PACKED": packed,
        "CONTAIN": contain,
        "SPAN": SPAN if spans else 0,
    }
    tile = contained(tile) if contain else tile
    constants["DESCRIBED"] = tile.described and memory.contiguous and memory.aligned
    return _specialisation("forward", arguments, constants, memory, tile, spec.program)


def merge(spec: AttentionSpec, tile: Tile, *, finished: bool = True, memory: Memory = Memory()) -> Specialisation:
    """The kernel that merges partial results over parts of the keys, in order (merge.py).

    finished  o is written in the storage type, sinks included; else the result is a partial again
    """
    element, accumulator = _elements(spec)
    arguments: dict[str, Type | None] = {
        "parts_o": f"*{accumulator}",
        "parts_lse": f"*{accumulator}",
        "o": f"*{element if finished else accumulator}",
        "lse": f"*{accumulator}",
        **_strides("o", memory),
        "o_split": "i64",
        "lse_split": "i64",
        **_sizes("first", "heads", "q_len", "value_size", "query_tiles", "splits"),
        "sinks": f"*{accumulator}" if spec.sinks and finished else None,
    }
    constants: dict[str, Constant] = {"TILE_Q": tile.tile_q, "VALUE": padded(spec.value_size)}
    return _specialisation("merge", arguments, constants, memory, tile)


def scores(spec: AttentionSpec, tile: Tile, *, memory: Memory = Memory()) -> Specialisation:
    """Stage one of the unfused baseline (vanilla.py): scores, changed and masked, stored."""
    element, _ = _elements(spec)
    arguments: dict[str, Type | None] = {
        "q": f"*{element}",
        "k": f"*{element}",
        "s": f"*{stored(spec)}",
        **_strides("qk", memory),
        "s_s": "i64",
        **_sizes("first", "heads", "group", "q_len", "kv_len", "columns", "head_size", "query_tiles", "key_tiles"),
        "scale": "i64",
        **_band(spec),
        "captures": _captures(spec.program),
    }
    constants: dict[str, Constant] = {**_program(spec.program), **_shapes(spec, tile, value=False)}
    constants["BAND"] = spec.band is not None
    return _specialisation("scores", arguments, constants, memory, tile, spec.program)


def softmax(spec: AttentionSpec, tile: Tile) -> Specialisation:
    """Stage two of the baseline: the weights of each row, stored, and its lse."""
    _, accumulator = _elements(spec)
    arguments: dict[str, Type | None] = {
        "s": f"*{stored(spec)}",
        "p": f"*{stored(spec)}",
        "lse": f"*{accumulator}",
        **_sizes("first", "q_len", "kv_len", "query_tiles"),
        "sinks": f"*{accumulator}" if spec.sinks else None,
    }
    constants: dict[str, Constant] = {"TILE_Q": tile.tile_q, "TILE_K": tile.tile_k}
    return _specialisation("softmax", arguments, constants, Memory(aligned=False), tile)


def output(spec: AttentionSpec, tile: Tile, *, state: str = FINISHED, memory: Memory = Memory()) -> Specialisation:
    """Stage three of the baseline: the weighted sum of the values; PARTIAL and CARRIED sums are in accumulators."""
    element, accumulator = _elements(spec)
    arguments: dict[str, Type | None] = {
        "p": f"*{stored(spec)}",
        "v": f"*{element}",
        "o": f"*{element if state == FINISHED else accumulator}",
        **_strides("vo", memory),
        "p_s": "i64",
        **_sizes("first", "heads", "group", "q_len", "kv_len", "value_size", "query_tiles"),
    }
    shapes = _shapes(spec, tile)
    constants = {name: shapes[name] for name in ("TILE_Q", "TILE_K", "VALUE", "OPERAND", "PRECISION")}
    constants["STATE"] = state
    return _specialisation("output", arguments, constants, memory, tile)


def stored(spec: AttentionSpec) -> str:
    """The element type in which the baseline stores scores and weights: a 16-bit input's own, else the accumulator."""
    element, accumulator = _elements(spec)
    return element if DTYPES[spec.dtype].itemsize == 2 else accumulator


def _elements(spec: AttentionSpec) -> tuple[str, str]:
    """Triton's names of the storage type and the accumulator."""
    return ELEMENTS[spec.dtype], ELEMENTS[DTYPES[spec.dtype].accumulator]


def _strides(tensors: Iterable[str], memory: Memory) -> dict[str, Type | None]:
    """Strides in elements along (B, H, S, D); an innermost stride of 1 is a constant."""
    return {f"{t}_{a}": None if a == "d" and memory.contiguous else "i64" for t in tensors for a in _AXES}


def _sizes(*names: str) -> dict[str, Type | None]:
    return dict.fromkeys(names, "i32")


def _band(spec: AttentionSpec) -> dict[str, Type | None]:
    """Distances of a band and what anchors it: a number, or one a batch."""
    band, per_batch = spec.band is not None, spec.offset is None
    return {
        "left": "i64" if band else None,
        "right": "i64" if band else None,
        "offset": "i64" if band and not per_batch else None,
        "offsets": "*i64" if band and per_batch else None,
    }


def _sides(spec: AttentionSpec) -> dict[str, Type | None]:
    """The same without the sides that are open."""
    there = {} if spec.band is None else {"left": spec.band.left, "right": spec.band.right}
    return {**_band(spec), **{name: None for name, distance in there.items() if distance is None}}


def _tables(spec: AttentionSpec) -> dict[str, Type | None]:
    """The coverage of a mask program: see tables.py."""
    masked = spec.program is not None and spec.program.mask is not None
    types = {"rows": "*i32", "runs": "*i32", "rows_b": "i32", "rows_h": "i32"}
    return {name: t if masked else None for name, t in types.items()}


def _origin(spec: AttentionSpec, part: bool) -> Type | None:
    """Where a part of larger arrays begins, batch, head, row and key, and how many heads those have: what a program, or
    dropout, knows its scores by."""
    return ("i32",) * 5 if part and (spec.program is not None or spec.dropout) else None


def _captures(code: Code | None) -> Type | None:
    return capture_types(code.slots) if code is not None and code.slots else None


def _program(code: Code | None) -> dict[str, Constant]:
    """SCORE and MASK say whether there is such an expression; jit.py puts the function in its place."""
    return {"SCORE": code is not None and code.score is not None, "MASK": code is not None and code.mask is not None}


def _shapes(spec: AttentionSpec, tile: Tile, *, value: bool = True) -> dict[str, Constant]:
    head, width = padded(spec.head_size), padded(spec.value_size)
    whole = spec.head_size == head and (spec.value_size == width or not value)
    element, _ = _elements(spec)
    return {
        "TILE_Q": tile.tile_q,
        "TILE_K": tile.tile_k,
        "HEAD": head,
        **({"VALUE": width} if value else {}),
        "WHOLE": whole,
        "OPERAND": OPERANDS[spec.precision] if element == "fp32" else element,
        "PRECISION": "tf32" if spec.precision == "tf32" else "ieee",
    }


def _specialisation(
    kernel: str,
    arguments: Mapping[str, Type | None],
    constants: Mapping[str, Constant],
    memory: Memory,
    tile: Tile,
    code: Code | None = None,
) -> Specialisation:
    """Arguments without a type become constants: an innermost stride is 1, anything else is not there."""
    passed = tuple((name, t) for name, t in arguments.items() if t is not None)
    absent = {name: 1 if name.endswith("_d") else None for name, t in arguments.items() if t is None}
    aligned = tuple(name for name, _ in passed if name in _ALIGNED) if memory.aligned else ()
    values = (*absent.items(), *constants.items())
    return Specialisation(kernel, passed, values, aligned, tile.num_warps, tile.num_stages, code, tile.registers)


_TENSORS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
_ALIGNED = frozenset((*_TENSORS, *(f"{t}_{a}" for t in _TENSORS for a in "bhs")))
