"""How a call is cut into work items, and which key tiles each of them meets."""

from __future__ import annotations

from flashtile.plan.capabilities import Capabilities
from flashtile.plan.coverage import Coverage, coverage_of, visible_pairs
from flashtile.plan.items import Plan
from flashtile.plan.tiling import cut_of, flops_of_pair, make_plan, waiting_of

__all__ = [
    "Capabilities",
    "Coverage",
    "Plan",
    "coverage_of",
    "cut_of",
    "flops_of_pair",
    "make_plan",
    "visible_pairs",
    "waiting_of",
]
