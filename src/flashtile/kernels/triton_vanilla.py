"""The unfused baseline on a GPU: three stages in Triton, each storing its whole S_q x S_kv result.

What the flash kernel of the family `triton` replaces and is measured against there, as `vanilla` is on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from flashtile.kernels import Capabilities, CompiledKernel, Family, Layout, triton
from flashtile.kernels.triton import tiles
from flashtile.kernels.triton.vanilla_host import Vanilla

if TYPE_CHECKING:
    from flashtile.plan import Plan
    from flashtile.spec import AttentionSpec


def capabilities(spec: AttentionSpec) -> Capabilities:
    """As the flash kernel's; a work item is a whole head, since unfused stages store S_q x S_kv at once."""
    return replace(
        triton.capabilities(spec),
        name="triton_vanilla",
        tile_q=(max(1, spec.q_len),),
        tile_k=(max(1, spec.kv_len),),
        variant="",
        head_block=1,
        part_keys=None,
    )


def compile(spec: AttentionSpec, plan: Plan, layout: Layout) -> CompiledKernel:
    """The three stages of one spec, plan and layout."""
    tile = tiles.vanilla_tile(spec, triton.arch_of(spec))
    return Vanilla(spec, plan, layout, tile, triton.device_of(spec))


FAMILY = Family("triton_vanilla", triton.unavailable, capabilities, compile, triton.refuses)
