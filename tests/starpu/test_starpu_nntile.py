"""flashtile.nntile as StarPU tasks: the bits of the same calls on arrays, costs, errors, other owners of the memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from inputs import same_bits
from nntile_problem import TILES, VALID, BackwardProblem, K, Problem

from flashtile import nntile
from flashtile.engines.starpu import session
from flashtile.errors import KernelError, SpecError


@pytest.mark.parametrize(
    ("mask", "causal"), [(None, False), (None, True), ("own", True), ("float32", False), ("bool", True)]
)
def test_tasks_give_the_bits_of_arrays(starpu: Any, dtype: str, mask: str | None, causal: bool) -> None:
    on_arrays, on_tiles = (Problem(dtype, mask, causal=causal, align=90) for _ in range(2))
    on_arrays.run(causal=causal, first_query=90)
    on_arrays.check()
    a, lse, q = (nntile.register(x) for x in (on_tiles.a, on_tiles.lse, on_tiles.q))
    tiles, tasks = [a, lse, q], 0
    for first, *arrays in on_tiles.key_tiles():
        k, m, v = (None if x is None else nntile.register(x) for x in arrays)
        tasks += nntile.flash_sdpa_fwd_async(k, q, m, lse, v, a, causal=causal, first_query=90, first_key=first)
        tiles += [x for x in (k, m, v) if x is not None]
    starpu.wait()
    for tile in tiles:
        tile.unregister()
    assert same_bits(on_tiles.a, on_arrays.a) and same_bits(on_tiles.lse, on_arrays.lse)
    assert tasks == (2 if causal else TILES)  # the last tile is beyond the diagonal


def test_tiles_that_starpu_owns_or_the_program_does(starpu: Any) -> None:
    problem = Problem("float32")
    a, lse = (
        nntile.empty(
            problem.a.shape,
            "fp32",
        ),
        nntile.empty(problem.lse.shape, "fp32"),
    )
    for tile, start in ((a, 0), (lse, -np.inf)):
        with tile.acquire("W") as contents:
            assert contents.flags.f_contiguous and contents.shape == tile.shape
            contents[...] = start
    q = nntile.register(problem.q)
    wrapped = nntile.wrap(q.handle, problem.q.shape, "fp32")
    tiles = []
    for _, k, _, v in problem.key_tiles():
        tiles += [nntile.register(k), nntile.register(v)]
        nntile.flash_sdpa_fwd_async(tiles[-2], wrapped, None, lse, tiles[-1], a, accumulate="commute")
    with a.acquire() as contents, lse.acquire() as sums:
        problem.a[...], problem.lse[...] = contents, sums
    starpu.wait()
    for tile in (a, lse, q, *tiles):
        tile.unregister()
    problem.check()
    with pytest.raises(SpecError, match="unregistered"):
        nntile.flash_sdpa_fwd_async(tiles[0], q, None, lse, tiles[1], a)


def test_a_failing_kernel_names_the_positions(starpu: Any) -> None:
    kernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    problem = Problem("float64")
    tiles = {name: nntile.register(x) for name, x in zip(("k", "v"), problem.key_tiles()[0][1::2], strict=True)}
    tiles |= {name: nntile.register(getattr(problem, name)) for name in ("q", "a", "lse")}

    def submit() -> None:
        nntile.flash_sdpa_fwd_async(
            tiles["k"],
            tiles["q"],
            None,
            tiles["lse"],
            tiles["v"],
            tiles["a"],
            first_query=128,
            first_key=256,
            scale=0.3,
        )

    submit()
    starpu.wait()
    (program,) = [p for key, p in session.current().flows.items() if key[0] == "accumulate" and key[1].scale == 0.3]
    native, broken = program.data.cpu, kernel(lambda *_: -5)
    program.data.cpu = ctypes.cast(broken, ctypes.c_void_p).value
    submit()
    expected = "codelet flashtile_accumulate_float64 failed on first query 128, first key 256 with status -5"
    with pytest.raises(KernelError, match=expected):
        starpu.wait()
    program.data.cpu = native
    submit()
    starpu.wait()
    for tile in tiles.values():
        tile.unregister()


def test_footprints_tell_costs_apart(starpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal sizes and equal parts of a band are one cost, wherever the tiles stand."""
    from flashtile.engines.starpu.programs import Program

    seen: list[Any] = []
    monkeypatch.setattr(Program, "submit", lambda self, job, codelet, handles, modes, tasks: seen.append(tasks.copy()))
    tiles = {n: nntile.empty((16, n, 1, 1, 2), "fp32") for n in (32, 64)}
    tiles16 = {n: nntile.empty((16, n, 1, 1, 2), "fp16") for n in (32, 64)}
    states = [(nntile.empty((16, 32, 1, 1, 2), kind), nntile.empty((32, 1, 1, 2), "fp32")) for kind in ("fp32", "fp16")]
    mask = nntile.empty((64, 32), bool)

    def footprint(keys: int = 64, mask: Any = None, half: bool = False, **options: Any) -> tuple[int, float]:
        these, (a, lse) = (tiles16, states[1]) if half else (tiles, states[0])
        assert nntile.flash_sdpa_fwd_async(these[keys], these[32], mask, lse, these[keys], a, **options) == 1
        return int(seen[-1]["footprint"][0]), float(seen[-1]["flops"][0])

    whole = footprint()
    assert whole[1] == 2 * 4 * 16 * 32 * 64
    assert footprint(first_query=999) == whole
    causal = {"causal": True}
    diagonal = footprint(**causal)
    assert diagonal[1] == 2 * 4 * 16 * 32 * 33 / 2
    assert footprint(first_query=640, first_key=640, **causal) == diagonal
    different = {
        whole,
        diagonal,
        footprint(first_query=1, **causal),
        footprint(keys=32),
        footprint(mask=mask),
        footprint(half=True),
        footprint(dtype="fp32_fast_bf16"),
    }
    bf16_unit = footprint(dtype="fp32_fast_bf16")[0] != whole[0]  # without one the code is the same
    assert len({f for f, _ in different}) == 7 - (not bf16_unit)
    for tile in (*tiles.values(), *tiles16.values(), *states[0], *states[1], mask):
        tile.unregister()


def test_bad_tiles(starpu: Any) -> None:
    tiles = {name: nntile.register(x.copy("F")) for name, x in VALID.items()}
    arguments = list(tiles.values())
    for change, expected in (
        ({"K": K}, "K: got a ndarray, expected a tile"),
        ({"logsumexp": tiles["A"]}, "logsumexp: got shape"),
        ({"A": tiles["Q"]}, "A: got "),
    ):
        given = [change.get(name, tile) for name, tile in tiles.items()]
        with pytest.raises(SpecError, match=expected):
            nntile.flash_sdpa_fwd_async(*given)
    with pytest.raises(SpecError, match="accumulate: got 'any'"):
        nntile.flash_sdpa_fwd_async(*arguments, accumulate="any")
    with tiles["A"].acquire("RW"), pytest.raises(SpecError, match="submit: got a tile that is acquired"):
        nntile.flash_sdpa_fwd_async(*arguments)
    with pytest.raises(SpecError, match="handle"):
        nntile.wrap(tiles["K"].handle, (8, 5, 1, 2, 3), "fp32")
    with pytest.raises(SpecError, match="array: got shape"):
        nntile.register(np.zeros((2, 3), "float32"))
    for tile in arguments:
        tile.unregister()


@pytest.mark.parametrize(
    ("element", "mask", "wide", "causal"),
    [("float64", None, False, True), ("float32", "bool", False, False), ("bfloat16", "own", False, True)]
    + [("float16", None, True, True)],
)
def test_gradient_tasks_give_the_bits_of_arrays(
    starpu: Any, element: str, mask: str | None, wide: bool, causal: bool
) -> None:
    on_arrays, on_tiles = (BackwardProblem(element, mask, wide=wide, causal=causal, align=90) for _ in range(2))
    on_arrays.run(causal=causal, first_query=90)
    shared = {name: nntile.register(getattr(on_tiles, name)) for name in ("q", "a", "da", "lse", "dq")}
    q, a, da, lse, dq = shared.values()
    tiles, tasks, pairs = list(shared.values()), 0, on_tiles.gradient_tiles()
    for first, read, gradients in pairs:
        k, m, v, dk, dv = (None if x is None else nntile.register(x) for x in (*read, *gradients))
        options = {"causal": causal, "first_query": 90, "first_key": first}
        tasks += nntile.flash_sdpa_bwd_async(k, q, m, lse, v, a, da, dk, dq, dv, **options)
        tiles += [x for x in (k, m, v, dk, dv) if x is not None]
    starpu.wait()
    for tile in tiles:
        tile.unregister()
    assert same_bits(on_tiles.dq, on_arrays.dq)
    for first, _, (dk, dv) in pairs:
        at = slice(first, first + dk.shape[1])
        assert same_bits(dk, on_arrays.dk[:, at]) and same_bits(dv, on_arrays.dv[:, at])
    narrow = 0 if wide or element in ("float32", "float64") else 3
    assert tasks == (2 + narrow) * (2 if causal else TILES)  # the last tile is beyond the diagonal
