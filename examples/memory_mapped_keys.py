"""Keys and values that do not fit in memory: attend to one part of them at a time, and merge.

The parts are exact partial results (o, lse), so their merge is the attention over all keys. Here the files are small;
nothing below would change if they were larger than the machine's memory.

    $ python examples/memory_mapped_keys.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import flashtile

HEADS, ROWS, KEYS, HEAD_SIZE = 4, 64, 10_000, 64
PART = 4096  # keys at a time


def write_keys_and_values(folder: Path) -> None:
    """Fill k.npy and v.npy, a part at a time."""
    rng = np.random.default_rng(0)
    for name in ("k", "v"):
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (HEADS, KEYS, HEAD_SIZE))
        for start in range(0, KEYS, PART):
            part = file[:, start : start + PART]
            part[...] = rng.standard_normal(part.shape)


def attend_by_parts(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(o, lse) of q over all keys, holding one partial result at a time."""
    total = None
    for start in range(0, k.shape[1], PART):
        part = slice(start, start + PART)
        partial = flashtile.attention(q, k[:, part], v[:, part], return_lse=True)
        total = partial if total is None else flashtile.merge([total, partial])
    assert total is not None, "there are keys"
    return total


def main() -> None:
    q = np.random.default_rng(1).standard_normal((HEADS, ROWS, HEAD_SIZE), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_keys_and_values(Path(folder))
        k, v = (np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("k", "v"))
        o, lse = attend_by_parts(q, k, v)
        whole, whole_lse = flashtile.attention(q, k, v, return_lse=True)
        print(f"{KEYS} keys in parts of {PART}: o {o.shape}, lse {lse.shape}")
        print(f"largest difference from one call: o {abs(o - whole).max():.1e}, lse {abs(lse - whole_lse).max():.1e}")
        np.testing.assert_allclose(o, whole, atol=1e-5)


if __name__ == "__main__":
    main()
