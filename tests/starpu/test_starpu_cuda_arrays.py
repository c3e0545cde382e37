"""Gradients of biases, slopes and captured arrays on CUDA workers: every launch as the driver is told of it, by its
parameters, and what it computes, by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import HEADS, KV_LEN, Q_LEN, TILE_K, TILE_Q, Buffer, forget, recorded, tensors
from interpreted_gpu import Anything
from processes import searched

from flashtile.engines.starpu import boxes, runtime
from flashtile.kernels.triton import aot, compiler_missing
from flashtile.kernels.triton import backward_forms as forms
from flashtile.kernels.triton.specialisation import Tile
from flashtile.score.operations import variable

Script = Callable[..., Any]
REASON = compiler_missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("starpu"),
]

HERE = Path(__file__).parent


def test_what_the_launches_compute(script: Script, driver: Path, tmp_path: Path) -> None:
    """Through the engine and the programs' own door: ragged tiles, shared keys; arrays of which tiles have their own
    part, and in which they meet, with copies and in turn."""
    script(
        """
        from pathlib import Path
        import fake_gpu, interpreted_gpu
        from flashtile.engines.starpu import boxes, engine
        from flashtile.kernels.triton.specialisation import Tile
        from flashtile.testing import assert_gradients_accurate

        folder, log, driver = (Path(os.environ[name]) for name in ("KERNELS", "LOG", "DRIVER"))
        starpu.init(workers=1)
        fake_gpu.use_driver(driver)
        engine.TILE_Q, engine.TILE_K = (48,), 40
        rng = np.random.default_rng(1)
        kernels = interpreted_gpu.Anything(folder, Tile(32, 64))
        table = rng.standard_normal(110).astype("float32")
        rows = rng.standard_normal((2, 90)).astype("float32")  # which is longer than it must be
        mod = lambda s, b, h, i, j: s + table[i - j + 50] * rows[h, i]
        cases = (
            (1, 50, "float64", ("bias", "alibi_slopes"), {"bias": rng.standard_normal((1, 60, 50)), "causal": True,
             "alibi_slopes": np.array([0.1, 0.2]), "align": 20}),
            (2, 30, "float16", ("captured",), {"score_mod": mod}),
        )
        with interpreted_gpu.working(folder, log, kernels) as worker:
            for batch, keys, dtype, names, options in cases:
                q, do = (rng.standard_normal((batch, 2, 60, 16)).astype(dtype) for _ in "12")
                k, v = (rng.standard_normal((batch, 1, keys, 16)).astype(dtype) for _ in "12")
                o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="reference", **options)
                wrt = "k", *names
                found = flashtile.attention_backward(do, q, k, v, o, lse, wrt=wrt, engine="starpu", **options)
                assert_gradients_accurate(found, do, q, k, v, wrt=wrt, **options)
            boxes.COPIES_BYTES = 0
            parts = zip(("do", "q", "k", "v", "o", "lse"), (do, q, k, v, o, lse))
            given = {name: starpu.register(x, 40 if name in "kv" else 48) for name, x in parts}
            found = starpu.submit_backward(**given, wrt=names, **options).wait()
            assert_gradients_accurate(found, do, q, k, v, wrt=names, **options)
            for tensor in given.values():
                tensor.unregister()
        ran = {name.split("-")[0] for name in worker.ran}
        assert {"clear", "array_sums", "array_finish"} < ran, ran
        words = {dict(row["what"].constants).get("WORDS") for row in kernels.rows.values()}
        assert {1, 2} < words, words
        """,
        KERNELS=str(tmp_path / "made"),
        LOG=str(tmp_path / "log"),
        DRIVER=str(driver),
        TRITON_INTERPRET="1",
        PYTHONPATH=searched(HERE, HERE.parent),
    )


def test_every_argument(
    machine: Callable[..., Any], starpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the launches that follow those of dQ, dK and dV: where in scratch memory they work, which elements a tile
    reaches, and to which handle they are added."""
    kept = Anything(tmp_path / "made", Tile(32, 16))
    (kept.folder / aot.MANIFEST).write_text('{"format": 1, "arch": "sm_90", "kernels": []}')
    gpu = machine(kept.folder)
    monkeypatch.setattr(runtime.current(), "kernels", kept)
    gpu.__dict__["manifest"] = kept.rows
    given = dict(zip(("q", "k", "v", "o", "lse"), tensors(starpu, "float16"), strict=True))
    given |= {"do": starpu.empty(given["o"].shape, "float16", TILE_Q)}
    bias = np.zeros((HEADS, Q_LEN, KV_LEN), np.float32)
    batch = recorded(lambda: starpu.submit_backward(**given, wrt=("bias",), bias=bias))["backward"]
    # q, k, v, do, lse, delta; what orders tasks on CPUs; the box's sums; the bias; scratch memory
    addresses = [n << 32 for n in range(1, 11)]
    assert batch.program.data.handles == 9 and len(np.unique(batch.handles[:, 7])) == len(batch.tasks)
    task = batch.tasks[-1]
    _, h, i, j = task["tile"].tolist()
    assert i and j
    launches = gpu.run(batch.codelet, batch.program, task, [Buffer(n) for n in addresses])
    names = [gpu.manifest[x.image]["kernel"] for x in launches]
    assert names == ["clear", "array_sums", "array_sums", "array_finish"]
    elements, scratch = TILE_Q * TILE_K, addresses[-1]
    totals, flags, end = scratch + 16, scratch + 16 + 8 * elements, 16 + 12 * elements
    assert batch.program.scratch_bytes >= end
    values = [gpu.values(x) for x in launches]
    assert values[0] | {"words": scratch, "count": end // 4, "first": 0} == values[0]
    where = {"largest": scratch, "totals": totals, "flags": flags, "elements": elements, "terms_bits": 0}
    box = [h, 1, i * TILE_Q, TILE_Q, j * TILE_K, TILE_K]
    reads = dict(zip(("q", "k", "v", "do", "lse", "delta"), addresses, strict=False))
    task_at = {f"origin[{n}]": value for n, value in enumerate((0, h, i * TILE_Q, j * TILE_K, HEADS))}
    sizes = {"q_len": Q_LEN - i * TILE_Q, "kv_len": min(TILE_K, KV_LEN - j * TILE_K), "splits": 1}
    alike = reads | task_at | sizes | {"largest": scratch, "captures[0]": addresses[8]}
    assert values[1] | alike == values[1] and "totals" not in values[1]
    assert values[2] | alike | where | {f"box[{n}]": x for n, x in enumerate(box)} == values[2]
    assert values[3] | where | {"out": addresses[7]} == values[3]
    blocks = [-(-end // 4 // forms.BLOCK), *[1] * 2, -(-elements // forms.BLOCK)]
    assert [x.grid[0] for x in launches] == blocks
    forget([*given.values()])


def test_boxes_of_an_array() -> None:
    """A tile's share along axes that one variable indexes in every load; copies where these are small."""
    b, h, i, j = (variable(name) for name in "bhij")
    spec: Any = SimpleNamespace(batch=3, heads=2, q_len=70, kv_len=100)
    real = np.dtype(np.float32)

    def of(*indices: Any, shape: tuple[int, ...]) -> Any:
        program: Any = SimpleNamespace(
            array_gradients=[SimpleNamespace(slot=SimpleNamespace(number=4), index=index) for index in indices]
        )
        return boxes.boxes_of(spec, program, ((4, shape),), 48, 40, real)

    [one] = of((h, i, j), shape=(2, 70, 100))
    assert one.lengths == (1, 48, 40) and one.counted == ("b", "h", "i", "j") and one.terms == 1
    assert one.count == 3 * 2 * 2 * 3
    [one] = of((h,), (h,), shape=(2,))
    assert one.lengths == (1,) and one.counted == ("b", "h", "i") and one.terms == 2 * 48 * 40
    [one] = of((i,), (j,), shape=(100,))
    assert one.axes == (None,) and one.lengths == (100,)
    [one] = of((i, b), shape=(60, 3))  # loads beyond it meet in its last elements
    assert one.axes == (None, "b")
    [one] = of((i, j), shape=(3000, 3000))  # in which boxes of six heads are more than copies may take
    assert one.axes == ("i", "j")
    refused = of((i, j), (j, i), shape=(9000, 9000))
    assert isinstance(refused, str) and "81000000 elements" in refused
    [one] = of((i, j), shape=(70, 120))
    assert one.counted == ("b", "h", "i", "j")
    memory = np.zeros((3, 2, 2, 3, 48, 40), np.float32)
    whole = np.arange(70 * 120, dtype=np.float64).reshape(70, 120)
    for n, m in np.ndindex(2, 3):
        part = whole[48 * n : 48 * n + 48, 40 * m : 40 * m + 40]
        memory[:, :, n, m, : part.shape[0], : part.shape[1]] = part
    assert np.array_equal(one.total(memory.ravel()), 6 * whole)
