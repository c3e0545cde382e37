"""The first use on a device: problems with known answers, held against the reference by the accuracy rule.

No kernel here has met every GPU, driver and Triton that it may run with, and a miscompiled kernel gives wrong numbers,
not errors. So the first call that needs a row of the tables in some use (with a score program, packed, gradients, ...)
computes a small problem in that use. Verdicts are kept on disk for that device, Triton and version of the kernels; a
failure takes the row out of the choice there (choice.py), and where none is left, the kernels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashtile import current
from flashtile.errors import FlashtileError
from flashtile.kernels.triton.specialisation import Tile
from flashtile.llvm import cache

# The uses of a row, in the order of their names in a verdict.
USES = ("backward", "packed", "few rows", "parts", "program", "arrays", "dropout", "sinks", "many keys")


@dataclass(frozen=True)
class Row:
    """What is judged at once: a row's tiles in one use, the forward's one tile, or those of dQ and of dK and dV."""

    dtype: str
    precision: str
    size: int  # head size, the largest that the row is for
    uses: frozenset[str]
    tiles: tuple[Tile, ...]

    def __str__(self) -> str:
        kind = self.dtype if self.precision == "ieee" else f"{self.dtype} with precision {self.precision}"
        uses = "".join(f", {use}" for use in USES if use in self.uses)
        return f"{kind}, head size {self.size}{uses}, tiles {' and '.join(map(_spelled, self.tiles))}"


def _spelled(tile: Tile) -> str:
    by = " by descriptors" if tile.described else ""
    return f"{tile.tile_q} x {tile.tile_k}{by} ({tile.num_warps} warps, {tile.num_stages} stages)"


# Computes a row's problem on the device under test and raises AssertionError for a wrong answer.
Judge = Callable[[Row], None]

_lock = threading.RLock()
_verdicts: dict[str, dict[str, str | None]] = {}  # by device, then by row: None for what is right


def failure(where: str, version: str, row: Row, judge: Judge | None = None) -> str | None:
    """Why a row must not be used on the device named `where`; None if it may, or if nothing is known.

    judge: how to find out where no verdict is known yet; None: do not. An error for want of memory is no verdict, and
    is raised.
    """
    name, key = str(row), _key(where, version)
    with _lock:
        known = _read(key)
        if name not in known:
            if judge is None:
                return None
            verdict = _judged(row, judge)
            known = _verdicts[key] = {**json.loads(cache.peek(key) or b"{}"), **known, name: verdict}
            cache.rebuild(key, lambda: json.dumps(known).encode())
        reason = known[name]
    return None if reason is None else _told(where, key, name, reason)


def known_failures(where: str, version: str) -> list[str]:
    """Every failure on a device that is known."""
    key = _key(where, version)
    with _lock:
        known = _read(key).items()
    return [_told(where, key, name, reason) for name, reason in known if reason is not None]


def _key(where: str, version: str) -> str:
    return f"self-test on {where}, triton {version}, {sources_digest()}"


def _read(key: str) -> dict[str, str | None]:
    """Verdicts that this process knows, or finds on disk."""
    if key not in _verdicts:
        _verdicts[key] = json.loads(cache.peek(key) or b"{}")
    return _verdicts[key]


def _told(where: str, key: str, name: str, reason: str) -> str:
    again = f"to have it tried again, remove {cache.path_of(key)}"
    return f"failed its self-test in {name} on {where}: {reason} ({again})"


def _judged(row: Row, judge: Judge) -> str | None:
    """What is wrong with the device's answer; None if nothing is."""
    try:
        judge(row)
    except AssertionError as mistake:
        return str(mistake)
    except (FlashtileError, RuntimeError) as broken:
        if out_of_memory(broken):
            raise
        return f"{type(broken).__name__}: {broken}"
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the device's want of memory."""
    full: tuple[type[Exception], ...] = (MemoryError,)
    if current.in_call():
        full += current.here().owner.out_of_memory()
    while error is not None:
        if isinstance(error, full):
            return True
        error = error.__cause__
    return False


@functools.cache
def sources_digest() -> str:
    """Digest of the kernels' sources: a verdict is about them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
