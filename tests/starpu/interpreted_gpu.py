"""A CUDA worker whose driver hands each launch to Triton's interpreter: what the launches compute, in CPU memory.

For a process of its own, where TRITON_INTERPRET=1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import numpy as np

from flashtile.arrays import address_of, contiguous, view
from flashtile.engines.starpu import manifest, runtime
from flashtile.engines.starpu.programs import Program
from flashtile.kernels.triton import aot
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.device import Pointer
from flashtile.kernels.triton.specialisation import Specialisation
from flashtile.spec import AttentionSpec

SCRATCH = ("global_scratch", "profile_scratch")


class Worker:
    """Runs every task that programs submit, at once, on the tiles where they lie."""

    def __init__(self, folder: Path, log: Path) -> None:
        from flashtile.kernels.triton.interpreter import Interpreter  # by torch, which what collects tests may lack

        self.gpu, self.device = fake_gpu.Gpu(folder, log), Interpreter()
        self.ran: list[str] = []  # kernels, by their names in the manifest

    def submit(self, program: Program, job: Any, codelet: Any, handles: Any, modes: Any, tasks: np.ndarray) -> None:
        """In place of Program.submit."""
        scratch = np.zeros(program.scratch_bytes + 64, np.uint8)
        assert not isinstance(program.cuda, str), program.cuda
        arrays = [fake_gpu.Buffer(address_of(x)) for x in program.cuda.arrays]
        for row, task in zip(np.asarray(handles), tasks, strict=True):
            tiles = [Tile(int(handle), int(task["turned"]) >> n & 1) for n, handle in enumerate(row)]
            buffers = [*(tile.buffer for tile in tiles), *arrays, fake_gpu.Buffer(scratch.ctypes.data)]
            for launched in self.gpu.run(codelet, program, task, buffers, job):
                self.compute(launched)
            for tile in tiles:
                tile.bring_home()

    def compute(self, launched: fake_gpu.Launched) -> None:
        row = self.gpu.manifest[launched.image]
        if "what" in row:
            self.ran.append(row["name"])
            self.device.launch(row["what"], launched.grid[0], passed_to(row["what"], self.gpu.values(launched)))
            return
        types = {p["name"]: p["type"] for p in row["parameters"] if p["name"] not in SCRATCH}
        values = self.gpu.values(launched)
        passed = {
            name: Pointer(values[name], kind[1:]) if kind[0] == "*" else values[name] for name, kind in types.items()
        }
        what = Specialisation(row["kernel"], tuple(types.items()), tuple(row["constants"].items()), (), 4, 1)
        self.ran.append(row["name"])
        self.device.launch(what, launched.grid[0], passed)


def passed_to(what: Specialisation, values: dict[str, int]) -> dict[str, Any]:
    """The arguments of a launch from its parameters."""

    def one(name: str, kind: str) -> int | Pointer:
        return Pointer(values[name], kind[1:]) if kind[0] == "*" else values[name]

    return {
        name: one(name, types) if isinstance(types, str) else tuple(one(f"{name}[{n}]", t) for n, t in enumerate(types))
        for name, types in what.signature
    }


class Anything(manifest.Kernels):
    """A folder that has every kernel that is asked for, of which no machine code was compiled."""

    def __init__(self, folder: Path, tile: special.Tile) -> None:
        self.folder, self.arch, self.tile = folder, fake_gpu.ARCH, tile
        self.rows: dict[int, dict[str, Any]] = {}
        self.made: dict[str, manifest.Entry] = {}
        folder.mkdir()

    def find(self, what: Specialisation) -> manifest.Entry:
        key = repr((what, aot.program_of(what)))
        if key not in self.made:
            self.made[key] = self.make(what)
        return self.made[key]

    def make(self, what: Specialisation) -> manifest.Entry:
        constants = dict(what.constants)
        sizes = {"TILE_Q": self.tile.tile_q, "TILE_K": self.tile.tile_k}
        constants |= {name: size for name, size in sizes.items() if name in constants}
        what = replace(what, constants=tuple(constants.items()))
        view = contiguous((1, 1, 1, 16), "float32")
        spec = AttentionSpec.of(view, view, view)
        return self._entry(self.row_of(aot.Chosen(f"{what.kernel}-{len(self.rows)}", what, spec, self.tile)))

    def row_of(self, one: aot.Chosen) -> dict[str, Any]:
        """Its row of a manifest, with a file that has no machine code."""
        code = machine_code(len(self.rows))
        meta = SimpleNamespace(
            name=one.specialisation.kernel,
            warp_size=32,
            num_warps=4,
            num_ctas=1,
            shared=0,
            global_scratch_size=0,
            global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1,
        )
        used = SimpleNamespace(
            registers=0, stack=0, local_stores=0, local_loads=0, static_shared=0, tensor={}, instructions=0
        )
        row: Any = aot.entry_of(one, f"{one.name}.cubin", code, meta, used)  # type: ignore[arg-type]
        (self.folder / row["file"]).write_bytes(code)
        self.rows[fake_gpu.checksum(code)] = {**row, "what": one.specialisation}
        return dict(row)


def machine_code(number: int) -> bytes:
    """The headers of a file that no other number has."""
    header = bytearray(b"\x7fELF".ljust(64, b"\0"))
    struct.pack_into("<Q", header, 40, 64)  # where sections begin
    struct.pack_into("<HH", header, 58, 8, 1)  # their size and number
    return bytes(header) + struct.pack("<Q", number)


class Tile:
    """A tile in the memory of the device, where StarPU leaves no gaps: its heads, and the rows of each, are adjacent.
    In main memory it is allocated if it was not yet."""

    def __init__(self, handle: int, turned: int) -> None:
        now = runtime.current()
        while now.lib.ft_acquire(handle, now.constant("W")):
            pass
        between = now.ffi.new("int64_t[2]")
        address = int(now.lib.ft_pointer(handle, turned, between, between + 1))
        now.lib.ft_release(handle)
        owner = now.handles.get(handle)
        self.home = self.here = None
        if owner is None or owner.heads == 1:
            self.buffer = fake_gpu.Buffer(address, between[0], 1)  # elements of a byte: a matrix of row_bytes
            return
        index = tuple(int(n) for n in np.argwhere(owner.handles == handle)[0])
        height, width = owner[index].height, (owner.columns or 1) * owner.dtype.itemsize
        shape = (owner.heads, height, width) if owner.columns else (owner.heads, 1, height * width)
        self.home = view(address, shape, (between[1], between[0], 1), np.dtype(np.uint8), writable=True)
        self.here = self.home.copy()
        at = self.here.ctypes.data
        if turned:
            self.here = np.ascontiguousarray(self.here.transpose(1, 0, 2)).transpose(1, 0, 2)
            at = self.here.ctypes.data
        plane, row = self.here.strides[:2]
        self.buffer = fake_gpu.Buffer(at, *((plane, 1, row) if turned else (row, 1, plane)))

    def bring_home(self) -> None:
        if self.home is not None:
            self.home[...] = self.here


@contextmanager
def working(folder: Path, log: Path, kernels: Anything | None = None) -> Iterator[Worker]:
    """Every task of a StarPU that runs on such a worker."""
    worker, submit = Worker(folder, log), Program.submit
    if kernels is not None:
        runtime.current().kernels = kernels
        worker.gpu.__dict__["manifest"] = kernels.rows
    Program.submit = lambda program, *task: worker.submit(program, *task)  # type: ignore[method-assign]
    try:
        yield worker
    finally:
        Program.submit = submit  # type: ignore[method-assign]
