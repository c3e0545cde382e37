"""The parameter blocks of the forward kernel: of a call, and of the score program of a tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from flashtile.kernels.cpu.steps.band import OPEN
from flashtile.llvm.blocks import Block, integers, pointers, reals, strides_of

if TYPE_CHECKING:
    from flashtile.spec import AttentionSpec, Band

CALL = Block(
    # captures: the program's capture block. rows, segments: which keys each panel of queries sees (plan/segments.py).
    pointers("q k v o lse offsets captures rows segments sinks keep"),
    strides_of("qkvo"),
    integers("heads group q_len kv_len head_size value_size value_columns key_words tile_q query_tiles"),
    # Parts of the keys, split_keys each, that are work items of their own, and the bytes between their results.
    integers("splits split_keys o_split lse_split"),
    # carry: o and lse hold the state of earlier keys, to be continued. pack_k, pack_v: K and V must be converted.
    integers("carry offset left right pack_k pack_v k_row v_row segment_b segment_h sink_b sink_h"),
    integers("at_q at_o at_state at_earlier_o at_earlier_state at_lost_o at_lost_state at_k at_v at_extra at_cursor"),
    # least: of Q and K, the smallest magnitude that the parts of products hold (steps/range.py).
    integers("at_dense at_key_flags at_lane_flags at_wide at_tiny_lanes at_tiny least"),
    reals("sign scale c_high c_low lse_scale"),
    integers("head_block"),  # query heads of a work item
)

BACKWARD = Block(
    # dlse, dq, dk, dv: null where there is none. parts: the first key of every part, and the end of the last.
    # sums: the accumulators of captured arrays; dsinks: (B, H), null where not wanted.
    # delta: of a tile, which has no parts.
    pointers("q k v o lse do dlse dq dk dv offsets captures rows segments sinks keep parts sums dsinks delta"),
    strides_of(["q", "k", "v", "o", "do", "dq", "dk", "dv"]),
    integers("heads kv_heads group q_len kv_len head_size value_size key_words value_words splits dq_split"),
    # columns: of dQ; q_columns, do_columns: of packed rows, and dK and dV; in registers key_registers, value_registers.
    integers("columns q_columns do_columns key_registers value_registers offset left right segment_b segment_h"),
    integers("sink_b sink_h"),
    # kept: Q and dO of all panels are made ready at once, and lie so many bytes a row apart; else at every visit.
    integers("kept q_step do_step q_kept do_kept pack_k pack_v pack_k_columns pack_q pack_do"),
    integers("k_row v_row q_row do_row dk_row dv_row"),
    integers("at_q at_do at_q_rows at_do_rows at_state at_flags at_dq at_k at_v at_k_columns at_words"),
    integers("at_dk at_dv at_dk_totals at_dv_totals at_cursor at_dense at_dsink at_kept"),
    # least: as above.
    integers("at_key_flags at_lane_flags at_wide_q at_wide_do least"),
    # Of a tile: its rows, its first key (kv_len is where it ends), and which copy of the accumulators in sums is its.
    # lse_h: bytes from a head's lse and delta to the next one's, where a task has several heads.
    integers("first_row row_count first_key copy lse_h"),
    reals("sign scale c_high c_low"),
)

DELTA = Block(
    # dlse, sinks, dsinks: null where there are none. All but sinks stand at the tile.
    pointers("do o lse dlse delta sinks dsinks"),
    integers("do_h do_s o_h o_s lse_h row_count value_size heads sink_b sink_h at_state at_dsink"),
)

# What ``keep`` points to where weights are dropped (score/keep.py).
KEEP = Block(integers("threshold seed"))

# What the score program of a tile needs, in scratch memory.
FRAME = Block(
    pointers("captures"),
    integers("b h row last_row block last_key"),
    reals("scale"),
    pointers("dense sums"),
    integers("item"),
)


# Where memory is asked for the next block: its rows of K and V, of so many bytes; count: of its keys, 0 for none.
NEXT = Block(pointers("k v"), integers("k_s v_s k_bytes v_bytes count"))


def band_of(spec: AttentionSpec) -> dict[str, int]:
    """A spec's band as the words of a block."""
    return {"offset": bounded(spec.offset or 0), **sides_of(spec.band)}


def sides_of(band: Band | None) -> dict[str, int]:
    """How far it reaches from its diagonal."""
    left, right = (band.left, band.right) if band else (None, None)
    return {"left": OPEN if left is None else bounded(left), "right": OPEN if right is None else bounded(right)}


def bounded(distance: int) -> int:
    """An offset or a side as kernels take it: no sum of several overflows."""
    return max(-OPEN, min(OPEN, distance))


@functools.lru_cache(maxsize=256)
def split_scale(scale: float, accumulator: str) -> Mapping[str, float]:
    """scale * log2(e) as sign * (c_high + c_low), and the factor from raw scores to nats.

    The kernel keeps raw scores, subtracts their maximum, and multiplies the difference by c_high + c_low, so
    the exponent of the largest weight is exactly 0 and the product is good to twice the precision.  c_low is
    strictly positive: a masked score of -inf must not meet a factor of 0.  ``sign`` multiplies the queries: it
    carries the sign of the scale, 0 for a scale of 0, and the power of two that brings an outlandish scale
    into range; all exact.
    """
    real = np.float64 if accumulator == "double" else np.float32
    c = np.longdouble(abs(scale)) / np.log(np.longdouble(2))
    if c == 0:
        sign, c = 0.0, np.longdouble(1) / np.log(np.longdouble(2))
    else:
        limit = 960 if real is np.float64 else 96
        exponent = int(math.floor(math.log2(abs(scale))))
        shift = min(max(exponent, -limit), limit) - exponent
        sign, c = math.copysign(2.0**-shift, scale), c * np.longdouble(2) ** shift
    high = real(c)
    if np.longdouble(high) >= c:
        high = np.nextafter(high, real(0))
    low = real(c - np.longdouble(high))
    nats = float(c * np.log(np.longdouble(2)))
    words = {"sign": sign, "scale": scale, "c_high": float(high), "c_low": float(low), "lse_scale": nats}
    return MappingProxyType(words)


def scores_in_nats(scale: float, accumulator: str) -> Mapping[str, float]:
    """The same where a score program needs the scores themselves: they are scaled first, and then are in nats."""
    return {**split_scale(1.0, accumulator), "scale": scale}
