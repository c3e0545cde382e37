"""What a kernel family says of itself, as data: all that the planner knows of kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kernel family does for one dtype and precision. The planner and the choice read nothing else."""

    name: str
    dtypes: frozenset[str]
    precisions: frozenset[str]  # honoured as asked; any other is honoured at higher precision
    max_head_size: int | None  # of D and D_v; None: no limit
    query_block: int  # rows it computes together
    tile_q: tuple[int, ...]  # menu, ascending, multiples of query_block
    tile_k: tuple[int, ...]  # menu, ascending
    options: frozenset[str]  # "band", "lse", ...: see AttentionSpec.options
    native: bool  # runs without the GIL
    isa: str = ""  # the instruction set in use, for explain and doctor
    product: str = ""  # how it multiplies, and why so, for explain and doctor
    backward_product: str = ""  # the same of the backward
    variant: str = ""  # which of the family's kernels computes this spec, for explain
    head_block: int = 1  # query heads of a work item; divides spec.heads
    stacked: bool = False  # AttentionSpec.stacked, whose capabilities are others, is computed faster
    part_keys: int | None = None  # fewest keys worth a work item of their own; None: keys are never split
    longest_part: int | None = None  # keys over which a work item sums accurately; None: any number
    devices: frozenset[str] = frozenset(("cpu",))  # whose memory it reads: "cpu", "cuda"
    enough_items: int | None = None  # work items that keep all of a device busy; None: as many as threads may need
    directions: frozenset[str] = frozenset(("forward",))  # and "backward"
    backward_options: frozenset[str] | None = None  # options that its backward knows; None: the same
    at_once: bool = False  # one call computes every work item, on a device's own threads
