"""The cases that are timed, with the targets they are held to, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEM_BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Case:
    """One attention problem; q is (batch, heads, queries, head_size), k and v (batch, kv_heads, keys, head_size).

    A row's position is i + keys - queries (bottom-right alignment). `window` is the number of visible keys that end
    at this position, 0 for no limit; it implies causal. Targets are those of a two-core Zen 4: `ratio` is the time of
    the best peer over flashtile's, `percent` flashtile's share of what `unit` names: the dot-product peak of one core
    in a dtype, or the "read" bandwidth.
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
        """The keys that query `row` attends to."""
        position = row + self.keys - self.queries
        stop = min(self.keys, position + 1) if self.hides else self.keys
        start = max(0, position - self.window + 1) if self.window else 0
        return range(start, max(start, stop))

    @property
    def flops(self) -> int:
        """Two multiply-adds a head element and visible (query, key) pair; the softmax is not counted."""
        pairs = sum(len(self.visible_keys(row)) for row in range(self.queries))
        return 4 * self.batch * self.heads * self.head_size * pairs

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


SCALING_TARGET = 1.85  # two threads against one, in every case bound by arithmetic

CASES = (
    Case("f32-1k64", "f32", 1, 8, 8, 1024, 1024, 64, ratio=1.05, percent=80),
    Case("f32-2k128", "f32", 1, 8, 8, 2048, 2048, 128, ratio=1.2, percent=88),
    Case("f32-4k64", "f32", 1, 8, 8, 4096, 4096, 64, ratio=1.1, percent=84),
    Case("f32-512", "f32", 4, 12, 12, 512, 512, 64, ratio=1.05, percent=78),
    Case("f32-causal-1k64", "f32", 1, 8, 8, 1024, 1024, 64, causal=True, ratio=1.5, percent=74),
    Case("f32-causal-2k128", "f32", 1, 8, 8, 2048, 2048, 128, causal=True, ratio=1.5, percent=85),
    Case("f32-causal-4k64", "f32", 1, 8, 8, 4096, 4096, 64, causal=True, ratio=1.5, percent=82),
    Case("f32-causal-512", "f32", 4, 12, 12, 512, 512, 64, causal=True, ratio=1.5, percent=70),
    Case("f32-causal-gqa", "f32", 1, 16, 4, 2048, 2048, 128, causal=True, ratio=1.5),
    Case("f32-window", "f32", 1, 8, 8, 8192, 8192, 64, causal=True, window=512, ratio=15),
    Case("bf16-2k128", "bf16", 1, 8, 8, 2048, 2048, 128, ratio=1.15, percent=82, unit="bf16"),
    Case("bf16-causal-4k64", "bf16", 1, 8, 8, 4096, 4096, 64, causal=True, ratio=2, percent=73, unit="bf16"),
    Case("f16-2k128", "f16", 1, 8, 8, 2048, 2048, 128, ratio=1.05, percent=85),
    Case("f16-causal-4k64", "f16", 1, 8, 8, 4096, 4096, 64, causal=True, ratio=1.8, percent=80),
    Case("f64-1k64", "f64", 1, 8, 8, 1024, 1024, 64, ratio=1.6, percent=78, unit="f64"),
    Case("f32-decode", "f32", 1, 32, 32, 1, 8192, 128, ratio=2, unit="read"),
    Case("bf16-decode", "bf16", 1, 32, 32, 1, 8192, 128, ratio=4, unit="read"),
    Case("f16-decode", "f16", 1, 32, 32, 1, 8192, 128, ratio=4, unit="read"),
    Case("bf16-decode-gqa", "bf16", 4, 32, 8, 1, 8192, 128, ratio=4, percent=80, unit="read"),
)

QUICK = ("f32-1k64", "f32-2k128", "f32-causal-2k128", "bf16-2k128", "f16-2k128", "f64-1k64", "bf16-decode-gqa")


def short_cases() -> list[Case]:
    """Sequences of 1 to 128, where NumPy's unfused form is at its best and fixed costs show."""
    lengths = (1, 2, 3, 5, 8, 16, 17, 31, 32, 48, 64, 65, 96, 127, 128)
    shapes = [(dtype, heads, 64, False) for dtype in ("f32", "f64", "bf16", "f16") for heads in (1, 8)]
    shapes += [("f32", 1, 16, False), ("f32", 8, 128, False), ("f32", 1, 64, True), ("f32", 8, 64, True)]
    found = []
    for dtype, heads, size, causal in shapes:
        name = f"short-{dtype}-h{heads}-d{size}{'-causal' * causal}"
        found += [Case(f"{name}-{n}", dtype, 1, heads, heads, n, n, size, causal, ratio=1) for n in lengths]
    return found
