"""Results that go to files and to storage: written beside under another name, and put in their place when whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashtile import arrayfiles
from flashtile.arrays import is_stored
from flashtile.dtypes import dtype_of
from flashtile.engines.starpu.outofcore import Read, Write, forget
from flashtile.errors import UnavailableError, wrong

NPY, ZARR = ".npy", ".zarr"
CHUNK = 1024  # rows of a chunk of a new Zarr array, each of one head
METADATA = "zarr.json", ".zarray", ".zattrs"  # of a Zarr array, in its folder


def place_of(target: Any, name: str) -> Place | None:
    """Where a result goes that names a file, or is an array in storage; None for any other. Raises: SpecError."""
    if isinstance(target, (str, os.PathLike)):
        path = Path(target)
        if path.suffix not in (NPY, ZARR) or not path.parent.is_dir():
            expected = "an array, or a name that ends in .npy or .zarr in a folder that exists"
            raise wrong(name, repr(str(target)), expected)
        if path.suffix == NPY and path.is_dir():
            raise wrong(name, f"{str(target)!r}, a folder", "the name of a file, or a new one")
        if path.suffix == ZARR and path.exists() and not _holds_array(path):
            raise wrong(
                name, f"{str(target)!r}, which holds no Zarr array or more than one", "a new name, or an array's"
            )
        return Place(name, path, path)
    if not is_stored(target):
        return None
    if not hasattr(target, "__setitem__") or getattr(target, "read_only", False):
        raise wrong(name, "an array in storage that is read only", "a writable one")
    return Place(name, target, _folder(target))


def _folder(x: Any) -> Path | None:
    """That of a Zarr array on this machine's disk; None for what is stored in another way."""
    root, path = getattr(getattr(x, "store", None), "root", None), getattr(x, "path", None)
    if not isinstance(root, Path) or not isinstance(path, str):
        return None
    found = root / path
    return found if any((found / file).is_file() for file in METADATA) else None


def _holds_array(folder: Path) -> bool:
    """Whether a folder is a Zarr array, or empty: nothing else is lost where it is replaced."""
    if not folder.is_dir():
        return False
    with contextlib.suppress(OSError, ValueError):
        if (folder / ".zarray").is_file() or json.loads((folder / "zarr.json").read_bytes())["node_type"] == "array":
            return True
    return not any(folder.iterdir())


@dataclass(frozen=True)
class Place:
    """A file, or an array in storage. `path`: what is replaced when the result is whole; None: it is written in place,
    part by part, since its storage has no name to change."""

    name: str
    target: Any
    path: Path | None

    def check(self, shape: tuple[int, ...], dtype: Any, inputs: Sequence[Any]) -> None:
        """Raise SpecError, or UnavailableError, unless a result of this shape can go there."""
        if self.target is self.path:
            if self.path.suffix == ZARR:
                _zarr(self.name, dtype)
            return
        if tuple(self.target.shape) != tuple(shape):
            raise wrong(self.name, f"shape {tuple(self.target.shape)}", f"{tuple(shape)}")
        if dtype_of(self.target.dtype, self.name) is not dtype_of(dtype):
            raise wrong(self.name, f"dtype {self.target.dtype}", f"{dtype}")
        if self.path is None and any(self.target is x for x in inputs):
            raise wrong(self.name, "an array that the call reads", "one of its own")

    @contextlib.contextmanager
    def writing(self, shape: tuple[int, ...], dtype: Any) -> Iterator[Any]:
        """What the result is written to, by slices; it takes its place unless the block raises."""
        if self.path is None:
            yield self.target
        elif self.path.suffix == NPY and self.target is self.path:
            with arrayfiles.replacing(self.path) as temporary:
                with arrayfiles.saying(str(self.path)):
                    arrayfiles.create_npy(temporary, shape, dtype)
                with temporary.open("r+b", buffering=0) as file:
                    yield _Rows(file.fileno(), shape, np.dtype(dtype), str(self.path))
                    os.fsync(file.fileno())
        else:
            with _replacing_folder(self.path) as temporary:
                yield self._beside(temporary, shape, dtype)

    def _beside(self, folder: Path, shape: tuple[int, ...], dtype: Any) -> Any:
        """A Zarr array there: with the metadata of the one that it will replace, or a new one."""
        zarr: Any = _zarr(self.name, dtype)
        if self.target is self.path:
            chunks = (1,) * (len(shape) - 2) + (max(1, min(CHUNK, shape[-2])), max(1, shape[-1]))
            return zarr.create_array(folder, shape=shape, dtype=dtype, chunks=chunks)
        assert self.path is not None
        folder.mkdir()
        for file in METADATA:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(self.path / file, folder / file)
        return zarr.open_array(folder, mode="r+")

    def result(self) -> Any:
        """What is there, once it is whole."""
        if self.target is not self.path:
            return self.target
        if self.path.suffix == NPY:
            return arrayfiles.open_npy(self.path)
        return _zarr(self.name, None).open_array(self.path, mode="r")


class _Rows:
    """An array at the end of a file, to which rows are written; a map of it would take a fault for every page."""

    def __init__(self, file: int, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
        self.shape, self.dtype, self._file, self._name = shape, dtype, file, name
        self._row = shape[-1] * dtype.itemsize
        self._first = os.fstat(file).st_size - math.prod(shape) * dtype.itemsize

    def __setitem__(self, where: tuple[Any, ...], rows: np.ndarray) -> None:
        """where: a number for each of the first axes, and a slice of rows."""
        *heads, part = where
        number = 0
        for n, size in zip((*heads, part.start), self.shape[:-1], strict=True):
            number = number * size + n
        arrayfiles.write_at(self._file, rows, self._first + number * self._row, self._name)


@contextlib.contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """As arrayfiles.replacing: a folder takes the name's place, unless the block raises. Between two changes of names
    nothing has it, and both, whole, are beside it; where the second change fails, the first is undone, so that nothing
    is removed while it is the only one."""
    temporary, old = (path.with_name(f".{path.stem}.{os.getpid()}{end}{path.suffix}") for end in ("", ".old"))
    try:
        yield temporary
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _zarr(name: str, dtype: Any) -> Any:
    """The library. Raises: UnavailableError without it; SpecError for a dtype that it does not store."""
    if dtype is not None and np.dtype(dtype).name == "bfloat16":
        raise wrong(name, "bfloat16 for a new Zarr array", "a name that ends in .npy")
    try:
        import zarr
    except ImportError as cause:
        raise UnavailableError(f"{name}: got {cause}, expected Zarr: pip install zarr") from cause
    return zarr


def reader(x: Any, given: Any, axes: int = 4) -> Read:
    """How rows of a head are read, of an array that has at most so many axes. A map's are read from its file; where
    that cannot be, its pages are forgotten at once."""
    missing, behind = axes - len(x.shape), arrayfiles.Behind.of(given)

    def read(batch: int, head: int, first: int, into: np.ndarray) -> None:
        rows = x[(*(batch, head)[missing:], slice(first, first + len(into)))]
        if behind is not None and behind.read(rows, into):
            return
        into[...] = rows.view(np.uint16) if rows.dtype.name == "bfloat16" else rows
        forget(given, rows)

    return read


def writer(x: Any) -> Write:
    """How rows of a head are written, of an array of at most four axes. Likewise."""
    missing = 4 - len(x.shape)

    def write(batch: int, head: int, first: int, rows: np.ndarray) -> None:
        where: tuple[Any, ...] = *(batch, head)[missing:], slice(first, first + len(rows))
        try:
            x[where] = rows.view(x.dtype)
        except OSError as e:  # a full disk, of which storage does not say where it is
            if e.errno is None or e.filename is not None:
                raise
            raise OSError(e.errno, e.strerror, str(x)) from e
        if isinstance(x, np.ndarray):
            forget(x, x[where])

    return write
