"""One call on all ranks: described, compared and planned before anything is submitted; an error of one reaches all.

A rank computes its own query tiles, in the order in which one process would, so bits do not depend on the number of
ranks. A key tile goes once to each rank of which some query sees some of it, and not at all to the others.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flashtile.dtypes import DTYPES, DType
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.flow import FORWARD_VALUES, Flow
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.states import submit_finish
from flashtile.engines.starpu.tiles import DROP, TiledTensor
from flashtile.engines.starpu_mpi.bias import ROWS, RowsOfBias, blocks_of, point
from flashtile.engines.starpu_mpi.link import POLL_SECONDS, Link
from flashtile.engines.starpu_mpi.parts import rows_of, tiles_of
from flashtile.errors import FlashtileError, KernelError, wrong
from flashtile.score.capture import ArrayCapture
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

SHORTEST_PAUSE = 2e-5  # seconds

T = TypeVar("T")


class _Failure(NamedTuple):
    """What a rank raised, as the others hear of it."""

    kind: type[Exception]
    text: str


def agree(comm: Any, what: Callable[[], T]) -> list[T]:
    """What `what` returns on each rank. Raises: on every rank, where one raised; the others name that one."""
    raised: BaseException | None = None
    try:
        mine: Any = what()
    except Exception as error:
        raised = error
        kind = type(error) if isinstance(error, FlashtileError) else KernelError
        mine = _Failure(kind, " ".join(str(error).split()) or type(error).__name__)
    _meet(comm)
    found = comm.allgather(mine)
    if raised is not None:
        raise raised
    for rank, other in enumerate(found):
        if isinstance(other, _Failure):
            raise other.kind(f"rank {rank}: {other.text}")
    return found


def _meet(comm: Any) -> None:
    """Return when all ranks are here. A collective call of MPI would wait with a core to itself, of which another rank,
    or a worker of this one, may have use."""
    arrived, pause = comm.Ibarrier(), SHORTEST_PAUSE
    while not arrived.Test():
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)


def same(every: list[dict[str, Any]], apart: int = 1) -> None:
    """Raise SpecError unless what all ranks said is the same, or what those said that are so many apart: it names the
    first rank that differs, and in what."""
    for rank, other in enumerate(every):
        for name, value in every[rank % apart].items():
            if other[name] != value:
                raise wrong(f"rank {rank}: {name}", other[name], f"{value} as on rank {rank % apart}")


def identity(spec: AttentionSpec, scoring: Scoring | None, offsets: np.ndarray | None) -> str:
    """A digest of everything that decides what is computed but q, k and v: equal where plans are."""
    digest = hashlib.blake2b(repr(spec).encode(), digest_size=16)
    arrays = [offsets]
    if scoring is not None:
        digest.update(repr(scoring.keep).encode())
        arrays.append(scoring.sinks)
        for found in () if scoring.program is None else scoring.program.captures:
            arrays.append(found.array if isinstance(found, ArrayCapture) else np.asarray(found.value))
    for array in arrays:
        if array is not None:
            digest.update(repr((array.shape, str(array.dtype))).encode())
            if array.size and not any(array.strides):  # one element, as what stands for an array
                array = array[(slice(1),) * array.ndim]
            digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class Cut:
    """How the sequences of a call lie over ranks."""

    ranks: int
    tile: int
    distribution: str

    def tiles(self, length: int, rank: int) -> np.ndarray:
        """The numbers of a rank's tiles, ascending."""
        return tiles_of(length, rank, self.ranks, self.tile, self.distribution)

    def numbers(self, length: int, rank: int) -> np.ndarray:
        """The numbers of a rank's rows, in its order."""
        return rows_of(self.tiles(length, rank), length, self.tile)

    def owners(self, length: int) -> np.ndarray:
        """int64 (tiles): the rank that has each."""
        owner = np.empty(-(-length // self.tile), np.int64)
        for rank in range(self.ranks):
            owner[self.tiles(length, rank)] = rank
        return owner

    def rows(self, length: int, rank: int) -> int:
        """How many rows a rank has."""
        return len(self.numbers(length, rank))


class Placed(NamedTuple):
    """The handles of a tensor of which some tiles are elsewhere."""

    handles: np.ndarray
    turned: bool = False


class Exchange:
    """Tiles of a sequence from the ranks that have them to those that need them."""

    def __init__(
        self, comm: Any, link: Link, cut: Cut, length: int, needs: list[np.ndarray], urgency: np.ndarray
    ) -> None:
        """needs: bool (B, heads, tiles) for each rank: what it reads of the tiles of others; urgency (ranks, tiles):
        how early it does."""
        self.comm, self.link, self.cut, self.length, self.needs = comm, link, cut, length, needs
        self.urgency = urgency
        self.mine = cut.tiles(length, comm.Get_rank())
        self.owner = cut.owners(length)

    @classmethod
    def of(
        cls, comm: Any, link: Link, cut: Cut, length: int, seen: Callable[[int], np.ndarray], urgency: np.ndarray
    ) -> Exchange:
        """seen: of a rank, the tiles (B, heads, tiles) that it reads, its own among them."""
        needs = [seen(rank).copy() for rank in range(cut.ranks)]
        for rank, need in enumerate(needs):
            need[:, :, cut.tiles(length, rank)] = False
        return cls(comm, link, cut, length, needs, urgency)

    def place(self, tensor: TiledTensor) -> Placed:
        """A tensor's own tiles, where they stand in the whole."""
        handles = np.zeros((*tensor.shape[:2], len(self.owner)), np.uint64)
        handles[:, :, self.mine] = tensor.handles
        return Placed(handles)

    def begin(self, own: list[TiledTensor], tensors: list[TiledTensor]) -> list[Placed]:
        """Begin every transfer of tensors that are cut alike; all with the tiles that will have come."""
        need = self.needs[self.comm.Get_rank()]
        grid = (len(own), *need.shape)
        tags = self.link.take_tags(int(np.prod(grid))).reshape(grid)
        self._send([self.place(tensor) for tensor in own], tags)
        placed = [self.room(tensor, tensors) for tensor in own]
        at = np.nonzero(need)
        for tensor, found, numbers in zip(own, placed, tags, strict=True):
            tensor.runtime.unwritten.difference_update(found.handles[at].tolist())
            self.link.receive(self.comm, found.handles[at], self.owner[at[2]], numbers[at])
        return placed

    def room(self, own: TiledTensor, tensors: list[TiledTensor]) -> Placed:
        """A tensor's own tiles, and room for those that this rank reads of others."""
        need, found = self.needs[self.comm.Get_rank()], self.place(own)
        far = np.flatnonzero(need.any(axis=(0, 1)))
        if height := len(rows_of(far, self.length, self.cut.tile)):
            tensors.append(TiledTensor((*need.shape[:2], height, *own.shape[3:]), own.dtype, self.cut.tile))
            found.handles[:, :, far] = tensors[-1].handles
        return found

    def _send(self, placed: list[Placed], tags: np.ndarray) -> None:
        """Begin to send: of what receivers meet first, head by head, tensor by tensor."""
        mine = self.owner == self.comm.Get_rank()
        to, batch, head, number = np.nonzero(np.stack(self.needs) & mine)
        which = np.repeat(np.arange(len(placed)), len(to))
        to, batch, head, number = (np.tile(x, len(placed)) for x in (to, batch, head, number))
        order = np.lexsort((number, to, which, head, batch, self.urgency[to, number]))
        to, which, *at = (x[order] for x in (to, which, batch, head, number))
        handles = np.stack([x.handles for x in placed])
        self.link.send(self.comm, handles[(which, *at)], to, tags[(which, *at)])


class Collective:
    """A planned call on this rank. Made and run on all ranks together."""

    def __init__(
        self,
        comm: Any,
        spec: AttentionSpec,
        cut: Cut,
        offsets: np.ndarray | None,
        scoring: Scoring | None,
        bias: RowsOfBias | None = None,
    ) -> None:
        """bias: of which the program has what stands for the whole."""
        self.comm, self.spec, self.cut = comm, spec, cut
        self.runtime = runtime.ensure()
        self.link = self.runtime.once(Link)
        rank = comm.Get_rank()
        self.queries, self.keys = cut.tiles(spec.q_len, rank), cut.tiles(spec.kv_len, rank)
        offsets = offsets if spec.offset is None else None
        tile = cut.tile
        with self.runtime.working():
            self.flow = Flow(self.runtime, spec, tile, tile, offsets=offsets, scoring=scoring, rows=self.queries)
        if bias is not None:
            assert scoring is not None and scoring.program is not None
            bias.check(spec, tile)
            program = scoring.program
            self._blocks = blocks_of(program, bias.slot(program), bias.mine, ROWS, self.queries, tile)
            words = self.flow.tasks["values"][:, FORWARD_VALUES.index("captures")]
            point(words, self.flow.pairs.query_tile, self.queries, self._blocks)
        touched = self.flow.coverage.touched()
        urgency = urgency_of(spec, cut, touched)
        seen = partial(keys_seen, spec, cut, touched)
        self.of_keys = Exchange.of(comm, self.link, cut, spec.kv_len, seen, urgency)

    @property
    def received_bytes(self) -> int:
        """Bytes of keys and values that come to this rank; no less would do for tiles of this size."""
        spec, tile = self.spec, self.cut.tile
        need = self.of_keys.needs[self.comm.Get_rank()]
        heights = np.minimum(tile, spec.kv_len - tile * np.arange(need.shape[2]))
        rows = int((need * heights).sum())
        return rows * (spec.head_size + spec.value_size) * DTYPES[spec.dtype].itemsize

    def run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray) -> None:
        """Compute o and lse of this rank's rows; all arrays are this rank's, rows of adjacent elements.

        Raises: KernelError on every rank, naming the rank, the codelet and the tile that failed first.
        """
        dtype = DTYPES[self.spec.dtype]
        accumulator = DTYPES[dtype.accumulator]
        tensors: list[TiledTensor] = []
        job = Job()

        def tiled(x: np.ndarray, kind: DType) -> TiledTensor:
            tensors.append(TiledTensor(x.shape, kind, self.cut.tile, address=x.ctypes.data, strides=x.strides, keep=x))
            return tensors[-1]

        placed: list[TiledTensor] = []

        def place() -> None:
            out, logs = tiled(o, dtype), tiled(lse, accumulator)
            state = out
            if accumulator is not dtype:
                state = TiledTensor(o.shape, accumulator, self.cut.tile)
                tensors.append(state)
            placed.extend([*(tiled(x, dtype) for x in (q, k, v)), out, logs, state])

        def compute() -> None:
            own_q, own_k, own_v, out, logs, state = placed
            try:
                keys, values = self.of_keys.begin([own_k, own_v], tensors)
                queries, sums, norms = (self._placed(x) for x in (own_q, state, logs))
                self.flow.submit_forward(job, queries, keys, values, sums, norms)
                if state is not out:
                    submit_finish(job, state, logs, out)
                job.wait()
            finally:
                job.drain()
                self.link.wait()

        with self.runtime.working():
            try:
                agree(self.comm, place)  # no rank waits for tiles of one that could not begin
                agree(self.comm, compute)
            finally:
                for x in tensors:
                    x.unregister(DROP if x.owned else None)

    def _placed(self, tensor: TiledTensor) -> Placed:
        """A tensor's own query tiles, where they stand in the whole."""
        spec = self.spec
        handles = np.zeros((spec.batch, spec.heads, -(-spec.q_len // self.cut.tile)), np.uint64)
        handles[:, :, self.queries] = tensor.handles
        return Placed(handles)


def urgency_of(spec: AttentionSpec, cut: Cut, touched: np.ndarray) -> np.ndarray:
    """int64 (ranks, key tiles): the earliest place of a tile in the chains of a rank's queries; of tiles that are not
    in them the last place there is."""
    meet = touched.any(axis=(0, 1))
    queries, keys = meet.shape
    last = queries + keys
    found = np.full((cut.ranks, keys), last)
    if not keys:
        return found
    own = np.minimum(np.arange(queries), keys - 1)
    order = (own[:, None] - np.arange(keys)) % keys  # of the keys of each query tile: flow.py
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.take_along_axis(meet, order, 1).cumsum(axis=1) - 1, 1)
    place[~meet] = last
    for rank in range(cut.ranks):
        found[rank] = place[cut.tiles(spec.q_len, rank)].min(axis=0, initial=last)
    return found


def keys_seen(spec: AttentionSpec, cut: Cut, touched: np.ndarray, rank: int) -> np.ndarray:
    """bool (B, H_kv, key tiles): the keys of which some row of a rank sees some."""
    mine = touched[:, :, cut.tiles(spec.q_len, rank)].any(axis=2)
    seen = np.broadcast_to(mine, (spec.batch, spec.heads, touched.shape[3]))
    return np.asarray(seen.reshape(spec.batch, spec.kv_heads, spec.group, touched.shape[3]).any(axis=2))


def queries_seen(spec: AttentionSpec, cut: Cut, touched: np.ndarray, rank: int) -> np.ndarray:
    """bool (B, H, query tiles): the rows of which some sees some key of a rank."""
    seen = touched[:, :, :, cut.tiles(spec.kv_len, rank)].any(axis=3)
    return np.asarray(np.broadcast_to(seen, (spec.batch, spec.heads, touched.shape[2])))
