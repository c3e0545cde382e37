"""The version, for the package and whatever it writes to disk."""

from __future__ import annotations

__version__ = "0.1.0"
