"""When tiles arrive: every rank has a link of one bandwidth in each direction, and an ideal switch is between them.

A message leaves when those queued before it at its rank have left, crosses in `latency`, and comes in when those that
left before it for the same rank have come in. All of a call's messages are queued at its start, as the engine does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashtile.engines.starpu_mpi.simulation.plan import Plan

POSTED, NEEDED = "posted", "needed"


@dataclass(frozen=True)
class Network:
    """latency in seconds, bandwidth in bytes a second and direction, overhead in seconds that a message adds."""

    latency: float
    bandwidth: float
    overhead: float = 0.0

    def seconds(self, nbytes: np.ndarray | float) -> np.ndarray:
        """How long a message holds a link."""
        return np.asarray(self.overhead + np.asarray(nbytes) / self.bandwidth)


@dataclass(frozen=True)
class Departures:
    """Of each tile that goes to a rank, int64 (n,), once a head: k and v of head h have left at first + h * step."""

    receiver: np.ndarray
    tile: np.ndarray
    first: np.ndarray  # seconds (n, 2): of k, of v
    step: np.ndarray  # seconds (n, 2)


def departures_of(plan: Plan, network: Network, order: str) -> Departures:
    """When every tile leaves its owner.

    order: "posted", as the engine queues them: k to rank 0, to rank 1, and so on, head by head; then v likewise.
           "needed": what is nearest in the receivers' chains first, head by head, k then v.
    """
    receiver, tile = np.nonzero(plan.needs)
    sender, heads = plan.key_owner[tile], plan.kv_heads
    group = receiver if order == POSTED else _urgency(plan)[receiver, tile]
    queue = np.lexsort((tile, receiver, group, sender))
    sender, receiver, tile, group = (x[queue] for x in (sender, receiver, tile, group))
    own = network.seconds(plan.heights[tile][:, None] * np.array(plan.row_bytes))  # (n, 2)
    of_sender, of_group = _runs(sender), _runs(sender, group)
    within = _before(own, of_group) + own
    sums = _sums(own, of_group)
    earlier = _before(own, of_sender) - _before(own, of_group)  # of the sender's groups before this one
    if order == POSTED:
        first = heads * earlier + within
        first[:, 1] += heads * _sums(own, of_sender)[:, 0]
        return Departures(receiver, tile, first, sums)
    first = heads * earlier.sum(axis=1, keepdims=True) + within
    first[:, 1] += sums[:, 0]
    return Departures(receiver, tile, first, np.broadcast_to(sums.sum(axis=1, keepdims=True), sums.shape))


def _runs(*columns: np.ndarray) -> np.ndarray:
    """int64 (runs + 1): where each run of equal rows begins, and the end."""
    new = np.ones(len(columns[0]), bool)
    if len(new):
        new[1:] = np.any([np.diff(x) != 0 for x in columns], axis=0)
    return np.append(np.flatnonzero(new), len(new))


def _before(x: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """The sum of what stands before each row in its run."""
    total = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x, axis=0)])
    return total[:-1] - np.repeat(total[runs[:-1]], np.diff(runs), axis=0)


def _sums(x: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Each row's run, summed."""
    if not len(x):
        return x.copy()
    return np.repeat(np.add.reduceat(x, runs[:-1], axis=0), np.diff(runs), axis=0)


def _urgency(plan: Plan) -> np.ndarray:
    """int64 (ranks, key tiles): the earliest place of a tile in the chains of a rank."""
    found = np.full((plan.ranks, len(plan.key_owner)), np.iinfo(np.int64).max)
    some = plan.pairs.key_tile >= 0
    at = plan.query_owner[plan.pairs.query_tile[some]], plan.pairs.key_tile[some]
    np.minimum.at(found, at, plan.pairs.place[some])
    return found


def arrivals(plan: Plan, network: Network, order: str) -> np.ndarray:
    """float64 (ranks, kv heads, key tiles): when both k and v of a tile are there; 0 for a rank's own."""
    heads = plan.kv_heads
    found = np.zeros((plan.ranks, heads, len(plan.key_owner)))
    d = departures_of(plan, network, order)
    by_rank = np.argsort(d.receiver, kind="stable")
    runs = _runs(d.receiver[by_rank])
    for begin, end in zip(runs[:-1], runs[1:], strict=True):
        mine = by_rank[begin:end]
        tiles = d.tile[mine]
        left = d.first[mine, None] + np.arange(heads)[:, None] * d.step[mine, None]  # (tiles, heads, 2)
        own = network.seconds(plan.heights[tiles][:, None] * np.array(plan.row_bytes))
        seconds = np.broadcast_to(own[:, None], left.shape).ravel()
        queue = left.ravel().argsort(kind="stable")
        taken = np.cumsum(seconds[queue])
        done = np.empty(left.size)
        # done[n] = max(done[n - 1] + seconds[n], left[n] + latency), as a running maximum
        done[queue] = np.maximum.accumulate(left.ravel()[queue] + network.latency - taken) + taken
        found[d.receiver[mine[0]]][:, tiles] = done.reshape(left.shape).max(axis=2).T
    return found
