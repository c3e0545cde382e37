"""How a call is cut into work items, and which key tiles each of them meets."""

from __future__ import annotations

from flashtile.plan.coverage import Coverage, coverage_of
from flashtile.plan.tiling import Plan, make_plan

__all__ = ["Coverage", "Plan", "coverage_of", "make_plan"]
