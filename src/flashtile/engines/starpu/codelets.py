"""Codelets: an operation in one dtype, its implementations by architecture, its performance model."""

from __future__ import annotations

from typing import Any

from flashtile.engines.starpu import runtime
from flashtile.errors import UnavailableError, wrong

# Operation: what the four numbers of a task's tile are, for errors.
LABELS: dict[str, tuple[str, ...]] = {
    "forward": ("batch", "head", "query tile", "key tile"),
    "finish": ("batch", "head", "query tile"),
    "merge": ("batch", "head", "query tile"),
    "scores": ("batch", "head", "query tile", "key tile"),
    "softmax": ("batch", "head", "query tile"),
    "output": ("batch", "head", "query tile", "key tile"),
    "accumulate": ("first query", "first key"),
    "delta": ("batch", "head", "query tile"),
    "backward": ("batch", "head", "query tile", "key tile"),
    "add": ("batch", "head", "tile"),
    "accumulate_delta": ("first query", "first key"),
    "accumulate_backward": ("first query", "first key"),
    "accumulate_add": ("first query", "first key"),
}


def name_of(operation: str, dtype: str) -> str:
    """What StarPU calls the codelet."""
    return f"flashtile_{operation}_{dtype}"


def labels_of(name: str) -> tuple[str, ...]:
    """What the numbers of a task's tile are, by the name of its codelet."""
    return LABELS[name.removeprefix("flashtile_").rpartition("_")[0]]


class Codelet:
    """One operation in one dtype, as StarPU knows it.

    Its performance model, history based and named like it, is kept on disk by schedulers that use models (dmda and
    its kin) and by calibration. Kernels come with each task, so one codelet serves every head size and score program;
    the footprint (footprint.py) tells their costs apart.
    """

    def __init__(self, operation: str, dtype: str) -> None:
        self.runtime = runtime.current()
        self.name = name_of(operation, dtype)
        self.labels = LABELS[operation]
        self.pointer: Any = self.runtime.lib.ft_codelet_new(self.name.encode())
        if self.pointer == self.runtime.ffi.NULL:
            raise MemoryError(f"no memory for codelet {self.name}")
        self.where: tuple[str, ...] = runtime.ARCHITECTURES
        self._tell("ft_codelet_implement", self.where)  # each program says whether it has a kernel for GPUs (cuda.py)

    def restrict(self, *where: str) -> None:
        """Let tasks submitted from now on run on "cpu", on "cuda" or on both only. Raises: as `check`; nothing is
        changed then."""
        self.check(*where)
        self.place(*where)

    def place(self, *where: str) -> None:
        """The same unchecked: tasks that nothing can run are refused when they are submitted (programs.py)."""
        self.where = where
        self._tell("ft_codelet_where", where)

    def check(self, *where: str) -> None:
        """Raise SpecError for an unknown name, UnavailableError if no worker remains that has kernels."""
        runtime.current()
        for name in where or ("nothing",):
            if name not in runtime.ARCHITECTURES:
                raise wrong("restrict", repr(name), "one of " + ", ".join(map(repr, runtime.ARCHITECTURES)))
        reasons = []
        for name in where:
            if not self.runtime.workers(name):
                reasons.append(f"{name}: StarPU runs no such worker")
            elif name == "cuda" and self.runtime.kernels is None:
                reasons.append(f"{name}: no kernels were given, init(cuda_kernels=...)")
        if len(reasons) == len(where):
            why = "; ".join(reasons)
            raise UnavailableError(f"restrict: got {', '.join(where)}, expected one with workers; {why}")

    def free(self) -> None:
        """Give the memory back, after StarPU's shutdown, which still saves the model."""
        self.runtime.lib.ft_codelet_free(self.pointer)

    def _tell(self, function: str, architectures: tuple[str, ...]) -> None:
        bits = sum(self.runtime.constant(name.upper()) for name in architectures)
        getattr(self.runtime.lib, function)(self.pointer, bits)
