"""Which heads one task takes: `heads` that follow one another, some of one batch's or those of several whole batches.

A task costs StarPU microseconds, whatever it computes, and a GPU wants work for all its processors at once. Each head
is computed by itself, so that results do not depend on how many there are in a task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

import numpy as np

from flashtile.engines.starpu.runtime import Runtime
from flashtile.spec import AttentionSpec

WORTH = 1 << 25  # FLOPs of a task that is long, some half a millisecond, beside what StarPU takes for it
CHAINS = 4  # for each worker, at least: what none waits for the end of


T = TypeVar("T", int, np.ndarray)


class Handles(Protocol):
    """A TiledTensor, or what stands for one of which some tiles are elsewhere."""

    @property
    def handles(self) -> np.ndarray:
        """uint64 (B, H, tiles along S), or of units of heads; 0 where there is none."""
        ...

    @property
    def turned(self) -> bool:
        """See TiledTensor."""
        ...


def turned_of(*tensors: Handles) -> int:
    """The bits of those whose blocks are turned, in the order of a task's handles."""
    return sum(1 << n for n, x in enumerate(tensors) if x.turned)


def several(identity: str, heads: int) -> str:
    """What the cost of a task of so many heads depends on."""
    return identity if heads == 1 else f"{identity} {heads} heads"


def unit_of(batch: T, head: T, count: int, heads: int) -> tuple[T, T]:
    """Where the handles of a tensor with `count` heads a batch have a head's, if each is of `heads` of them."""
    if heads <= count:
        return batch, head // heads
    return (batch * count + head) // heads, 0 * head


def of_keys(heads: int, group: int) -> int:
    """Heads of keys that a task with so many heads of queries reads."""
    return max(1, heads // group)


def sizes(spec: AttentionSpec) -> Iterator[int]:
    """How many heads a task of a spec may have, ascending: whole groups that read one head of keys, or parts of one."""
    for n in range(1, spec.heads + 1):
        if spec.heads % n == 0 and (n % spec.group == 0 or spec.group % n == 0):
            yield n
    for n in range(2, spec.batch + 1):
        if spec.batch % n == 0:
            yield n * spec.heads


def most(runtime: Runtime, spec: AttentionSpec, chains: int, flops: float) -> int:
    """How many heads a task should have at most, where one head makes so many chains of tasks and a task of one has so
    many FLOPs: all of them for a GPU, else so many that the task is worth its cost and workers have enough of them."""
    if runtime.kernels is not None and runtime.workers("cuda"):
        return spec.batch * spec.heads
    enough = CHAINS * runtime.workers()
    return max(1, min(int(WORTH / max(flops, 1.0)), spec.batch * spec.heads * chains // enough))
