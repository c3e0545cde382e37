"""flashtile in the case that another one is held to: the same inputs without the option, or with a built-in one."""

from __future__ import annotations

from .flashtile import prepare, refuses, versions

__all__ = ["prepare", "refuses", "versions"]
