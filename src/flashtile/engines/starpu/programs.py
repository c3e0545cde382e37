"""Programs: a tile kernel with the table that tells the trampoline which word of its block each buffer sets."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from flashtile.engines.starpu.codelets import Codelet
from flashtile.engines.starpu.cuda_scores import size_of
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.launches import Launches
from flashtile.engines.starpu.runtime import Runtime
from flashtile.engines.starpu.tiles import DROP_LATER
from flashtile.errors import UnavailableError
from flashtile.kernels.tiles import TileKernel

CACHE_LINE = 64
NOT_FOR_GPUS = "it has kernels for CPUs only"

NO_HANDLES = np.zeros(0, np.uint64)
NOTHING: Mapping[str, int] = MappingProxyType({})

# Handle of the task, word of its address, word of its bytes between rows or None; and, where the word is to hold the
# distance from another binding, the number of that one.
Binding = tuple[Any, ...]


class Program:
    """A kernel as tasks call it. Lives as long as tasks of it may run; jobs see to that."""

    def __init__(
        self,
        runtime: Runtime,
        kernel: TileKernel,
        bindings: tuple[Binding, ...],
        values: tuple[str, ...],
        keep: Any = None,
        cuda: Launches | str = NOT_FOR_GPUS,
        handles: int | None = None,
        heads: int = 0,
        per: Mapping[str, int] = NOTHING,
        moves: Mapping[str, int] = NOTHING,
    ) -> None:
        """cuda: what a GPU launches instead, or why it has nothing to launch. handles: of a task, where some of them
        set nothing and only order it; None: those of the bindings.

        heads: of a batch, where tasks have batch and head; by the words of addresses, per: how many heads share one of
        the handle's, moves: bytes from where the kernel looks for one head to where it looks for the next.
        """
        self.kernel, self.cuda, self._keep = kernel, cuda, keep
        self.data = data = runtime.ffi.new("ft_program *")
        assert len(kernel.block) <= len(data.block) and len(bindings) <= len(data.handle)
        data.cpu, data.words = kernel.address, len(kernel.block)
        if not isinstance(cuda, str):
            data.cuda = int(runtime.ffi.cast("uintptr_t", cuda.data))
        data.inner_word, data.inner_at = kernel.inner
        self._arrays = () if isinstance(cuda, str) else cuda.arrays
        data.handles = (handles or 1 + max(handle for handle, *_ in bindings)) + len(self._arrays)
        data.bindings, data.values, data.heads = len(bindings), len(values), heads
        for n, (handle, address, stride, *other) in enumerate(bindings):
            data.handle[n], data.address_word[n] = handle, kernel.words[address]
            data.stride_word[n] = -1 if stride is None else kernel.words[stride]
            getattr(data, "from")[n] = other[0] if other else -1
            data.per[n], data.moves[n] = per.get(address, 1), moves.get(address, 0)
        for n, name in enumerate(values):
            data.value_word[n] = kernel.words[name]
        data.block[0 : len(kernel.block)] = kernel.block.tolist()
        self.address = int(runtime.ffi.cast("uintptr_t", data))

    @property
    def scratch_bytes(self) -> int:
        """That a worker of either kind needs."""
        return max(self.kernel.scratch_bytes, 0 if isinstance(self.cuda, str) else self.cuda.scratch_bytes)

    def submit(self, job: Job, codelet: Codelet, handles: np.ndarray, modes: np.ndarray, tasks: np.ndarray) -> None:
        """Submit tasks on handles (n, buffers), with a scratch buffer a worker; see Job.submit."""
        if not len(tasks):
            return
        if isinstance(self.cuda, str) and codelet.where == ("cuda",):
            raise UnavailableError(f"starpu: codelet {codelet.name}, restricted to cuda: {self.cuda}")
        runtime, n = job.runtime, len(tasks)
        tasks["program"] = self.address
        scratch = runtime.scratch(self.scratch_bytes + CACHE_LINE)
        arrays = runtime.register(*zip(*map(size_of, self._arrays), strict=True)) if self._arrays else NO_HANDLES
        further = np.append(arrays, np.uint64(scratch))
        kinds = ["R"] * len(arrays) + ["SCRATCH"]
        handles = np.concatenate([handles, np.tile(further, (n, 1))], axis=1)
        modes = np.concatenate([modes, np.tile(np.array([*map(runtime.constant, kinds)], np.int32), (n, 1))], axis=1)
        job.hold(*self._arrays)
        try:
            job.submit(codelet, handles, modes, tasks, self)
        finally:
            if len(arrays):
                runtime.unregister(arrays, DROP_LATER)
