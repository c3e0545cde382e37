"""The footprint by which StarPU's performance models tell the costs of tasks apart.

Two tasks have one footprint when the same machine code meets tiles of the same sizes of which it sees the same part,
wherever the tiles stand: every tile on the diagonal of a causal mask is one case, every full tile another.
"""

from __future__ import annotations

import zlib

import numpy as np


def footprint_of(identity: str, *numbers: int) -> int:
    """A hash of what sets the cost of a task: the code with its head sizes and score program, and numbers of tiles."""
    return zlib.crc32(repr((identity, *numbers)).encode())


def footprints(identity: str, cases: np.ndarray) -> np.ndarray:
    """uint32 (n,): the footprint of each row of `cases` (n, numbers)."""
    kinds, which = np.unique(cases, axis=0, return_inverse=True)
    found = np.array([footprint_of(identity, *kind) for kind in kinds.tolist()], np.uint32)
    return found[which.reshape(-1)]  # NumPy 2.0 gave it a second axis
