"""Rooms are found by listing a folder: the file engines/direct.py is engine="direct", and no second list is kept."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names(package: ModuleType, first: tuple[str, ...]) -> list[str]:
    """The public modules in a package, those in `first` ahead, in its order."""
    found = {info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")}
    return [name for name in first if name in found] + sorted(found.difference(first))


def load(package: ModuleType, name: str, *needed: str) -> ModuleType | str | None:
    """Import one module of a package.

    Returns the module; or the reason, if something it needs is not installed; or None, if it is not a room,
    that is, if it lacks one of the functions named in `needed`.
    """
    try:
        module = importlib.import_module(f"{package.__name__}.{name}")
    except ImportError as missing:
        return str(missing)
    return module if all(hasattr(module, function) for function in needed) else None
