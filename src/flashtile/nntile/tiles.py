"""What the doors for NNTile share: tiles, names of dtypes, and whether arguments fit together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.arrays import address_of, check_outside, plain
from flashtile.checks import integer
from flashtile.dtypes import DTYPES, DType, dtype_of
from flashtile.errors import described, wrong
from flashtile.plan.coverage import visible_pairs
from flashtile.spec import LARGEST_POSITION, AttentionSpec

if TYPE_CHECKING:
    from flashtile.engines.starpu.tiles import TiledTensor

# NNTile's names: the dtype that is stored, and the precision of the products.
DTYPE_NAMES: dict[str, tuple[str, str]] = {
    "fp64": ("float64", "ieee"),
    "fp32": ("float32", "ieee"),
    "fp32_fast_tf32": ("float32", "tf32"),
    "fp32_fast_fp16": ("float32", "fp16"),
    "fp32_fast_bf16": ("float32", "bf16"),
    "fp16": ("float16", "ieee"),
    "bf16": ("bfloat16", "ieee"),
}
BOOL = DType("bool", 1, "bool", np.dtype(bool), 0.0, 0.0, 1.0)  # of masks only


class Call(NamedTuple):
    """A validated call: what is computed, the offset of its band, and the dtype of its mask."""

    spec: AttentionSpec
    offset: int
    mask: str | None


class Tile:
    """A Fortran-ordered tile behind one StarPU handle; see `register`, `empty` and `wrap`."""

    def __init__(self, tensor: TiledTensor, shape: tuple[int, ...]) -> None:
        self.tensor, self.shape, self.dtype = tensor, shape, tensor.dtype

    @property
    def handle(self) -> int:
        """The address of StarPU's handle (starpu_data_handle_t); from here on the tile counts as written."""
        return self.tensor[0, 0, 0].handle

    @contextmanager
    def acquire(self, mode: str = "R") -> Iterator[np.ndarray]:
        """The contents, Fortran-ordered, once every task submitted on the tile before is done; mode R, W or RW.
        bfloat16 comes as its bits, uint16. Raises: SpecError."""
        with self.tensor.acquire((0, 0, 0), mode) as flat:
            yield flat.reshape(self.shape[::-1]).T

    def unregister(self) -> None:
        """Wait for the tasks on the tile and give its memory back. Raises: SpecError if it was done, or a hold."""
        self.tensor.unregister()


def register(array: Any) -> Tile:
    """A tile over a Fortran-ordered NumPy array, which stays where it is; use it through `Tile.acquire` only.

    Raises: SpecError; UnavailableError before flashtile.starpu.init().
    """
    array = plain(array, "array")
    if not array.size or not array.flags.f_contiguous:
        raise wrong("array", f"shape {array.shape}, strides {array.strides}", "a Fortran-ordered array with elements")
    row, n = row_of("array", array.dtype), array.size
    first, strides = address_of(array), (0, 0, n * row.itemsize)
    tensor = _tensors().TiledTensor((1, 1, 1, n), row, 1, address=first, strides=strides, keep=[array])
    tensor.extent, tensor.writable = (first, first + array.nbytes), array.flags.writeable
    return Tile(tensor, array.shape)


def empty(shape: Sequence[int], dtype: Any) -> Tile:
    """A tile that StarPU owns; dtype as NumPy or NNTile names it, or bool."""
    numbers = _shape_of(shape)
    return Tile(_tensors().TiledTensor((1, 1, 1, int(np.prod(numbers))), row_of("dtype", dtype), 1), numbers)


def wrap(handle: int, shape: Sequence[int], dtype: Any) -> Tile:
    """A tile over a handle of the program's own: its address (starpu_data_handle_t), contiguous, of the right size."""
    numbers = _shape_of(shape)
    handles = np.full((1, 1, 1), handle, np.uint64)
    size = int(np.prod(numbers))
    return Tile(_tensors().TiledTensor.wrap(handles, (1, 1, 1, size), row_of("dtype", dtype), 1), numbers)


def _tensors() -> Any:
    from flashtile.engines.starpu import tiles

    return tiles


def _shape_of(shape: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(integer(n) or 0 for n in shape)
    if not numbers or min(numbers) < 1:
        raise wrong("shape", repr(shape), "positive integers")
    return numbers


def row_of(argument: str, dtype: Any) -> DType:
    """A dtype by any name; bool, too."""
    if dtype in (bool, "bool") or (isinstance(dtype, np.dtype) and dtype.kind == "b"):
        return BOOL
    return dtype_of(DTYPE_NAMES[dtype][0] if isinstance(dtype, str) and dtype in DTYPE_NAMES else dtype, argument)


Described = dict[str, tuple[tuple[int, ...], DType]]

AXES = {
    2: "[n_keys, n_queries]",
    4: "[n_queries, n_batch, kv_group_size, n_head_kv]",
    5: "[head_size, n_seq, n_batch, kv_group_size, n_head_kv]",
}


def validated(
    given: Described, dtype: str | None, causal: Any, window: Any, first_query: Any, first_key: Any, scale: Any
) -> Call | None:
    """The call; None if its computed mask hides every key, or there is nothing to do. Raises: SpecError."""
    _check_shapes(given)
    (k, _), (q, row), (v, _) = given["K"], given["Q"], given["V"]
    if dtype is not None and (dtype not in DTYPE_NAMES or DTYPE_NAMES[dtype][0] != row.name):
        names = [name for name, (stored, _) in DTYPE_NAMES.items() if stored == row.name]
        raise wrong("dtype", repr(dtype), f"one of {', '.join(names)} for arrays of {row.name}")
    heads = int(np.prod(q[2:]))
    shapes = [(1, max(heads, 1), n, size) for n, size in ((q[1], q[0]), (k[1], k[0]), (k[1], v[0]))]
    spec = AttentionSpec.of(
        *(SimpleNamespace(shape=shape, dtype=row.name) for shape in shapes),
        causal=causal,
        window=window,
        align=0,
        scale=scale,
        precision=DTYPE_NAMES[dtype][1] if dtype is not None else "ieee",
    )
    offset = _position("first_query", first_query) - _position("first_key", first_key)
    if not (heads and spec.q_len and spec.kv_len) or not _meets(spec, offset):
        return None
    return Call(spec, offset, given["mask"][1].name if "mask" in given else None)


Asked = tuple[str | None, Any, Any, Any, Any, Any]  # dtype, causal, window, first_query, first_key, scale


def call_on_arrays(
    given: dict[str, Any], written: Collection[str], asked: Asked
) -> tuple[Call | None, dict[str, np.ndarray]]:
    """As `validated`, and the arrays, those that are written in memory of their own. Raises: SpecError."""
    arrays = _arrays_of(given, written)
    call = validated({name: (x.shape, row_of(name, x.dtype)) for name, x in arrays.items()}, *asked)
    check_apart({name: (address_of(x), address_of(x) + x.nbytes) for name, x in arrays.items()}, written)
    return call, arrays


def call_on_tiles(given: dict[str, Any], written: Collection[str], asked: Asked) -> tuple[Call | None, dict[str, int]]:
    """As `validated`, and the tiles' handles, those that are written in memory of their own. Raises: SpecError."""
    _check_tiles(given, written)
    call = validated({name: (tile.shape, tile.dtype) for name, tile in given.items()}, *asked)
    return call, _handles_of(given, written)


def _arrays_of(given: dict[str, Any], written: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays, Fortran-ordered, those that are written writable. Raises: SpecError."""
    arrays = {name: plain(x, name) for name, x in given.items()}
    for name, x in arrays.items():
        if x.size and not x.flags.f_contiguous:
            raise wrong(name, f"strides {x.strides}", "a Fortran-ordered array: the first axis contiguous, no gaps")
        if name in written and not x.flags.writeable:
            raise wrong(name, "a read-only array", "a writable one")
    return arrays


def _check_tiles(given: dict[str, Any], written: Collection[str]) -> None:
    """Raise SpecError unless all are tiles, those that are written writable."""
    for name, tile in given.items():
        if not isinstance(tile, Tile):
            raise wrong(name, described(tile), "a tile: nntile.register, nntile.empty or nntile.wrap")
        tile.tensor.check()
        if name in written and not tile.tensor.writable:
            raise wrong(name, "a read-only array", "a writable one")


def _handles_of(given: dict[str, Tile], written: Collection[str]) -> dict[str, int]:
    """The handles of tiles, those that are written on memory of their own. Raises: SpecError."""
    check_apart({name: tile.tensor.extent for name, tile in given.items()}, written)
    handles = {name: tile.tensor[0, 0, 0].address for name, tile in given.items()}
    for name in written:
        if [*handles.values()].count(handles[name]) > 1:
            raise wrong(name, "a tile that is another argument too", "a tile of its own")
    return handles


def _check_shapes(given: Described) -> None:
    """Raise SpecError unless shapes and dtypes fit together."""
    for name, (shape, _) in given.items():
        rank = {"mask": 2, "logsumexp": 4}.get(name, 5)
        if len(shape) != rank:
            raise wrong(name, f"shape {shape}", AXES[rank])
    (k, _), (q, row), (v, _) = given["K"], given["Q"], given["V"]
    if row is BOOL:
        raise wrong("Q", "dtype bool", "a float dtype")
    expected: dict[str, tuple[tuple[int, ...], tuple[DType, ...]]] = {
        "K": ((q[0], k[1], *q[2:]), (row,)),
        "V": ((v[0], k[1], *q[2:]), (row,)),
        "A": ((v[0], *q[1:]), (row,)),
        "logsumexp": (q[1:], (DTYPES[row.accumulator],)),
        "mask": ((k[1], q[1]), (row, DTYPES["float32"], BOOL)),
        "dA": ((v[0], *q[1:]), (row,)),
        "dK": ((q[0], k[1], *q[2:]), (row, DTYPES[row.accumulator])),
        "dQ": (q, (row, DTYPES[row.accumulator])),
        "dV": ((v[0], k[1], *q[2:]), (row, DTYPES[row.accumulator])),
    }
    for name, (shape, dtypes) in expected.items():
        if name not in given:
            continue
        if given[name][0] != shape:
            raise wrong(name, f"shape {given[name][0]}", f"{shape} beside Q of {q}")
        if given[name][1] not in dtypes:
            raise wrong(name, f"dtype {given[name][1].name}", " or ".join(dict.fromkeys(d.name for d in dtypes)))


def _position(name: str, value: Any) -> int:
    """Of a tile's first row or key in its sequence. Raises: SpecError."""
    number = integer(value)
    if number is None or not 0 <= number <= LARGEST_POSITION:
        raise wrong(name, repr(value), f"an integer from 0 to {LARGEST_POSITION}")
    return number


def _meets(spec: AttentionSpec, offset: int) -> bool:
    """Whether some query sees some key."""
    return spec.band is None or visible_pairs(replace(spec, heads=1, kv_heads=1), offset) > 0


STATE = ("A", "logsumexp")  # what a forward call writes
GRADIENTS = ("dK", "dQ", "dV")


def check_apart(spans: dict[str, tuple[int, int]], written: Collection[str] = STATE) -> None:
    """What is written shares no byte with anything else."""
    for name in written:
        check_outside(name, spans[name], ((other, *span) for other, span in spans.items() if other != name))
