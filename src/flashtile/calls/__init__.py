"""A call, whatever door it came through: described once, looked up, prepared, run.

request.py   what is asked for beside the arrays: options, what changes scores, offsets
prepared.py  what calls of the same shapes, strides, dtypes and options have in common, and the cache of them
forward.py   attend: from the arrays of an owner to the kernel that reads them
backward.py  the same for gradients
"""

from __future__ import annotations

from flashtile.calls.backward import INPUTS, check_rows, differentiate, run_backward
from flashtile.calls.forward import NUMPY, Arrays, attend, scored, traced
from flashtile.calls.prepared import (
    CACHE_ENTRIES,
    Call,
    cache,
    check_apart,
    clear_cache,
    engine_of,
    family_of,
    lookup,
    prepare,
)
from flashtile.calls.request import Options, Request, Scored, as_name, as_offsets, describe, gathered, split_align

__all__ = [
    "CACHE_ENTRIES",
    "INPUTS",
    "NUMPY",
    "Arrays",
    "Call",
    "Options",
    "Request",
    "Scored",
    "as_name",
    "as_offsets",
    "attend",
    "cache",
    "check_apart",
    "check_rows",
    "clear_cache",
    "describe",
    "differentiate",
    "engine_of",
    "family_of",
    "gathered",
    "lookup",
    "prepare",
    "run_backward",
    "scored",
    "traced",
    "split_align",
]
