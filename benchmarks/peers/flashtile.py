"""flashtile itself, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ..cases import Case
from ..layouts import LAYOUTS


def refuses(case: Case) -> str | None:
    return None


def versions() -> dict[str, str]:
    try:
        found = {"flashtile": version("flashtile")}
    except PackageNotFoundError:
        found = {"flashtile": "checkout"}
    return {**found, "llvmlite": version("llvmlite")}


def options(case: Case) -> dict[str, Any]:
    """What the case hides and changes, as keywords of `flashtile.attention`."""
    found: dict[str, Any] = {"causal": case.causal}
    if case.window:
        found["window"] = (case.window - 1, 0)
    if case.hides and case.queries != case.keys:
        found["align"] = "bottom_right"
    return {**found, **case.options.keywords(case)}


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    import flashtile

    flashtile.set_num_threads(threads)
    keywords = options(case)
    q, k, v = map(LAYOUTS[case.layout], (q, k, v))

    def run() -> np.ndarray:
        return flashtile.attention(q, k, v, **keywords)

    def to_numpy(out: Any) -> np.ndarray:
        return out

    return run, to_numpy


def prepare_backward(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, threads: int
) -> tuple[Callable, Callable]:
    import flashtile

    flashtile.set_num_threads(threads)
    keywords = options(case)

    def forward() -> tuple[np.ndarray, np.ndarray]:
        return flashtile.attention(q, k, v, return_lse=True, **keywords)

    done = forward()

    def run() -> Any:
        o, lse = forward() if case.direction == "both" else done
        return flashtile.attention_backward(do, q, k, v, o, lse, **keywords)

    return run, lambda gradients: (gradients.q, gradients.k, gradients.v)
