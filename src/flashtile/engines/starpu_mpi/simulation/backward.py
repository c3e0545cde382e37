"""The gradients of a call over many ranks: the tasks of engines/starpu_mpi/gradients.py, and when they run.

A pair of tiles is one task on the rank that has both its rows and its keys, of five products; else one on each of two
ranks. Tasks that add to one gradient follow one another in their order. A worker takes, of the next WINDOW tasks in the
order in which their tiles can be there, the one that can begin first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.backward import pairs_of
from flashtile.engines.starpu.flow import Pairs
from flashtile.engines.starpu_mpi.simulation.network import Traffic
from flashtile.engines.starpu_mpi.simulation.plan import Plan
from flashtile.engines.starpu_mpi.simulation.schedule import Times

ROWS, KEYS, BOTH = 1, 2, 3  # the gradients that a task adds to: dQ, dK and dV, all
GRADIENTS = {ROWS: ("dq",), KEYS: ("dk", "dv"), BOTH: ("dq", "dk", "dv")}
AT_ONCE = 1 << 22  # tasks that are simulated together
WINDOW = 16


@dataclass(frozen=True)
class BackwardPlan:
    """The backward of a forward's plan."""

    plan: Plan

    @cached_property
    def pairs(self) -> Pairs:
        """Of one head, in the order of submission."""
        return pairs_of(self.plan.coverage.spec, self.plan.coverage)

    @cached_property
    def wide(self) -> int:
        """Bytes of a sum."""
        return DTYPES[DTYPES[self.plan.spec.dtype].accumulator].itemsize

    @cached_property
    def traffic(self) -> tuple[Traffic, Traffic]:
        """Keys and values to the rows that see them; q, do, lse and delta to the keys that these rows see."""
        plan, spec = self.plan, self.plan.spec
        own, key = plan.pairs_owners(self.pairs)
        needs = np.zeros((plan.ranks, len(plan.query_owner)), bool)
        needs[key, self.pairs.query_tile] = True
        needs[plan.query_owner, np.arange(len(plan.query_owner))] = False
        urgency = np.full(needs.shape, np.iinfo(np.int64).max)
        np.minimum.at(urgency, (key, self.pairs.query_tile), self.pairs.place)
        heights = np.minimum(plan.tile, spec.q_len - plan.tile * np.arange(len(plan.query_owner)))
        size = DTYPES[spec.dtype].itemsize
        row = np.array([spec.head_size * size, spec.value_size * size, self.wide, self.wide])
        return plan.traffic, Traffic(needs, plan.query_owner, heights, row, plan.heads, urgency)

    def kinds(self, rank: int) -> np.ndarray:
        """What a rank's task of each pair adds to; 0 where it has none."""
        own, key = self.plan.pairs_owners(self.pairs)
        return ROWS * (own == rank) + KEYS * (key == rank)

    @cached_property
    def tasks(self) -> np.ndarray:
        """int64 (ranks): of delta, of pairs, and those that cast 16-bit gradients."""
        plan, ranks = self.plan, self.plan.ranks
        own, key = plan.pairs_owners(self.pairs)
        rows, keys = np.bincount(plan.query_owner, minlength=ranks), np.bincount(plan.key_owner, minlength=ranks)
        found = np.bincount(own, minlength=ranks) + np.bincount(key[key != own], minlength=ranks) + rows
        narrow = int(DTYPES[plan.spec.dtype].accumulator != plan.spec.dtype)
        return plan.heads * (found + narrow * rows) + narrow * 2 * plan.kv_heads * keys

    @property
    def received_bytes(self) -> np.ndarray:
        """int64 (ranks)."""
        return self.traffic[0].received_bytes + self.traffic[1].received_bytes

    @property
    def sent_bytes(self) -> np.ndarray:
        """int64 (ranks)."""
        return self.traffic[0].sent_bytes + self.traffic[1].sent_bytes

    def flops(self, kind: int) -> np.ndarray:
        """Of a task of each pair."""
        spec, p = self.plan.spec, self.pairs
        visible, _ = self.plan.coverage.amount(p.batch, p.head, p.query_tile, p.key_tile)
        columns = spec.head_size + spec.value_size
        columns += sum(spec.value_size if x == "dv" else spec.head_size for x in GRADIENTS[kind])
        return 2.0 * columns * visible


def run(
    plan: BackwardPlan,
    seconds: Callable[[int], np.ndarray],
    arrived: tuple[np.ndarray, np.ndarray],
    workers: int,
    overhead: float,
) -> Times:
    """seconds: of a task of each pair, by its kind; arrived: of keys (ranks, kv heads, key tiles), of rows (ranks,
    heads, query tiles). A task takes a worker `overhead` more."""
    costs = np.stack([np.zeros(len(plan.pairs.place)), *(seconds(kind) for kind in (ROWS, KEYS, BOTH))])
    ranks = plan.plan.ranks
    end, busy = np.zeros(ranks), np.zeros(ranks)
    longest = int(plan.tasks.max(initial=1))
    block = max(1, AT_ONCE // longest)
    for first in range(0, ranks, block):
        some = np.arange(first, min(first + block, ranks))
        end[some], busy[some] = _run(plan, costs, arrived, workers, overhead, some)
    return Times(end, busy)


def _run(
    plan: BackwardPlan,
    costs: np.ndarray,
    arrived: tuple[np.ndarray, np.ndarray],
    workers: int,
    overhead: float,
    ranks: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Of some ranks, event by event; arrays (ranks, tasks)."""
    chains, cost, ready = _tasks(plan, costs, arrived, ranks)
    number, ready = _in_chains(chains, ready)
    order = np.argsort(ready, axis=1, kind="stable")
    at, (count, steps) = np.arange(len(ranks)), cost.shape
    window = np.broadcast_to(np.arange(WINDOW), (count, WINDOW)).copy()  # places in the order that are looked at
    following = np.full(count, WINDOW)
    began = plan.plan.heads * np.bincount(plan.plan.query_owner, minlength=plan.plan.ranks)[ranks] * overhead
    free = np.repeat((began / workers)[:, None], workers, axis=1)  # after the tasks of delta
    busy = began.copy()
    most = int(chains.max(initial=0)) + 1
    done, over = np.zeros((2, count, most)), np.zeros((2, count, most), np.int64)  # the last end, and how many, of each
    for _ in range(steps):
        task = order[at[:, None], np.minimum(window, steps - 1)]
        i, j = (x[at[:, None], task] for x in chains)
        turn = (number[0, at[:, None], task] == over[0, at[:, None], i]) & (
            number[1, at[:, None], task] == over[1, at[:, None], j]
        )
        worker = free.argmin(axis=1)
        start = np.maximum(free[at, worker][:, None], ready[at[:, None], task])
        start = np.maximum(start, np.maximum(done[0, at[:, None], i], done[1, at[:, None], j]))
        start = np.where(turn & (window < steps) & (cost[at[:, None], task] >= 0), start, np.inf)
        first = np.where(start <= start.min(axis=1, keepdims=True), window, steps).argmin(axis=1)
        found, began_at = task[at, first], start[at, first]
        here = np.isfinite(began_at)
        took = np.where(here, cost[at, found] + overhead, 0.0)
        end = np.where(here, began_at + took, free[at, worker])
        free[at, worker], busy = end, busy + took
        for which, chain in enumerate((i[at, first], j[at, first])):
            done[which, at, chain] = np.where(here & (chain > 0), end, done[which, at, chain])
            over[which, at, chain] += here & (chain > 0)
        window[at, first] = np.where(here, following, window[at, first])
        following = following + here
    return free.max(axis=1), busy


def _in_chains(chains: np.ndarray, ready: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2, ranks, tasks), (ranks, tasks): which of both its chains each task is, from 0, and when its tiles and those of
    all before it are there."""
    count, steps = ready.shape
    at, most = np.arange(count), int(chains.max(initial=0)) + 1
    number, ready = np.zeros_like(chains), ready.copy()
    came, over = np.zeros((2, count, most)), np.zeros((2, count, most), np.int64)
    for n in range(steps):
        for which in range(2):
            number[which, :, n] = over[which, at, chains[which, :, n]]
            over[which, at, chains[which, :, n]] += 1
            ready[:, n] = np.maximum(ready[:, n], came[which, at, chains[which, :, n]])
        for which in range(2):
            came[which, at, chains[which, :, n]] = ready[:, n]
        came[:, :, 0], over[:, :, 0] = 0.0, 0  # of no chain
    return number, ready


def _tasks(
    plan: BackwardPlan, costs: np.ndarray, arrived: tuple[np.ndarray, np.ndarray], ranks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(2, ranks, tasks): the chains of dQ and of dK and dV, from 1, 0 for none; and (ranks, tasks): seconds, -1 beyond
    a rank's last, and when its tiles come."""
    p, whole = plan.pairs, plan.plan
    group, queries, tiles = whole.spec.group, len(whole.query_owner), len(whole.key_owner)
    found = []
    for rank in ranks:
        kinds = plan.kinds(int(rank))
        mine = np.flatnonzero(kinds)
        # By heads that share keys; in each the pairs one by one, and of a pair the heads.
        kv = np.repeat(np.arange(whole.kv_heads), len(mine) * group)
        pair = np.tile(np.repeat(mine, group), whole.kv_heads)
        head = kv * group + np.tile(np.arange(group), len(mine) * whole.kv_heads)
        kind, i, j = kinds[pair], p.query_tile[pair], p.key_tile[pair]
        came = np.maximum(arrived[0][rank, kv, j] * (kind == ROWS), arrived[1][rank, head, i] * (kind == KEYS))
        dq, dk = (kind & ROWS > 0) * (1 + head * queries + i), (kind & KEYS > 0) * (1 + kv * tiles + j)
        found.append((dq, dk, costs[kind, pair], came))
    width = max(len(x[0]) for x in found)
    filled = []
    for n, nothing in enumerate((0, 0, -1.0, np.inf)):
        filled.append(np.stack([np.append(x[n], np.full(width - len(x[n]), nothing)) for x in found]))
    rows, keys, cost, ready = filled
    return np.stack([rows, keys]).astype(np.int64), cost, ready
