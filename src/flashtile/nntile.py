"""The door for NNTile: flash attention on Fortran-ordered tiles, one key tile a call::

    A, logsumexp = zeros, minus infinity
    for K, V, mask in key tiles:
        nntile.flash_sdpa_fwd(K, Q, mask, logsumexp, V, A)

Shapes are NNTile's, in Fortran order: Q and A [head_size, n_seq, n_batch, kv_group_size, n_head_kv], K and V the same
with their own n_seq, mask [n_seq of K, n_seq of Q], logsumexp [n_seq of Q, n_batch, kv_group_size, n_head_kv].

`flash_sdpa_fwd` computes on NumPy arrays before it returns. `flash_sdpa_fwd_async` submits one StarPU task on tiles,
in the order of NNTile's arguments, with modes R, R, R, RW, R, RW; `flashtile.starpu` starts StarPU and waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.arrays import address_of, plain
from flashtile.checks import integer
from flashtile.dtypes import DTYPES, DType, dtype_of
from flashtile.engines import direct
from flashtile.errors import wrong
from flashtile.kernels import tile_kernels
from flashtile.kernels.tiles import Native
from flashtile.plan import Plan
from flashtile.plan.coverage import visible_pairs
from flashtile.plan.tiling import flops_of
from flashtile.spec import LARGEST_POSITION, AttentionSpec

if TYPE_CHECKING:
    from flashtile.engines.starpu.tiles import TiledTensor

__all__ = ["DTYPE_NAMES", "Tile", "empty", "flash_sdpa_fwd", "flash_sdpa_fwd_async", "register", "wrap"]

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


class _Call(NamedTuple):
    """A validated call: what is computed, the offset of its band, and the dtype of its mask."""

    spec: AttentionSpec
    offset: int
    mask: str | None


def flash_sdpa_fwd(
    K: Any,
    Q: Any,
    mask: Any,
    logsumexp: Any,
    V: Any,
    A: Any,
    *,
    dtype: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    first_query: int = 0,
    first_key: int = 0,
    scale: float | None = None,
) -> None:
    """Add one key tile to (A, logsumexp), which hold the state of earlier ones: at first 0 and -inf.

    Shapes:   Fortran-ordered arrays; K, V [head_size, n_keys, n_batch, kv_group_size, n_head_kv]; Q, A the same with
              n_queries; mask [n_keys, n_queries] or None; logsumexp [n_queries, n_batch, kv_group_size, n_head_kv] in
              float32 (float64 for float64). n_keys and n_queries may differ, and so may the head size of V and A.
              mask in the dtype of Q, or float32, is added to the scores (0 shows, -inf hides); a bool mask shows what
              is True.
    Options:  dtype      one of NNTile's names, DTYPE_NAMES, if it is not the arrays' own: "fp32_fast_tf32",
                         "fp32_fast_fp16" and "fp32_fast_bf16" say how the products of float32 arrays may be rounded.
              causal, window  computed masks, as in `flashtile.attention`, between query first_query + i and key
                         first_key + j; they join a stored one.
              scale      by default 1 / sqrt(head_size).
    Numerics: sums in float32 (float64 for float64). In 16 bits A is rounded to nearest once a call: after n key tiles
              it is off by at most n x 0.5 ulp (of the largest element of A on the way, by size) from a sum that was
              kept in float32.
    Raises:   SpecError before memory is touched; KernelError.
    Source:   NNTile's flash_sdpa_fwd; Milakov and Gimelshein 2018 for the state.

    >>> from flashtile import nntile
    >>> rng = np.random.default_rng(0)
    >>> Q, K, V = (np.asfortranarray(rng.standard_normal((64, n, 2, 1, 4), np.float32)) for n in (128, 256, 256))
    >>> A, logsumexp = np.zeros_like(Q), np.full((128, 2, 1, 4), -np.inf, np.float32, order="F")
    >>> for at in (0, 128):
    ...     k, v = (np.asfortranarray(x[:, at : at + 128]) for x in (K, V))
    ...     nntile.flash_sdpa_fwd(k, Q, None, logsumexp, v, A)
    >>> rows = [x.transpose(2, 4, 3, 1, 0).reshape(2, 4, -1, 64) for x in (Q, K, V)]
    >>> bool(np.abs(A.transpose(2, 4, 3, 1, 0).reshape(2, 4, -1, 64) - flashtile.attention(*rows)).max() < 1e-6)
    True
    """
    given = {"K": K, "Q": Q, "V": V, "A": A, "logsumexp": logsumexp, **({} if mask is None else {"mask": mask})}
    arrays = {name: plain(x, name) for name, x in given.items()}
    for name, x in arrays.items():
        if x.size and not x.flags.f_contiguous:
            raise wrong(name, f"strides {x.strides}", "a Fortran-ordered array: the first axis contiguous, no gaps")
        if name in ("A", "logsumexp") and not x.flags.writeable:
            raise wrong(name, "a read-only array", "a writable one")
    described = {name: (x.shape, _row_of(name, x.dtype)) for name, x in arrays.items()}
    call = _validated(described, dtype, causal, window, first_query, first_key, scale)
    _check_apart({name: (address_of(x), address_of(x) + x.nbytes) for name, x in arrays.items()})
    if call is not None:
        _run(call, arrays)


def flash_sdpa_fwd_async(
    K: Tile,
    Q: Tile,
    mask: Tile | None,
    logsumexp: Tile,
    V: Tile,
    A: Tile,
    *,
    dtype: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    first_query: int = 0,
    first_key: int = 0,
    scale: float | None = None,
    accumulate: str = "ordered",
) -> int:
    """Submit `flash_sdpa_fwd` on tiles as one task; returns 1, or 0 if the computed mask hides every key.

    Arguments as there, tiles in place of arrays. accumulate "commute" lets StarPU take the calls on one A in any order
    (STARPU_COMMUTE): the bits may then differ from run to run. Does not wait; `flashtile.starpu.wait` does, and raises
    what a task met, naming codelet, first_query and first_key.
    Raises: SpecError, UnavailableError.
    """
    from flashtile.engines.starpu import accumulation

    given = {"K": K, "Q": Q, "V": V, "A": A, "logsumexp": logsumexp, **({} if mask is None else {"mask": mask})}
    for name, tile in given.items():
        if not isinstance(tile, Tile):
            raise wrong(name, f"a {type(tile).__name__}", "a tile: nntile.register, nntile.empty or nntile.wrap")
        tile.tensor.check()
        if name in ("A", "logsumexp") and not tile.tensor.writable:
            raise wrong(name, "a read-only array", "a writable one")
    described = {name: (tile.shape, tile.dtype) for name, tile in given.items()}
    call = _validated(described, dtype, causal, window, first_query, first_key, scale)
    _check_apart({name: tile.tensor.extent for name, tile in given.items()})
    handles = {name: tile.tensor[0, 0, 0].address for name, tile in given.items()}
    for name in ("A", "logsumexp"):
        if [*handles.values()].count(handles[name]) > 1:
            raise wrong(name, "a tile that is another argument too", "a tile of its own")
    if call is None:
        return 0
    return accumulation.submit(call.spec, call.offset, call.mask, handles, (first_query, first_key), accumulate)


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
    row, n = _row_of("array", array.dtype), array.size
    first, strides = address_of(array), (0, 0, n * row.itemsize)
    tensor = _tensors().TiledTensor((1, 1, 1, n), row, 1, address=first, strides=strides, keep=[array])
    tensor.extent, tensor.writable = (first, first + array.nbytes), array.flags.writeable
    return Tile(tensor, array.shape)


def empty(shape: Sequence[int], dtype: Any) -> Tile:
    """A tile that StarPU owns; dtype as NumPy or NNTile names it, or bool."""
    numbers = _shape_of(shape)
    return Tile(_tensors().TiledTensor((1, 1, 1, int(np.prod(numbers))), _row_of("dtype", dtype), 1), numbers)


def wrap(handle: int, shape: Sequence[int], dtype: Any) -> Tile:
    """A tile over a handle of the program's own: its address (starpu_data_handle_t), contiguous, of the right size."""
    numbers = _shape_of(shape)
    handles = np.full((1, 1, 1), handle, np.uint64)
    size = int(np.prod(numbers))
    return Tile(_tensors().TiledTensor.wrap(handles, (1, 1, 1, size), _row_of("dtype", dtype), 1), numbers)


def _tensors() -> Any:
    from flashtile.engines.starpu import tiles

    return tiles


def _shape_of(shape: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(integer(n) or 0 for n in shape)
    if not numbers or min(numbers) < 1:
        raise wrong("shape", repr(shape), "positive integers")
    return numbers


def _row_of(argument: str, dtype: Any) -> DType:
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


def _validated(
    given: Described, dtype: str | None, causal: Any, window: Any, first_query: Any, first_key: Any, scale: Any
) -> _Call | None:
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
    return _Call(spec, offset, given["mask"][1].name if "mask" in given else None)


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


def _check_apart(spans: dict[str, tuple[int, int]]) -> None:
    """What is written shares no byte with anything else."""
    for name in ("A", "logsumexp"):
        for other, span in spans.items():
            if other != name and max(span[0], spans[name][0]) < min(span[1], spans[name][1]):
                raise wrong(name, f"an array within the memory that {other} spans", "memory of its own")


def _run(call: _Call, arrays: dict[str, np.ndarray]) -> None:
    """Compute on the embedded engine's threads."""
    kernel = tile_kernels().accumulating(call.spec, call.mask)
    words = {"Q": "q", "K": "k", "V": "v", "A": "o", "logsumexp": "lse", "mask": "mask"}
    block = kernel.filled(offset=call.offset, **{words[name]: address_of(x) for name, x in arrays.items()})
    query_tiles = kernel.items // call.spec.heads
    plan = Plan(1, call.spec.heads, query_tiles, 1, 1, call.spec.kv_len, flops_of(call.spec))
    direct.prepare(plan, Native(kernel))(address_of(block))
