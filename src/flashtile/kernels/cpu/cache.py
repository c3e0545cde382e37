"""Disk cache of generated machine code.

A file is named by a digest of what the code depends on: the kernel's configuration, the instruction set,
llvmlite's version, and the sources of the generator itself, so an edited generator never finds an old
object.  Each file begins with a digest of its contents; one that does not match is rebuilt.  Files appear
by rename, so many processes can fill the cache at once.  Machine code that another user could have written
is never run: a folder or file that is not ours alone to write is refused, with a warning, and the code is
generated in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

_MAGIC = b"flashtile object 1\n"


def directory() -> Path:
    """Where objects are kept: FLASHTILE_CACHE_DIR, else flashtile/ in the XDG cache folder."""
    if chosen := os.environ.get("FLASHTILE_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "flashtile"


@functools.cache
def sources_digest() -> str:
    """Digest of every source file that takes part in generating code: this folder's and the score language's."""
    here = Path(__file__).parent
    files = sorted([*here.rglob("*.py"), *(here.parent.parent / "score").rglob("*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def path_of(key: str) -> Path:
    """The file that holds the object of this key."""
    return directory() / (hashlib.sha256(f"{key}\0{sources_digest()}".encode()).hexdigest()[:40] + ".o")


def fetch(key: str, build: Callable[[], bytes]) -> bytes:
    """The object of this key: read if a sound one is there, else built and kept."""
    return _read(path_of(key)) or rebuild(key, build)


def rebuild(key: str, build: Callable[[], bytes]) -> bytes:
    """Build the object and keep it, replacing what was there."""
    obj = build()
    _write(path_of(key), obj)
    return obj


def _ours(path: Path) -> bool:
    """Whether the file or folder belongs to us (or root) and no one else may write it."""
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        return False
    return info.st_uid in (os.geteuid(), 0) and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _refuse(path: Path) -> None:
    warnings.warn(
        f"flashtile's cache {path} can be written by another user (or is a link) and is not used; "
        "set FLASHTILE_CACHE_DIR to a folder of your own, or chmod go-w",
        RuntimeWarning,
        stacklevel=6,
    )


def _read(path: Path) -> bytes | None:
    try:
        for part in (path.parent, path):
            if not _ours(part):
                _refuse(part)
                return None
        content = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + hashlib.sha256().digest_size
    obj = content[head:]
    return obj if content[:head] == _MAGIC + hashlib.sha256(obj).digest() else None


def _write(path: Path, obj: bytes) -> None:
    """Keep the object; a cache that cannot be written (read-only, full, refused) costs time, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours(path.parent):
            _refuse(path.parent)
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(obj).digest() + obj)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
