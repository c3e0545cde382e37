"""Gradients that leave memory before they are whole: sums in accumulators, in a file of no name until they return."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashtile.arrayfiles import read_at, write_at
from flashtile.dtypes import DType
from flashtile.engines.starpu.outofcore import Read, Write


class Target(NamedTuple):
    """Where a gradient goes; read: what it is added to, None for zeros; back: reads what was written, None where sums
    are not to be there before they are whole, in a file or in storage."""

    write: Write
    read: Read | None = None
    back: Read | None = None


class Sums:
    """What gradients of one key/value head are as long as not all has been added to them.

    The file is made when the first sums leave, and has no name, so that nothing of it is left by whatever end. In the
    call's own results they wait without a file, where these are in memory and wide enough.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        shapes: Mapping[str, tuple[int, int, int]],
        kind: DType,
        folder: Path | None,
    ) -> None:
        """targets: those that can hold sums; shapes: (heads, rows, columns) of each gradient; kind: of sums."""
        self._targets, self._shapes, self._size, self._folder = targets, shapes, kind.itemsize, folder
        self._file: int | None = None
        self._first: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            self._first[name] = end
            end += int(np.prod(shape)) * self._size

    def __enter__(self) -> Sums:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def write(self, name: str, batch: int, head: int, first: int, rows: np.ndarray) -> None:
        """Let rows go."""
        target = self._targets[name]
        if target.back is not None:
            target.write(batch, head, first, rows)
            return
        if self._file is None:
            self._file = self._new()
        write_at(self._file, rows, self._at(name, head, first), self._where)

    def read(self, name: str, batch: int, head: int, first: int, into: np.ndarray) -> None:
        """Take them back."""
        if (back := self._targets[name].back) is not None:
            back(batch, head, first, into)
            return
        assert self._file is not None
        read_at(self._file, into, self._at(name, head, first), self._where)

    def _at(self, name: str, head: int, first: int) -> int:
        heads, rows, columns = self._shapes[name]
        return self._first[name] + ((head % heads) * rows + first) * columns * self._size

    @property
    def _where(self) -> str:
        return f"a file of sums in {self._folder or tempfile.gettempdir()}"

    def _new(self) -> int:
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            return os.dup(file.fileno())
