"""flashtile's engine "starpu", with StarPU's own choice of scheduler (lws); the base of the other files starpu_*."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cases import Case
from . import flashtile as direct

# Task times are given as they are: neither measured anew nor kept from another run.
os.environ.setdefault("STARPU_SILENT", "1")


def refuses(case: Case) -> str | None:
    from flashtile.engines import starpu

    return starpu.unavailable()


def versions() -> dict[str, str]:
    from flashtile.engines.starpu import build

    found = build.package()
    return {**direct.versions(), "starpu": found[1] if found else "not available"}


def prepare(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int, **keywords: Any
) -> tuple[Callable, Callable]:
    import flashtile

    flashtile.set_num_threads(threads)
    keywords |= direct.options(case)
    return lambda: flashtile.attention(q, k, v, engine="starpu", **keywords), lambda out: out
