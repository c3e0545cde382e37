"""Workers that take tasks as they become ready, on all ranks in step: one event of every rank at a time, in NumPy.

What a rank computes depends on the others through arrivals alone, so ranks need no common clock. A worker that is free
takes, of the chains whose next task is ready, the one with most left; where none is, the one that is ready first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashtile.engines.starpu_mpi.simulation.plan import Plan

AT_ONCE = 1 << 22  # (rank, chain) pairs that are simulated together


@dataclass(frozen=True)
class Times:
    """Of each rank, seconds (ranks,): when its last task ends, and how long its workers compute, together."""

    end: np.ndarray
    busy: np.ndarray


def run(
    plan: Plan, seconds: np.ndarray, arrived: np.ndarray, workers: int, overhead: float, share: float = 0.0
) -> Times:
    """seconds (pairs of one head), arrived (ranks, kv heads, key tiles); a task takes a worker `overhead` more, and the
    part `share` of its time where it begins before all tiles of its rank are there."""
    end, busy = np.zeros(plan.ranks), np.zeros(plan.ranks)
    chains = max(len(plan.tiles(plan.spec.q_len, rank)) for rank in range(plan.ranks)) * plan.heads
    block = max(1, AT_ONCE // max(chains, 1))
    for first in range(0, plan.ranks, block):
        ranks = np.arange(first, min(first + block, plan.ranks))
        end[ranks], busy[ranks] = _run(plan, seconds, arrived, workers, overhead, share, ranks, chains)
    return Times(end, busy)


def _run(
    plan: Plan,
    seconds: np.ndarray,
    arrived: np.ndarray,
    workers: int,
    overhead: float,
    share: float,
    ranks: np.ndarray,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    count, group = len(ranks), plan.spec.group
    at = np.zeros((count, width), np.int64)  # the number of each chain's next pair
    stop, head = np.zeros_like(at), np.zeros_like(at)
    for n, rank in enumerate(ranks):
        tiles = plan.tiles(plan.spec.q_len, rank)
        size = len(tiles) * plan.heads
        at[n, :size], stop[n, :size] = (
            np.tile(plan.chains[tiles], plan.heads),
            np.tile(plan.chains[tiles + 1], plan.heads),
        )
        head[n, :size] = np.repeat(np.arange(plan.heads) // group, len(tiles))
    keys = np.maximum(plan.pairs.key_tile, 0)
    last = len(seconds) - 1
    rows = np.arange(count)
    ready = arrived[ranks[:, None], head, keys[np.minimum(at, last)]]
    left = stop - at
    free, busy = np.zeros((count, workers)), np.zeros(count)
    ready[left == 0] = np.inf
    far, complete = 2.0**40, arrived[ranks].max(axis=(1, 2), initial=0)
    for _ in range(int(left.sum(axis=1).max(initial=0))):
        worker = free.argmin(axis=1)
        now = free[rows, worker]
        chain = np.where(ready <= now[:, None], far + left, -ready).argmax(axis=1)
        start = np.maximum(now, ready[rows, chain])
        here = np.isfinite(start)  # ranks that are not done
        pair = at[rows, chain]
        cost = seconds[np.minimum(pair, last)] * np.where(start < complete, 1 + share, 1) + overhead
        done = start + cost
        free[rows[here], worker[here]] = done[here]
        busy += np.where(here, cost, 0.0)
        at[rows, chain] += 1
        left[rows, chain] -= 1
        next_key = keys[np.minimum(pair + 1, last)]
        coming = np.maximum(done, arrived[ranks, head[rows, chain], next_key])
        ready[rows, chain] = np.where(left[rows, chain] > 0, coming, np.inf)
    # A worker that waits for a tile is free until then, so the last end is the greatest of all.
    return free.max(axis=1), busy
