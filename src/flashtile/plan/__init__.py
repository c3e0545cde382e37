"""How a call is cut into work items, and which key tiles each of them meets."""

from __future__ import annotations

from flashtile.plan.capabilities import Capabilities
from flashtile.plan.coverage import Coverage, coverage_of
from flashtile.plan.items import Plan
from flashtile.plan.tiling import make_plan

__all__ = ["Capabilities", "Coverage", "Plan", "coverage_of", "make_plan"]
