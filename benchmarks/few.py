"""`python -m benchmarks.few`: the kernel of few queries beside that of tiles, by the number of rows that share keys.

Which one computes a call is a table (`PACES`, `TILED_PACES` and `STACKED_HEADS` in kernels/cpu/few.py). Here both
compute every call, with the table set aside for this process: one thread, keys in cache and from memory, results
held to the accuracy rule first. Rows are queries of one head, as heads with one query each become where they are many;
or of several heads that share keys.
A line that ends with NOT THE FASTER ONE names a place where the table takes a kernel that needs over 1.15 times as
long.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

import flashtile
from flashtile.calls import clear_cache
from flashtile.kernels import cpu
from flashtile.testing import assert_accurate

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)
# Queries of a head, by how many heads share keys.
ROWS = {1: (4, 8, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64), 4: (2, 3, 5, 7, 12), 8: (2, 4, 7)}
# Heads and keys: K and V of a megabyte or two, and of more than caches hold.
KEYS = {"in cache": (1, 2048), "from memory": (8, 16384)}
HEAD_SIZE = 128
SMALL_ROWS, SMALL_KEYS = {1: (4, 24), 4: (7,)}, {"in cache": (1, 300)}
SLOWER = 1.15


@contextlib.contextmanager
def forced(least: float) -> Iterator[None]:
    """passes/decode from so many keys on, whatever the rows: 0 always, inf never."""
    table = cpu._decodes_from

    def forget() -> None:
        for kept in (cpu._decoding, cpu._capabilities):
            kept.cache_clear()
        clear_cache()

    cpu._decodes_from = functools.lru_cache(lambda *_: least)
    forget()
    try:
        yield
    finally:
        cpu._decodes_from = table
        forget()


def seconds(*arrays: np.ndarray, least: int) -> float:
    """The least time of a call that the accuracy rule has passed."""
    heads, keys = arrays[1].shape[1:3]
    few = [x[:, :1, : min(keys, 500)] for x in arrays]
    assert_accurate(flashtile.attention(*few, kernel="cpu"), *few)
    times = []
    while len(times) < least or (sum(times) < 0.2 and len(times) < 100 * least):
        start = time.perf_counter()
        flashtile.attention(*arrays, kernel="cpu")
        times.append(time.perf_counter() - start)
    return min(times)


def lines(*, small: bool = False) -> Iterator[str]:
    flashtile.set_num_threads(1)
    random = np.random.default_rng(0)
    for dtype in DTYPES[: 1 if small else None]:
        for where, (heads, keys) in (SMALL_KEYS if small else KEYS).items():
            k, v = (random.standard_normal((1, heads, keys, HEAD_SIZE), np.float32).astype(dtype) for _ in range(2))
            for group, some in (SMALL_ROWS if small else ROWS).items():
                for rows in some:
                    q = random.standard_normal((1, group * heads, rows, HEAD_SIZE), np.float32).astype(dtype)
                    of = f"{rows} rows" if group == 1 else f"{rows} rows of {group} heads"
                    yield _line(f"{np.dtype(dtype).name}, {where}, {of}", q, k, v, 2 if small else 5)


def _line(what: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, least: int) -> str:
    taken: Any = flashtile.explain(q, k, v, kernel="cpu").variant
    found = {}
    for name, from_ in (("decode", 0), ("forward", math.inf)):
        with forced(from_):
            assert flashtile.explain(q, k, v, kernel="cpu").variant == name
            found[name] = seconds(q, k, v, least=least)
    slower = found[taken] / min(found.values())
    marked = f"  NOT THE FASTER ONE: {slower:.2f} times as long" if slower > SLOWER else ""
    times = ", ".join(f"{name} {1e6 * t:8.0f} us" for name, t in found.items())
    return f"{what:42} {times}; takes {taken}{marked}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="of almost no size: to see that it runs")
    for line in lines(small=parser.parse_args().small):
        print(line, flush=True)


if __name__ == "__main__":
    main()
