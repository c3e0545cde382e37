"""The way of dQ over ranks: a sum is where the next of its keys is, and comes home when it is whole.

So a pair of tiles is one task, of five products, on the rank that has its keys. A query tile's chain goes through the
ranks in the order of its keys, which is that of one process, and so are the bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashtile.engines.starpu.flow import Pairs

HOME = -1  # for a pair, where a leg begins before all of its chain, or ends after all


class Legs(NamedTuple):
    """Every leg of every sum, the same list on all ranks: int64 arrays (n,).

    batch, head, query_tile  whose sum; sender, receiver  ranks; after  the pair that adds to it last before it leaves,
    before  the one that adds to it first when it is there.
    """

    batch: np.ndarray
    head: np.ndarray
    query_tile: np.ndarray
    sender: np.ndarray
    receiver: np.ndarray
    after: np.ndarray
    before: np.ndarray


class Stage(NamedTuple):
    """What a rank does of its part: legs that come, pairs, legs that go; each sum is there once at most."""

    come: np.ndarray
    pairs: np.ndarray
    go: np.ndarray


def legs_of(pairs: Pairs, rows: np.ndarray, keys: np.ndarray) -> Legs:
    """The legs of pairs that stand in their order. rows, keys: the rank that has each query tile, each key tile."""
    order = np.lexsort((pairs.query_tile, pairs.head, pairs.batch))  # chain by chain; stable: as they stand in each
    batch, head, tile = (x[order] for x in (pairs.batch, pairs.head, pairs.query_tile))
    at, home = keys[pairs.key_tile[order]], rows[tile]
    new = np.ones(len(order) + 1, bool)
    new[1:-1] = np.any([np.diff(x) != 0 for x in (batch, head, tile)], axis=0)
    first, last = new[:-1], new[1:]
    sender = np.where(first, home, np.roll(at, 1))
    after = np.where(first, HOME, np.roll(order, 1))
    there, back = np.flatnonzero(sender != at), np.flatnonzero(last & (at != home))
    numbers = np.concatenate([there, back])
    ends = np.full(len(back), HOME)
    return Legs(
        batch[numbers],
        head[numbers],
        tile[numbers],
        np.concatenate([sender[there], at[back]]),
        np.concatenate([at[there], home[back]]),
        np.concatenate([after[there], order[back]]),
        np.concatenate([order[there], ends]),
    )


def stages_of(legs: Legs, mine: np.ndarray, rank: int) -> list[Stage]:
    """A rank's part, where its pairs are `mine`, ascending: the sums that leave home first, then as few stages as
    there may be, then those that come home."""
    coming, going = legs.receiver == rank, legs.sender == rank
    away, back = legs.after == HOME, legs.before == HOME
    none = np.zeros(0, np.int64)
    found = [Stage(none, none, np.flatnonzero(going & away))]
    come, go = np.flatnonzero(coming & ~back), np.flatnonzero(going & ~away)
    edges = _edges(legs, come, go)
    each = (come, legs.before[come]), (mine, mine), (go, legs.after[go])
    for begin, end in zip([0, *edges], [*edges, np.iinfo(np.int64).max], strict=True):
        found.append(Stage(*(x[(at >= begin) & (at < end)] for x, at in each)))
    return [*found, Stage(np.flatnonzero(coming & back), none, none)]


def _edges(legs: Legs, come: np.ndarray, go: np.ndarray) -> list[int]:
    """The pairs at which stages begin but for the first: where a sum comes again that left in the same one."""
    edges: list[int] = []
    left: dict[tuple[int, int, int], int] = {}  # a sum, and the last pair before it left
    events = [(int(legs.before[n]), 0, int(n)) for n in come] + [(int(legs.after[n]), 1, int(n)) for n in go]
    for pair, goes, n in sorted(events):
        name = int(legs.batch[n]), int(legs.head[n]), int(legs.query_tile[n])
        if goes:
            left[name] = pair
        elif left.get(name, -1) >= (edges[-1] if edges else 0):
            edges.append(pair)
    return edges
