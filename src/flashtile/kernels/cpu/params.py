"""The parameter block of a call: 64-bit words, addresses first, and the scratch memory it lays out."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import numpy as np

from flashtile.kernels.cpu.config import Config

# captures: the program's capture block.  rows, segments: which keys each panel of queries sees (plan/segments.py).
ADDRESSES = ("q", "k", "v", "o", "lse", "offsets", "captures", "rows", "segments", "sinks")
STRIDES = tuple(f"{tensor}_{axis}" for tensor in "qkvo" for axis in "bhsd")
SIZES = ("heads", "group", "q_len", "kv_len", "head_size", "value_size", "value_columns", "key_words", "tile_q",
         "query_tiles", "splits", "split_keys", "o_split", "lse_split", "carry", "offset", "left", "right", "pack_k",
         "pack_v", "k_row", "v_row", "segment_b", "segment_h", "sink_b", "sink_h")  # fmt: skip
SCRATCH = ("at_q", "at_o", "at_state", "at_earlier_o", "at_earlier_state", "at_lost_o", "at_lost_state", "at_k", "at_v",
           "at_extra", "at_cursor", "at_dense")  # fmt: skip
REALS = ("sign", "scale", "c_high", "c_low", "lse_scale")

# What the score program of a tile needs, in scratch memory: 64-bit words.
FRAME = ("captures", "b", "h", "row", "last_row", "block", "last_key", "scale", "dense")
# splits: parts of the keys, split_keys each, that are work items of their own; o_split, lse_split: bytes between their
# results.  carry: o and lse hold the state of earlier keys, to be continued.
FIELDS = (*ADDRESSES, *STRIDES, *SIZES, *SCRATCH, *REALS)
INDEX: Mapping[str, int] = {name: i for i, name in enumerate(FIELDS)}

OPEN = 1 << 61  # beyond every position, window and offset that a spec may hold: the open side of a band

_addresses = struct.Struct(f"{len(ADDRESSES)}q")
_tail = struct.Struct(f"{len(FIELDS) - len(ADDRESSES) - len(REALS)}q{len(REALS)}d")

pack_addresses = _addresses.pack


def pack_tail(values: Mapping[str, float]) -> bytes:
    """All fields but the addresses; they are the same at every call of a prepared plan."""
    return _tail.pack(*(values[name] for name in FIELDS[len(ADDRESSES) :]))


def split_scale(scale: float, accumulator: str) -> dict[str, float]:
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
    return {"sign": sign, "scale": scale, "c_high": float(high), "c_low": float(low), "lse_scale": nats}


def scores_in_nats(scale: float, accumulator: str) -> dict[str, float]:
    """The same where a score program needs the scores themselves: they are scaled first, and then are in nats."""
    return {**split_scale(1.0, accumulator), "scale": scale}


class Scratch:
    """Where things stand in a thread's scratch memory.

    The first areas have sizes known when the kernel is generated: the frame of the score program, the running
    maximum of the block, the factor for older sums, and the scores.  The others follow at offsets that ride in
    the parameter block: transposed queries and outputs and the softmax state of each panel, a converted block of K
    and V, and more.
    """

    def __init__(self, c: Config):
        self.frame = 0
        self.block_max = _aligned(8 * len(FRAME))
        self.alpha = self.block_max + _aligned(c.line)
        self.scores = self.alpha + _aligned(c.line)
        self.dense = (c.key_block + c.rows) * c.line  # one dense load's tile: a line a key, as the scores
        self.rest = self.scores + self.dense

    def layout(self, c: Config, head_size: int, value_size: int, panels: int) -> tuple[dict[str, int], int]:
        """Offsets of the areas whose size depends on the call, and the bytes of all."""
        columns = c.padded(value_size)
        areas = {
            "at_q": panels * c.key_words(head_size) * c.line,
            **{f"at_{level}o": panels * columns * c.line for level in ("", "earlier_", "lost_")},
            **{f"at_{level}state": panels * 2 * c.line for level in ("", "earlier_", "lost_")},
            "at_k": c.key_block * c.key_words(head_size) * c.size,
            "at_v": (c.key_block // c.per_word + 1) * columns * c.size,
            "at_extra": columns * c.line,
            "at_cursor": 8 * (panels + 1),
            "at_dense": len(c.code.dense_loads) * self.dense if c.code else 0,
        }
        offsets, at = {}, _aligned(self.rest)
        for name, size in areas.items():
            offsets[name] = at
            at += _aligned(size)
        return offsets, at


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
