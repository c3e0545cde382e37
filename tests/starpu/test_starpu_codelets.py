"""Codelets: what each has, the slot for CUDA kernels, and the tasks of the unfused three."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from processes import run
from test_starpu_tasks import spec_of

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import build, codelets, programs, runtime, session
from flashtile.engines.starpu.flow import Flow
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.vanilla import VanillaFlow
from flashtile.errors import UnavailableError

pytestmark = pytest.mark.usefixtures("starpu")

Script = Callable[..., Any]


def test_every_operation_runs_in_every_dtype_and_keeps_a_model(script: Script, tmp_path: Path) -> None:
    """Calibrated once each; the files on disk are one a codelet."""
    script(
        """
        from flashtile import nntile
        starpu.init(workers=2, scheduler="dmda", calibrate=True, models=os.environ["MODELS"])
        import ml_dtypes
        for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16):
            q_, k_, v_ = (x.astype(dtype) for x in arrays()[:3])
            for kernel in ("cpu", "vanilla"):
                flashtile.attention(q_, k_, v_, engine="starpu", kernel=kernel)
            wide = "float64" if dtype == "float64" else "float32"
            parts = [starpu.register(np.zeros(s, wide), 100) for s in [(1, 2, 300, 16), (1, 2, 300)] * 2]
            starpu.submit_merge(*parts)
            shapes = [(16, 40, 1, 1, 2)] * 3 + [(40, 1, 1, 2), (16, 40, 1, 1, 2)]
            kinds = [dtype] * 3 + [wide, dtype]
            k, q, v, lse, a = (nntile.register(np.zeros(s, t, "F")) for s, t in zip(shapes, kinds))
            nntile.flash_sdpa_fwd_async(k, q, None, lse, v, a)
            gradients = [nntile.register(np.zeros((16, 40, 1, 1, 2), dtype, "F")) for _ in range(4)]
            nntile.flash_sdpa_bwd_async(k, q, None, lse, v, a, *gradients)
            starpu.wait()
            o, lse = flashtile.attention(q_, k_, v_, return_lse=True)
            flashtile.attention_backward(o, q_, k_, v_, o, lse, engine="starpu")
        """,
        MODELS=str(tmp_path),
    )
    names = {file.name.split(".")[0] for file in tmp_path.rglob("flashtile_*")}
    narrow = "float16", "bfloat16"
    wide = {"merge": ("float64", "float32"), "finish": narrow, "add": narrow, "accumulate_add": narrow}
    expected = {f"flashtile_{name}_{dtype}" for name in codelets.LABELS for dtype in wide.get(name, tuple(DTYPES))}
    assert names == expected


def test_a_task_goes_only_where_its_program_has_a_kernel(starpu: Any) -> None:
    """The slot for CUDA: a program with a kernel there alone finds no worker here, and says so."""
    arrays = uniform(Shape(1, 1, 1, 50, 50, 16, 16), "float32")
    rt = runtime.current()
    flow = Flow(rt, spec_of(50, 50), 50, 50)
    assert flow.program.data.cpu and not flow.program.data.cuda
    o, lse = np.zeros((1, 1, 50, 16), "float32"), np.zeros((1, 1, 50), "float32")
    tensors = [starpu.register(x, 50) for x in (*arrays, o, lse)]
    native, flow.program.data.cpu, flow.program.data.cuda = flow.program.data.cpu, 0, 1
    job = Job()
    with pytest.raises(UnavailableError, match=r"codelet flashtile_forward_float32 was refused with status -19"):
        flow.submit(job, *tensors)
    flow.program.data.cpu, flow.program.data.cuda = native, 0
    flow.submit(job, *tensors)
    job.wait()
    for tensor in tensors:
        tensor.unregister()
    assert same_bits(o, flashtile.attention(*arrays, engine="starpu"))


STUB = """
typedef struct CUstream_st *cudaStream_t; typedef int cudaError_t; typedef int CUdevice; typedef void *cudaEvent_t;
enum cudaMemcpyKind { cudaMemcpyHostToDevice }; struct cudaDeviceProp { int major; };
typedef void *cusparseHandle_t; typedef void *cublasHandle_t;
"""
HEADERS = ("cuda_runtime.h", "cuda_runtime_api.h", "cusparse.h", "cublas.h", "cublas_v2.h")


def test_the_cuda_trampoline_compiles(tmp_path: Path) -> None:
    """Against stand-ins for CUDA's headers, as in a StarPU with CUDA: that was never run, for want of a GPU."""
    found, compiler = build.package(), shutil.which("gcc") or shutil.which("cc")
    assert found is not None and compiler is not None
    (tmp_path / "cuda.h").write_text("#pragma once\n" + STUB)
    for name in HEADERS:
        (tmp_path / name).write_text('#include "cuda.h"\n')
    flags = subprocess.run(["pkg-config", "--cflags", found[0]], capture_output=True, text=True, check=True)
    command = [
        compiler,
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        "-DSTARPU_USE_CUDA",
        f"-I{tmp_path}",
        f"-I{build.HERE}",
        *flags.stdout.split(),
        str(build.HERE / "shim.c"),
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    listed = run([*command, "-E"]).stdout
    assert "run_cuda" in listed


def test_10_000_empty_tasks_run() -> None:
    """Batched: the path whose cost the benchmark measures."""
    rt = runtime.current()
    job, n = Job(), 10_000
    handles = np.tile(rt.register([0] * 5, [64] * 5), (n, 1))
    modes = np.full((n, 5), rt.constant("W"))
    job.submit(session.codelet("forward", "float32"), handles, modes, np.zeros(n, TASK))
    job.wait()
    assert job.pending == 0
    rt.unregister(handles[0], 1)


def test_access_modes_of_a_chain() -> None:
    """The first task of a chain writes the state, the others update it, in order or, if asked, in any."""
    rt = runtime.current()
    r, w, rw, commute = (rt.constant(name) for name in ("R", "W", "RW", "COMMUTE"))
    spec = spec_of(200, 300)
    for accumulate, later in (("ordered", rw), ("commute", rw | commute)):
        modes = Flow(rt, spec, 100, 100, accumulate=accumulate)._modes(rt)
        assert modes.tolist() == [[r, r, r, w, w], *[[r, r, r, later, later]] * 2] * 2


def recorded(flow: VanillaFlow, monkeypatch: pytest.MonkeyPatch, door: Any) -> dict[str, tuple[Any, Any]]:
    """(modes, tasks) of each stage, submitted on tensors of the flow's shape and not run."""
    seen: dict[str, tuple[Any, Any]] = {}

    def record(self: Any, job: Any, codelet: Any, handles: Any, modes: Any, tasks: Any) -> None:
        seen[codelet.name.split("_")[1]] = np.array(modes), tasks.copy()

    monkeypatch.setattr(programs.Program, "submit", record)
    spec = flow.spec
    shapes = [
        (spec.q_len, spec.head_size),
        (spec.kv_len, spec.head_size),
        (spec.kv_len, spec.value_size),
        (spec.q_len, spec.value_size),
    ]
    rows = flow.tile_q, flow.tile_k, flow.tile_k, flow.tile_q
    tensors = [door.empty((1, spec.heads, *s), spec.dtype, n) for s, n in zip(shapes, rows, strict=True)]
    tensors.append(door.empty((1, spec.heads, spec.q_len), DTYPES[spec.dtype].accumulator, flow.tile_q))
    flow.submit(Job(), *tensors)
    for tensor in tensors:
        tensor.unregister()
    return seen


def test_the_unfused_three(starpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of tiles, hidden or not: modes, FLOPs and footprints."""
    rt = runtime.current()
    r, w, rw = (rt.constant(name) for name in ("R", "W", "RW"))
    flow = VanillaFlow(rt, spec_of(250, 300, heads=2, causal=True, align=0), 100, 100)
    stages = recorded(flow, monkeypatch, starpu)
    assert {name: len(tasks) for name, (_, tasks) in stages.items()} == {"scores": 18, "softmax": 6, "output": 18}
    assert stages["scores"][0][:3].tolist() == [[r, r, w], [r, r, rw], [r, r, rw]]
    assert stages["softmax"][0].tolist() == [[rw, w]] * 6
    assert stages["output"][0][:3].tolist() == [[r, r, w], [r, r, rw], [r, r, rw]]
    for name in ("scores", "output"):
        tasks = stages[name][1]
        assert tasks["flops"].sum() == 2 * 16 * 2 * 250 * 300
        assert len(set(tasks["footprint"].tolist())) == 4  # 100 or 50 rows; the first of a chain, or not
    assert len(set(stages["softmax"][1]["footprint"].tolist())) == 2
    marks = [set(tasks["footprint"].tolist()) for _, tasks in stages.values()]
    assert len(set.union(*marks)) == sum(map(len, marks))
    other = recorded(VanillaFlow(rt, spec_of(250, 300, heads=2, head_size=32), 100, 100), monkeypatch, starpu)
    for name, mine in zip(stages, marks, strict=True):
        assert mine.isdisjoint(other[name][1]["footprint"].tolist())


def test_footprints_of_merge_and_finish(starpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(programs.Program, "submit", lambda self, *given: seen.append(given[-1]["footprint"].tolist()))

    def state(size: int, rows: int, dtype: str) -> list[Any]:
        return [starpu.empty((1, 2, 250, size), dtype, rows), starpu.empty((1, 2, 250), dtype, rows)]

    kept = []
    for size, rows, dtype in ((16, 100, "float32"), (32, 100, "float32"), (16, 50, "float32"), (16, 100, "float64")):
        kept += [*state(size, rows, dtype), *state(size, rows, dtype)]
        starpu.submit_merge(*kept[-4:])
    kept += [*state(16, 100, "float32"), starpu.empty((1, 2, 250, 16), "float16", 100)]
    starpu.submit_finish(*kept[-3:])
    sets = [set(x) for x in seen]
    assert [len(x) for x in sets] == [2, 2, 1, 2, 2]  # 100 rows, and 50 at the end
    assert len(sets[0] | sets[1] | sets[3] | sets[4]) == 8
    assert sets[2] < sets[0]  # 50 rows cost the same, wherever
    for tensor in kept:
        tensor.unregister()
