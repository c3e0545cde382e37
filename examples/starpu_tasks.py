"""Attention as StarPU tasks: tiles registered once, submitted without waiting, results read tile by tile.

Needs StarPU (Debian: apt-get install libstarpu-dev pkg-config gcc libc6-dev; pip install 'flashtile[starpu]'); says so
and does nothing where it is missing.
"""

from __future__ import annotations

import sys

import numpy as np

from flashtile import starpu
from flashtile.errors import UnavailableError
from flashtile.testing import assert_accurate

try:
    starpu.init(workers=2)
except UnavailableError as reason:
    print(f"nothing done: {reason}")
    sys.exit()

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 4, 1000, 64), dtype=np.float32) for _ in range(3))
o, lse = np.empty_like(q), np.empty(q.shape[:3], np.float32)

tensors = [starpu.register(x, rows=256) for x in (q, k, v, o, lse)]  # no copy; the last tile has 232 rows
tasks = starpu.submit_forward(*tensors, causal=True)  # returns at once
print(f"{tasks} tasks on {starpu.workers()} workers; tiles that the mask hides make none")

with tensors[3].acquire((0, 2, 1)) as tile:  # waits for just the tasks on this tile
    print(f"head 2, rows 256 to 511 are there: {tile.shape}")

starpu.wait()  # raises what a task met, naming codelet and tile
for tensor in tensors:
    tensor.unregister()  # the arrays are the program's again
starpu.shutdown()

assert_accurate(o, q, k, v, causal=True)
print("as accurate as the rule asks")
