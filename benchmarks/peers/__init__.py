"""One file a peer. A peer's module has

refuses(case) -> str | None
    Why the peer cannot do the case, None if it can. Needs no import of the peer's package.
prepare(case, q, k, v, threads) -> (run, to_numpy)
    `run()` is what is timed: one whole call on arrays the peer holds already. `to_numpy(run())` is the output as
    (batch, heads, queries, head_size). Anything that a user pays once (building a graph, compiling) happens here.
prepare_backward(case, q, k, v, do, threads) -> (run, to_numpy)
    The same for gradients, from peers that have them: `to_numpy(run())` is (dq, dk, dv). With the case's direction
    "backward" the forward is done here, with "both" in each run.
versions() -> dict
    The packages whose versions the report names.

A peer is named by its file here; a name with a dot is any importable module of the same form.
"""

from __future__ import annotations

import importlib
from types import ModuleType

DEFAULT = ("flashtile", "flashtile_base", "torch", "onnxruntime", "onnxruntime_mha", "openvino", "jax", "numpy")


def load(name: str) -> ModuleType:
    return importlib.import_module(name if "." in name else f"{__name__}.{name}")
