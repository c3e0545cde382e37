"""Arrays in .npy and .npz files, mapped into memory rather than read, so that they may be larger than it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flashtile.errors import wrong

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; at its end the lengths of the name and of the extra field
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def open_npy(path: Path) -> np.ndarray:
    """Map an .npy file, read only. Raises: SpecError, naming the file, if it is not one that can be read."""
    with _named(path, "a readable .npy file"):
        return _with_bfloat16(np.lib.format.open_memmap(path, mode="r"), path)


def open_npz(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """Map the named arrays of an .npz file, read only; compressed ones are read.

    Raises: SpecError, naming the file, if it is not one that can be read or lacks one of the arrays.
    """
    with _named(path, "a readable .npz file"), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        missing = [name for name in names if name not in members]
        if missing:
            raise wrong(str(path), f"arrays {', '.join(members) or 'none'}", f"also {', '.join(missing)}")
        return [_with_bfloat16(_member(archive, members[name], path), path) for name in names]


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if info.compress_type != zipfile.ZIP_STORED or version not in _HEADER_READERS:
            stream.seek(0)
            return np.lib.format.read_array(stream, allow_pickle=False)
        shape, by_columns, dtype = _HEADER_READERS[version](stream)
        npy_header = stream.tell()
    if dtype.hasobject:
        raise wrong(f"{path}: {info.filename}", "Python objects", "numbers")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    offset = info.header_offset + _LOCAL_HEADER.size + sum(lengths) + npy_header
    return np.memmap(path, dtype, "r", offset, shape, "F" if by_columns else "C")


def _with_bfloat16(array: np.ndarray, path: Path) -> np.ndarray:
    """Two bytes without a type are how NumPy stores the bfloat16 of ml_dtypes."""
    if array.dtype.str.lstrip("<|") != "V2":
        return array
    try:
        from ml_dtypes import bfloat16
    except ImportError as missing:
        expected = "float64, float32 or float16; bfloat16 needs ml_dtypes (pip install ml_dtypes)"
        raise wrong(str(path), "values of two bytes and no type", expected) from missing
    return array.view(bfloat16)


@contextlib.contextmanager
def _named(path: Path, expected: str) -> Iterator[None]:
    """Turn what reading a file may raise into a SpecError that names the file."""
    try:
        yield
    except OSError as e:
        raise wrong(str(path), (e.strerror or str(e)).lower(), expected) from e
    except (zipfile.BadZipFile, EOFError, struct.error, RuntimeError) as e:
        raise wrong(str(path), str(e), expected) from e
    except ValueError as e:
        if type(e) is not ValueError:  # a SpecError says what is wrong already
            raise
        raise wrong(str(path), str(e).splitlines()[0], expected) from e


def same(one: Path, other: Path) -> bool:
    """Whether two names, by whatever links, lead to one file that exists."""
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist, or is not to be looked at: reading or writing it will say so
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and put the file written there in its place, unless the block raises.

    An output may therefore have the name of an input that is mapped: the input lives on until it is unmapped.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_at(file: int, rows: np.ndarray, at: int, name: str) -> None:
    """Write contiguous rows at an offset of a file. Raises: OSError that says which, as where a disk is full."""
    left = rows.view(np.uint8).reshape(-1).data
    with saying(name):
        while len(left):
            done = os.pwrite(file, left, at)
            left, at = left[done:], at + done


def read_at(file: int, into: np.ndarray, at: int, name: str) -> None:
    """Fill contiguous rows from an offset of a file. Raises: OSError."""
    left = into.view(np.uint8).reshape(-1).data
    with saying(name):
        while len(left):
            done = os.preadv(file, [left], at)
            if not done:
                raise OSError(errno.EIO, "it ends before its rows do")
            left, at = left[done:], at + done


class Behind:
    """The file behind a memory map, to be read without it: where a file is cut short meanwhile, a read is an error, of
    which a program knows; a touch of the map is a signal, by which it dies. No page need be mapped and forgotten, too.
    """

    def __init__(self, file: int, name: str, address: int, offset: int) -> None:
        self._file, self._name, self._address, self._offset = file, name, address, offset

    @classmethod
    def of(cls, x: Any) -> Behind | None:
        """None for an array that is no map, for one's own copy (mode "c"), and where the file cannot be told for sure:
        its name may lead to another by now, and only Linux says which file is mapped."""
        base = mapped(x)
        if base is None:
            return None
        start = np.frombuffer(base, np.uint8).ctypes.data
        with contextlib.suppress(OSError, TypeError), open("/proc/self/maps") as maps:
            for line in maps:
                places, _, offset, _, inode, *_ = line.split()
                first, end = (int(place, 16) for place in places.split("-"))
                if first <= start < end:
                    file = os.open(x.filename, os.O_RDONLY | os.O_CLOEXEC)
                    found = cls(file, str(x.filename), start, int(offset, 16) + start - first)
                    return found if os.fstat(file).st_ino == int(inode) else None
        return None

    def read(self, rows: np.ndarray, into: np.ndarray) -> bool:
        """Fill `into` with a part of the map; False where their bytes do not lie alike. Raises: OSError."""
        if not rows.flags.c_contiguous or not into.flags.c_contiguous or rows.nbytes != into.nbytes:
            return False
        read_at(self._file, into, self._offset + rows.ctypes.data - self._address, self._name)
        return True

    def __del__(self) -> None:
        os.close(self._file)


def mapped(x: Any) -> mmap.mmap | None:
    """The map in which an array lies, if that is a file's and not one's own copy of it."""
    if getattr(x, "mode", None) not in ("r", "r+", "w+") or not x.size:
        return None
    base: Any = x
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


@contextlib.contextmanager
def saying(name: str) -> Iterator[None]:
    """Let errors of the system say which file it was."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, name) from e


def create_npy(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Create an .npy file and map it for writing."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
