"""The gradients of a call over many ranks: the tasks of engines/starpu_mpi/gradients.py, and when they run.

A pair of tiles is a task of five products on the rank that has its keys. Tasks that add to dK and dV of a key tile
follow one another, and so do those that add to dQ of a query tile, whose sum goes from rank to rank (journey.py). So
ranks wait for one another, and are simulated together: in one step each rank whose next task begins before the first
of all could end begins it, since what it waits for is known by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.backward import pairs_of
from flashtile.engines.starpu.flow import Pairs
from flashtile.engines.starpu_mpi.journey import HOME, Legs, legs_of
from flashtile.engines.starpu_mpi.order import first_use, steps_of
from flashtile.engines.starpu_mpi.simulation.network import Network, Traffic
from flashtile.engines.starpu_mpi.simulation.plan import Plan
from flashtile.engines.starpu_mpi.simulation.schedule import Times


@dataclass(frozen=True)
class BackwardPlan:
    """The backward of a forward's plan."""

    plan: Plan

    @cached_property
    def pairs(self) -> Pairs:
        """Of one head, in the order of submission."""
        return pairs_of(self.plan.coverage.spec, self.plan.coverage, steps=steps_of(self.plan.touched))

    @cached_property
    def legs(self) -> Legs:
        """Of the sums of one head."""
        return legs_of(self.pairs, self.plan.query_owner, self.plan.key_owner)

    @cached_property
    def wide(self) -> int:
        """Bytes of a sum's element."""
        return DTYPES[DTYPES[self.plan.spec.dtype].accumulator].itemsize

    @cached_property
    def heights(self) -> np.ndarray:
        """int64 (query tiles): rows of each."""
        return np.minimum(self.plan.tile, self.plan.spec.q_len - self.plan.tile * np.arange(len(self.plan.query_owner)))

    @cached_property
    def traffic(self) -> Traffic:
        """q, do, lse and delta to the keys that these rows see."""
        plan, spec = self.plan, self.plan.spec
        _, key = plan.pairs_owners(self.pairs)
        needs = np.zeros((plan.ranks, len(plan.query_owner)), bool)
        needs[key, self.pairs.query_tile] = True
        needs[plan.query_owner, np.arange(len(plan.query_owner))] = False
        urgency = first_use(plan.ranks, key, self.pairs.query_tile, len(plan.query_owner))
        size = DTYPES[spec.dtype].itemsize
        row = np.array([spec.head_size * size, spec.value_size * size, self.wide, self.wide])
        return Traffic(needs, plan.query_owner, self.heights, row, plan.heads, urgency)

    @cached_property
    def tasks(self) -> np.ndarray:
        """int64 (ranks): of delta, of pairs, and those that cast 16-bit gradients."""
        plan, ranks = self.plan, self.plan.ranks
        _, key = plan.pairs_owners(self.pairs)
        rows, keys = np.bincount(plan.query_owner, minlength=ranks), np.bincount(plan.key_owner, minlength=ranks)
        narrow = int(DTYPES[plan.spec.dtype].accumulator != plan.spec.dtype)
        found = np.bincount(key, minlength=ranks) + rows + narrow * rows
        return np.asarray(plan.heads * found + narrow * 2 * plan.kv_heads * keys)

    @cached_property
    def leg_bytes(self) -> np.ndarray:
        """int64: of each leg."""
        return np.asarray(self.heights[self.legs.query_tile] * (self.plan.spec.head_size * self.wide))

    @property
    def received_bytes(self) -> np.ndarray:
        """int64 (ranks)."""
        return self.traffic.received_bytes + self._of_legs(self.legs.receiver)

    @property
    def sent_bytes(self) -> np.ndarray:
        """int64 (ranks)."""
        return self.traffic.sent_bytes + self._of_legs(self.legs.sender)

    def _of_legs(self, ranks: np.ndarray) -> np.ndarray:
        found = np.bincount(ranks, self.leg_bytes, self.plan.ranks).astype(np.int64)
        return np.asarray(self.plan.heads * found)

    @cached_property
    def flops(self) -> np.ndarray:
        """Of a task of each pair."""
        spec, p = self.plan.spec, self.pairs
        visible, _ = self.plan.coverage.amount(p.batch, p.head, p.query_tile, p.key_tile)
        return np.asarray(2.0 * (3 * spec.head_size + 2 * spec.value_size) * visible)


def run(
    plan: BackwardPlan,
    seconds: np.ndarray,
    arrived: np.ndarray,
    workers: int,
    overhead: float,
    network: Network,
    share: float = 0.0,
) -> Times:
    """seconds: of a task of each pair; arrived: of rows (ranks, heads, query tiles). A task takes a worker `overhead`
    more, and the part `share` of its time on a rank that exchanges tiles. A sum that leaves waits for sums that its
    rank sends, and overtakes tiles that wait to be sent."""
    slower = 1 + share * ((plan.received_bytes + plan.sent_bytes) > 0)
    _, keys = plan.plan.pairs_owners(plan.pairs)
    seconds = seconds * slower[keys]
    state = _Run(plan, seconds + overhead, arrived, network)
    whole = plan.plan
    began = whole.heads * np.bincount(whole.query_owner, minlength=whole.ranks) * overhead  # the tasks of delta
    free = np.repeat((began / workers)[:, None], workers, axis=1)
    busy, every = began.copy(), np.arange(whole.ranks)
    ahead = float((seconds + overhead).min(initial=np.inf))
    while True:
        worker = free.argmin(axis=1)
        start = np.maximum(free[every, worker], state.ready.min(axis=1, initial=np.inf))
        first = start.min()
        if not np.isfinite(first):
            break
        rank = np.flatnonzero(start <= first + ahead * (1 - 1e-9))
        begin = start[rank]
        slot = np.where(state.ready[rank] <= begin[:, None], state.turn[rank], np.inf).argmin(axis=1)
        end = state.take(rank, slot, begin)
        free[rank, worker[rank]] = end
        busy[rank] += end - begin
    return Times(np.maximum(free.max(axis=1), state.home), busy)


class _Run:
    """Key tiles as slots of their ranks (ranks, slots), each with its next task; query tiles (heads, tiles), each with
    the place that its sum has come to. Of tasks that can begin, that submitted first is first, as in the engine."""

    def __init__(self, plan: BackwardPlan, cost: np.ndarray, arrived: np.ndarray, network: Network) -> None:
        whole, p = plan.plan, plan.pairs
        self.plan, self.cost, self.arrived, self.latency = whole, cost, arrived, network.latency
        self.query, self.place = p.query_tile, p.place
        self.group, tiles = whole.spec.group, len(whole.key_owner)
        self.by_key = np.argsort(p.key_tile, kind="stable")  # pairs, column by column in their order
        self.begins = np.searchsorted(p.key_tile[self.by_key], np.arange(tiles + 1))
        owned = [whole.tiles(whole.spec.kv_len, rank) for rank in range(whole.ranks)]
        self.width = max(map(len, owned), default=0)
        held = np.full((whole.ranks, self.width), -1)
        self.place_of = np.zeros(tiles, np.int64)  # of a key tile, among those of its rank
        for rank, own in enumerate(owned):
            held[rank, : len(own)] = own
            self.place_of[own] = np.arange(len(own))
        self.key = np.tile(held, whole.kv_heads)
        self.kv = np.broadcast_to(np.repeat(np.arange(whole.kv_heads), self.width), self.key.shape)
        self.number = np.zeros(self.key.shape, np.int64)  # of a slot's next task, among all of its heads
        self.done = np.zeros(self.key.shape)
        shape = whole.heads, len(whole.query_owner)
        self.come, self.there = np.zeros(shape, np.int64), np.zeros(shape)
        self._follow(plan, network)
        self.ready, self.turn = np.full(self.key.shape, np.inf), np.full(self.key.shape, np.inf)
        self._look(*(x.ravel() for x in np.indices(self.key.shape)))

    def _follow(self, plan: BackwardPlan, network: Network) -> None:
        """Of each pair, the key tile that its sum meets next, -1 for none, and seconds of the leg after it, if any."""
        p, legs, whole = plan.pairs, plan.legs, self.plan
        order = np.lexsort((p.place, p.query_tile))
        follows = np.diff(p.query_tile[order]) == 0
        self.next_key = np.full(len(order), -1)
        self.next_key[order[:-1][follows]] = p.key_tile[order[1:][follows]]
        self.leg = np.zeros(len(order))
        took, leaves = network.seconds(plan.leg_bytes), legs.after != HOME
        self.leg[legs.after[leaves]] = took[leaves]
        self.moves = np.zeros(len(order), bool)
        self.moves[legs.after[leaves]] = True
        self.there[:, legs.query_tile[~leaves]] = network.latency + took[~leaves]
        self.sending, self.home = np.zeros(whole.ranks), np.zeros(whole.ranks)

    def _task(self, rank: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pair, head, whether there is one) of next tasks."""
        key, number = self.key[rank, slot], self.number[rank, slot]
        size = np.where(key < 0, 0, self.begins[key + 1] - self.begins[key])
        some = number < self.group * size
        turn, at = np.divmod(number, np.maximum(size, 1))
        pair = self.by_key[np.where(some, self.begins[key] + at, 0)]
        return pair, np.where(some, self.kv[rank, slot] * self.group + turn, 0), some

    def _look(self, rank: np.ndarray, slot: np.ndarray) -> None:
        """When the next tasks of some slots can begin, as far as is known; and their turns."""
        if not len(self.by_key):
            return
        pair, head, some = self._task(rank, slot)
        i = self.query[pair]
        some = some & (self.come[head, i] == self.place[pair])
        ready = np.maximum(np.maximum(self.there[head, i], self.arrived[rank, head, i]), self.done[rank, slot])
        self.ready[rank, slot] = np.where(some, ready, np.inf)
        self.turn[rank, slot] = head * len(self.by_key) + pair

    def take(self, rank: np.ndarray, slot: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """A task of each of some ranks begins; returns when they end."""
        pair, head, _ = self._task(rank, slot)
        i, end = self.query[pair], begin + self.cost[pair]
        self.done[rank, slot] = end
        self.number[rank, slot] += 1
        moves = self.moves[pair]
        left = np.maximum(end, self.sending[rank]) + self.leg[pair]
        self.sending[rank] = np.where(moves, left, self.sending[rank])
        self.come[head, i] += 1
        self.there[head, i] = np.where(moves, left + self.latency, end)
        self._look(rank, slot)
        more = self.next_key[pair] >= 0
        np.maximum.at(self.home, self.plan.query_owner[i[~more]], self.there[head, i][~more])
        key, kv = self.next_key[pair[more]], head[more] // self.group
        self._look(self.plan.key_owner[key], kv * self.width + self.place_of[key])
        return end
