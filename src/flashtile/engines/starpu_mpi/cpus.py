"""Where the threads of ranks on one machine run: workers, and StarPU-MPI's thread, which makes transfers progress."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from flashtile.engines.starpu import runtime
from flashtile.engines.starpu_mpi.link import Link
from flashtile.threads import get_num_threads


class Place(NamedTuple):
    """Of a rank: its machine, the CPUs that it may use, and how many workers it has or will have."""

    machine: str
    cpus: frozenset[int]
    workers: int


def here() -> Place:
    """This rank's."""
    said = os.environ.get("STARPU_NCPU", "")
    return Place(
        socket.gethostname(), frozenset(os.sched_getaffinity(0)), int(said) if said.isdigit() else get_num_threads()
    )


def _neighbours(ranks: Sequence[Place], rank: int) -> list[int]:
    """The ranks that may use a CPU of this one's, itself among them."""
    mine = ranks[rank]
    return [n for n, other in enumerate(ranks) if other.machine == mine.machine and other.cpus & mine.cpus]


def settings(ranks: Sequence[Place], rank: int) -> dict[str, str]:
    """What StarPU must know to keep this rank's workers off those of others, as environment variables.

    It binds the workers of each rank to the first CPUs that the rank may use, and so those of all ranks to the same.
    Where there is a CPU for each worker they are dealt out, else the kernel's scheduler places them.
    """
    near = _neighbours(ranks, rank)
    if len(near) == 1:
        return {}
    cpus, workers = ranks[rank].cpus, sum(ranks[n].workers for n in near)
    same = all(ranks[n].cpus == cpus for n in near) and cpus == frozenset(range(os.cpu_count() or 0))
    if not same or workers > len(cpus):
        return {"STARPU_WORKERS_NOBIND": "1", "STARPU_MPI_NOBIND": "1"}
    step, first = len(cpus) // workers, sum(ranks[n].workers for n in near if n < rank)
    own = " ".join(str(step * n) for n in range(first, first + ranks[rank].workers))
    return {"STARPU_WORKERS_CPUID": own, "STARPU_MPI_NOBIND": "1"}


def crowded(ranks: Sequence[Place], rank: int) -> bool:
    """Whether threads that poll would take CPUs of workers: there are fewer than one for each worker and each rank."""
    near = [ranks[n] for n in _neighbours(ranks, rank)]
    return sum(x.workers + 1 for x in near) > len(frozenset().union(*(x.cpus for x in near)))


def start(ranks: Sequence[Place], rank: int) -> None:
    """Start StarPU and StarPU-MPI unless they run, with room for all. What the environment says stays.

    Raises: UnavailableError.
    """
    wanted = settings(ranks, rank)
    if any(name.startswith("STARPU_WORKERS_") for name in os.environ):
        wanted = {n: x for n, x in wanted.items() if not n.startswith("STARPU_WORKERS_")}
    added = {n: x for n, x in wanted.items() if n not in os.environ}
    os.environ.update(added)
    try:
        link = runtime.ensure().once(Link)
    finally:
        for name in added:
            del os.environ[name]
    if crowded(ranks, rank):
        link.share()
