"""An exchange of heads before tiles travel (Ulysses): ranks of a group give rows for heads, and get rows back.

In a group of n ranks each then has all rows of the group and one in n of the heads, so a sequence is cut over groups,
and a rank receives the keys and values of its heads only. The rows of a group are those that `part` gives to one of as
many ranks as there are groups, so tiles, their order and the bits are those of a call without an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashtile.engines.starpu_mpi.collective import Cut, agree
from flashtile.errors import UnavailableError, wrong

# Options in the order of ScoreOptions: which of the last axes of an array counts heads; None: nothing here does.
AXES = {"mask": 3, "bias": 3, "score_mod": None, "softcap": None, "alibi_slopes": 1, "sinks": 1, "dropout_p": None}


class Heads:
    """This rank's share. `across`: the communicator of the ranks with the same heads; `cut`: of rows over these."""

    def __init__(self, comm: Any, cut: Cut, size: int, whole: Sequence[Any]) -> None:
        """On all ranks together. size: ranks of a group. whole: what has the shapes of q, k and v of all ranks.

        Raises: SpecError for numbers of ranks or heads that are no multiple of size.
        """
        numbers = {"ranks": cut.ranks, "q": whole[0].shape[1], "k": whole[1].shape[1]}
        for name, n in numbers.items():
            if n % size:
                got = f"{n} ranks" if name == "ranks" else f"{n} heads"
                raise wrong(name, got, f"a multiple of exchange = {size}")
        rank = comm.Get_rank()
        self.comm, self.size, self.number, self.heads = comm, size, rank % size, whole[0].shape[1]
        self._ranks, self._fine = range(rank - self.number, rank - self.number + size), cut
        self.cut = Cut(cut.ranks // size, cut.tile, cut.distribution)
        # Never freed: StarPU-MPI listens on every communicator that it has met.
        self._group, self.across = comm.Split(rank // size, rank), comm.Split(self.number, rank)

    def whole(self, whole: Sequence[Any]) -> tuple[Any, Any, Any]:
        """What has the shapes of q, k and v of all ranks, for this rank's heads."""
        q, k, v = (
            SimpleNamespace(shape=(x.shape[0], x.shape[1] // self.size, *x.shape[2:]), dtype=x.dtype) for x in whole
        )
        return q, k, v

    def scores(self, scores: Sequence[Any]) -> tuple[Any, ...]:
        """Options that change scores, for this rank's heads.

        Raises: UnavailableError for a function, or dropout, which would count heads from this rank's first.
        """
        return tuple(self._of(name, axis, x) for (name, axis), x in zip(AXES.items(), scores, strict=True))

    def _of(self, name: str, axis: int | None, x: Any) -> Any:
        if x is None or name == "softcap":
            return x
        if axis is None or not isinstance(x, np.ndarray):
            raise UnavailableError(
                f"exchange: got {self.size} with {name}, expected options that are arrays: what counts heads by itself "
                "would do so from a rank's first"
            )
        if x.ndim < axis or x.shape[-axis] != self.heads:
            return x
        own = self.heads // self.size
        where: Any = ..., slice(self.number * own, (self.number + 1) * own), *(slice(None),) * (axis - 1)
        return x[where]

    def gather(self, lengths: Sequence[int], given: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays (B, H, own rows, ...), of sequences so long, as (B, H / size, rows of the group, ...)."""
        made: list[list[list[np.ndarray]]] = []
        agree(self.comm, lambda: made.append([self._share(given, n) for n in range(self.size)]))
        came, found = self._group.alltoall(made[0]), []
        for n, (length, x) in enumerate(zip(lengths, given, strict=True)):
            places = self._places(length)
            shape = x.shape[0], x.shape[1] // self.size, sum(map(len, places)), *x.shape[3:]
            found.append(np.empty(shape, x.dtype))
            for place, parts in zip(places, came, strict=True):
                found[-1][:, :, place] = parts[n]
        return found

    def scatter(self, lengths: Sequence[int], given: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The way back: of all heads this rank's own rows."""
        places = [self._places(length) for length in lengths]
        made: list[list[list[np.ndarray]]] = []
        agree(
            self.comm,
            lambda: made.append(
                [[x[:, :, at[n]] for at, x in zip(places, given, strict=True)] for n in range(self.size)]
            ),
        )
        came = self._group.alltoall(made[0])
        return [np.concatenate([parts[n] for parts in came], axis=1) for n in range(len(given))]

    def _share(self, given: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
        own = [x.shape[1] // self.size for x in given]
        return [np.ascontiguousarray(x[:, number * n : (number + 1) * n]) for n, x in zip(own, given, strict=True)]

    def _places(self, length: int) -> list[np.ndarray]:
        """Where the rows of each rank of the group stand among those of the group."""
        rows = self.cut.numbers(length, self._ranks.start // self.size)
        return [np.searchsorted(rows, self._fine.numbers(length, rank)) for rank in self._ranks]
