"""CUDA implementations of the codelets where something is amiss: the driver says no, kernels or tiles do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import (
    CONTEXT,
    HEAD,
    HEADS,
    Q_LEN,
    SCRATCH,
    TILE_K,
    TILE_Q,
    Buffer,
    Gpu,
    Recorded,
    forget,
    matrix,
    recorded,
    spec,
    state,
    tensors,
)
from interpreted_gpu import Anything
from processes import searched

from flashtile.engines.starpu import made, manifest, runtime, session
from flashtile.engines.starpu.flow import Flow
from flashtile.engines.starpu.jobs import Job
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.kernels.triton import aot, compiler_missing
from flashtile.kernels.triton.specialisation import Tile

Script = Callable[..., Any]
REASON = compiler_missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("starpu"),
]

HERE = Path(__file__).parent


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


def test_no_device_waits_for_what_another_loads(script: Script, folder: Path, driver: Path, tmp_path: Path) -> None:
    """Two workers load at the same time: the fake driver lets neither go before the other has begun."""
    script(
        """
        import ctypes, threading
        from pathlib import Path
        import fake_gpu
        from fake_gpu import Buffer
        from flashtile.engines.starpu import runtime
        from flashtile.engines.starpu.flow import Flow
        from flashtile.engines.starpu.jobs import Job

        starpu.init(workers=1, cuda_kernels=os.environ["KERNELS"])
        fake_gpu.use_driver(Path(os.environ["DRIVER"]))
        given = fake_gpu.tensors(starpu, "float16")
        flow = Flow(runtime.current(), fake_gpu.spec("float16"), fake_gpu.TILE_Q, fake_gpu.TILE_K)
        tasks = fake_gpu.recorded(lambda: flow.submit(Job(), *given))["forward"]
        gpu = fake_gpu.Gpu(Path(os.environ["KERNELS"]), Path(os.environ["LOG"]))

        def work(context):
            ctypes.CDLL(os.environ["DRIVER"]).fake_driver_context(ctypes.c_long(context))
            gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], [Buffer(n << 32) for n in range(1, 7)])

        workers = [threading.Thread(target=work, args=(context,)) for context in (5, 6)]
        for one in workers:
            one.start()
        for one in workers:
            one.join()
        gpu.job.wait()
        assert sorted(gpu.loads()) == [5, 5, 6, 6] and sorted(x.context for x in gpu.launches()) == [5, 5, 6, 6]
        """,
        KERNELS=str(folder),
        DRIVER=str(driver),
        LOG=str(tmp_path / "log"),
        FAKE_DRIVER_MEET="2",
        PYTHONPATH=searched(HERE, HERE.parent),
    )


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


def test_what_the_driver_refuses_of_gradients(
    machine: Callable[..., Gpu], folder: Path, starpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the forward, by every codelet of theirs; a codelet has no CUDA function that keeps an error to itself."""
    gpu = machine(folder)
    monkeypatch.setattr(runtime.current(), "kernels", Anything(tmp_path / "made", Tile(32, 16)))
    given = dict(zip(("q", "k", "v", "o", "lse"), tensors(starpu, "float16"), strict=True))
    given |= {name: starpu.empty(given[name[1:]].shape, "float16", given[name[1:]].rows) for name in ("do", "dq", "dk")}
    batches = recorded(lambda: starpu.submit_backward(**given, causal=True, align=30))
    monkeypatch.setenv("FAKE_DRIVER_FAIL", "cuLaunchKernel:701")
    for operation in ("delta", "backward", "add"):
        batch, job = batches[operation], Job()
        buffers = [Buffer(n << 32) for n in range(1, batch.program.data.handles + 2)]
        assert not gpu.run(batch.codelet, batch.program, batch.tasks[-1], buffers, job)
        with pytest.raises(
            KernelError, match=f"codelet flashtile_{operation}_float16 failed on batch 0, head 1, .* 701"
        ):
            job.wait()
    forget([*given.values()])


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
        from flashtile.engines.starpu import launches, runtime
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
            print(message(lambda: launches.open_driver(runtime.current())))
        """,
        KERNELS=str(folder),
        PYTHONPATH=searched(HERE, HERE.parent),
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
    monkeypatch.setattr(made, "folder_of", lambda what, spec, arch: None)  # as without a compiler
    with pytest.raises(UnavailableError, match=r"cuda: no kernels were given, init\(cuda_kernels=...\)"):
        starpu.restrict("cuda")
    gpu = machine(folder)
    try:
        starpu.restrict("cuda")
        tasks = forward()
        assert tasks.program.data.cuda and gpu.run(tasks.codelet, tasks.program, tasks.tasks[0], PLAIN)
        q = np.zeros((1, 2, 70, 16), np.float16)
        for options, reason in (
            ({"sinks": np.zeros(2)}, "restricted to cuda: .* has no kernel forward of"),
            ({"dropout_p": 0.5, "seed": 1}, "restricted to cuda: dropout in tiles of 45 keys, no multiple of 8, is"),
            ({"precision": "ieee"}, "has no kernel forward of .*bf16.* with .*BAND=False"),
        ):
            dtype = "float16" if len(options) and "precision" not in options else "bfloat16"
            rows = 45 if "seed" in options else 48
            given = [starpu.empty(q.shape, dtype, rows) for _ in range(4)]
            given.append(starpu.empty(q.shape[:3], "float32", rows))
            with pytest.raises(UnavailableError, match=reason):
                starpu.submit_forward(*given, **options)
            forget(given)
    finally:
        monkeypatch.undo()
        starpu.restrict("cpu", "cuda")


def test_a_codelet_that_nothing_could_run(starpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when it is restricted, and as it was then: its tasks would never run."""
    refused = "restrict: got cuda, expected one with workers; cuda: "
    one = session.codelet("add", "float16")
    for workers, reason in ((0, "StarPU runs no such worker"), (1, "no kernels were given")):
        monkeypatch.setattr(runtime.current(), "workers", lambda architecture=None, n=workers: n)
        with pytest.raises(UnavailableError, match=refused + reason):
            one.restrict("cuda")
        assert one.where == ("cpu", "cuda")


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
