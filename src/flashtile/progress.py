"""Progress of a call: a function progress(done, total) of work items, or True for a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from flashtile.errors import wrong

Report = Callable[[int, int], object]

_WIDTH = 40


def reporter(progress: Any) -> Report | None:
    """The function to call for a `progress` argument, None for None and False.

    Raises: SpecError if it is neither a bool, None nor callable.
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return _bar()
    if not callable(progress):
        raise wrong("progress", repr(progress), "a function (done, total), True for a bar, or None")
    return progress


def _bar() -> Report:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return text_bar(sys.stderr)
    bar: Any = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc="attention", unit="tile")
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


def text_bar(stream: TextIO) -> Report:
    """A bar of plain characters that redraws one line."""

    def report(done: int, total: int) -> None:
        filled = _WIDTH if total == 0 else _WIDTH * done // total
        percent = 100 if total == 0 else 100 * done // total
        stream.write(f"\rattention [{'#' * filled}{'.' * (_WIDTH - filled)}] {percent:3d}%")
        stream.write("\n" if done == total else "")
        stream.flush()

    return report
