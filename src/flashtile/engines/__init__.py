"""Engines run the work items of a plan. An engine is a module in this folder with two functions:

    unavailable() -> str | None            why it cannot run on this machine, None if it can
    prepare(plan, kernel) -> Run           called once for a call that may be repeated many times

One that cuts the arrays into tiles of its own, instead of running a plan's work items, also has

    prepare_tiles(spec, layout, family) -> (pack, Run)     pack as CompiledKernel.pack; family, the kernels to use

and any may have remark() -> str, what `flashtile doctor` says of it where it is available.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

from flashtile import rooms
from flashtile.errors import UnavailableError, wrong
from flashtile.progress import Report

AUTO_FIRST = ("direct",)


class Run(Protocol):
    """Run every work item of one call to its end, or raise. The arrays behind `params` outlive the call."""

    def __call__(self, params: Any, report: Report | None = None) -> None: ...


def engines() -> Iterator[tuple[str, ModuleType | str]]:
    """Every engine by name, in the order of preference: its module, or why it cannot be imported."""
    package = sys.modules[__name__]
    for name in rooms.names(package, AUTO_FIRST):
        module = rooms.load(package, name, "unavailable", "prepare")
        if module is not None:
            yield name, module


def pick(requested: str) -> ModuleType:
    """The engine named `requested`; "auto" is the first that is available.

    Raises: SpecError for an unknown name, UnavailableError if the engine cannot run here.
    """
    known = ["auto"]
    reasons = []
    for name, engine in engines():
        known.append(name)
        if requested not in ("auto", name):
            continue
        reason = engine if isinstance(engine, str) else engine.unavailable()
        if reason is None and isinstance(engine, ModuleType):
            return engine
        reasons.append(f"{name}: {reason}")
    if not reasons:
        raise wrong("engine", repr(requested), "one of " + ", ".join(map(repr, known)))
    raise UnavailableError(f"engine: got {requested!r}, expected an available one; " + "; ".join(reasons))


def survey() -> list[tuple[str, str, bool, str]]:
    """(room, name, available, reason if not) of every engine."""
    rows = []
    for name, engine in engines():
        reason = engine if isinstance(engine, str) else engine.unavailable()
        remark = engine.remark() if reason is None and hasattr(engine, "remark") else ""
        rows.append(("engine", name, reason is None, reason or remark))
    return rows
