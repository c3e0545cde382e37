"""CUDA implementations of the codelets, as far as they go without a GPU: real machine code, the C function that StarPU
would call, and a driver that writes down what it is told.

Every parameter of every launch is read back where the machine code has it, and held against what the task is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
import pytest
from fake_gpu import (
    CONTEXT,
    HEAD,
    KV_LEN,
    OFFSET,
    Q_LEN,
    SCALE,
    SCRATCH,
    STREAM,
    TILE_K,
    TILE_Q,
    Buffer,
    Gpu,
    Launched,
    forget,
    matrix,
    recorded,
    spec,
    state,
    tensors,
)
from processes import searched

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.flow import Flow
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.vanilla import VanillaFlow
from flashtile.kernels.triton import aot, compiler_missing

Script = Callable[..., Any]
REASON = compiler_missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("starpu"),
]

HERE = Path(__file__).parent
SLOW = [
    (dtype, precision)
    for dtype, precisions in {
        "float64": ("ieee",),
        "float32": ("ieee", "tf32", "bf16", "fp16"),
        "float16": ("ieee",),
        "bfloat16": ("ieee",),
    }.items()
    for precision in precisions
]

LINE = 0x7_0000_0040


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
    buffers = [
        matrix(0x1_0000_0000, 32, dtype),
        Buffer(0x2_0000_0000),
        matrix(0x3_0000_0000, 48, dtype),
        matrix(0x4_0000_0000, 64, wide),
        Buffer(0x5_0000_0008),
        Buffer(SCRATCH),
    ]
    seen = set()
    for task in tasks.tasks:
        _, _, i, j = task["tile"].tolist()
        rows, keys = min(TILE_Q, Q_LEN - i * TILE_Q), min(TILE_K, KV_LEN - j * TILE_K)
        kind = "carried" if task["values"][0] else "partial"
        query_tiles = tiles_of(rows, fake_gpu.TILE.tile_q)
        expected = {
            "q": 0x1_0000_0000,
            "k": 0x2_0000_0000,
            "v": 0x3_0000_0000,
            "o": 0x4_0000_0000,
            "lse": 0x5_0000_0008,
            "odd": LINE,
            **STRIDES,
            "q_s": 32,
            "k_s": HEAD,
            "v_s": 48,
            "o_s": 64,
            "o_split": 0,
            "lse_split": 0,
            **COUNTS,
            "q_len": rows,
            "kv_len": keys,
            "head_size": HEAD,
            "value_size": HEAD,
            "query_tiles": query_tiles,
            "items": query_tiles,
            "blocks": 1,
            "together": 1,
            "splits": 1,
            "split_keys": keys,
            "scale": BITS,
            "right": 0,
            "offset": OFFSET + i * TILE_Q - j * TILE_K,
        }
        launches = gpu.run(tasks.codelet, tasks.program, task, buffers)
        names = [f"forward-{dtype}-{precision}-True-True-{kind}{end}" for end in ("", "-contain")]
        assert [gpu.manifest[x.image]["name"] for x in launches] == names
        for launched in launches:
            check(gpu, launched, "forward", query_tiles, expected)
        seen.add((kind, rows, keys))
    assert {(48, 40), (22, 40), (22, 20)} == {x[1:] for x in seen} and len({x[0] for x in seen}) == 2
    assert flow.program.scratch_bytes >= 4 * tiles_of(TILE_Q, fake_gpu.TILE.tile_q)
    forget(given)


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
            "parts_o": addresses[0],
            "parts_lse": addresses[1],
            "o": addresses[0],
            "lse": addresses[1],
            **of("o"),
            "o_s": HEAD,
            "o_split": -0x1_0000_0000 // size,
            "lse_split": 0x1_0000_0000 // size,
            "first": 0,
            "heads": 1,
            "q_len": rows,
            "value_size": HEAD,
            "query_tiles": query_tiles,
            "splits": 2,
        }
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
            "parts_o": 0x4_0000_0000,
            "parts_lse": 0x5_0000_0000,
            "o": 0x6_0000_0000,
            "lse": LINE,
            **of("o"),
            "o_s": 40,
            "o_split": 0,
            "lse_split": 0,
            "first": 0,
            "heads": 1,
            "q_len": rows,
            "value_size": HEAD,
            "query_tiles": query_tiles,
            "splits": 1,
        }
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
                "scores": (
                    {
                        "q": 0x1_0000_0000,
                        "k": 0x2_0000_0000,
                        "s": at,
                        **of("qk"),
                        "q_s": 32,
                        "k_s": HEAD,
                        "s_s": row,
                        **common,
                        "q_len": rows,
                        "kv_len": keys,
                        "columns": columns,
                        "query_tiles": query_tiles,
                        "key_tiles": key_tiles,
                        "scale": BITS,
                        "left": 2**61,
                        "right": 0,
                        "offset": OFFSET + i * TILE_Q - j * TILE_K,
                    },
                    query_tiles * key_tiles,
                    f"scores-{dtype}-{precision}",
                ),
                "softmax": (
                    {
                        "s": 0x7_0000_0000,
                        "p": 0x7_0000_0000,
                        "lse": 0x5_0000_0000,
                        "first": 0,
                        "q_len": rows,
                        "kv_len": row,
                        "query_tiles": query_tiles,
                    },
                    query_tiles,
                    f"softmax-{dtype}-{precision}",
                ),
                "output": (
                    {
                        "p": at,
                        "v": 0x3_0000_0000,
                        "o": 0x4_0000_0000,
                        **of("vo"),
                        "v_s": 48,
                        "o_s": 64,
                        "p_s": row,
                        **COUNTS,
                        "q_len": rows,
                        "kv_len": keys,
                        "value_size": HEAD,
                        "query_tiles": query_tiles,
                    },
                    query_tiles,
                    f"output-{dtype}-{precision}-True-True-{'carried' if j else 'partial'}",
                ),
            }[stage]
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
    every_codelet(gpu, starpu, fake_gpu.QUICK)
    merge_launches(gpu, starpu, "float64")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), SLOW)
def test_every_argument_in_every_dtype(
    machine: Callable[..., Gpu], tmp_path: Path, starpu: Any, kind: str, precision: str
) -> None:
    list(aot.build(tmp_path, fake_gpu.ARCH, fake_gpu.chosen(kind, precision)))
    every_codelet(machine(tmp_path), starpu, kind, precision)


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
        KERNELS=str(folder),
        LOG=str(tmp_path / "log"),
        DRIVER=str(driver),
        TRITON_INTERPRET="1",
        PYTHONPATH=searched(HERE, HERE.parent),
    )


def test_the_run_on_hardware_compiles_what_its_tasks_launch(script: Script, driver: Path, tmp_path: Path) -> None:
    """A folder of the kernels that it compiles ahead, and of no others; what they compute, too."""
    script(
        """
        from pathlib import Path
        import fake_gpu, interpreted_gpu
        from benchmarks.gpu import tasks
        from flashtile.engines.starpu import engine, manifest
        from flashtile.kernels.triton.specialisation import Tile

        ahead = {manifest.key_of(one.specialisation) for one in tasks.kernels(fake_gpu.ARCH)}

        class Folder(interpreted_gpu.Anything):
            def find(self, what):
                return super().find(what) if manifest.key_of(what) in ahead else None

            def compiled(self, what, spec):
                return None

        folder, log, driver = (Path(os.environ[name]) for name in ("KERNELS", "LOG", "DRIVER"))
        starpu.init(workers=1)
        fake_gpu.use_driver(driver)
        engine.TILE_Q, engine.TILE_K = (64,), 64
        with interpreted_gpu.working(folder, log, Folder(folder, Tile(64, 64))) as worker:
            tasks.attention(100)
        ran = {name.split("-")[0] for name in worker.ran}
        assert ran == {"forward", "row_deltas", "backward_q", "backward_kv"}, ran
        """,
        KERNELS=str(tmp_path / "made"),
        LOG=str(tmp_path / "log"),
        DRIVER=str(driver),
        TRITON_INTERPRET="1",
        PYTHONPATH=searched(HERE, HERE.parent, HERE.parent.parent),
    )
