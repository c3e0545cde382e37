"""When tiles arrive: every rank has a link of one bandwidth in each direction, and an ideal switch is between them.

A message leaves when those queued before it at its rank have left, crosses in `latency`, and comes in when those that
left before it for the same rank have come in. All of a call's messages are queued at its start, as the engine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

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


@dataclass(frozen=True, eq=False)
class Traffic:
    """Tiles of a sequence that travel, once a head and tensor.

    needs    bool (ranks, tiles): which tiles come to a rank
    owner    int64 (tiles): where each comes from
    heights  int64 (tiles): rows of each
    row      bytes of a row of each tensor, in the order of sending
    heads    of all batches
    urgency  int64 (ranks, tiles): the earliest place of a tile in the chains of a rank
    """

    needs: np.ndarray
    owner: np.ndarray
    heights: np.ndarray
    row: np.ndarray
    heads: int
    urgency: np.ndarray

    @cached_property
    def received_bytes(self) -> np.ndarray:
        """int64 (ranks): bytes that come to each."""
        return np.asarray((self.needs @ self.heights) * (self.heads * int(self.row.sum())))

    @cached_property
    def sent_bytes(self) -> np.ndarray:
        """int64 (ranks): and that leave each."""
        copies = self.needs.sum(axis=0) * self.heights
        return np.bincount(self.owner, copies, len(self.needs)).astype(np.int64) * (self.heads * int(self.row.sum()))


@dataclass(frozen=True)
class Departures:
    """Of each tile that goes to a rank, int64 (n,), once a head: tensors of head h have left at first + h * step."""

    receiver: np.ndarray
    tile: np.ndarray
    first: np.ndarray  # seconds (n, tensors)
    step: np.ndarray  # likewise


def departures_of(traffic: Traffic, network: Network, order: str) -> Departures:
    """When every tile leaves its owner.

    order: "needed", as the engine queues them: what is nearest in the receivers' chains first, head by head, tensor by
           tensor. "posted": a tensor to rank 0, to rank 1, and so on, head by head; then the next.
    """
    receiver, tile = np.nonzero(traffic.needs)
    sender, heads = traffic.owner[tile], traffic.heads
    group = receiver if order == POSTED else traffic.urgency[receiver, tile]
    queue = np.lexsort((tile, receiver, group, sender))
    sender, receiver, tile, group = (x[queue] for x in (sender, receiver, tile, group))
    own = network.seconds(traffic.heights[tile][:, None] * traffic.row)  # (n, tensors)
    of_sender, of_group = _runs(sender), _runs(sender, group)
    within = _before(own, of_group) + own
    sums = _sums(own, of_group)
    earlier = _before(own, of_sender) - _before(own, of_group)  # of the sender's groups before this one
    if order == POSTED:
        return Departures(receiver, tile, heads * (earlier + _to_the_left(_sums(own, of_sender))) + within, sums)
    first = heads * earlier.sum(axis=1, keepdims=True) + _to_the_left(sums) + within
    return Departures(receiver, tile, first, np.broadcast_to(sums.sum(axis=1, keepdims=True), sums.shape))


def _to_the_left(x: np.ndarray) -> np.ndarray:
    """The sum of the columns before each."""
    return np.cumsum(x, axis=1) - x


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


def arrivals(traffics: Sequence[Traffic], network: Network, order: str) -> list[np.ndarray]:
    """float64 (ranks, heads, tiles) of each: when all tensors of a tile are there; 0 for a rank's own. What is queued
    second waits, at its sender, for all that is queued first."""
    found = [np.zeros((len(x.needs), x.heads, len(x.owner))) for x in traffics]
    ranks = len(traffics[0].needs)
    queued = np.zeros(ranks)  # seconds, at each sender
    lists = []
    for traffic in traffics:
        d = departures_of(traffic, network, order)
        sender = traffic.owner[d.tile]
        seconds = network.seconds(traffic.heights[d.tile][:, None] * traffic.row)  # (n, tensors)
        by_rank = np.argsort(d.receiver, kind="stable")
        edges = np.searchsorted(d.receiver[by_rank], np.arange(ranks + 1))
        lists.append((d, d.first + queued[sender][:, None], seconds, by_rank, edges))
        queued = queued + traffic.heads * np.bincount(sender, seconds.sum(axis=1), ranks)
    for rank in range(ranks):
        mine = [by_rank[edges[rank] : edges[rank + 1]] for *_, by_rank, edges in lists]
        left, taken_each, shapes = [], [], []
        for (d, first, seconds, *_), n, traffic in zip(lists, mine, traffics, strict=True):
            x = first[n, None] + np.arange(traffic.heads)[:, None] * d.step[n, None]  # (tiles, heads, tensors)
            left.append(x.ravel())
            taken_each.append(np.broadcast_to(seconds[n, None], x.shape).ravel())
            shapes.append(x.shape)
        done = _received(np.concatenate(left), np.concatenate(taken_each), network.latency)
        for out, (d, *_), n, shape in zip(found, lists, mine, shapes, strict=True):
            own, done = np.split(done, [int(np.prod(shape))])
            out[rank][:, d.tile[n]] = own.reshape(shape).max(axis=2).T
    return found


def _received(left: np.ndarray, seconds: np.ndarray, latency: float) -> np.ndarray:
    """When messages are in that left then, for a link that takes one after the other."""
    queue = left.argsort(kind="stable")
    taken = np.cumsum(seconds[queue])
    done = np.empty(left.size)
    # done[n] = max(done[n - 1] + seconds[n], left[n] + latency), as a running maximum
    done[queue] = np.maximum.accumulate(left[queue] + latency - taken) + taken
    return done
