"""flashtile.nntile: Fortran-ordered tiles, one key tile a call, on arrays and on StarPU handles."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from inputs import numpy_dtype, same_bits

from flashtile import nntile
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import runtime
from flashtile.errors import KernelError, SpecError
from flashtile.testing import expect, ulp

SIZE, BATCH, GROUP, HEADS = 24, 2, 3, 2
QUERIES, KEYS, TILES = 50, 70, 3


def rows_first(x: np.ndarray) -> np.ndarray:
    """[head_size, n_seq, n_batch, kv_group_size, n_head_kv] as (B, H, S, D); logsumexp as (B, H, S)."""
    order = (2, 4, 3, 1, 0) if x.ndim == 5 else (1, 3, 2, 0)
    moved = x.transpose(order)
    return np.ascontiguousarray(moved.reshape(moved.shape[0], -1, *moved.shape[3:]))


class Problem:
    """A query tile and TILES key tiles, with what their attention should be."""

    def __init__(self, dtype: str, mask: str | None = None, value_size: int = SIZE, **options: Any) -> None:
        rng = np.random.default_rng(0)
        kind = numpy_dtype(dtype)
        heads = (BATCH, GROUP, HEADS)

        def drawn(size: int, length: int) -> np.ndarray:
            return np.asfortranarray(rng.uniform(-1, 1, (size, length, *heads)).astype(kind))

        self.q, self.k, self.v = drawn(SIZE, QUERIES), drawn(SIZE, TILES * KEYS), drawn(value_size, TILES * KEYS)
        self.a = np.zeros((value_size, QUERIES, *heads), kind, order="F")
        accumulator = DTYPES[dtype].accumulator
        self.lse = np.full((QUERIES, *heads), -np.inf, accumulator, order="F")
        self.mask, self.dtype = None, dtype
        if mask is not None:
            seen = rng.random((TILES * KEYS, QUERIES)) < 0.7
            seen[:, 7] = False  # a row without a key
            seen[KEYS : 2 * KEYS, 20:] = False  # rows that a key tile adds nothing to
            options["mask"] = seen.T
            stored = kind if mask == "own" else np.dtype(mask)
            self.mask = np.asfortranarray(seen if mask == "bool" else np.where(seen, 0, -np.inf).astype(stored))
        self.expected = expect(*map(rows_first, (self.q, self.k, self.v)), **options)

    def key_tiles(self) -> list[tuple[int, np.ndarray, np.ndarray | None, np.ndarray]]:
        """(first key, K, mask, V) of each."""
        found = []
        for first in range(0, TILES * KEYS, KEYS):
            at = slice(first, first + KEYS)
            mask = None if self.mask is None else np.asfortranarray(self.mask[at])
            found.append((first, np.asfortranarray(self.k[:, at]), mask, np.asfortranarray(self.v[:, at])))
        return found

    def run(self, **options: Any) -> None:
        """On arrays."""
        for first, k, mask, v in self.key_tiles():
            nntile.flash_sdpa_fwd(k, self.q, mask, self.lse, v, self.a, first_key=first, **options)

    def check(self) -> None:
        """By the accuracy rule, to which rounding A once a tile in 16 bits adds half an ulp each time."""
        o, lse = self.expected
        lse.check(rows_first(self.lse), "logsumexp")
        got = rows_first(self.a).astype(o.value.dtype)
        largest = float(np.abs(self.v.astype("float64")).max())  # of any |A| on the way: weights sum to 1
        bound = o.allowed + (TILES * 0.5 * ulp(largest, self.dtype) if DTYPES[self.dtype].itemsize == 2 else 0)
        error = np.abs(got - o.value).max()
        assert np.isfinite(got).all() and error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("mask", [None, "own", "float32", "bool"])
def test_every_dtype_and_mask_on_arrays(dtype: str, mask: str | None) -> None:
    problem = Problem(dtype, mask, value_size=17)
    problem.run()
    problem.check()


@pytest.mark.parametrize("name", list(nntile.DTYPE_NAMES))
def test_nntile_s_names_of_dtypes(name: str) -> None:
    stored, precision = nntile.DTYPE_NAMES[name]
    problem = Problem(stored, precision=precision)
    problem.run(dtype=name)
    problem.check()


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (40, 10)}, {"causal": True, "window": (30, -1)}], ids=str
)
@pytest.mark.parametrize("first", [0, 90, 1000])
def test_computed_masks_know_where_tiles_stand(options: dict[str, Any], first: int) -> None:
    """Queries that begin at `first`; key tiles that they do not see change nothing."""
    problem = Problem("float32", align=first, **options)
    problem.run(first_query=first, **options)
    problem.check()


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_16_bit_rounding_is_bounded_by_half_an_ulp_a_tile(narrow: str) -> None:
    """The same inputs with A in float32 instead, which differs by nothing but that rounding; many small tiles.

    bfloat16 products may go through a unit that rounds weights, so it is compared on float32 inputs with the same
    request."""
    tiles, keys, size = 64, 8, 16
    rng = np.random.default_rng(1)
    q, k, v = (rng.uniform(-1, 1, (size, n, 1, 1, 2)).astype(numpy_dtype(narrow)) for n in (40, *[tiles * keys] * 2))
    precision = "fp32_fast_bf16" if narrow == "bfloat16" else "fp32"
    found = []
    for kind, name in ((numpy_dtype(narrow), None), (np.dtype("float32"), precision)):
        a, lse = np.zeros((size, 40, 1, 1, 2), kind, order="F"), np.full((40, 1, 1, 2), -np.inf, "float32", order="F")
        arrays = [np.asfortranarray(x.astype(kind)) for x in (q, k, v)]
        for first in range(0, tiles * keys, keys):
            part = [np.asfortranarray(x[:, first : first + keys]) for x in arrays[1:]]
            nntile.flash_sdpa_fwd(part[0], arrays[0], None, lse, part[1], a, dtype=name)
        found.append(a.astype("float64"))
    largest = float(np.abs(v.astype("float64")).max())
    error = np.abs(found[0] - found[1]).max()
    assert 0 < error <= tiles * 0.5 * ulp(largest, narrow)
    assert error > 2 * ulp(np.abs(found[1]).max(), narrow), "the bound says nothing if one rounding explains the error"


@pytest.mark.parametrize("mask", [None, "own", "float32", "bool"])
@pytest.mark.parametrize("causal", [False, True])
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
    a, lse = nntile.empty(problem.a.shape, "fp32", ), nntile.empty(problem.lse.shape, "fp32")
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
        nntile.flash_sdpa_fwd_async(tiles["k"], tiles["q"], None, tiles["lse"], tiles["v"], tiles["a"],
                                    first_query=128, first_key=256, scale=0.3)  # fmt: skip

    submit()
    starpu.wait()
    (program,) = [p for key, p in runtime.current().flows.items() if key[0] == "accumulate" and key[1].scale == 0.3]
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
    different = {whole, diagonal, footprint(first_query=1, **causal), footprint(keys=32), footprint(mask=mask),
                 footprint(half=True), footprint(dtype="fp32_fast_bf16")}  # fmt: skip
    bf16_unit = footprint(dtype="fp32_fast_bf16")[0] != whole[0]  # without one the code is the same
    assert len({f for f, _ in different}) == 7 - (not bf16_unit)
    for tile in (*tiles.values(), *tiles16.values(), *states[0], *states[1], mask):
        tile.unregister()


K = np.zeros((8, 6, 1, 2, 3), "float32", order="F")
Q = np.zeros((8, 4, 1, 2, 3), "float32", order="F")
LSE = np.zeros((4, 1, 2, 3), "float32", order="F")
MASK = np.zeros((6, 4), "float32", order="F")
VALID = {"K": K, "Q": Q, "mask": MASK, "logsumexp": LSE, "V": K.copy("F"), "A": Q.copy("F")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"K": K[:7].copy("F")}, "K: got shape (7, 6, 1, 2, 3), expected (8, 6, 1, 2, 3)"),
        ({"V": K[:, :5].copy("F")}, "V: got shape (8, 5, 1, 2, 3), expected (8, 6, 1, 2, 3)"),
        ({"K": K[..., :2].copy("F")}, "K: got shape (8, 6, 1, 2, 2)"),
        ({"A": K.copy("F")}, "A: got shape"),
        ({"logsumexp": LSE[..., 0]}, "logsumexp: got shape (4, 1, 2), expected [n_queries"),
        ({"logsumexp": LSE.astype("float64")}, "logsumexp: got dtype float64, expected float32"),
        ({"mask": MASK.T.copy("F")}, "mask: got shape (4, 6), expected (6, 4)"),
        ({"mask": MASK.astype("float64", order="F")}, "mask: got dtype float64, expected float32"),
        ({"mask": MASK.copy("C")}, "mask: got strides"),
        ({"Q": Q.copy("C")}, "Q: got strides"),
        ({"Q": [1]}, "Q: got a builtins.list"),
        ({"A": K[:, :4]}, "A: got strides"),
        ({"A": Q}, "A: got an array within the memory that Q spans"),
        ({"dtype": "fp32_fast"}, "dtype: got 'fp32_fast', expected one of fp32, fp32_fast_tf32"),
        ({"dtype": "fp16"}, "dtype: got 'fp16', expected one of fp32"),
        ({"first_key": -1}, "first_key: got -1"),
        ({"first_query": 1.5}, "first_query: got 1.5"),
        ({"causal": 1}, "causal: got 1"),
        ({"scale": np.nan}, "scale: got nan"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], expected: str) -> None:
    given = {**VALID, **change}
    arrays = [given.pop(name) for name in VALID]
    with pytest.raises(SpecError) as raised:
        nntile.flash_sdpa_fwd(*arrays, **given)
    assert str(raised.value).startswith(expected), raised.value


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
