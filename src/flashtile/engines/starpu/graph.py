"""Which tasks wait for which: the rule by which StarPU orders a sequential task flow, applied to what was submitted.

Of a tile, a task that reads waits for the last one that wrote; one that writes waits for those that read since, else
for the last that wrote. Tasks that commute wait for what was there before the first of them, not for one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class TileHistory:
    """The tasks that what comes next on one tile has to wait for."""

    writers: list[int] = field(default_factory=list)  # the last one, or all that commute
    readers: list[int] = field(default_factory=list)  # since then
    before: list[int] = field(default_factory=list)  # what the writers that commute wait for
    commuting: bool = False

    def read(self, task: int) -> list[int]:
        """What a task that only reads waits for."""
        self.readers.append(task)
        return self.writers

    def write(self, task: int, commute: bool) -> list[int]:
        """What a task that writes waits for."""
        if commute and self.commuting and not self.readers:
            self.writers.append(task)
            return self.before
        self.before = self.readers or self.writers
        self.writers, self.readers, self.commuting = [task], [], commute
        return self.before


@dataclass(frozen=True)
class Modes:
    """Bits of StarPU's access modes."""

    write: int
    scratch: int
    commute: int


class Graph:
    """Tasks in the order of their submission, numbered from 0."""

    def __init__(self, modes: Modes) -> None:
        self.modes = modes
        self.tasks = 0
        self.edges: set[tuple[int, int]] = set()  # (earlier, later)
        self._tiles: dict[int, TileHistory] = {}

    def add(self, handles: Iterable[int], modes: Iterable[int]) -> None:
        """The next task, by the handles of its tiles and how it uses them."""
        later = self.tasks
        self.tasks += 1
        for handle, mode in zip(handles, modes, strict=True):
            for earlier in self._use(later, handle, mode):
                self.edges.add((earlier, later))

    def forget(self, handles: Iterable[int]) -> None:
        """Tiles that were unregistered: StarPU may give their addresses to others."""
        for handle in handles:
            self._tiles.pop(handle, None)

    def _use(self, task: int, handle: int, mode: int) -> Iterator[int]:
        if mode & self.modes.scratch:
            return
        history = self._tiles.setdefault(handle, TileHistory())
        found = history.write(task, bool(mode & self.modes.commute)) if mode & self.modes.write else history.read(task)
        yield from (earlier for earlier in found if earlier != task)
