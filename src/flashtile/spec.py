"""AttentionSpec: what one call computes, validated, frozen and hashable. It holds no array values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from flashtile.arrays import device_of
from flashtile.checks import ALIGNMENTS, check_flag, finite, integer
from flashtile.dtypes import DTYPES, DType, dtype_of
from flashtile.errors import wrong
from flashtile.score.code import Code
from flashtile.signature import Precision

PRECISIONS: tuple[str, ...] = get_args(Precision)

# Positions, windows and offsets stay below this, so that their sums never overflow 64 bits in a kernel.
LARGEST_POSITION = 2**60

# Stands for an integer array (B,) given as `align`: its values are run-time parameters, its presence is structure.
PER_BATCH = type("PerBatch", (), {"__repr__": lambda self: "an integer per batch"})()

# What a score program may depend on that is the same for every head and row.
_OF_KEYS = frozenset("sbj")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Band:
    """Key j is visible to row i iff -left <= j - (i + offset) <= right; None is open on that side.

    Causal is Band(None, 0); a window (l, r) is Band(l, r); both together intersect.
    """

    left: int | None
    right: int | None


@dataclass(frozen=True)
class AttentionSpec:
    """Everything that decides which kernel runs and how, except where the arrays lie.

    Shapes:  q (batch, heads, q_len, head_size), k (batch, kv_heads, kv_len, head_size),
             v (batch, kv_heads, kv_len, value_size) -> o (batch, heads, q_len, value_size).
    offset anchors the band: 0 for top_left, kv_len - q_len for bottom_right, or any integer;
    None if it is an array (batch,) that comes with each call. Without a band it is 0.
    device is where all arrays lie: "cpu", or "cuda:0" and so on.
    program is what else changes scores or hides keys; where it has a mask, that mask includes the band. sinks says
    whether each query head has a logit that joins its denominators, dropout
    whether some of its weights are dropped: by which seed and probability is a value of the call.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_size: int
    value_size: int
    dtype: str
    precision: str
    band: Band | None
    offset: int | None
    scale: float
    program: Code | None = None
    sinks: bool = False
    dropout: bool = False
    device: str = "cpu"

    @property
    def device_kind(self) -> str:
        """The device without its number, as in `Capabilities.devices`."""
        return self.device.partition(":")[0]

    @property
    def element_bytes(self) -> int:
        """Of Q, K and V."""
        return DTYPES[self.dtype].itemsize

    @property
    def group(self) -> int:
        """Query heads that share one key/value head: head h reads key/value head h // group."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def heads_alike(self) -> bool:
        """Whether nothing but their one query tells heads apart that share a key/value head."""
        told = self.band or self.sinks or self.dropout
        code = self.program
        free = code is None or (code.mask is None and code.score is not None and code.score.variables <= _OF_KEYS)
        return self.q_len == 1 and self.group > 1 and not told and free

    @property
    def stacked(self) -> AttentionSpec:
        """The same call where `heads_alike`, with those that share a key/value head as the rows of one."""
        return self.changed(heads=self.kv_heads, q_len=self.group)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to multiply, or nothing to multiply it with: no heads, or head sizes of 0. Lengths
        and batches of 0 are no special case to a kernel."""
        return 0 in (self.heads, self.head_size, self.value_size)

    @property
    def filled(self) -> AttentionSpec:
        """This call with a 1 for every such 0, as kernel families are asked about it."""
        if not self.empty:
            return self
        heads, kv_heads = max(self.heads, self.kv_heads, 1), max(self.kv_heads, 1)
        size, value_size = max(self.head_size, 1), max(self.value_size, 1)
        return replace(self, heads=heads, kv_heads=kv_heads, head_size=size, value_size=value_size)

    @property
    def options(self) -> frozenset[str]:
        """The names of the features this call needs from a kernel, as in `Capabilities.options`."""
        named = (("band", self.band), ("program", self.program), ("sinks", self.sinks), ("dropout", self.dropout))
        return frozenset(name for name, value in named if value)

    def with_keys(self, kv_len: int, align: object, positional: bool = False) -> AttentionSpec:
        """This spec for another number of keys, `align` and `positional` being what it was made with (`of`).

        Raises: SpecError where a rule needs an align now.
        """
        if kv_len == self.kv_len:
            return self
        return self.changed(kv_len=kv_len, offset=self.offset_at(kv_len, align, positional))

    def offset_at(self, kv_len: int, align: object, positional: bool = False) -> int | None:
        """The offset of `with_keys`. Raises: as it does."""
        return offset_of(align, positional or self.band is not None, self.q_len, kv_len)

    def changed(self, **fields: Any) -> AttentionSpec:
        """This spec with other values in some fields, like dataclasses.replace, which takes ten times as long: decoders
        ask at every step."""
        found = object.__new__(AttentionSpec)
        found.__dict__.update(self.__dict__, **fields)
        return found

    @classmethod
    def of(
        cls,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: object = False,
        window: object = None,
        align: object = None,
        scale: object = None,
        precision: object = "ieee",
        positional: bool = False,
    ) -> AttentionSpec:
        """Validate a call. q, k and v are anything with a `shape` of rank 2, 3 or 4 and a `dtype`; positional says that
        a rule other than the band is anchored by `align`.

        Raises: SpecError naming the first wrong argument, what came and what was expected.
        """
        dtype = common_dtype(q.dtype, k.dtype, v.dtype)
        q4, k4, v4 = four_dims(tuple(q.shape), tuple(k.shape), tuple(v.shape))
        for argument, holds, got, expected in SHAPE_RULES:
            if not holds(q4, k4, v4):
                raise wrong(argument, got(q4, k4, v4), expected(q4, k4, v4))
        band = band_of(causal, window)
        if band is not None and band.left is None and q4[2] == 1 and isinstance(align, str) and align == "bottom_right":
            band = None  # one row at the last key sees them all, however many
        return cls(
            batch=q4[0],
            heads=q4[1],
            kv_heads=k4[1],
            q_len=q4[2],
            kv_len=k4[2],
            head_size=q4[3],
            value_size=v4[3],
            dtype=dtype.name,
            precision=precision_of(precision, dtype),
            band=band,
            offset=offset_of(align, positional or band is not None, q4[2], k4[2]),
            scale=scale_of(scale, q4[3], DTYPES[dtype.accumulator]),
            device=common_device(q, k, v),
        )


Text = Callable[[Shape, Shape, Shape], str]
ShapeRule = tuple[str, Callable[[Shape, Shape, Shape], bool], Text, Text]

# argument, what must hold, what came, what was expected: of the three shapes as (B, H, S, D).
SHAPE_RULES: tuple[ShapeRule, ...] = (
    ("k", lambda q, k, v: k[0] == q[0], lambda q, k, v: f"batch {k[0]}", lambda q, k, v: f"{q[0]} as in q"),
    ("v", lambda q, k, v: v[0] == q[0], lambda q, k, v: f"batch {v[0]}", lambda q, k, v: f"{q[0]} as in q"),
    ("k", lambda q, k, v: k[3] == q[3], lambda q, k, v: f"head size {k[3]}", lambda q, k, v: f"{q[3]} as in q"),
    ("v", lambda q, k, v: v[1] == k[1], lambda q, k, v: f"{v[1]} heads", lambda q, k, v: f"{k[1]} as in k"),
    ("v", lambda q, k, v: v[2] == k[2], lambda q, k, v: f"length {v[2]}", lambda q, k, v: f"{k[2]} as in k"),
    (
        "k",
        lambda q, k, v: q[1] % k[1] == 0 if k[1] else q[1] == 0,
        lambda q, k, v: f"{k[1]} heads",
        lambda q, k, v: f"a divisor of q's {q[1]} heads",
    ),
)


def common_dtype(q: object, k: object, v: object) -> DType:
    """The dtype that q, k and v share."""
    dtype = dtype_of(q, "q")
    for argument, other in (("k", dtype_of(k, "k")), ("v", dtype_of(v, "v"))):
        if other is not dtype:
            raise wrong(argument, f"dtype {other.name}", f"{dtype.name} as in q")
    return dtype


def common_device(q: object, k: object, v: object) -> str:
    """The device that q, k and v share."""
    device = device_of(q)
    for argument, other in (("k", device_of(k)), ("v", device_of(v))):
        if other != device:
            raise wrong(argument, f"an array on {other}", f"one on {device} as q")
    return device


def four_dims(q: Shape, k: Shape, v: Shape) -> tuple[Shape, Shape, Shape]:
    """The three shapes as (B, H, S, D): rank 3 is one batch, rank 2 is also one head."""
    if not 2 <= len(q) <= 4:
        raise wrong("q", f"shape {q}", "(B, H, S_q, D), (H, S_q, D) or (S_q, D)")
    for argument, shape in (("k", k), ("v", v)):
        if len(shape) != len(q):
            raise wrong(argument, f"shape {shape}", f"rank {len(q)} as in q")
    ones = (1,) * (4 - len(q))
    return ones + q, ones + k, ones + v


def band_of(causal: object, window: object) -> Band | None:
    """The intersection of `causal` and `window`, None if every key is visible to every row."""
    check_flag("causal", causal)
    left, right = (None, None) if window is None else _window(window)
    right = 0 if causal else right
    return None if left is None and right is None else Band(left, right)


def _window(window: object) -> tuple[int | None, int | None]:
    expected = f"a pair (left, right) of integers from 0 to {LARGEST_POSITION}, or -1 or None for an open side"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise wrong("window", repr(window), expected)
    sides = []
    for side in window:
        number = -1 if side is None else integer(side)
        if number is None or not -1 <= number <= LARGEST_POSITION:
            raise wrong("window", repr(window), expected)
        sides.append(None if number == -1 else number)
    return sides[0], sides[1]


def check_align(align: object) -> None:
    """Raise SpecError for what is no alignment, for any lengths."""
    if align is None or align is PER_BATCH or (isinstance(align, str) and align in ALIGNMENTS):
        return
    number = integer(align)
    if number is None or abs(number) > LARGEST_POSITION:
        raise wrong("align", repr(align), '"top_left", "bottom_right", an integer, or an integer array (B,)')


def offset_of(align: object, needed: bool, q_len: int, kv_len: int) -> int | None:
    """The offset that `align` stands for; see AttentionSpec."""
    check_align(align)
    if not needed:
        return 0
    if align is None and q_len != kv_len:
        raise wrong(
            "align",
            f"None with {q_len} queries and {kv_len} keys",
            'a choice, because a positional rule (causal, window, ALiBi, ...) needs one here: "top_left" (row 0 '
            "meets key 0), "
            '"bottom_right" (the last row meets the last key), an integer offset, or an integer array (B,)',
        )
    if align is PER_BATCH:
        return None
    if isinstance(align, str):
        return 0 if align == "top_left" else kv_len - q_len
    return integer(align) or 0


def scale_of(scale: object, head_size: int, scores: DType = DTYPES["float64"]) -> float:
    """The factor of q.k, in the dtype of scores; by default 1 / sqrt(head_size), of no elements 1."""
    if scale is None:
        return 1.0 / math.sqrt(max(head_size, 1))
    number = finite(scale)
    if number is None:
        raise wrong("scale", repr(scale), "a finite real number or None")
    if abs(number) > scores.largest:  # 0 times what becomes an infinity would be NaN
        raise wrong("scale", repr(scale), f"a number that {scores.name} holds, in which scores are computed")
    return number


def precision_of(precision: object, dtype: DType) -> str:
    """The precision of the two products; only float32 inputs leave a choice."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise wrong("precision", repr(precision), "one of " + ", ".join(map(repr, PRECISIONS)))
    if precision != "ieee" and dtype.name != "float32":
        raise wrong("precision", f"{precision!r} with {dtype.name} inputs", "'ieee' (others are for float32 inputs)")
    return precision
