"""CUDA implementations of the codelets, as far as they go without a GPU: real machine code, the C function that StarPU
would call, and a driver that writes down what it is told.

Every parameter of every launch is read back where the machine code has it, and held against what the task is.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import CONTEXT, HEAD, STREAM, Buffer, Gpu, Launched, Recorded
from test_starpu_tasks import spec_of

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import manifest, runtime
from flashtile.engines.starpu.flow import Flow
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.vanilla import VanillaFlow
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.kernels.triton import aot, compiler_missing

Script = Callable[..., Any]
REASON = compiler_missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("starpu"),
]

HERE = Path(__file__).parent
QUICK = "float16"
SLOW = [
    (dtype, precision)
    for dtype, precisions in {
        "float64": ("ieee",), "float32": ("ieee", "tf32", "bf16", "fp16"), "float16": ("ieee",), "bfloat16": ("ieee",),
    }.items()
    for precision in precisions
]  # fmt: skip

# Two key/value heads read by two query heads each; ragged tiles of 48 rows and 40 keys; row i sees keys up to i + 30.
Q_LEN, KV_LEN, TILE_Q, TILE_K, HEADS, GROUP, OFFSET = 70, 100, 48, 40, 2, 1, 30
SCALE = 0.3
SCRATCH = 0x7_0000_0007  # not on a cache line: the launcher moves up to one
LINE = 0x7_0000_0040
OPEN = 2**61


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kernel of one dtype, and the merge of states, which that one has not."""
    path = tmp_path_factory.mktemp("kernels")
    merging = (one for one in fake_gpu.chosen("float64") if one.name.startswith("merge"))
    list(aot.build(path, fake_gpu.ARCH, [*fake_gpu.chosen(QUICK), *merging]))
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_gpu.build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def machine(driver: Path, starpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Gpu]]:
    """Makes the running StarPU one with kernels of a folder."""
    fake_gpu.use_driver(driver)
    for name in ("LOG", "CONTEXT"):  # put back afterwards
        monkeypatch.setenv(f"FAKE_DRIVER_{name}", "")

    def make(folder: Path) -> Gpu:
        runtime.current().lib.ft_driver_forget()
        monkeypatch.setattr(runtime.current(), "kernels", manifest.Kernels(folder))
        return Gpu(folder, tmp_path / "log")

    yield make
    runtime.current().lib.ft_driver_forget()


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
    with fake_gpu.recording() as batches:
        submit()
    return {batch.codelet.name.split("_")[1]: batch for batch in batches}


def check(gpu: Gpu, launched: Launched, name: str, grid: int, expected: dict[str, int]) -> None:
    """Every parameter, by the offset and size that the machine code has; and everything else that a launch says."""
    row = gpu.manifest[launched.image]
    assert row["name"].startswith(name) and launched.function == row["function"]
    assert launched.grid == (grid, 1, 1) and launched.cluster == 1
    assert launched.block == tuple(row["launch"]["block"]) and launched.shared == row["launch"]["dynamic_shared"]
    assert (launched.context, launched.stream) == (CONTEXT, STREAM)
    places = gpu.places(launched)
    assert [(p["offset"], p["size"]) for p in row["parameters"]] == [(p.offset, p.size) for p in places]
    assert len(launched.parameters) == row["parameter_bytes"] == places[-1].offset + places[-1].size
    assert gpu.values(launched) == {**expected, "global_scratch": 0, "profile_scratch": 0}


def tiles_of(size: int, tile: int) -> int:
    return -(-size // tile)


def matrix(address: int, ld: int, dtype: str) -> Buffer:
    return Buffer(address, ld, DTYPES[dtype].itemsize)


COUNTS = {"first": 0, "heads": 1, "group": 1}
STRIDES = {f"{t}_{a}": 0 for t in "qkvo" for a in "bh"}
BITS = struct.unpack("<q", struct.pack("<d", SCALE))[0]


def of(names: str) -> dict[str, int]:
    return {name: value for name, value in STRIDES.items() if name[0] in names}


def forward_launches(gpu: Gpu, door: Any, dtype: str, precision: str = "ieee") -> None:
    """Each task is two launches, the second of which looks for what is not finite."""
    flow = Flow(runtime.current(), spec(dtype, precision), TILE_Q, TILE_K)
    wide = DTYPES[dtype].accumulator
    given = tensors(door, dtype)
    tasks = recorded(lambda: flow.submit(Job(), *given))["forward"]
    buffers = [matrix(0x1_0000_0000, 32, dtype), Buffer(0x2_0000_0000), matrix(0x3_0000_0000, 48, dtype),
               matrix(0x4_0000_0000, 64, wide), Buffer(0x5_0000_0008), Buffer(SCRATCH)]  # fmt: skip
    seen = set()
    for task in tasks.tasks:
        _, _, i, j = task["tile"].tolist()
        rows, keys = min(TILE_Q, Q_LEN - i * TILE_Q), min(TILE_K, KV_LEN - j * TILE_K)
        kind = "carried" if task["values"][0] else "partial"
        query_tiles = tiles_of(rows, fake_gpu.TILE.tile_q)
        expected = {
            "q": 0x1_0000_0000, "k": 0x2_0000_0000, "v": 0x3_0000_0000, "o": 0x4_0000_0000, "lse": 0x5_0000_0008,
            "odd": LINE, **STRIDES, "q_s": 32, "k_s": HEAD, "v_s": 48, "o_s": 64, "o_split": 0, "lse_split": 0,
            **COUNTS, "q_len": rows, "kv_len": keys, "head_size": HEAD, "value_size": HEAD, "query_tiles": query_tiles,
            "splits": 1, "split_keys": keys, "scale": BITS, "left": OPEN, "right": 0,
            "offset": OFFSET + i * TILE_Q - j * TILE_K,
        }  # fmt: skip
        launches = gpu.run(tasks.codelet, tasks.program, task, buffers)
        names = [f"forward-{dtype}-{precision}-True-True-{kind}{end}" for end in ("", "-contain")]
        assert [gpu.manifest[x.image]["name"] for x in launches] == names
        for launched in launches:
            check(gpu, launched, "forward", query_tiles, expected)
        seen.add((kind, rows, keys))
    assert {(48, 40), (22, 40), (22, 20)} == {x[1:] for x in seen} and len({x[0] for x in seen}) == 2
    assert flow.program.scratch_bytes >= 4 * tiles_of(TILE_Q, fake_gpu.TILE.tile_q)
    forget(given)


def forget(given: list[Any]) -> None:
    for tensor in given:
        tensor.unregister()


def merge_launches(gpu: Gpu, door: Any, dtype: str) -> None:
    """Of two states, into the first, in place."""

    size = DTYPES[dtype].itemsize
    given = state(door, dtype) + state(door, dtype)
    tasks = recorded(lambda: door.submit_merge(*given))["merge"]
    addresses = [0x4_0000_0000, 0x5_0000_0000, 0x3_0000_0000, 0x6_0000_0000]
    for task in tasks.tasks:
        rows = min(TILE_Q, Q_LEN - int(task["tile"][2]) * TILE_Q)
        query_tiles = tiles_of(rows, aot.MERGE_ROWS)
        [launched] = gpu.run(tasks.codelet, tasks.program, task, [*map(Buffer, addresses), Buffer(SCRATCH)])
        expected = {
            "parts_o": addresses[0], "parts_lse": addresses[1], "o": addresses[0], "lse": addresses[1],
            **of("o"), "o_s": HEAD, "o_split": -0x1_0000_0000 // size, "lse_split": 0x1_0000_0000 // size,
            "first": 0, "heads": 1, "q_len": rows, "value_size": HEAD, "query_tiles": query_tiles, "splits": 2,
        }  # fmt: skip
        check(gpu, launched, f"merge-{dtype}", query_tiles, expected)
    forget(given)


def finish_launches(gpu: Gpu, door: Any, dtype: str) -> None:
    """The merge of one part, whose lse goes nowhere: the tile's is only read."""
    flow = Flow(runtime.current(), spec(dtype), TILE_Q, TILE_K)
    given = tensors(door, dtype)
    tasks = recorded(lambda: flow.submit(Job(), *given))["finish"]
    for task in tasks.tasks:
        rows = min(TILE_Q, Q_LEN - int(task["tile"][2]) * TILE_Q)
        query_tiles = tiles_of(rows, aot.MERGE_ROWS)
        buffers = [Buffer(0x4_0000_0000), Buffer(0x5_0000_0000), matrix(0x6_0000_0000, 40, dtype), Buffer(SCRATCH)]
        [launched] = gpu.run(tasks.codelet, tasks.program, task, buffers)
        expected = {
            "parts_o": 0x4_0000_0000, "parts_lse": 0x5_0000_0000, "o": 0x6_0000_0000, "lse": LINE,
            **of("o"), "o_s": 40, "o_split": 0, "lse_split": 0,
            "first": 0, "heads": 1, "q_len": rows, "value_size": HEAD, "query_tiles": query_tiles, "splits": 1,
        }  # fmt: skip
        check(gpu, launched, f"merge-{dtype}", query_tiles, expected)
    assert tasks.program.scratch_bytes >= TILE_Q * 4
    forget(given)


def unfused_launches(gpu: Gpu, door: Any, dtype: str, precision: str = "ieee") -> None:
    """Scores of a pair of tiles, softmax of a row of them in place, and the sum of a pair into the outputs."""
    flow = VanillaFlow(runtime.current(), spec(dtype, precision), TILE_Q, TILE_K)
    columns, row = flow.columns, flow.row_elements
    assert columns >= TILE_K and row == columns * tiles_of(KV_LEN, TILE_K)
    given, wide = tensors(door, dtype), DTYPES[dtype].accumulator
    stages = recorded(lambda: flow.submit(Job(), *given))
    buffers = {
        "scores": [matrix(0x1_0000_0000, 32, dtype), Buffer(0x2_0000_0000), Buffer(0x7_0000_0000)],
        "softmax": [Buffer(0x7_0000_0000), Buffer(0x5_0000_0000)],
        "output": [Buffer(0x7_0000_0000), matrix(0x3_0000_0000, 48, dtype), matrix(0x4_0000_0000, 64, wide)],
    }
    common = {**COUNTS, "head_size": HEAD}
    for stage, mapped in buffers.items():
        batch = stages[stage]
        for task in batch.tasks:
            _, _, i, j = task["tile"].tolist()
            rows, keys = min(TILE_Q, Q_LEN - i * TILE_Q), min(TILE_K, KV_LEN - j * TILE_K)
            query_tiles, key_tiles = tiles_of(rows, fake_gpu.TILE.tile_q), tiles_of(columns, fake_gpu.TILE.tile_k)
            at = 0x7_0000_0000 + j * columns * DTYPES[dtype].itemsize
            expected, grid, name = {
                "scores": ({
                    "q": 0x1_0000_0000, "k": 0x2_0000_0000, "s": at, **of("qk"), "q_s": 32, "k_s": HEAD, "s_s": row,
                    **common, "q_len": rows, "kv_len": keys, "columns": columns, "query_tiles": query_tiles,
                    "key_tiles": key_tiles, "scale": BITS, "left": OPEN, "right": 0,
                    "offset": OFFSET + i * TILE_Q - j * TILE_K,
                }, query_tiles * key_tiles, f"scores-{dtype}-{precision}"),
                "softmax": ({
                    "s": 0x7_0000_0000, "p": 0x7_0000_0000, "lse": 0x5_0000_0000, "first": 0, "q_len": rows,
                    "kv_len": row, "query_tiles": query_tiles,
                }, query_tiles, f"softmax-{dtype}-{precision}"),
                "output": ({
                    "p": at, "v": 0x3_0000_0000, "o": 0x4_0000_0000, **of("vo"), "v_s": 48, "o_s": 64, "p_s": row,
                    **COUNTS, "q_len": rows, "kv_len": keys, "value_size": HEAD, "query_tiles": query_tiles,
                }, query_tiles, f"output-{dtype}-{precision}-True-True-{'carried' if j else 'partial'}"),
            }[stage]  # fmt: skip
            [launched] = gpu.run(batch.codelet, batch.program, task, [*mapped, Buffer(SCRATCH)])
            check(gpu, launched, name, grid, expected)
    forget(given)


def every_codelet(gpu: Gpu, door: Any, dtype: str, precision: str = "ieee") -> None:
    forward_launches(gpu, door, dtype, precision)
    unfused_launches(gpu, door, dtype, precision)
    if DTYPES[dtype].accumulator == dtype:
        merge_launches(gpu, door, dtype)
    else:
        finish_launches(gpu, door, dtype)


def test_every_argument_of_every_codelet(machine: Callable[..., Gpu], folder: Path, starpu: Any) -> None:
    gpu = machine(folder)
    every_codelet(gpu, starpu, QUICK)
    merge_launches(gpu, starpu, "float64")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), SLOW)
def test_every_argument_in_every_dtype(
    machine: Callable[..., Gpu], tmp_path: Path, starpu: Any, kind: str, precision: str
) -> None:
    list(aot.build(tmp_path, fake_gpu.ARCH, fake_gpu.chosen(kind, precision)))
    every_codelet(machine(tmp_path), starpu, kind, precision)


def edited(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The kernels with another manifest."""
    shutil.copytree(folder, to)
    told = json.loads((to / aot.MANIFEST).read_text())
    change(told)
    (to / aot.MANIFEST).write_text(json.dumps(told))
    return to


def every_launch(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        for row in told["kernels"]:
            row["launch"].update(values)

    return change


@pytest.fixture
def forward(starpu: Any) -> Iterator[Callable[[], Recorded]]:
    """Makes the tasks of a forward pass with the kernels of the moment."""
    given = tensors(starpu, "float16")

    def make(**options: Any) -> Recorded:
        flow = Flow(runtime.current(), spec("float16", **options), TILE_Q, TILE_K)
        return recorded(lambda: flow.submit(Job(), *given))["forward"]

    yield make
    forget(given)


PLAIN = [*(Buffer(n << 32) for n in range(1, 6)), Buffer(SCRATCH)]


def test_kernels_are_loaded_once_a_context(
    machine: Callable[..., Gpu], folder: Path, forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs share them; what a context had is gone with the StarPU that ended."""
    gpu = machine(folder)
    for _ in range(2):
        for tasks in (forward(), forward()):
            for task in tasks.tasks:
                assert len(gpu.run(tasks.codelet, tasks.program, task, PLAIN)) == 2
    assert gpu.loads() == [CONTEXT] * 4
    monkeypatch.setenv("FAKE_DRIVER_CONTEXT", "77")
    assert {x.context for x in gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN)} == {77}
    assert gpu.loads() == [CONTEXT] * 4 + [77] * 2
    runtime.current().lib.ft_driver_forget()
    gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN)
    assert gpu.loads() == [CONTEXT] * 4 + [77] * 4


def test_much_shared_memory_is_asked_for(
    machine: Callable[..., Gpu], folder: Path, forward: Any, tmp_path: Path
) -> None:
    """Beyond 48 KB a launch fails unless the function was given more: the fake driver insists."""
    gpu = machine(edited(folder, tmp_path / "large", every_launch(dynamic_shared=100 << 10)))
    tasks = forward()
    assert {x.shared for x in gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN)} == {100 << 10}


def test_clusters(machine: Callable[..., Gpu], folder: Path, forward: Any, tmp_path: Path) -> None:
    """A grid counts blocks: as many a program as the cluster has."""
    gpu = machine(edited(folder, tmp_path / "clusters", every_launch(cluster=[2, 1, 1])))
    tasks = forward()
    launches = gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN)
    assert [(x.cluster, x.grid) for x in launches] == [(2, (2 * 2, 1, 1))] * 2


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("cuCtxGetCurrent:3", "status 3, .*: cuCtxGetCurrent of kernel forward: CUDA_ERROR_OF_THE_TEST"),
        ("cuModuleLoadData:2", "status 2, .*: cuModuleLoadData of kernel forward: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuModuleGetFunction:500", "status 500, .*: cuModuleGetFunction of kernel forward"),
        ("cuLaunchKernel:701", "status 701, .*: cuLaunchKernel of kernel forward: CUDA_ERROR_OF_THE_TEST"),
    ],
)
def test_what_the_driver_refuses_is_raised(
    machine: Callable[..., Gpu], folder: Path, forward: Any, monkeypatch: pytest.MonkeyPatch, fails: str, message: str
) -> None:
    """With codelet and tile; tasks of the job that follow are skipped, and the next job is sound."""
    gpu, job = machine(folder), Job()
    tasks = forward()
    monkeypatch.setenv("FAKE_DRIVER_FAIL", fails)
    assert not gpu.run(tasks.codelet, tasks.program, tasks.tasks[-1], PLAIN, job)
    monkeypatch.delenv("FAKE_DRIVER_FAIL")
    assert not gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN, job), "skipped"
    place = "batch 0, head 1, query tile 1, key tile 2"
    with pytest.raises(KernelError, match=f"codelet flashtile_forward_float16 failed on {place} with {message}"):
        job.wait()
    assert len(gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN, job)) == 2
    job.wait()


def test_shared_memory_that_the_device_does_not_have(
    machine: Callable[..., Gpu], folder: Path, forward: Any, tmp_path: Path
) -> None:
    gpu = machine(edited(folder, tmp_path / "larger", every_launch(dynamic_shared=300 << 10)))
    tasks = forward()
    gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN)
    with pytest.raises(KernelError, match="with status 1, .*: cuFuncSetAttribute of kernel forward"):
        gpu.job.wait()


def test_tiles_that_do_not_lie_as_kernels_want(
    machine: Callable[..., Gpu], folder: Path, starpu: Any, forward: Any
) -> None:
    """Nothing is launched on them."""
    gpu = machine(folder)
    tasks = forward()
    for address, ld in ((1 << 32, 24), ((1 << 32) + 8, 0)):
        buffers = [matrix(address, ld, "float16"), *PLAIN[1:]]
        assert not gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], buffers)
        with pytest.raises(KernelError, match="got .* for the argument at byte .*, expected a multiple of 16"):
            gpu.job.wait()
    given = [starpu.empty((1, HEADS, Q_LEN, HEAD), "float16", TILE_Q), *state(starpu, "float32")]
    [batch] = recorded(lambda: starpu.submit_finish(given[1], given[2], given[0])).values()
    buffers = [matrix(1 << 32, 2 * HEAD, "float32"), *PLAIN[1:3], Buffer(SCRATCH)]
    assert not gpu.run(batch.codelet, batch.program, batch.tasks[0], buffers)
    with pytest.raises(KernelError, match=r"status -3, .*: got rows of handle 0 that lie 128 bytes apart, expected 64"):
        gpu.job.wait()
    forget(given)


def test_without_a_driver_or_a_stream(script: Script, folder: Path) -> None:
    """The binding builds and loads here, where there is neither; a task that came to a worker all the same says so."""
    done = script(
        """
        from pathlib import Path
        import fake_gpu
        from fake_gpu import Buffer
        from flashtile.engines.starpu import cuda, runtime
        from flashtile.engines.starpu.flow import Flow
        from flashtile.engines.starpu.jobs import Job
        from test_starpu_tasks import spec_of

        starpu.init(workers=1, cuda_kernels=os.environ["KERNELS"])
        flow = Flow(runtime.current(), spec_of(70, 70, 1, 16, "float16", causal=True), 48, 48)
        with fake_gpu.recording() as batches:
            flow.submit(Job(), *(starpu.register(x, 48) for x in arrays(70, 70, 1, dtype="float16")))
        gpu = fake_gpu.Gpu(Path(os.environ["KERNELS"]), Path("unused"))
        gpu.run(batches[0].codelet, batches[0].program, batches[0].tasks[0], [Buffer(4096)] * 6)
        print(message(gpu.job.wait))
        for path in ("libcuda.so.1", "/nowhere/libcuda.so.1", os.environ["KERNELS"] + "/manifest.json"):
            os.environ["FLASHTILE_CUDA_DRIVER"] = path
            print(message(lambda: cuda.open_driver(runtime.current())))
        """,
        KERNELS=str(folder),
        PYTHONPATH=os.pathsep.join((str(HERE), str(HERE.parent))),
    )
    first, *rest = done.stdout.splitlines()
    assert "status -2" in first and first.endswith("this StarPU has no starpu_cuda_get_local_stream")
    assert [line.startswith("FLASHTILE_CUDA_DRIVER: got '") for line in rest] == [True, True, False]
    assert "NVIDIA's driver cannot be loaded: " in rest[2] and "manifest.json" in rest[2]


def test_restrict(
    machine: Callable[..., Gpu], folder: Path, starpu: Any, forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To CUDA: where StarPU has such workers, and of tasks those whose program has a kernel."""
    with pytest.raises(UnavailableError, match="restrict: got cuda, .*; cuda: StarPU runs no such worker"):
        starpu.restrict("cuda")
    now = runtime.current()
    monkeypatch.setattr(now, "workers", lambda architecture=None: 1)
    with pytest.raises(UnavailableError, match=r"cuda: no kernels were given, init\(cuda_kernels=...\)"):
        starpu.restrict("cuda")
    gpu = machine(folder)
    try:
        starpu.restrict("cuda")
        tasks = forward()
        assert tasks.program.data.cuda and gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN)
        q = np.zeros((1, 2, 70, 16), np.float16)
        for options, reason in (
            ({"sinks": np.zeros(2)}, "restricted to cuda: score programs and sinks, whose values lie in"),
            ({"softcap": 3.0}, "restricted to cuda: score programs and sinks, whose values lie in"),
            ({"precision": "ieee"}, "has no kernel forward of .*bf16.* with .*BAND=False"),
        ):
            dtype = "float16" if len(options) and "precision" not in options else "bfloat16"
            given = [starpu.empty(q.shape, dtype, 48) for _ in range(4)]
            given.append(starpu.empty(q.shape[:3], "float32", 48))
            with pytest.raises(UnavailableError, match=reason):
                starpu.submit_forward(*given, **options)
            forget(given)
    finally:
        monkeypatch.undo()
        starpu.restrict("cpu", "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.update(format=99), "cuda_kernels: got format 99 for sm_90, expected format 1 for sm_80"),
        (lambda told: told.update(arch="gfx942"), "cuda_kernels: got format 1 for gfx942, expected"),
        (lambda told: told.pop("kernels"), "cuda_kernels: got .*manifest.json, which cannot be understood"),
        (lambda told: told["kernels"][0].update(file="../x"), "cuda_kernels: got .*, which cannot be understood"),
    ],
)
def test_a_folder_that_is_none(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        manifest.Kernels(edited(folder, tmp_path / "kernels", change))


def test_a_folder_without_manifest_or_with_another_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cuda_kernels: got .*manifest.json: No such file"):
        manifest.Kernels(tmp_path)
    kernels = manifest.Kernels(edited(folder, tmp_path / "kernels", lambda told: None))
    entry = next(iter(kernels._entries.values()))
    entry.path.write_bytes(b"\x7fELF")
    with pytest.raises(UnavailableError, match="is not the file that manifest.json tells of"):
        entry.image()
    entry.path.unlink()
    with pytest.raises(UnavailableError, match="cannot be read"):
        entry.image()


def test_kernels_that_want_what_tasks_do_not_give(
    machine: Callable[..., Gpu], folder: Path, forward: Any, tmp_path: Path
) -> None:
    machine(edited(folder, tmp_path / "kernels", every_launch(cooperative=True)))
    assert "wants cooperative, which tasks do not give" in forward().program.cuda


def test_what_the_launches_compute(script: Script, driver: Path, folder: Path, tmp_path: Path) -> None:
    """Through the engine: each launch, as the driver is told of it, by Triton's interpreter. Against the reference."""
    script(
        """
        from pathlib import Path
        import fake_gpu, interpreted_gpu
        from flashtile.engines.starpu import engine
        from flashtile.testing import expect

        folder, log, driver = (Path(os.environ[name]) for name in ("KERNELS", "LOG", "DRIVER"))
        starpu.init(workers=1, cuda_kernels=folder)
        fake_gpu.use_driver(driver)
        engine.TILE_Q, engine.TILE_K = (48,), 40
        rng = np.random.default_rng(1)
        q, k, v = (rng.standard_normal((2, h, n, 16)).astype("float16") for h, n in ((2, 70), (1, 100), (1, 100)))
        k[0, 0, 95], v[1, 0, 90] = np.nan, np.inf  # hidden from most rows
        with interpreted_gpu.working(folder, log) as worker:
            for kernel in ("cpu", "vanilla"):
                # The first rows of batch 0 see no key.
                options = {"causal": True, "align": np.array([-20, 60]), "scale": 0.3}
                got = flashtile.attention(q, k, v, engine="starpu", kernel=kernel, return_lse=True, **options)
                for x, want, name in zip(got, expect(q, k, v, **options), ("output", "lse")):
                    want.check(x, name)
        ran = {name.split("-")[0] for name in worker.ran}
        assert ran == {"forward", "merge", "scores", "softmax", "output"}, ran
        """,
        timeout=300,
        KERNELS=str(folder),
        LOG=str(tmp_path / "log"),
        DRIVER=str(driver),
        TRITON_INTERPRET="1",
        PYTHONPATH=os.pathsep.join((str(HERE), str(HERE.parent))),
    )
