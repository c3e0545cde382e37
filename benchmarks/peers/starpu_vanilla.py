"""The unfused pipeline of three codelets (scores, softmax, output) on the same tiles and workers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..cases import Case
from .starpu import prepare as prepare_engine
from .starpu import refuses, versions

__all__ = ["prepare", "refuses", "versions"]


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    return prepare_engine(case, q, k, v, threads, kernel="vanilla")
