"""What a task of the graph runs: the queries of one block on one key tile, in machine code and without the GIL.

Tasks are pure, as Dask wants them: a state that a task continues is copied first, which costs little beside the two
products. So a task may run twice, on any worker, and give the same bits.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from flashtile.arrays import address_of
from flashtile.dtypes import DTYPES
from flashtile.errors import KernelError
from flashtile.kernels import tile_kernels
from flashtile.kernels.tiles import Native, TileKernel
from flashtile.score.captures import Block
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

CACHE_LINE = 64
KEPT = 64  # calls that a process remembers

# What a task does for a head of its block.
VISIT, CARRY, LAST, NO_KEYS = 1, 2, 4, 8

State = tuple[np.ndarray, np.ndarray]  # o (b, h, rows, D_v) in the accumulator's dtype, lse (b, h, rows)

_here = threading.local()
_kept: OrderedDict[str, Work] = OrderedDict()
_lock = threading.Lock()


@dataclass(eq=False)
class Work:
    """Everything of a call that its tasks share, values of captured arrays included: one node of the graph, which
    goes to each worker once.

    offsets: int64 (B,), where spec.offset is None. bias: the slot of a captured array that comes block by block.
    """

    spec: AttentionSpec
    scoring: Scoring | None
    offsets: np.ndarray | None
    tile_q: int
    tile_k: int
    bias: int | None = None
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (type(self), *(getattr(self, x.name) for x in fields(self)))

    @cached_property
    def forward(self) -> tuple[TileKernel, Native]:
        at = 0 if self.offsets is None else address_of(self.offsets)
        kernel = tile_kernels().forward(self.spec, self.tile_q, self.tile_k, offsets=at, scoring=self.scoring)
        return kernel, Native(kernel)

    @cached_property
    def finish(self) -> tuple[TileKernel, Native]:
        kernel = tile_kernels().finish(self.spec.dtype, self.spec.value_size)
        return kernel, Native(kernel)

    def item(self, head: int, i: int, j: int) -> int:
        """The kernel's number of query tile i on key tile j of a head, counted over all batches."""
        query_tiles, key_tiles = -(-self.spec.q_len // self.tile_q), max(1, -(-self.spec.kv_len // self.tile_k))
        return (head * query_tiles + i) * key_tiles + j

    @property
    def narrow(self) -> bool:
        """Whether outputs are cast from the state at the end."""
        return DTYPES[self.spec.dtype].accumulator != self.spec.dtype

    @property
    def accumulator(self) -> np.dtype:
        return DTYPES[DTYPES[self.spec.dtype].accumulator].numpy


def _received(kind: type[Work], *values: Any) -> Work:
    """The work of these fields; in a process that has it, that one with its compiled kernel."""
    work = kind(*values)
    with _lock:
        work = _kept.setdefault(work.uid, work)
        _kept.move_to_end(work.uid)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return work


def step(
    work: Work,
    batch: int,
    head: int,
    i: int,
    j: int,
    visits: Any,
    final: bool,
    state: State | None,
    q: np.ndarray,
    k: np.ndarray | None,
    v: np.ndarray | None,
    bias: np.ndarray | None = None,
) -> State:
    """Query tile i of a block of heads on key tile j; of a final task o is in the inputs' dtype.

    Shapes:  q (b, h, rows, D), k (b, h_kv, keys, D), v (b, h_kv, keys, D_v): batches from `batch` and query heads from
             `head` on. visits: what to do for each head, uint8 that broadcasts to (b, h). state None: there is none.
             bias: the block of a bias, whose axes of one element are those of the whole.
    Raises:  KernelError naming the tile.
    """
    spec = work.spec
    kernel, native = work.forward
    q, k, v = (None if x is None else adjacent(x) for x in (q, k, v))  # type: ignore[assignment]  # q is there
    sizes = q.shape[:3]
    if state is None:
        o, lse = np.empty((*sizes, spec.value_size), work.accumulator), np.empty(sizes, work.accumulator)
    else:
        o, lse = state[0].copy(), state[1].copy()
    row, key = i * work.tile_q, max(j, 0) * work.tile_k
    captures = {} if bias is None else {"captures": captures_of(work, bias, batch, head, row, key)}
    block = kernel.filled(q_s=q.strides[2], o_s=o.strides[2], **{n: address_of(x) for n, x in captures.items()})
    scratch, sinks = scratch_at(kernel.scratch_bytes), int(block[kernel.words["sinks"]])
    todo = np.broadcast_to(visits, sizes[:2])
    for b, h in np.argwhere(todo).tolist():
        of_all = (batch + b) * spec.heads + head + h
        values = {
            "q": start_of(q, b, h, row),
            "o": start_of(o, b, h, row),
            "lse": address_of(lse) + b * lse.strides[0] + h * lse.strides[1] - of_all * spec.q_len * lse.itemsize,
            "carry": int(bool(todo[b, h] & CARRY)),
            "sinks": sinks if todo[b, h] & LAST else 0,
            "k": start_of(q, b, h, row),  # where no key is read the queries stand in
            "v": start_of(q, b, h, row),
            "kv_len": 0,
        }
        values["lse"] -= row * lse.itemsize
        if not todo[b, h] & NO_KEYS:
            assert k is not None and v is not None
            g = h // spec.group
            values |= {"k": start_of(k, b, g, key), "v": start_of(v, b, g, key)}
            values |= {"k_s": k.strides[2], "v_s": v.strides[2], "kv_len": key + k.shape[2]}
        for name, value in values.items():
            block[kernel.words[name]] = value
        item = work.item(of_all, i, max(j, 0))
        if status := native.run(address_of(block), item, item + 1, scratch):
            tile = f"batch {batch + b}, head {head + h}, query tile {i}, key tile {j}"
            raise KernelError(f"dask: the forward kernel failed on {tile} with status {status}")
    return (_finished(work, o, lse).view(q.dtype), lse) if final and work.narrow else (o, lse)


def _finished(work: Work, o: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """o in the inputs' dtype."""
    kernel, native = work.finish
    out = np.empty(o.shape, DTYPES[work.spec.dtype].numpy)
    rows = lse.size
    at = {"parts_o": address_of(o), "parts_lse": address_of(lse), "o": address_of(out), "o_s": out.strides[2]}
    block = kernel.filled(**at)
    if status := native.run(address_of(block), 0, rows, scratch_at(kernel.scratch_bytes)):
        raise KernelError(f"dask: the cast of a block failed with status {status}")
    return out


def read(array: Any, rank: int, *bounds: int) -> np.ndarray:
    """A block (b, h, rows, D) of a stored array of 2 to 4 axes; bounds: first and last of each of three axes."""
    spans = [slice(*pair) for pair in zip(bounds[::2], bounds[1::2], strict=True)][4 - rank :]
    found = np.asarray(array[(*spans, slice(None))])
    return found.reshape((1,) * (4 - rank) + found.shape)


def adjacent(x: np.ndarray) -> np.ndarray:
    """The array; or a copy whose rows are of adjacent elements."""
    x = np.asarray(x)
    fits = x.strides[3] == x.itemsize and x.strides[2] >= x.shape[3] * x.itemsize and not x.strides[2] % x.itemsize
    return x if fits else np.ascontiguousarray(x)


def start_of(x: np.ndarray, b: int, h: int, row: int) -> int:
    """Where the whole array of this head would begin, if the block began at its row `row`."""
    return address_of(x) + b * x.strides[0] + h * x.strides[1] - row * x.strides[2]


def captures_of(work: Work, bias: np.ndarray, *first: int) -> np.ndarray:
    """The capture block, where the block of the bias stands for the whole one."""
    assert work.scoring is not None and work.scoring.program is not None and work.bias is not None
    program = work.scoring.program
    return Block(program.slots).pack_part(program.captures, program.slots[work.bias], bias, first)


def scratch_at(size: int) -> int:
    """The address of this thread's scratch memory."""
    kept = getattr(_here, "scratch", None)
    if kept is None or kept.size < size + CACHE_LINE:
        kept = _here.scratch = np.empty(size + CACHE_LINE, np.uint8)
    return -(-kept.ctypes.data // CACHE_LINE) * CACHE_LINE
