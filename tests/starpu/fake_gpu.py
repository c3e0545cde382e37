"""CUDA implementations of the codelets without a GPU: kernels compiled ahead of time, a driver that writes down what it
is told (fake_driver.c), and tasks run as a worker of StarPU would run them."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from test_starpu_tasks import spec_of

from flashtile.arrays import contiguous
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import launches, runtime
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.programs import Program
from flashtile.kernels.triton import aot
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.resources import Parameter, _parameters, _tool
from flashtile.kernels.triton.specialisation import Memory, Tile
from flashtile.spec import AttentionSpec

ARCH = "sm_90"
TILE = Tile(32, 16, 4, 1)  # small ones compile in two seconds
ROWS = Tile(aot.MERGE_ROWS, aot.MERGE_ROWS)
HEAD = 16
# Two key/value heads read by two query heads each; ragged tiles of 48 rows and 40 keys; row i sees keys up to i + 30.
Q_LEN, KV_LEN, TILE_Q, TILE_K, HEADS, GROUP, OFFSET = 70, 100, 48, 40, 2, 1, 30
SCALE = 0.3
SCRATCH = 0x7_0000_0007  # not on a cache line: the launcher moves up to one

QUICK = "float16"  # the dtype whose kernels every test run compiles
CONTEXT, STREAM = 0xC0, 0x5F  # of a worker; of fake_driver.c


def chosen(dtype: str, precision: str = "ieee", causal: bool = True, aligned: bool = True) -> Iterator[aot.Chosen]:
    """Every kernel that tasks of one dtype want."""
    view = contiguous((1, 1, 1, HEAD), dtype)
    spec = AttentionSpec.of(view, view, view, causal=causal, precision=precision)
    name, memory = f"{dtype}-{precision}-{causal}-{aligned}", Memory(aligned=aligned)
    for state in (special.PARTIAL, special.CARRIED):
        for contain in (False, True):
            what = special.forward(spec, TILE, state=state, contain=contain, memory=memory)
            yield aot.Chosen(f"forward-{name}-{state}" + "-contain" * contain, what, spec, TILE)
    yield aot.Chosen(f"scores-{name}", special.scores(spec, TILE, memory=memory), spec, TILE)
    yield aot.Chosen(f"softmax-{name}", special.softmax(spec, TILE), spec, TILE)
    for state in (special.PARTIAL, special.CARRIED):
        yield aot.Chosen(f"output-{name}-{state}", special.output(spec, TILE, state=state, memory=memory), spec, TILE)
    finished = DTYPES[dtype].accumulator != dtype
    what = special.merge(spec, ROWS, finished=finished, memory=Memory(aligned=False))
    yield aot.Chosen(f"merge-{name}", what, spec, ROWS)


def build_driver(folder: Path) -> Path:
    """The fake driver, compiled against NVIDIA's header, which Triton brings."""
    import triton

    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "StarPU's binding was compiled by one"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    target, source = folder / "libcuda.so.1", Path(__file__).parent / "fake_driver.c"
    flags = ["-shared", "-fPIC", "-pthread", "-Wall", "-Werror", "-I", str(include)]
    subprocess.run([compiler, *flags, "-o", target, source], check=True)
    return target


def use_driver(library: Path) -> None:
    """Let the launcher open it, and find in it what a StarPU with CUDA has."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ[launches.DRIVER_VARIABLE] = str(library)
    try:
        launches.open_driver(runtime.current())
    finally:
        del os.environ[launches.DRIVER_VARIABLE]


class Launched(NamedTuple):
    """One launch in the fake driver's log."""

    function: str
    image: int  # checksum of the machine code
    context: int
    grid: tuple[int, ...]
    cluster: int
    block: tuple[int, ...]
    shared: int
    stream: int
    parameters: bytes


class Buffer(NamedTuple):
    """A tile on the device: a matrix of ld elements between rows, or a variable where that is 0; with ldz between
    heads, a block."""

    address: int
    ld: int = 0
    itemsize: int = 1
    ldz: int = 0


class Recorded(NamedTuple):
    """A batch of tasks, as programs submit them."""

    program: Any
    codelet: Any
    handles: np.ndarray
    tasks: np.ndarray


class Gpu:
    """A CUDA worker of its own kind, and what its driver was told."""

    def __init__(self, folder: Path, log: Path) -> None:
        os.environ.update(FAKE_DRIVER_LOG=str(log), FAKE_DRIVER_CONTEXT=str(CONTEXT))
        self.folder, self.log, self.job = folder, log, Job()
        self._places: dict[int, tuple[Parameter, ...]] = {}

    @functools.cached_property
    def manifest(self) -> dict[int, dict[str, Any]]:
        """Entries of the manifest, by the checksum of their machine code."""
        rows = json.loads((self.folder / "manifest.json").read_text())["kernels"]
        return {checksum((self.folder / row["file"]).read_bytes()): row for row in rows}

    def run(
        self, codelet: Any, program: Any, task: np.ndarray, buffers: list[Buffer], job: Any = None
    ) -> list[Launched]:
        """Call the codelet's CUDA function for one task; the launches that it made."""
        rt, before = runtime.current(), len(self.launches())
        one = np.array([task])
        one["program"] = program.address
        numbers = [np.array([getattr(b, name) for b in buffers], kind) for name, kind in FIELDS]
        pointers = [rt.ffi.from_buffer(f"{kind}_t[]", x) for x, (_, kind) in zip(numbers, FIELDS, strict=True)]
        what = rt.ffi.cast("ft_task *", rt.ffi.from_buffer(one))
        rt.lib.ft_run_cuda((job or self.job)._job, codelet.pointer, what, len(buffers), *pointers)
        return self.launches()[before:]

    def loads(self) -> list[int]:
        """The contexts that machine code was loaded into."""
        return [int(words[1]) for words in self._lines() if words[0] == "load"]

    def launches(self) -> list[Launched]:
        found = []
        for w in self._lines():
            if w[0] == "launch":
                grid, block = (tuple(map(int, w[n : n + 3])) for n in (7, 13))
                numbers = int(w[3]), int(w[5]), grid, int(w[11]), block, int(w[17]), int(w[19])
                found.append(Launched(w[1], *numbers, bytes.fromhex(w[21])))
        return found

    def _lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def places(self, launched: Launched) -> tuple[Parameter, ...]:
        """Where the machine code has the parameters."""
        if launched.image not in self._places:
            row = self.manifest[launched.image]
            self._places[launched.image] = parameters_of(self.folder / row["file"])
        return self._places[launched.image]

    def values(self, launched: Launched) -> dict[str, int]:
        """The parameters by name, as the manifest lays them out."""
        return {
            p["name"]: int.from_bytes(launched.parameters[p["offset"] : p["offset"] + p["size"]], "little", signed=True)
            for p in self.manifest[launched.image]["parameters"]
        }


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Keep what programs submit instead of submitting it."""
    batches: list[Recorded] = []
    submit = Program.submit

    def record(
        self: Program, job: Any, codelet: Any, handles: np.ndarray, modes: np.ndarray, tasks: np.ndarray
    ) -> None:
        batches.append(Recorded(self, codelet, np.array(handles), tasks.copy()))

    Program.submit = record  # type: ignore[method-assign]
    try:
        yield batches
    finally:
        Program.submit = submit  # type: ignore[method-assign]


FIELDS = (("address", "uint64"), ("ld", "uint32"), ("ldz", "uint32"), ("itemsize", "uint64"))


def parameters_of(cubin: Path) -> tuple[Parameter, ...]:
    """Where machine code has its parameters; its instructions are of no interest here, and slow to list."""
    return _parameters(_tool("cuobjdump", "-elf", str(cubin)))


def checksum(image: bytes) -> int:
    """As fake_driver.c takes it."""
    segments_at, sections_at = struct.unpack_from("<QQ", image, 32)
    segment, segments, section, sections = struct.unpack_from("<HHHH", image, 54)
    return zlib.adler32(image[: max(sections_at + section * sections, segments_at + segment * segments)])


def spec(dtype: str, precision: str = "ieee", **options: Any) -> Any:
    options = {"causal": True, "align": OFFSET, "scale": SCALE, **options}
    return spec_of(Q_LEN, KV_LEN, HEADS, HEAD, dtype, precision=precision, **options)


def tensors(door: Any, dtype: str) -> list[Any]:
    shapes = [(Q_LEN, HEAD), (KV_LEN, HEAD), (KV_LEN, HEAD), (Q_LEN, HEAD)]
    rows = TILE_Q, TILE_K, TILE_K, TILE_Q
    made = [door.empty((1, HEADS, *s), dtype, n) for s, n in zip(shapes, rows, strict=True)]
    return [*made, door.empty((1, HEADS, Q_LEN), DTYPES[dtype].accumulator, TILE_Q)]


def state(door: Any, dtype: str) -> list[Any]:
    return [door.empty((1, HEADS, Q_LEN, HEAD), dtype, TILE_Q), door.empty((1, HEADS, Q_LEN), dtype, TILE_Q)]


def recorded(submit: Callable[[], Any]) -> dict[str, Recorded]:
    """What is submitted, by operation."""
    with recording() as batches:
        submit()
    return {batch.codelet.name.split("_")[1]: batch for batch in batches}


def matrix(address: int, ld: int, dtype: str) -> Buffer:
    return Buffer(address, ld, DTYPES[dtype].itemsize)


def forget(given: list[Any]) -> None:
    for tensor in given:
        tensor.unregister()
