"""The cases that are timed, with the targets they are held to, as data."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .options import OPTIONS, Option

MULTIPLY_ADDS = {"forward": 2, "backward": 5, "both": 7}  # a pair and head element
ITEM_BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Case:
    """One attention problem; q is (batch, heads, queries, head_size), k and v (batch, kv_heads, keys, head_size).

    A row's position is i + keys - queries (bottom-right alignment). `window` is the number of visible keys that end
    at this position, 0 for no limit; it implies causal. `option` names what else changes the scores (options.py),
    `layout` how q, k and v lie in memory (layouts.py; of flashtile's own arrays only).

    Targets are those of two cores of Zen 4 or 5: `ratio` is the time of the best peer, or of `rival`, over flashtile's;
    where there is a `base`, another case's name, flashtile's rate over its rate on the same inputs there. `percent` is
    flashtile's share of what `unit` names: the dot-product peak of one core in a dtype, or the "read" bandwidth.
    `scaling` is what two threads are to gain over one. `amx`, `amx_percent` and `intel` are the same targets on other
    kinds of machines (kinds.py); `only` names the one kind that runs the case unasked. `direction` says whether the
    forward is timed, its gradients of q, k and v, or "both" together.
    """

    name: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_size: int
    causal: bool = False
    window: int = 0
    ratio: float | None = None
    percent: float | None = None
    unit: str = "f32"
    option: str = ""
    rival: str = ""
    base: str = ""
    layout: str = ""
    direction: str = "forward"
    scaling: float | None = None
    intel: float | None = None
    amx: float | None = None
    amx_percent: float | None = None
    only: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arrays that the case takes."""
        return ("q", "k", "v") if self.direction == "forward" else ("q", "k", "v", "do")

    @property
    def options(self) -> Option:
        return OPTIONS[self.option]

    @property
    def shape(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else str(self.heads)
        length = str(self.queries) if self.queries == self.keys else f"{self.queries}/{self.keys}"
        return f"({self.batch},{heads},{length},{self.head_size})"

    @property
    def reads(self) -> bool:
        """Bound by reading K and V, not by arithmetic: measured in GB/s."""
        return self.queries == 1 and self.keys > 1

    @property
    def hides(self) -> bool:
        return self.causal or self.window > 0

    def visible_keys(self, row: int) -> range:
        """The keys that causal and window show query `row`."""
        position = row + self.keys - self.queries
        stop = min(self.keys, position + 1) if self.hides else self.keys
        start = max(0, position - self.window + 1) if self.window else 0
        return range(start, max(start, stop))

    @property
    def flops(self) -> int:
        """Two multiply-adds a head element and visible (query, key) pair, five for gradients; the softmax is not
        counted."""
        return 2 * MULTIPLY_ADDS[self.direction] * self.head_size * _visible_pairs(self)

    @property
    def bytes(self) -> int:
        """Q, K and V read once and O written once."""
        rows = 2 * self.heads * self.queries + 2 * self.kv_heads * self.keys
        return self.batch * rows * self.head_size * ITEM_BYTES[self.dtype]

    @property
    def score_bytes(self) -> int:
        """What an unfused form stores for the scores alone, in at least fp32."""
        return self.batch * self.heads * self.queries * self.keys * max(4, ITEM_BYTES[self.dtype])

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_size)


@functools.cache
def _visible_pairs(case: Case) -> int:
    """Over all batches and heads."""
    if case.options.mask is None:
        return case.batch * case.heads * sum(len(case.visible_keys(row)) for row in range(case.queries))
    mask = case.options.mask(case)  # an option with a mask comes without causal and window
    copies = case.batch * case.heads * case.queries * case.keys // mask.size
    return copies * int(np.count_nonzero(mask))


SCALING_TARGET = 1.85  # two threads against one, in every forward case bound by arithmetic

CASES = (
    Case("f32-1k64", "f32", 1, 8, 8, 1024, 1024, 64, ratio=1.05, percent=80, amx=1.35),
    Case("f32-2k128", "f32", 1, 8, 8, 2048, 2048, 128, ratio=1.2, percent=88, amx=1.5, amx_percent=100),
    Case("f32-4k64", "f32", 1, 8, 8, 4096, 4096, 64, ratio=1.1, percent=84, amx=1.5, amx_percent=100),
    Case("f32-512", "f32", 4, 12, 12, 512, 512, 64, ratio=1.05, percent=78),
    Case("f32-causal-1k64", "f32", 1, 8, 8, 1024, 1024, 64, causal=True, ratio=1.5, percent=74, amx=1.6),
    Case(
        "f32-causal-2k128",
        "f32",
        1,
        8,
        8,
        2048,
        2048,
        128,
        causal=True,
        ratio=1.5,
        percent=85,
        amx=1.9,
        amx_percent=100,
    ),
    Case(
        "f32-causal-4k64", "f32", 1, 8, 8, 4096, 4096, 64, causal=True, ratio=1.5, percent=82, amx=1.9, amx_percent=100
    ),
    Case("f32-causal-512", "f32", 4, 12, 12, 512, 512, 64, causal=True, ratio=1.5, percent=70),
    Case("f32-causal-gqa", "f32", 1, 16, 4, 2048, 2048, 128, causal=True, ratio=1.5),
    Case("f32-window", "f32", 1, 8, 8, 8192, 8192, 64, causal=True, window=512, ratio=15),
    Case("bf16-2k128", "bf16", 1, 8, 8, 2048, 2048, 128, ratio=1.15, percent=82, unit="bf16", amx=2.3),
    Case("bf16-causal-4k64", "bf16", 1, 8, 8, 4096, 4096, 64, causal=True, ratio=2, percent=73, unit="bf16", amx=3.3),
    Case("f16-2k128", "f16", 1, 8, 8, 2048, 2048, 128, ratio=1.05, percent=85, amx=3),
    Case("f16-causal-4k64", "f16", 1, 8, 8, 4096, 4096, 64, causal=True, ratio=1.8, percent=80),
    Case("f64-1k64", "f64", 1, 8, 8, 1024, 1024, 64, ratio=1.6, percent=78, unit="f64"),
    Case("f32-decode", "f32", 1, 32, 32, 1, 8192, 128, ratio=2, unit="read"),
    Case("bf16-decode", "bf16", 1, 32, 32, 1, 8192, 128, ratio=4, unit="read"),
    Case("f16-decode", "f16", 1, 32, 32, 1, 8192, 128, ratio=4, unit="read"),
    Case("bf16-decode-gqa", "bf16", 4, 32, 8, 1, 8192, 128, ratio=4, percent=80, unit="read"),
    Case("f32-decode-64", "f32", 1, 32, 32, 1, 16384, 64, percent=80, unit="read"),
    Case("bf16-decode-64", "bf16", 1, 32, 32, 1, 16384, 64, ratio=4, percent=80, unit="read"),
)

# Options that change scores. Peers are given dense arrays where flashtile computes; in the last ones flashtile is held
# to itself: what an option costs beside the plain kernel (0.952 and 0.87: 5% and 15% more time), and a user's function
# beside the built-in one it copies.
OPTION_CASES = (
    Case("f32-documents", "f32", 1, 8, 8, 8192, 8192, 64, option="documents", ratio=4),
    Case("f32-padding", "f32", 1, 8, 8, 2048, 2048, 64, option="padding", ratio=1.1, rival="torch"),
    Case("f32-bias", "f32", 1, 8, 8, 2048, 2048, 64, option="bias", ratio=1.1, rival="torch"),
    Case(
        "f32-cap-sinks",
        "f32",
        1,
        8,
        8,
        4096,
        4096,
        64,
        causal=True,
        window=512,
        option="softcap, sinks",
        ratio=8,
        rival="torch",
    ),
    Case("f32-alibi", "f32", 1, 8, 8, 4096, 4096, 64, option="alibi", ratio=0.952, base="f32-4k64"),
    Case("f32-softcap", "f32", 1, 8, 8, 4096, 4096, 64, option="softcap", ratio=0.87, base="f32-4k64"),
    Case("f32-window-2k", "f32", 1, 8, 8, 4096, 4096, 64, causal=True, window=2048, ratio=0.952, base="f32-4k64"),
    Case("own-alibi", "f32", 1, 8, 8, 4096, 4096, 64, option="alibi by hand", ratio=0.952, base="f32-alibi"),
    Case("own-softcap", "f32", 1, 8, 8, 4096, 4096, 64, option="softcap by hand", ratio=0.952, base="f32-softcap"),
    Case(
        "own-window",
        "f32",
        1,
        8,
        8,
        4096,
        4096,
        64,
        causal=True,
        window=2048,
        option="window by hand",
        ratio=0.952,
        base="f32-window-2k",
    ),
    Case(
        "own-documents", "f32", 1, 8, 8, 8192, 8192, 64, option="documents by hand", ratio=0.952, base="f32-documents"
    ),
)

AMX = "Intel AMX"


def _on_tiles(name: str, dtype: str, heads: int, length: int, size: int, amx: float | None, **fields: Any) -> Case:
    """One sequence, of as many queries as keys unless they are given."""
    known = {"batch": 1, "kv_heads": heads, "queries": length, "keys": length, **fields}
    return Case(name, dtype, heads=heads, head_size=size, amx=amx, only=AMX, **known)


def _options_on_tiles() -> Iterator[Case]:
    """What options cost: the share of the plain kernel's rate over visible pairs. At D = 64 it is recorded."""
    exact, coarse = (0.85, 0.85, 0.85, 0.65), (0.85, 0.75, 0.75, 0.55)
    for dtype, targets in (("f32", exact), ("f16", exact), ("bf16", coarse)):
        for option, target in zip(("padding", "alibi", "alibi by hand", "softcap"), targets, strict=True):
            for length, size in ((2048, 128), (4096, 64)):
                shape = f"{length // 1024}k{size}"
                name = f"{dtype}-{option.replace('alibi by hand', 'own-alibi')}-{shape}"
                share = target if size == 128 else None
                yield _on_tiles(name, dtype, 8, length, size, share, option=option, base=f"{dtype}-{shape}")


# What matrix registers are held to beside the cases above; other kinds of machines run these where they are named.
AMX_CASES = (
    _on_tiles("bf16-4k64", "bf16", 8, 4096, 64, 3.0),
    _on_tiles("bf16-causal-2k128", "bf16", 8, 2048, 128, 2.5, causal=True),
    _on_tiles("f16-causal-2k128", "f16", 8, 2048, 128, 3.5, causal=True),
    _on_tiles("f16-4k64", "f16", 8, 4096, 64, None),
    _on_tiles("bf16-causal-gqa", "bf16", 16, 2048, 128, 2.2, causal=True, kv_heads=4),
    _on_tiles("bf16-window", "bf16", 8, 8192, 64, 40.0, causal=True, window=512),
    _on_tiles("bf16-512", "bf16", 12, 512, 64, 1.8, batch=4),
    _on_tiles("bf16-causal-ragged", "bf16", 6, 1531, 96, 2.2, batch=2, causal=True),
    _on_tiles("bf16-few-gqa", "bf16", 32, 16384, 128, 1.3, kv_heads=8, queries=7),
    _on_tiles("f32-tf32-2k128", "f32", 8, 2048, 128, 2.5, option="tf32"),
    *_options_on_tiles(),
)

ALL_CASES = (*CASES, *OPTION_CASES, *AMX_CASES)

QUICK = ("f32-1k64", "f32-2k128", "f32-causal-2k128", "bf16-2k128", "f16-2k128", "f64-1k64", "bf16-decode-gqa")


SHORT_SAMPLE = 400  # of the many short shapes: all of them would take an hour


def short_cases() -> list[Case]:
    """Sequences of 1 to 128, where NumPy's unfused form is at its best and fixed costs show: as many queries as keys,
    then a sample of other numbers of both, in every dtype and head size, the same at every run."""
    lengths = (1, 2, 3, 5, 8, 16, 17, 31, 32, 48, 64, 65, 96, 127, 128)
    shapes = [(dtype, heads, 64, False) for dtype in ("f32", "f64", "bf16", "f16") for heads in (1, 8)]
    shapes += [("f32", 1, 16, False), ("f32", 8, 128, False), ("f32", 1, 64, True), ("f32", 8, 64, True)]
    found = [_short(dtype, h, n, n, size, causal) for dtype, h, size, causal in shapes for n in lengths]
    others = [case for case in short_grid() if case not in found]
    return found + random.Random(0).sample(others, SHORT_SAMPLE)


def short_grid() -> list[Case]:
    """Every combination; a causal row is one that sees a key."""
    lengths = (1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64, 96, 128)
    axes = itertools.product(
        ("f32", "f64", "bf16", "f16"), (1, 8), lengths, lengths, (16, 32, 64, 80, 128), (False, True)
    )
    return [_short(*axis) for axis in axes if not axis[-1] or axis[2] <= axis[3]]


def _short(dtype: str, heads: int, queries: int, keys: int, size: int, causal: bool) -> Case:
    length = f"{queries}" if queries == keys else f"{queries}-{keys}"
    name = f"short-{dtype}-h{heads}-d{size}{'-causal' * causal}-{length}"
    return Case(name, dtype, 1, heads, heads, queries, keys, size, causal, ratio=1)
