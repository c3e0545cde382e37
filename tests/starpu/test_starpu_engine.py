"""engine="starpu": the same answers as ever, the same bits whoever computes them, errors that come back to Python."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import Shape, placed, preset, same_bits, uniform

import flashtile
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import engine, flow, jobs, runtime, session
from flashtile.errors import KernelError, UnavailableError
from flashtile.llvm import machines
from flashtile.testing import assert_accurate, assert_gradients_accurate, expect

pytestmark = pytest.mark.usefixtures("starpu")

Script = Callable[..., Any]
ELEMENTS = 10_368
SMALL_TILE = 8  # keys
LEAST_OUTPUTS = 16  # elements: with fewer, what the baseline happens to err says little of what a kernel may


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that a test of a few hundred rows has many."""
    monkeypatch.setattr(engine, "TILE_Q", (64,))
    monkeypatch.setattr(engine, "TILE_K", 100)
    clear_cache()
    yield
    clear_cache()


def attention(*arrays: Any, **options: Any) -> Any:
    return flashtile.attention(*arrays, engine="starpu", **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("number", ["bfloat16", "float16", "float32"])
def test_matrix_registers_of_workers(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """Products of one, two and three parts in threads of StarPU's, their state carried from tile to tile; what a key
    holds that parts cannot stays with the rows that see it."""
    if machines.unavailable(machines.known()["amx_emulated"]) is not None:
        pytest.skip("no machine here has matrix registers, or emulates them")
    monkeypatch.setenv("FLASHTILE_ISA", "amx_emulated")
    clear_cache()
    q, k, v = uniform(Shape(1, 4, 2, 150, 290, 24, 40), number)
    options: dict[str, Any] = {"causal": True, "align": 140}
    clean = attention(q, k, v, **options)
    assert_accurate(clean, q, k, v, **options)
    k, v = k.copy(), v.copy()
    k[0, 0, 240, 3], v[0, 0, 240, 5] = np.inf, np.nan
    dirty = attention(q, k, v, **options)
    assert same_bits(dirty[:, :, :100], clean[:, :, :100]) and same_bits(dirty[:, 2:], clean[:, 2:])
    assert np.isnan(dirty[:, :2, 100:].astype(np.float32)).any()
    q, k, v = uniform(Shape(1, 4, 2, 150, 290, 24, 40), number)
    o, lse = attention(q, k, v, return_lse=True, **options)
    gradients = flashtile.attention_backward(o, q, k, v, o, lse, engine="starpu", **options)
    assert_gradients_accurate(gradients, o, q, k, v, **options)


# The fused codelet, and the three unfused ones.
families = pytest.mark.parametrize("family", ["cpu", "vanilla"])


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # as `placed`: order, steps, bytes off, repeated axes
    "contiguous": lambda x: placed(x, (0, 1, 2, 3), (1, 1, 1, 1), 0),
    "rows transposed": lambda x: placed(x, (0, 1, 3, 2), (1, 1, 1, 1), 0),
    "heads inside": lambda x: placed(x, (0, 2, 1, 3), (1, 1, 1, 1), 0),
    "every second element": lambda x: placed(x, (0, 1, 2, 3), (1, 1, 1, 2), 0),
    "every third row": lambda x: placed(x, (0, 1, 2, 3), (1, 1, 3, 1), 0),
    "elements backwards": lambda x: placed(x, (0, 1, 2, 3), (1, 1, 1, -1), 0),
    "rows backwards": lambda x: placed(x, (0, 1, 2, 3), (1, -1, -1, 1), 0),
    "one byte off": lambda x: placed(x, (0, 1, 2, 3), (1, 1, 1, 1), 1),
    "one element for all": lambda x: placed(x, (0, 1, 2, 3), (1, 1, 1, 1), 0, (3,)),
    "one row for all": lambda x: placed(x, (0, 1, 2, 3), (1, 1, 1, 1), 0, (2,)),
}


@pytest.mark.parametrize("chosen", ["direct", "starpu"])
@families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_every_engine(small_tiles: None, dtype: str, chosen: str, family: str, layout: str) -> None:
    """q, k, v and out= lie in any way; the bits are those of contiguous arrays of the same values."""
    inputs = uniform(Shape(2, 2, 1, 70, 110, 16, 8), dtype, seed=1)
    laid = [LAYOUTS[layout](x) for x in inputs]
    plain = [np.ascontiguousarray(x) for x in laid]
    want = flashtile.attention(*plain, engine=chosen, kernel=family)
    if layout == "contiguous":
        expect(*plain)[0].check(want)
    assert same_bits(flashtile.attention(*laid, engine=chosen, kernel=family), want)
    if "for all" not in layout:
        out = LAYOUTS[layout](np.zeros_like(want))
        assert flashtile.attention(*laid, engine=chosen, kernel=family, out=out) is out and same_bits(out, want)


@families
def test_element_by_element_grid(family: str) -> None:
    checked = 0
    sizes = itertools.product(DTYPES, (preset, uniform), (1, 2), (1, 2), (4, 8), (4, 8))
    for dtype, data, batch, heads, length, head_size in sizes:
        q, k, v = data(Shape(batch, heads, heads, length, length, head_size, head_size), dtype)
        o = attention(q, k, v, kernel=family)
        expect(q, k, v)[0].check(o)
        checked += o.size
    assert checked == ELEMENTS


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "align": "top_left"},
    {"causal": True, "align": "bottom_right"},
    {"causal": True, "align": 37},
    {"causal": True, "align": np.array([-250, 90])},
    {"window": (40, 30), "align": "bottom_right"},
    {"window": (5, 0), "align": 400},
    {"causal": True, "window": (70, -1), "align": np.array([3, -3])},
    {"scale": -0.3},
]


@pytest.mark.usefixtures("small_tiles")
@families
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_against_the_reference(dtype: str, options: dict[str, Any], family: str) -> None:
    """Several tiles in both directions, both ragged; grouped heads; head sizes that differ."""
    arrays = uniform(Shape(2, 4, 2, 230, 330, 24, 17), dtype)
    o, lse = attention(*arrays, return_lse=True, kernel=family, **options)
    assert_accurate(o, *arrays, **options)
    assert_accurate(lse, *arrays, kind="lse", **options)


@pytest.mark.usefixtures("small_tiles")
@families
@pytest.mark.parametrize("element", ["float32", "float64"])
@pytest.mark.parametrize("sink", [-200.0, 20.0, 33.0, 60.0, 75.0, 86.0, 95.0, 120.0, 700.0, 740.0])
def test_a_sink_however_large_only_scales_the_row(element: str, sink: float, family: str) -> None:
    """As of the direct engine's kernels, which tests/options judges: over several tiles of queries and of keys."""
    q, k, v = uniform(Shape(1, 2, 2, 80, 230, 16, 8), element, size=1.0)
    sinks = np.array([sink, sink + 0.37])
    for values in (v, v * v.dtype.type(1e20)):
        o, lse = attention(q, k, values, sinks=sinks, return_lse=True, kernel=family)
        want_o, want_lse = expect(q, k, values, sinks=sinks)
        want_o.check(o, "output")
        want_lse.check(lse, "lse")


rng = np.random.default_rng(5)
MASK = rng.random((2, 1, 230, 330)) < 0.3
MASK[:, :, 64:128] = False  # a query tile without keys
MASK[1, :, :, 100:200] = False  # a key tile that one batch does not see
SCORES: list[dict[str, Any]] = [
    {"softcap": 3.0},
    {"mask": MASK},
    {"mask": MASK, "causal": True, "align": "bottom_right"},
    {"bias": rng.standard_normal((4, 230, 330)).astype("float32")},
    {"alibi_slopes": np.linspace(0.01, 0.2, 4, dtype="float32"), "align": 0},
    {"sinks": np.linspace(-1, 2, 4, dtype="float32")},
    {"sinks": np.linspace(-1, 2, 4, dtype="float32"), "mask": MASK},
    {"score_mod": lambda s, b, h, i, j: s - (i - j) * (i - j) / (100 + 100 * h), "causal": True, "align": 40},
]


@pytest.mark.usefixtures("small_tiles")
@families
@pytest.mark.parametrize("options", SCORES, ids=lambda options: "-".join(options))
def test_score_programs_are_carried_to_tiles(options: dict[str, Any], family: str, dtype: str) -> None:
    """The program sees global rows and keys; sinks are counted once."""
    arrays = uniform(Shape(2, 4, 2, 230, 330, 24, 17), dtype)
    o, lse = attention(*arrays, return_lse=True, kernel=family, **options)
    assert_accurate(o, *arrays, **options)
    assert_accurate(lse, *arrays, kind="lse", **options)


@pytest.mark.usefixtures("small_tiles")
@families
def test_what_a_mask_hides_stays_hidden(family: str, dtype: str) -> None:
    """NaN and inf in hidden keys change no bit; a visible NaN makes its rows NaN."""
    q, k, v = uniform(Shape(1, 2, 2, 230, 330, 24, 17), dtype)
    clean = attention(q, k, v, kernel=family, causal=True, align=0)
    for broken in (k, v):
        broken[:, :, 230::2], broken[:, :, 231::2] = np.nan, np.inf
    assert same_bits(attention(q, k, v, kernel=family, causal=True, align=0), clean)
    v[0, 0, 150, 3] = np.nan
    seen = np.isnan(attention(q, k, v, kernel=family, causal=True, align=0).astype("float32"))
    assert seen[0, 0, 150:, 3].all() and seen.sum() == 80


@families
@settings(max_examples=25)
@given(data=st.data())
def test_random_shapes_and_tilings(family: str, data: st.DataObject) -> None:
    """Tiles of any size on lengths that they do not divide.

    The accuracy rule; of tiles so small that a row meets very many, an ulp more for each, since each rounds the state.
    """
    draw = data.draw
    tile_q, tile_k = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = st.integers(1, 260)
    shape = Shape(
        draw(st.integers(1, 2)),
        kv_heads * group,
        kv_heads,
        draw(lengths),
        draw(lengths),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
    )
    assume(shape.batch * shape.heads * shape.q_len * shape.value_size >= LEAST_OUTPUTS)
    options: dict[str, Any] = {"causal": draw(st.booleans()), "align": draw(st.integers(-100, 100))}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(0, 150)), draw(st.integers(0, 150))
    arrays = uniform(shape, draw(st.sampled_from(list(DTYPES))))
    before = engine.TILE_Q, engine.TILE_K
    engine.TILE_Q, engine.TILE_K = (tile_q,), tile_k
    clear_cache()
    try:
        want = expect(*arrays, **options)[0]
        if tile_k < SMALL_TILE:
            tiles, accumulator = -(-shape.kv_len // tile_k), DTYPES[DTYPES[arrays[0].dtype.name].accumulator].numpy
            rounding = tiles * np.spacing(np.nanmax(np.abs(want.value), initial=0).astype(accumulator))
            want = dataclasses.replace(want, allowed=want.allowed + float(rounding))
        want.check(attention(*arrays, kernel=family, **options))
    finally:
        engine.TILE_Q, engine.TILE_K = before
        clear_cache()


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_precisions(precision: str) -> None:
    arrays = uniform(Shape(1, 2, 2, 100, 200, 32, 32), "float32")
    assert_accurate(attention(*arrays, precision=precision), *arrays, precision=precision)


@pytest.mark.usefixtures("small_tiles")
def test_inputs_of_any_place() -> None:
    """Gaps, negative and zero strides, odd addresses: in place where a handle can say so, else by a copy."""
    q, k, v = uniform(Shape(2, 3, 3, 150, 210, 8, 5), "float32")
    expected = attention(q, k, v)
    places = [
        ((0, 1, 2, 3), (1, 1, 1, 1), 0),
        ((0, 2, 1, 3), (1, 1, 2, 1), 0),
        ((0, 1, 3, 2), (1, 1, 1, 1), 0),
        ((0, 1, 2, 3), (1, -1, -1, 1), 0),
        ((0, 1, 2, 3), (1, 1, 1, -2), 4),
        ((0, 1, 2, 3), (1, 1, 1, 1), 1),
    ]
    for order, steps, shift in places:
        moved = [placed(x, order, steps, shift) for x in (q, k, v)]
        out = placed(np.zeros_like(expected), order, steps, shift)
        attention(*moved, out=out)
        assert same_bits(np.ascontiguousarray(out), expected), (order, steps, shift)
    shared = np.broadcast_to(k[:, :1], k.shape), np.broadcast_to(v[:1], v.shape)
    assert_accurate(attention(q, *shared), q, *shared)


@families
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 4, 4), (1, 0, 4), (2, 4, 0), (1, 0, 0)])
def test_empty_sizes(dtype: str, batch: int, q_len: int, kv_len: int, family: str) -> None:
    arrays = uniform(Shape(batch, 2, 2, q_len, kv_len, 8, 8), dtype)
    o, lse = attention(*arrays, return_lse=True, kernel=family)
    assert o.shape == (batch, 2, q_len, 8) and not o.astype("float32").any() and np.isneginf(lse).all()


def test_kernels_in_python_are_refused() -> None:
    arrays = uniform(Shape(), "float32")
    with pytest.raises(UnavailableError, match="kernel: got 'reference' with engine 'starpu'"):
        attention(*arrays, kernel="reference")


def test_progress_and_many_threads() -> None:
    arrays = uniform(Shape(1, 8, 8, 700, 700, 32, 32), "float16")
    expected, seen = attention(*arrays), []
    assert same_bits(attention(*arrays, progress=lambda done, total: seen.append((done, total))), expected)
    assert seen and seen[-1][0] == seen[-1][1] > 0
    results: list[Any] = [None] * 4

    def call(n: int) -> None:
        results[n] = attention(*arrays)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(same_bits(result, expected) for result in results)


def test_bits_depend_neither_on_workers_nor_on_the_scheduler(script: Script, tmp_path: Any) -> None:
    body = """
    import hashlib
    from flashtile.engines.starpu import engine
    engine.TILE_Q, engine.TILE_K = (64,), 96
    starpu.init(workers=int(os.environ["N"]))
    digest = hashlib.sha256()
    for dtype in ("float32", "float16"):
        q, k, v, *_ = arrays(q_len=500, kv_len=600, heads=3, size=32, dtype=dtype)
        for options in ({}, dict(causal=True, align="bottom_right"), dict(window=(200, 100), align=0)):
            for x in flashtile.attention(q, k, v, engine="starpu", return_lse=True, **options):
                digest.update(x.tobytes())
    print(digest.hexdigest())
    """
    runs = [("1", "eager"), ("2", "lws"), ("3", "random"), ("4", "dmda")]
    models = str(tmp_path / "models")
    printed = {script(body, N=n, STARPU_SCHED=scheduler, STARPU_PERF_MODEL_DIR=models).stdout for n, scheduler in runs}
    assert len(printed) == 1


# Errors


def flow_of(arrays: Any) -> flow.Flow:
    """The flow that a call of attention on these arrays has left in the cache."""
    attention(*arrays)
    (call,) = [c for c in flashtile.calls.cache.values() if c.pack is engine.Addresses]
    return call.run.__self__._flow[1]  # type: ignore[attr-defined]


KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("status", [1, -5, 2**31 - 1])
def test_a_failing_kernel_is_raised_with_codelet_and_tile(status: int) -> None:
    """Tasks behind it are skipped; the next call is as good as new."""
    arrays = uniform(Shape(1, 1, 1, 120, 1000, 16, 16), "float32")
    expected = attention(*arrays)
    broken = flow_of(arrays)
    native, ran = broken.program.data.cpu, []
    failing = 1 * 10 + 7  # query tile 1 on key tile 7 of 10

    @KERNEL
    def kernel(params: int, begin: int, end: int, scratch: int) -> int:
        ran.append(begin)
        return status if begin == failing else 0

    broken.program.data.cpu = ctypes.cast(kernel, ctypes.c_void_p).value
    try:
        with pytest.raises(KernelError) as raised:
            attention(*arrays)
    finally:
        broken.program.data.cpu = native
    message = str(raised.value)
    assert "codelet flashtile_forward_float32 failed on batch 0, head 0, query tile 1, key tile 7" in message
    assert f"with status {status}, on CPU" in message
    assert failing in ran and 1 * 10 + 2 not in ran  # met after 7: skipped
    assert same_bits(attention(*arrays), expected)


def test_a_codelet_that_no_worker_can_run(starpu: Any) -> None:
    arrays = uniform(Shape(1, 1, 1, 50, 50, 16, 16), "float32")
    expected = attention(*arrays)
    now = runtime.current()
    codelet = session.current().codelets["flashtile_forward_float32"]
    now.lib.ft_codelet_where(codelet.pointer, now.constant("CUDA"))
    try:
        with pytest.raises(UnavailableError, match=r"task 0 of 1 of codelet flashtile_forward_float32 .* status -19"):
            attention(*arrays)
    finally:
        now.lib.ft_codelet_where(codelet.pointer, now.constant("CPU"))
    assert same_bits(attention(*arrays), expected)


def test_restrict(starpu: Any) -> None:
    starpu.restrict("cpu")
    starpu.restrict("cpu", "cuda", dtype="float32")
    with pytest.raises(UnavailableError, match="restrict: got cuda, .*; cuda: StarPU runs no such worker"):
        starpu.restrict("cuda")
    with pytest.raises(flashtile.errors.SpecError, match="restrict: got 'gpu', expected one of 'cpu', 'cuda'"):
        starpu.restrict("gpu")
    assert attention(*uniform(Shape(), "float32")).shape == (1, 1, 16, 8)


def test_a_task_is_laid_out_as_in_c() -> None:
    ffi = runtime.current().ffi
    for name in jobs.TASK.names or ():
        assert ffi.offsetof("ft_task", name) == jobs.TASK.fields[name][1], name  # type: ignore[index]


def test_a_thousand_calls_do_not_grow(script: Script) -> None:
    """Of both kinds: those whose flow is kept and those that are made anew; each with a state that StarPU owns."""
    done = script(
        """
        import resource
        from flashtile.engines.starpu import runtime
        q, k, v, *_ = arrays(q_len=100, kv_len=100, dtype="float16")
        align = np.array([3])
        def calls(n):
            for _ in range(n):
                flashtile.attention(q, k, v, engine="starpu")
                flashtile.attention(q, k, v, engine="starpu", causal=True, align=align)
        calls(50)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calls(500)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(runtime.current().handles))
        """,
        STARPU_NCPU="1",  # a second worker would poll, and take as much time again
    )
    grown, handles = map(int, done.stdout.split())
    assert grown < 4000 and handles == 0  # KiB


def test_a_state_carried_over_many_keys(dtype: str) -> None:
    """Each key tile's sums are formed apart before they join the state: see tests/test_many_keys.py."""
    q, k, v = uniform(Shape(1, 1, 1, 8, 100_000, 8, 4), dtype)
    v = np.abs(v)
    o = attention(np.tile(q, (1, 1, 220, 1)), k, v, scale=1e-3)
    assert_accurate(o[:, :, :8], q, k, v, scale=1e-3)
