"""T5's relative position bias: a learnt number for each head and each bucket of distances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..checks import check_flag, integer
from ..errors import SpecError, described, wrong
from .capture import capture
from .causal import anchor
from .mask import Score

FARTHEST = 1 << 24  # fp32, in which T5 computes buckets, has every distance so far; their table is then 64 MiB


def relative(table: Any, *, max_distance: int = 128, bidirectional: bool = True) -> Score:
    """s + table[bucket(j - (i + offset)), h].

    Shapes:   table (buckets, H), floats.
    Numerics: half of the buckets (of each direction's share) are for the distances 0, 1, 2, ..., the rest spaced
              logarithmically up to max_distance, the last for everything beyond. Looked up in a small integer
              table made once, so that every kernel agrees on the bucket edges.
    Raises:   SpecError for another rank or dtype, or max_distance not beyond the exact buckets or above 2^24.
    Source:   Raffel et al. 2020, T5, section 2.1; mesh_tensorflow's relative_position_bucket.
    """
    check_flag("bidirectional", bidirectional)
    found = capture(table, "relative")
    if found.rank != 2 or found.type != "float":
        raise SpecError(f"relative: got {found.dtype} of shape {found.array.shape}, expected floats (buckets, H)")
    buckets = distance_buckets(found.array.shape[0] // (2 if bidirectional else 1), max_distance)
    share = found.array.shape[0] // 2 if bidirectional else 0
    last = len(buckets) - 1

    def build(offset: Any) -> Any:
        def biased(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            ahead = j - (i + anchor(offset, b))
            distance = np.abs(ahead) if bidirectional else np.maximum(-ahead, 0)
            bucket = buckets[np.minimum(distance, last)]
            return s + table[bucket + np.where(ahead > 0, share, 0), h]

        return biased

    def fits(shape: tuple[int, int, int, int]) -> None:
        if found.array.shape[1] != shape[1]:
            raise SpecError(f"relative: got shape {found.array.shape}, expected (buckets, H) = (..., {shape[1]})")

    return Score(build, positional=True, name="relative", fits=fits)


def distance_buckets(count: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance 0 ... max_distance, int32; computed in fp32 as T5 does."""
    exact, whole = count // 2, integer(max_distance)
    if whole is None or whole > FARTHEST:
        raise wrong("max_distance", described(max_distance), f"an integer, at most {FARTHEST}")
    if exact < 1 or whole <= exact:
        raise SpecError(
            f"relative: got {count} buckets a direction and max_distance {max_distance}, "
            "expected at least 2 buckets and max_distance beyond half of them"
        )
    distance = np.arange(whole + 1)
    beyond = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    ratio = np.log(beyond) / np.float32(math.log(whole / exact))
    far = exact + (ratio * np.float32(count - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, count - 1)).astype(np.int32)
