"""flashtile: exact flash attention on tiles."""

from __future__ import annotations

