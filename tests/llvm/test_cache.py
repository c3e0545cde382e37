"""The disk cache: what is found, what is rebuilt, and what is refused because someone else could have written it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashtile
from flashtile.llvm import cache

OBJECT = bytes(range(256)) * 40
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, in a folder that is not made yet."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path / "cache"))
    cache._warn.cache_clear()
    yield tmp_path / "cache"
    cache._warn.cache_clear()


class Builder:
    """Builds OBJECT, and counts how often."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self) -> bytes:
        self.built += 1
        return OBJECT


def fetch(times: int = 1) -> int:
    """How often one object is built when it is fetched so often."""
    build = Builder()
    for _ in range(times):
        assert cache.fetch("key", build) == OBJECT
    return build.built


# -- where ---------------------------------------------------------------------------------------------


def test_where_objects_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FLASHTILE_CACHE_DIR", raising=False)
    assert cache.directory() == tmp_path / "home/.cache/flashtile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg/flashtile"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache.directory() == tmp_path / "home/.cache/flashtile"
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path / "own"))
    assert cache.directory() == tmp_path / "own"
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", "~/own")
    assert cache.directory() == tmp_path / "home/own"
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", "")
    assert cache.directory() == tmp_path / "home/.cache/flashtile"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "FLASHTILE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it answers a user that is not in passwd
    assert fetch(2) == 2
    assert cache.unavailable() is not None


# -- found and not found -------------------------------------------------------------------------------


def test_an_object_is_built_once(folder: Path) -> None:
    assert fetch(3) == 1
    (kept,) = folder.iterdir()
    assert kept == cache.path_of("key")
    assert (folder.stat().st_mode & 0o777, kept.stat().st_mode & 0o777) == (0o700, 0o600)
    assert cache.unavailable() is None


def test_another_key_is_another_object(folder: Path) -> None:
    assert cache.fetch("a", lambda: b"one") == b"one"
    assert cache.fetch("b", lambda: b"two") == b"two"
    assert cache.fetch("a", lambda: b"three") == b"one"


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "another file", "longer"])
def test_a_damaged_file_is_rebuilt(folder: Path, damage: str) -> None:
    fetch()
    path = cache.path_of("key")
    content = path.read_bytes()
    flipped = bytes([content[-1] ^ 1])
    damaged = {
        "truncated": content[:-5000],
        "empty": b"",
        "one bit": content[:-1] + flipped,
        "another file": b"\x7fELF" + content,
        "longer": content + b"\0",
    }
    path.write_bytes(damaged[damage])
    assert fetch(2) == 1
    assert path.read_bytes() == content


def package_copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(Path(flashtile.__file__).parent, tmp_path / "copy/flashtile", ignore=ignored))


@pytest.mark.parametrize("source", ["kernels/cpu/steps/softmax.py", "llvm/machines/base.py", "score/emit.py"])
def test_an_edited_source_makes_new_objects(tmp_path: Path, source: str) -> None:
    """A copy of the package; a comment more in one generator; the same call finds nothing of what it had kept."""
    package, objects = package_copy(tmp_path), tmp_path / "objects"
    call = "import numpy as np, flashtile; q = np.ones((1, 1, 4, 4), 'f4'); flashtile.attention(q, q, q, kernel='cpu')"
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "FLASHTILE_CACHE_DIR": str(objects)}

    def kept() -> set[str]:
        subprocess.run([sys.executable, "-c", call], env=environment, check=True)
        return {path.name for path in objects.iterdir()}

    before = kept()
    assert before and kept() == before
    with open(package / source, "a") as file:
        file.write("\n# edited\n")
    after = kept()
    assert after > before and len(after) == 2 * len(before)


def test_what_generates_no_code_makes_no_new_objects(tmp_path: Path) -> None:
    package = package_copy(tmp_path)
    ask = "from flashtile.llvm.cache import sources_digest; print(sources_digest())"

    def digest() -> str:
        environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        return subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True)

    before = digest()
    with open(package / "cli.py", "a") as file:
        file.write("\n# edited\n")
    assert digest() == before
    (package / "kernels/cpu/steps/softmax.py").rename(package / "kernels/cpu/steps/softmax_renamed.py")
    assert digest() != before


FILL = """
import os, random, sys
from flashtile.llvm import cache
keys = [str(n) for n in range(40)] * 3
random.Random(int(sys.argv[1])).shuffle(keys)
for key in keys:
    expected = (key * 50000).encode()
    assert cache.fetch(key, lambda: expected) == expected, key
"""


def test_many_processes_fill_one_cache(folder: Path) -> None:
    """Half of them find it damaged all the time: every process always gets the object of its key, and whole."""
    processes = [subprocess.Popen([sys.executable, "-c", FILL, str(n)]) for n in range(4)]
    while any(process.poll() is None for process in processes):
        for path in list(folder.glob("*.o"))[:5]:
            path.write_bytes(path.read_bytes()[:1000])
    assert [process.wait() for process in processes] == [0] * 4
    assert not list(folder.glob("*.tmp"))
    assert len(list(folder.glob("*.o"))) == 40


TOGETHER = """
import os, signal, sys, time
from flashtile.llvm import cache
def build():
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.3)
    if sys.argv[2:] == ["dies"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return b"object"
cache.fetch("ready " + sys.argv[1], lambda: b"")
print(flush=True)
sys.stdin.read()
assert cache.fetch("key", build) == b"object"
"""


@pytest.mark.parametrize("how", [[], ["dies"]])
def test_what_several_processes_want_is_built_by_one(how: list[str], folder: Path, tmp_path: Path) -> None:
    """A process that dies while it builds leaves it to the next."""
    log, pipe = tmp_path / "log", subprocess.PIPE
    commands = [[sys.executable, "-c", TOGETHER, log], [sys.executable, "-c", TOGETHER, log, *how]]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe) for command in reversed(commands)]
    for process in processes:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
    for n, process in enumerate(processes):
        process.stdin.close()
        while how and n == 0 and not log.exists():  # the one that dies has begun
            time.sleep(0.01)
    ended = [process.wait() for process in processes]
    assert ended == [-signal.SIGKILL if how else 0, 0]
    assert log.read_text() == "built\n" * (2 if how else 1)
    assert not list(folder.glob("*.lock"))


def test_nobody_waits_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.fetch("other", lambda: OBJECT)
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.05)
    with open(cache.path_of("key").with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fetch(2) == 1


def test_the_objects_last_used_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 4)
    for n in range(4):
        cache.fetch(str(n), lambda: OBJECT)
        os.utime(cache.path_of(str(n)), ns=(n, n))
    cache.fetch("0", lambda: OBJECT)  # the oldest, used again
    cache.fetch("4", lambda: OBJECT)
    (folder / "killed.tmp").write_bytes(b"")
    os.utime(folder / "killed.tmp", ns=(0, 0))
    cache.fetch("5", lambda: OBJECT)
    assert {p.name for p in folder.iterdir()} == {cache.path_of(n).name for n in "0345"}


KILLED = """
import os, signal
from flashtile.llvm import cache
os.rename = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
cache.fetch("key", lambda: bytes(100))
"""


def test_what_a_killed_process_left_goes_an_hour_later(folder: Path) -> None:
    """Its file that was not renamed and its lock; those of processes that may be at work stay."""
    assert subprocess.run([sys.executable, "-c", KILLED]).returncode == -signal.SIGKILL
    left = list(folder.iterdir())
    assert sorted(x.suffix for x in left) == [".lock", ".tmp"]
    cache.fetch("other", lambda: OBJECT)
    assert all(x.exists() for x in left)
    past = time.time() - cache.ABANDONED_SECONDS - 60
    for x in (*left, cache.path_of("other")):
        os.utime(x, (past, past))
    cache.fetch("another", lambda: OBJECT)
    assert {x.name for x in folder.iterdir()} == {cache.path_of(n).name for n in ("other", "another")}


# -- cannot be written ---------------------------------------------------------------------------------


def failing(error: int):  # type: ignore[no-untyped-def]
    def fail(*_args: object, **_options: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


def test_a_full_disk_costs_time_only(folder: Path) -> None:
    """A file system so small that the object does not fit: stood in for by a limit on the size of files."""
    script = (
        "import resource, signal\n"
        "from flashtile.llvm import cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for _ in range(2):\n"
        "    assert cache.fetch('key', lambda: bytes(5000)) == bytes(5000)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("call", ["mkdir", "open", "rename"])
@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_read_only_or_full_disk_costs_time_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.setattr(os, call, failing(error))
        assert fetch(2) == 2
    assert not folder.exists() or list(folder.iterdir()) == []
    assert fetch(2) == 1


@root_only
def test_a_read_only_folder_that_is_filled_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user: what root has put there is read, and nothing can be added."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setenv("FLASHTILE_CACHE_DIR", name)
        fetch()
        cache.path_of("key").chmod(0o644)
        script = (
            "import os\n"
            "from flashtile.llvm import cache\n"
            "cache.sources_digest()\n"
            f"os.setuid({NOBODY})\n"
            "assert cache.fetch('key', lambda: b'built') != b'built'\n"
            "assert cache.fetch('other', lambda: b'built') == b'built'\n"
            "assert cache.unavailable() == 'read-only'\n"
        )
        subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", script], check=True)
        assert [path.name for path in folder.iterdir()] == [cache.path_of("key").name]


# -- refused -------------------------------------------------------------------------------------------


def refused(reason: str) -> None:
    """The object is built every time, and the user is told why, once."""
    with pytest.warns(RuntimeWarning, match=reason) as record:
        assert fetch(3) == 3
    assert len(record) == 1
    assert "FLASHTILE_CACHE_DIR" in str(record[0].message)
    assert re.search(reason, cache.unavailable() or "")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_refused(folder: Path, mode: int) -> None:
    fetch()
    folder.chmod(mode)
    refused("can be written by another user")
    folder.chmod(0o700)
    assert fetch() == 0


def test_a_folder_that_is_a_link_is_refused(folder: Path) -> None:
    fetch()
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    refused("symbolic link")


@pytest.mark.parametrize("sticky", [False, True])
def test_a_parent_that_anyone_can_write_is_refused_unless_sticky(folder: Path, sticky: bool) -> None:
    fetch()
    folder.parent.chmod(0o1777 if sticky else 0o777)
    if sticky:
        assert fetch() == 0
    else:
        refused(f"parent {re.escape(str(folder.parent))} can be written by anyone")


def test_a_link_above_the_folder_does_not_hide_a_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~/.cache may be a link; what it points into is examined like any parent."""
    fetch()
    outside = folder.parent / "outside"
    outside.mkdir()
    folder.rename(outside / "cache")
    (folder.parent / "link").symlink_to(outside)
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(folder.parent / "link/cache"))
    assert fetch() == 0
    outside.chmod(0o777)
    refused("can be written by anyone")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_not_read(folder: Path, mode: int) -> None:
    fetch()
    cache.path_of("key").chmod(mode)
    with pytest.warns(RuntimeWarning, match="can be written by another user"):
        assert fetch() == 1
    assert cache.path_of("key").stat().st_mode & 0o777 == 0o600, "what replaced it is ours alone"
    assert fetch() == 0


def test_a_file_that_is_a_link_is_not_followed(folder: Path) -> None:
    fetch()
    path = cache.path_of("key")
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert fetch() == 1
    assert not path.is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_read(folder: Path, make) -> None:  # type: ignore[no-untyped-def]
    fetch()
    path = cache.path_of("key")
    path.unlink()
    make(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fetch() == 1


@root_only
def test_what_belongs_to_another_user_is_refused(folder: Path) -> None:
    fetch()
    os.chown(cache.path_of("key"), NOBODY, -1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert fetch() == 1
    assert fetch() == 0
    cache._warn.cache_clear()
    os.chown(folder, NOBODY, -1)
    refused("belongs to another user")


def test_what_is_examined_is_what_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file swapped after it was opened, before it is looked at, changes nothing: no name is used twice."""
    fetch()
    path, real = cache.path_of("key"), os.fstat
    evil = folder / "evil"
    evil.write_bytes(cache._header(b"evil") + b"evil")

    def swapping(handle: int) -> os.stat_result:
        info = real(handle)
        if stat.S_ISREG(info.st_mode):
            os.replace(evil, path)
        return info

    with monkeypatch.context() as patch:  # pytest itself asks of its files, between here and the next test
        patch.setattr(os, "fstat", swapping)
        assert fetch() == 0
    assert not evil.exists(), "nothing was swapped"
