"""Score programs, sinks, several heads and NNTile's tiles on CUDA workers: every launch as the driver is told of it, by
Triton's interpreter, on tiles that lie as a device has them. No machine code is compiled for this."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import ARCH, Buffer, checksum, forget, parameters_of, recorded, tensors
from interpreted_gpu import Anything
from processes import searched

from flashtile.engines.starpu import cuda_scores, made, runtime
from flashtile.kernels.triton import aot, compiler_missing
from flashtile.kernels.triton.specialisation import Tile

Script = Callable[..., Any]
REASON = compiler_missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("starpu"),
]

HERE = Path(__file__).parent

BEGIN = """
from pathlib import Path
import fake_gpu, interpreted_gpu
from flashtile.engines.starpu import engine, flow, units
from flashtile.kernels.triton.specialisation import Tile
from flashtile.testing import expect

folder, log, driver = (Path(os.environ[name]) for name in ("KERNELS", "LOG", "DRIVER"))
starpu.init(workers=1)
fake_gpu.use_driver(driver)
engine.TILE_Q, engine.TILE_K = (48,), 40
rng = np.random.default_rng(1)
kernels = interpreted_gpu.Anything(folder, Tile(32, 64))
got = []
make = flow.Flow.__init__

def noted(self, *given, **named):
    make(self, *given, **named)
    got.append(self.heads)

flow.Flow.__init__ = noted
"""


@pytest.fixture
def interpreted(script: Script, driver: Path, tmp_path: Path) -> Callable[[str], None]:
    def run(body: str) -> None:
        script(
            BEGIN + body,
            KERNELS=str(tmp_path / "made"),
            LOG=str(tmp_path / "log"),
            DRIVER=str(driver),
            TRITON_INTERPRET="1",
            PYTHONPATH=searched(HERE, HERE.parent),
        )

    return run


def test_scores_and_sinks_of_several_heads(interpreted: Callable[[str], None]) -> None:
    """All heads of two batches in a task, or of one, in either layout; masks and arrays at their own places."""
    interpreted(
        """
sizes = (2, 70), (1, 100), (1, 100)
q, k, v = (rng.standard_normal((2, n, h, 16)).astype("float32").transpose(0, 2, 1, 3) for h, n in sizes)
flat = [np.ascontiguousarray(x) for x in (q, k, v)]
mask = rng.random((70, 100)) < 0.7
mask[48:, 40:80] = False
sinks = np.linspace(-1, 2, 2)
table = rng.standard_normal(170).astype("float32")
mod = lambda s, b, h, i, j: s + table[i - j + 99] * (1 + b) - h * 0.1
cases = [
    (4, flat, {"mask": mask, "sinks": sinks}),
    (4, flat, {"score_mod": mod, "softcap": 3.0, "causal": True, "align": 30}),
    (2, (q, k, v), {"bias": rng.standard_normal((1, 1, 70, 100)).astype("float32"), "sinks": sinks}),
    (1, flat, {"mask": rng.random((2, 2, 70, 100)) < 0.6, "softcap": 2.0}),
    (4, flat, {"dropout_p": 0.25, "seed": 3 << 62, "causal": True, "align": 30}),
]
units.most = lambda *given: 4
with interpreted_gpu.working(folder, log, kernels) as worker:
    for heads, arrays, options in cases:
        found = flashtile.attention(*arrays, engine="starpu", return_lse=True, **options)
        for x, want, name in zip(found, expect(*arrays, **options), ("output", "lse")):
            want.check(x, name)
        assert got.pop() == heads, heads
kinds = {(row["what"].constants, row["what"].names) for row in kernels.rows.values()}
assert any("sinks" in names for _, names in kinds) and any("origin" in names for _, names in kinds)
"""
    )


def test_tiles_of_nntile(interpreted: Callable[[str], None]) -> None:
    """All heads of a tile by one task: added to A in its own dtype, with a mask that is a tile, too; and gradients."""
    interpreted(
        """
from flashtile import nntile
from nntile_problem import BackwardProblem, Problem

kernels.tile = Tile(64, 128)  # few programs: tiles of several are another test's

with interpreted_gpu.working(folder, log, kernels) as worker:
    problem = Problem("float16", "own", causal=True, align=90)
    a, lse, q = (nntile.register(x) for x in (problem.a, problem.lse, problem.q))
    tiles = [a, lse, q]
    for first, *arrays in problem.key_tiles():
        k, m, v = (nntile.register(x) for x in arrays)
        nntile.flash_sdpa_fwd_async(k, q, m, lse, v, a, causal=True, first_query=90, first_key=first)
        tiles += [k, m, v]
    for tile in tiles:
        tile.unregister()
    problem.check()
    assert {dict(row["what"].signature)["o"] for row in kernels.rows.values()} == {"*fp16"}
    problem = BackwardProblem("float32", "own")
    q, lse, a, da, dq = tiles = [nntile.register(getattr(problem, name)) for name in ("q", "lse", "a", "da", "dq")]
    pairs = problem.gradient_tiles()
    for first, read, (dk, dv) in pairs:
        k, m, v, of_k, of_v = (nntile.register(x) for x in (*read, dk, dv))
        nntile.flash_sdpa_bwd_async(k, q, m, lse, v, a, da, of_k, dq, of_v, first_key=first)
        tiles += [k, m, v, of_k, of_v]
    for tile in tiles:
        tile.unregister()
    for first, _, (dk, dv) in pairs:
        at = slice(first, first + dk.shape[1])
        problem.dk[:, at], problem.dv[:, at] = dk, dv
    problem.check()
"""
    )


def test_gradients(interpreted: Callable[[str], None]) -> None:
    """Of all heads of a tile at once, where none share keys; of those that do. Through masks, score functions and
    dropout, each of which knows where its tile lies, and to sinks."""
    interpreted(
        """
from flashtile.testing import assert_gradients_accurate

units.most = lambda *given: 4
table = rng.standard_normal(130).astype("float32")
mod = lambda s, b, h, i, j: s * (1 + table[i - j + 59]) + b - h * 0.1
shown = rng.random((2, 1, 70, 60)) < 0.7
shown[:, :, 48:, :40] = False
with interpreted_gpu.working(folder, log, kernels) as worker:
    cases = (
        (2, 40, "float32", {"causal": True, "align": np.array([-10, 30])}),
        (1, 40, "float16", {"window": (40, 20), "align": 20}),
        (2, 70, "float32", {"mask": shown, "sinks": np.linspace(-1, 2, 2), "score_mod": mod}),
        (1, 70, "float32", {"dropout_p": 0.25, "seed": 3 << 62, "softcap": 2.0, "causal": True, "align": 10}),
    )
    for kv_heads, rows, dtype, options in cases:
        q, do = (rng.standard_normal((2, 2, rows, 16)).astype(dtype) for _ in "12")
        k, v = (rng.standard_normal((2, kv_heads, 60, 16)).astype(dtype) for _ in "12")
        given = {"dlse": rng.standard_normal((2, 2, rows)).astype("float32"), **options}
        wrt = ["q", "k", "v", *(["sinks"] if "sinks" in options else [])]
        o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="reference", **options)
        found = flashtile.attention_backward(do, q, k, v, o, lse, wrt=wrt, engine="starpu", **given)
        assert_gradients_accurate(found, do, q, k, v, wrt=wrt, **given)
ran = {name.split("-")[0] for name in worker.ran}
assert ran == {"row_deltas", "sink_sums", "backward_q", "backward_kv", "add_parts"}, ran
"""
    )


def test_gradients_find_what_was_compiled_ahead(
    machine: Callable[..., Any], starpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of `flashtile aot --kernels backward --state carried` are those of the tasks of plain gradients."""
    kept = Anything(tmp_path / "made", Tile(32, 16))
    chosen = aot.choose(ARCH, ["float16"], [16], kernels=["backward"], states=["carried"], bands=["band", "open"])
    rows = [kept.row_of(one) for one in chosen]
    (kept.folder / aot.MANIFEST).write_text(json.dumps({"format": aot.FORMAT, "arch": ARCH, "kernels": rows}))
    gpu = machine(kept.folder)
    gpu.__dict__["manifest"] = kept.rows
    given = dict(zip(("q", "k", "v", "o", "lse"), tensors(starpu, "float16"), strict=True))
    given |= {name: starpu.empty(given[name[1:]].shape, "float16", given[name[1:]].rows) for name in ("do", "dq", "dk")}
    given["dv"] = starpu.empty(given["v"].shape, "float16", given["v"].rows)
    for options in ({}, {"window": (5, 20), "align": 3}):
        batches = recorded(lambda o=options: starpu.submit_backward(**given, **o))
        for operation, kernels in (("delta", 1), ("backward", 4), ("add", 1)):
            batch = batches[operation]
            buffers = [Buffer(n << 32) for n in range(1, batch.program.data.handles + 2)]
            assert len(gpu.run(batch.codelet, batch.program, batch.tasks[-1], buffers)) == kernels
    forget([*given.values()])


def test_the_run_on_hardware_asks_for_cuda_workers(script: Script) -> None:
    """And says so where StarPU has none; where it has, tests of launches show what the tasks would do."""
    script(
        """
        from benchmarks.gpu import habits

        assert "no CUDA workers" in message(habits.cuda_workers, ImportError)
        from flashtile.engines.starpu import runtime
        assert not runtime.running()
        """,
        PYTHONPATH=searched(HERE.parent.parent),
    )


def test_arrays_that_repeat_travel_once() -> None:
    """The elements that there are, and strides by which the array has its shape."""
    base = np.arange(12, dtype="float32").reshape(3, 4)
    for x in (base, base.T, base[::2, ::-1], np.broadcast_to(base[:, None], (3, 5, 4)), base[:0], base[:1]):
        found, strides = cuda_scores.packed(x)
        assert found.flags.c_contiguous and found.size <= base.size
        again = np.lib.stride_tricks.as_strided(found, x.shape, [n * x.itemsize for n in strides])
        assert np.array_equal(again, x)


def test_without_a_compiler_a_program_stays_on_cpus(
    machine: Callable[..., Any], folder: Path, starpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(folder)
    asked: list[str] = []
    monkeypatch.setattr(made, "folder_of", lambda what, spec, arch: asked.append(f"{what.kernel} for {arch}"))
    monkeypatch.setattr(runtime.current(), "workers", lambda architecture=None: 1)  # of CUDA, too
    given = tensors(starpu, "float16")
    tasks = recorded(lambda: starpu.submit_forward(*given, softcap=3.0))["forward"]
    assert asked == ["forward for sm_90"] and "has no kernel forward of *fp16" in tasks.program.cuda
    forget(given)


@pytest.mark.slow
def test_a_program_is_compiled_when_it_is_wanted(
    machine: Callable[..., Any], folder: Path, starpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And found again; the driver is told of its own parameters at the places that the machine code has."""
    monkeypatch.setattr(made.build, "directory", lambda: tmp_path / "kept")
    monkeypatch.setattr(runtime.current(), "workers", lambda architecture=None: 1)
    gpu = machine(folder)
    given = tensors(starpu, "float16")
    for _ in range(2):
        tasks = recorded(lambda: starpu.submit_forward(*given, softcap=3.0))["forward"]
        assert not isinstance(tasks.program.cuda, str), tasks.program.cuda
        kept = sorted((tmp_path / "kept" / "kernels").iterdir())
        assert len(kept) == 4  # a state that starts and one that continues, each with its second launch
    launches = gpu.run(tasks.codelet, tasks.program, tasks.tasks[-1], [Buffer(n << 32) for n in range(1, 7)])
    rows = {}
    for one in kept:
        for row in json.loads((one / aot.MANIFEST).read_text())["kernels"]:
            rows[checksum((one / row["file"]).read_bytes())] = one / row["file"], row
    for launched in launches:
        file, row = rows[launched.image]
        places = [(place.offset, place.size) for place in parameters_of(file)]
        assert [(p["offset"], p["size"]) for p in row["parameters"]] == places and row["program"] is not None
        told = {p["name"]: p for p in row["parameters"]}["origin[1]"]
        at = launched.parameters[told["offset"] : told["offset"] + told["size"]]
        assert int.from_bytes(at, "little") == tasks.tasks[-1]["tile"][1]
    forget(given)
