"""Disk cache of generated machine code.

A file is named by a digest of what the code depends on: the kernel's configuration, the instruction set,
llvmlite's version, and the sources of the generator itself, so an edited generator never finds an old
object.  Each file begins with a digest of its contents; one that does not match is rebuilt.  Files appear
by rename, so many processes can fill the cache at once; a process that wants what another one builds waits
for it, on a lock that ends with its holder, and not for ever.

Machine code that another user could have written is never run: the folder and the file are opened without
following links, and what was opened is examined, so nothing can be swapped between the look and the read.
A folder that is not fit is refused, with a warning; a folder that is read-only, full or missing costs time
only.  Kept are the 512 objects last used, 20 to 60 KB each; what killed processes were writing goes an hour later,
when the next object is kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from flashtile.errors import FlashtileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # `_locked` asks

KEPT = 512
PATIENCE_SECONDS = 20.0  # with another process that builds the same; kernels take up to a few
LOOK_SECONDS = 0.01
ABANDONED_SECONDS = 3600.0  # after which a file that is being written, or a lock, is one of a process that was killed
GENERATORS = ("llvm", "kernels/cpu", "score")  # folders whose sources decide what is generated

_MAGIC = b"flashtile object 1\n"
_HEAD = len(_MAGIC) + hashlib.sha256().digest_size
_REMEDY = "set FLASHTILE_CACHE_DIR to a folder that only you can write, or chmod go-w"


class _Refused(FlashtileError):
    """The cache could hold code that another user wrote."""


def directory() -> Path:
    """Where objects are kept: FLASHTILE_CACHE_DIR, else flashtile/ in the XDG cache folder."""
    if chosen := os.environ.get("FLASHTILE_CACHE_DIR"):
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification ignores relative paths
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # a user without a home, as containers have them: no folder of this name exists
        base = os.devnull
    return Path(base) / "flashtile"


def unavailable() -> str | None:
    """Why objects are not kept; None if they are.  Makes the folder if there is none."""
    try:
        with _folder(directory(), create=True):
            return None if os.access(directory(), os.W_OK) else "read-only"
    except (OSError, _Refused) as e:
        return str(e)


@functools.cache
def sources_digest() -> str:
    """Digest of every source file that takes part in generating code."""
    root = os.path.dirname(os.path.dirname(__file__))
    walks = itertools.chain.from_iterable(os.walk(os.path.join(root, folder)) for folder in GENERATORS)
    digest = hashlib.sha256()
    for file in sorted(os.path.join(at, name) for at, _, names in walks for name in names if name.endswith(".py")):
        with open(file, "rb") as source:
            content = source.read()
        digest.update(f"{os.path.relpath(file, root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def path_of(key: str) -> Path:
    """The file that holds the object of this key."""
    return directory() / (hashlib.sha256(f"{key}\0{sources_digest()}".encode()).hexdigest()[:40] + ".o")


def peek(key: str) -> bytes | None:
    """The object of this key, if a sound one is there."""
    return _read(path_of(key))


def fetch(key: str, build: Callable[[], bytes]) -> bytes:
    """The object of this key: read if a sound one is there, else built and kept; where another process builds it
    already, read when that is done."""
    path = path_of(key)
    if (found := _read(path)) is not None:
        return found
    with _turn(path):
        return _read(path) or rebuild(key, build)


def rebuild(key: str, build: Callable[[], bytes]) -> bytes:
    """Build the object and keep it, replacing what was there."""
    obj = build()
    _write(path_of(key), obj)
    return obj


# -- files ---------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes | None:
    """The object in the file; None if there is none that is whole and ours."""
    try:
        with _folder(path.parent) as folder:
            handle = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            with os.fdopen(handle, "rb") as file:
                _examine(path, os.fstat(handle), stat.S_ISREG)
                content = file.read()
                with contextlib.suppress(OSError):  # the time says what was used last; a read-only folder keeps none
                    os.utime(handle)
    except _Refused as e:
        _warn(str(e))
        return None
    except OSError:
        return None
    obj = content[_HEAD:]
    return obj if content[:_HEAD] == _header(obj) else None


def _write(path: Path, obj: bytes) -> None:
    """Keep the object; where that is not possible, it is built again next time."""
    try:
        with _folder(path.parent, create=True) as folder:
            temporary = f"{os.urandom(8).hex()}.tmp"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            handle = os.open(temporary, flags, 0o600, dir_fd=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_header(obj) + obj)
                os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(temporary, dir_fd=folder)
                raise
            _prune(folder)
    except _Refused as e:
        _warn(str(e))
    except OSError:
        pass


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """While no other process builds the object of this file, as far as a lock can say and patience lasts."""
    with contextlib.ExitStack() as held:
        try:
            folder = held.enter_context(_folder(path.parent, create=True))
            lock = path.with_suffix(".lock").name
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
            held.callback(os.close, handle)
            if _locked(handle):
                held.callback(_remove, lock, folder)
        except (_Refused, OSError):
            pass  # then several may build it
        yield


def _locked(handle: int) -> bool:
    """Whether this process has got the lock in time. It goes with the process that has it, however that ends."""
    if fcntl is None:
        return False
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(LOOK_SECONDS)
        else:
            return True


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _header(obj: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(obj).digest()


def _prune(folder: int) -> None:
    """Remove what processes that were killed left behind, and what was used least recently, down to the limit."""
    with os.scandir(folder) as entries:
        files = [e for e in entries if e.name.endswith((".o", ".tmp", ".lock")) and not _abandoned(e, folder)]
    most = KEPT + sum(e.name.endswith(".lock") for e in files)  # of processes at work
    if len(files) <= most:
        return
    ages = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another process prunes, too
            ages.append((file.stat(follow_symlinks=False).st_mtime_ns, file.name))
    for _, name in sorted(ages)[: len(ages) - most]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _abandoned(file: os.DirEntry[str], folder: int) -> bool:
    """Whether a process was killed before it could rename or remove this file, which is then removed."""
    if file.name.endswith(".o"):
        return False
    with contextlib.suppress(FileNotFoundError):  # its process has ended well
        if time.time() - file.stat(follow_symlinks=False).st_mtime < ABANDONED_SECONDS:
            return False
        _remove(file.name, folder)
    return True


# -- who could have written it -----------------------------------------------------------------------


@contextlib.contextmanager
def _folder(path: Path, create: bool = False) -> Iterator[int]:
    """A descriptor of the folder, which only we (or root) can write; _Refused or OSError if there is none."""
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        if path.is_symlink():
            raise _Refused(f"flashtile's cache {path} is a symbolic link and is not used; {_REMEDY}") from None
        raise
    try:
        _examine(path, os.fstat(handle), stat.S_ISDIR)
        _examine_parents(path)
        yield handle
    finally:
        os.close(handle)


def _examine(path: Path, info: os.stat_result, kind: Callable[[int], bool]) -> None:
    """_Refused unless the file or folder is of this kind, belongs to us (or root) and no one else may write it."""
    if info.st_uid not in (os.geteuid(), 0):
        raise _Refused(f"flashtile's cache {path} belongs to another user and is not used; {_REMEDY}")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Refused(f"flashtile's cache {path} can be written by another user and is not used; {_REMEDY}")
    if not kind(info.st_mode):
        raise _Refused(f"flashtile's cache {path} is of an unexpected kind and is not used; {_REMEDY}")


def _examine_parents(path: Path) -> None:
    """_Refused if anyone could put another folder in this one's place: a parent that all may write, and not sticky.

    Parents that a group may write pass: many systems give each user a group of their own.  What such a group
    puts in our folder's place belongs to another user, which _examine refuses.
    """
    for parent in dict.fromkeys((*path.parents, *path.resolve().parents)):
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _Refused(f"flashtile's cache is not used: its parent {parent} can be written by anyone; {_REMEDY}")


@functools.cache
def _warn(reason: str) -> None:
    """Say it once in a process."""
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
