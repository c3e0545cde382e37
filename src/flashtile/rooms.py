"""Rooms are found by listing a folder: the file engines/direct.py is engine="direct", and no second list is kept."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


@functools.cache
def names(package: ModuleType, first: tuple[str, ...]) -> list[str]:
    """The public modules in a package, those in `first` ahead, in its order."""
    found = {info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")}
    return [name for name in first if name in found] + sorted(found.difference(first))


def load(package: ModuleType, name: str, offer: str, kind: type[T]) -> T | str | None:
    """Import one module of a package.

    Returns what it offers: its attribute named `offer`; or the reason, if something it needs is not installed; or None,
    if it is not a room, that is, if it offers nothing of this kind.
    """
    try:
        module = importlib.import_module(f"{package.__name__}.{name}")
    except ImportError as missing:
        return str(missing)
    offered = getattr(module, offer, None)
    return offered if isinstance(offered, kind) else None


def no_remark() -> str:
    """What `flashtile doctor` says of a room that says nothing."""
    return ""
