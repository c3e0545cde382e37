"""What a profile has of each task, and what the pictures read of a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TaskRecord:
    """One task. Times are seconds since the first submission of the profile, by StarPU's clock."""

    number: int  # in the order of submission, from 0
    codelet: str
    tile: str  # "batch 0, head 1, query tile 3, key tile 2"
    worker: int
    submitted: float
    start: float
    end: float
    outcome: str  # "done", "failed", or "skipped" because an earlier one had failed
    flops: float  # as declared: exact for masked tiles
    footprint: int  # equal where the performance model takes costs for equal
    priority: int


class Records(Protocol):
    """A profile that has ended."""

    workers: tuple[str, ...]  # their names

    @property
    def tasks(self) -> tuple[TaskRecord, ...]: ...

    @property
    def dependencies(self) -> list[tuple[int, int]]: ...
