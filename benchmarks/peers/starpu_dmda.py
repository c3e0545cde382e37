"""The same under dmda, a scheduler that uses performance models, calibrated first and then left alone."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from .. import machine
from ..cases import Case
from .starpu import prepare as prepare_engine
from .starpu import refuses, versions

__all__ = ["prepare", "refuses", "versions"]

CALIBRATING_CALLS = 3  # a call has many tasks of a kind; StarPU wants ten measurements


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    from flashtile import starpu

    models = str(machine.folder_until_exit("models"))  # registered before StarPU's own last steps, which save them
    starpu.init(workers=threads, scheduler="dmda", calibrate=True, models=models)
    run, to_numpy = prepare_engine(case, q, k, v, threads)
    for _ in range(CALIBRATING_CALLS):
        run()
    starpu.shutdown()  # saves the models
    os.environ["STARPU_SCHED"] = "dmda"
    return run, to_numpy
