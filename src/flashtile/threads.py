"""How many threads a call may use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Protocol

from flashtile.checks import integer
from flashtile.errors import wrong

VARIABLE = "FLASHTILE_NUM_THREADS"
MOST = 4096  # more than any machine has CPUs; systems refuse tens of thousands, in the middle of a call

_chosen: int | None = None
_told = ctypes.c_int64()  # the same, for machine code


def get_num_threads() -> int:
    """Threads that a call may use, the calling one included.

    What set_num_threads chose; else FLASHTILE_NUM_THREADS, read at the first call; else the number of CPUs that
    this process may run on.
    """
    if _chosen is None:
        set_num_threads(_default())
    assert _chosen is not None
    return _chosen


def set_num_threads(n: int) -> None:
    """Let later calls use n threads, the calling one included. The result of a call does not depend on n.

    Raises: SpecError unless n is an integer from 1 to 4096.
    """
    global _chosen
    number = integer(n)
    if number is None or not 1 <= number <= MOST:
        raise wrong("n", repr(n), f"an integer from 1 to {MOST}")
    _chosen = _told.value = number


def address_of_number() -> int:
    """Of 64 bits that always hold what `get_num_threads` returns."""
    get_num_threads()
    return ctypes.addressof(_told)


class Team(Protocol):
    """Threads of another library that stay awake between calls."""

    def __call__(
        self,
        function: Any,
        params: bytes | int,
        begin: int,
        end: int,
        share: int,
        scratch: int,
        step: int,
        members: int,
        /,
    ) -> tuple[int, int]:
        """Call function(params, first, beyond, scratch of its own) on each of as many members, `share` items of those
        from begin to end at a time, until all are done or one fails: (from which item, its status); a status of 0 is
        none. params: bytes, or an address. scratch: `step` bytes for each member."""
        ...


_make: Callable[[], Team] | None = None
_made: Team | None = None


def lend(make: Callable[[], Team] | None) -> None:
    """Offer such threads, made when they are first needed; None offers none any more."""
    global _made, _make
    _made, _make = None, make


def team() -> Team | None:
    """Those that were offered last."""
    global _made
    if _made is None and _make is not None:
        _made = _make()
    return _made


def _default() -> int:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        try:
            return len(os.sched_getaffinity(0))
        except AttributeError:  # no such call on macOS and Windows
            return os.cpu_count() or 1
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise wrong(VARIABLE, repr(text), f"an integer from 1 to {MOST}")
    return int(text)
