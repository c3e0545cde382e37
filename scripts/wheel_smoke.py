"""Run by `scripts/test` with only the built wheel installed: the package imports, computes and says its version."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np

import flashtile

assert importlib.util.find_spec("torch") is None, "the clean environment is not clean"
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 2, 64, 32), dtype=np.float32) for _ in range(3))
fast = flashtile.attention(q, k, v, causal=True)
exact = flashtile.attention(q, k, v, causal=True, kernel="reference")
assert np.abs(fast - exact).max() < 1e-5, np.abs(fast - exact).max()
print(f"flashtile {importlib.metadata.version('flashtile')} from {flashtile.__file__}: ok")
