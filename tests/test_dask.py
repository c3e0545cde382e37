"""engine="dask": the same answers, the same bits whoever computes them, and nothing read that nobody needs."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform

import flashtile
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.gradient_problem import ByIdentity, Gradients
from flashtile.testing import assert_accurate, assert_gradients_accurate, expect

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

SHAPE = Shape(2, 4, 2, 230, 330, 24, 17)
CHUNKS = (1, 2, 96, 24), (1, 1, 100, 12), (2, 2, 70, 17)  # of q, k, v: D cut, heads cut otherwise than in k, ragged

rng = np.random.default_rng(5)
MASK = rng.random((2, 1, 230, 330)) < 0.3
MASK[:, :, 96:192] = False  # a query tile without keys
MASK[1, :, :, 100:200] = False  # a key tile that one batch does not see
BIAS = rng.standard_normal((4, 230, 330)).astype("float32")
SLOPES = np.linspace(0.01, 0.2, 4, dtype="float32")
SINKS = np.linspace(-1, 2, 4, dtype="float32")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "align": "bottom_right", "sinks": SINKS},
    {"causal": True, "align": np.array([-250, 90]), "alibi_slopes": SLOPES},
    {"window": (40, 30), "align": 5, "softcap": 3.0},
    {"mask": MASK, "sinks": SINKS},
    {"mask": MASK, "causal": True, "align": np.array([-100, 40]), "bias": BIAS},
    {"score_mod": lambda s, b, h, i, j: s - (i - j) * (i - j) / (100 + 100 * h), "dropout_p": 0.3, "seed": 7},
]


def lazy(arrays: Any, chunks: Any = CHUNKS) -> list[Any]:
    return [da.from_array(x, chunks=c) for x, c in zip(arrays, chunks, strict=True)]


def tasks_of(x: Any) -> list[Any]:
    """The keys of the tasks of kernels that computing x runs."""
    graph = x.__dask_graph__().cull(set(dask.core.flatten(x.__dask_keys__())))
    names = [key[0] for key in graph if isinstance(key, tuple) and key[0].endswith("-o")]
    return [key for key in graph if isinstance(key, tuple) and f"{key[0]}-o" in names]


# Every option, every dtype: pairs, not products, since each compiles kernels.
CASES = list(zip(itertools.cycle(["float32", "bfloat16", "float64", "float16"]), OPTIONS, strict=False))


@pytest.mark.parametrize(("element", "options"), CASES, ids=[f"{d}-{'-'.join(o)}" for d, o in CASES])
def test_options_by_the_accuracy_rule(element: str, options: dict[str, Any]) -> None:
    """Several tiles in both directions, both ragged; grouped heads; lse; lazy or not, by the accuracy rule."""
    arrays = uniform(SHAPE, element)
    o, lse = flashtile.attention(*lazy(arrays), return_lse=True, **options)
    assert o.shape == (2, 4, 230, 17) and lse.shape == (2, 4, 230) and o.dtype == arrays[0].dtype
    o, lse = dask.compute(o, lse)
    assert_accurate(o, *arrays, **options)
    assert_accurate(lse, *arrays, kind="lse", **options)
    assert_accurate(flashtile.attention(*arrays, engine="dask", **options), *arrays, **options)


def test_bits_are_the_same_whatever_the_scheduler() -> None:
    """Threads, one thread, processes, a cluster: a score program with captured arrays goes to all of them."""
    distributed = pytest.importorskip("distributed")
    options: dict[str, Any] = {**OPTIONS[5], "sinks": SINKS, "dropout_p": 0.2, "seed": 3}
    o = flashtile.attention(*lazy(uniform(SHAPE, "bfloat16")), **options)
    want = o.compute(scheduler="synchronous")
    assert same_bits(o.compute(scheduler="threads", num_workers=3), want)
    assert same_bits(o.compute(scheduler="processes", num_workers=2), want)
    with distributed.Client(n_workers=1, threads_per_worker=2, dashboard_address=None):
        assert same_bits(o.compute(), want)


@pytest.mark.usefixtures("starpu")
def test_bits_are_those_of_starpu(dtype: str) -> None:
    """Tiles and the order of keys are the same, and so is the kernel."""
    arrays = uniform(Shape(1, 2, 1, 300, 2100, 16, 8), dtype)
    options: dict[str, Any] = {"causal": True, "align": 900, "sinks": SINKS[:2]}
    want = flashtile.attention(*arrays, engine="starpu", **options)
    assert same_bits(flashtile.attention(*arrays, engine="dask", **options), want)


@pytest.fixture
def starpu() -> None:
    from flashtile.engines import starpu as engine

    if reason := engine.unavailable():
        pytest.skip(f"StarPU: {reason}")


class Stored:
    """An array as Zarr and HDF5 have it: read by slices. It remembers which rows of which heads were read."""

    def __init__(self, values: np.ndarray, chunks: tuple[int, ...]) -> None:
        self.shape, self.dtype, self.chunks = values.shape, values.dtype, chunks
        self._values, self.seen = values, [np.zeros(values.shape[:-1], int)]

    def __getitem__(self, index: Any) -> np.ndarray:
        self.seen[0][index[:-1]] += 1
        return self._values[index]


def test_tiles_beyond_a_window_are_never_read() -> None:
    arrays = uniform(Shape(1, 2, 1, 1536, 1536, 8, 8), "float32")
    q, k, v = (Stored(x, (1, 1, 512, 8)) for x in arrays)
    o = flashtile.attention(q, k, v, window=(100, 0), align=-512)
    assert not any(x.seen[0].any() for x in (q, k, v)), "nothing is read at the call"
    assert_accurate(o.compute(), *arrays, window=(100, 0), align=-512)
    assert (k.seen[0][0, 0, :1024] > 0).all() and not k.seen[0][0, 0, 1024:].any()
    assert np.array_equal(k.seen[0], v.seen[0])


def test_chunks_that_nobody_sees_are_never_computed() -> None:
    """Of Dask's arrays: k, v, and a bias, in the tiles that a rectangle of results needs."""
    arrays = uniform(Shape(1, 2, 2, 240, 320, 8, 8), "float32")
    computed: list[tuple[str, Any]] = []

    def watched(x: np.ndarray, name: str, rows: int) -> Any:
        def note(block: np.ndarray, block_info: Any) -> np.ndarray:
            computed.append((name, block_info[0]["chunk-location"]))
            return block

        chunks = (*(1,) * (x.ndim - 2), rows, 80 if name == "bias" else x.shape[-1])
        return da.from_array(x, chunks=chunks).map_blocks(note, dtype=x.dtype, meta=np.empty((0,) * x.ndim, x.dtype))

    q, k, v = (watched(x, name, rows) for x, name, rows in zip(arrays, "qkv", (48, 80, 80), strict=True))
    bias = rng.standard_normal((240, 320)).astype("float32")
    o = flashtile.attention(q, k, v, bias=watched(bias, "bias", 48), causal=True, align=0)
    assert computed == []
    want = expect(*arrays, bias=bias, causal=True, align=0)[0]
    want.check(o.compute(scheduler="synchronous"))
    assert {at[2] for name, at in computed if name == "k"} == {0, 1, 2}, "of four key tiles the last is hidden"
    assert {at for name, at in computed if name == "bias"} == {
        (i, j) for i in range(5) for j in range(4) if j * 80 <= i * 48 + 47
    }
    computed.clear()
    part = o[:, 1:, :48].compute(scheduler="synchronous")
    assert sorted(set(computed)) == [("bias", (0, 0)), ("k", (0, 1, 0, 0)), ("q", (0, 1, 0, 0)), ("v", (0, 1, 0, 0))]
    assert same_bits(part, o.compute()[:, 1:, :48])


@pytest.mark.parametrize("shape", [(230, 330), (1, 330), (4, 1, 330), (4, 230, 1), (1, 4, 230, 330), (2, 1, 230, 330)])
def test_a_bias_in_blocks_broadcasts(shape: tuple[int, ...]) -> None:
    arrays = uniform(SHAPE, "float32")
    bias = rng.standard_normal(shape).astype("float16")
    whole = flashtile.attention(*lazy(arrays), bias=bias, window=(90, 60), align=20)
    blocks = flashtile.attention(*lazy(arrays), bias=da.from_array(bias, chunks=37), window=(90, 60), align=20)
    assert same_bits(blocks.compute(), whole.compute())


def test_a_task_exists_for_each_pair_of_tiles_that_meet() -> None:
    arrays = uniform(Shape(1, 2, 2, 288, 288, 8, 8), "float32")
    chunks = ((1, 1, 96, 8),) * 3
    assert len(tasks_of(flashtile.attention(*lazy(arrays, chunks)))) == 2 * 9
    assert len(tasks_of(flashtile.attention(*lazy(arrays, chunks), causal=True))) == 2 * 6
    assert len(tasks_of(flashtile.attention(*lazy(arrays, chunks), mask=lambda b, h, i, j: j < 96))) == 2 * 3
    assert len(tasks_of(flashtile.attention(*lazy(arrays, chunks), causal=True)[:, :1, :96])) == 1


def test_what_a_call_captured_is_in_the_graph_once() -> None:
    big = np.random.default_rng(0).random((500, 500)) < 0.5
    arrays = uniform(Shape(1, 2, 2, 500, 500, 8, 8), "float32")
    o = flashtile.attention(*lazy(arrays, ((1, 1, 48, 8),) * 3), mask=big)
    graph = dict(o.__dask_graph__())
    kernels = tasks_of(o)
    assert len(kernels) > 100
    ours = {key: task for key, task in graph.items() if "attention" in str(key)}
    assert len(pickle.dumps(ours)) < 2 * big.nbytes
    assert max(len(pickle.dumps(graph[key])) for key in kernels) < 4000


def test_a_program_comes_back_from_a_pickle_as_the_same_expressions() -> None:
    table = np.arange(9, dtype="float32")
    rule = flashtile.score.freeze(lambda s, b, h, i, j: s + table[(i - j) % 9] * 0.5)
    spec_of = flashtile.calls.Options(True, None, None, None, "ieee", "auto", "auto")
    scores = flashtile.score.options.ScoreOptions(score_mod=rule, softcap=2.0, mask=MASK[:1, :, :9, :9])
    q = np.ones((1, 1, 9, 4), "float32")
    spec, scoring = spec_of.scored(scores, q, q, q, None)
    again, values = pickle.loads(pickle.dumps((spec, scoring)))
    assert again == spec and again.program.score is spec.program.score and again.program.mask is spec.program.mask
    for one, other in zip(scoring.program.captures, values.program.captures, strict=True):
        assert type(one) is type(other) and (
            one.value == other.value if hasattr(one, "value") else same_bits(one.array, other.array)
        )


def test_from_zarr_to_zarr(tmp_path: Any) -> None:
    zarr = pytest.importorskip("zarr")
    arrays = uniform(Shape(1, 2, 1, 700, 1300, 16, 8), "float32")
    stored = []
    for name, x in zip("qkv", arrays, strict=True):
        z = zarr.open(str(tmp_path / name), mode="w", shape=x.shape, chunks=(1, 1, 128, x.shape[3]), dtype=x.dtype)
        z[...] = x
        stored.append(z)
    o = flashtile.attention(*stored, causal=True, align="bottom_right")
    o.to_zarr(str(tmp_path / "o"))
    assert_accurate(zarr.open(str(tmp_path / "o"))[...], *arrays, causal=True, align="bottom_right")


def test_memory_maps_and_numpy_arrays_mix_with_lazy_ones(tmp_path: Any) -> None:
    """And arrays of three axes, of two."""
    arrays = [x[0] for x in uniform(Shape(1, 2, 2, 100, 200, 8, 8), "float32")]
    np.save(tmp_path / "k.npy", arrays[1])
    k = np.load(tmp_path / "k.npy", mmap_mode="r")
    o = flashtile.attention(da.from_array(arrays[0], chunks=(1, 48, 8)), k, arrays[2])
    assert isinstance(o, da.Array) and o.shape == (2, 100, 8)
    assert_accurate(o.compute(), *arrays)
    assert_accurate(flashtile.attention(arrays[0], k, arrays[2], engine="dask"), *arrays)
    flat = [da.from_array(x[0], chunks=(48, 8)) for x in arrays]
    o, lse = flashtile.attention(*flat, return_lse=True)
    assert o.shape == (100, 8) and lse.shape == (100,)
    assert_accurate(o.compute(), *(x[0] for x in arrays))


def test_no_keys_at_all() -> None:
    q, k, v = uniform(Shape(1, 2, 2, 100, 0, 8, 8), "float16")
    o, lse = flashtile.attention(*lazy((q, k, v), (-1, -1, -1)), return_lse=True)
    assert not o.compute().any() and np.isneginf(lse.compute()).all()
    assert not flashtile.attention(q, k, v, engine="dask").any()


def test_equal_calls_have_equal_names() -> None:
    """So that Dask computes what two of them share once; other values of options, other names."""
    arrays = lazy(uniform(SHAPE, "float32"))
    one, same, other = (flashtile.attention(*arrays, softcap=cap) for cap in (2.0, 2.0, 3.0))
    assert one.name == same.name != other.name


def test_progress_and_out_of_arrays_in_memory() -> None:
    arrays = uniform(Shape(1, 4, 4, 500, 1500, 8, 8), "float32")
    seen: list[tuple[int, int]] = []
    out = np.empty((1, 4, 500, 8), "float32")
    got = flashtile.attention(*arrays, engine="dask", out=out, progress=lambda done, total: seen.append((done, total)))
    assert got is out
    assert_accurate(out, *arrays)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (seen[0][1], seen[0][1]) and len(seen) > 3


def test_a_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile.engines.dask import work

    class Failing(work.Native):
        def __init__(self, kernel: Any) -> None:
            super().__init__(kernel)
            self.run = lambda params, begin, end, scratch: 3 if begin == 1 else 0

    monkeypatch.setattr(work, "Native", Failing)
    o = flashtile.attention(
        *lazy(uniform(Shape(1, 1, 1, 96, 200, 8, 8), "float32"), ((1, 1, 96, 8), (1, 1, 100, 8)) + (-1,))
    )
    with pytest.raises(KernelError, match="batch 0, head 0, query tile 0, key tile 1 with status 3"):
        o.compute()


TABLE = rng.standard_normal(600).astype("float32")
GRADIENTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (
        "float32",
        {"causal": True, "align": np.array([-250, 90]), "alibi_slopes": SLOPES, "sinks": SINKS},
        ("q", "k", "v", "alibi_slopes", "sinks"),
    ),
    ("float16", {"mask": MASK, "dropout_p": 0.3, "seed": 7}, ("q", "k", "v")),
    ("bfloat16", {"window": (40, 30), "align": 5}, ("k",)),
    ("float32", {"score_mod": lambda s, b, h, i, j: s + TABLE[i - j + 330], "bias": BIAS}, ("captured", "q", "bias")),
]


@pytest.mark.parametrize(("element", "options", "wrt"), GRADIENTS, ids=["-".join((d, *o)) for d, o, _ in GRADIENTS])
def test_gradients_by_the_accuracy_rule(element: str, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
    """Lazy or not, cut otherwise than the kernels' tiles; with a gradient of lse; each result by itself."""
    arrays = uniform(SHAPE, element)
    do = uniform(Shape(2, 4, 2, 230, 230, 17, 17), element)[0]
    o, lse = flashtile.attention(*arrays, kernel="reference", return_lse=True, **options)
    dlse = np.sin(np.arange(lse.size)).reshape(lse.shape).astype(lse.dtype)
    given = do, *lazy(arrays), o, da.from_array(lse, chunks=(1, 2, 100))
    options = {**options, "dlse": dlse, "wrt": wrt}
    found = flashtile.attention_backward(*given, **options)
    names = [n for n in wrt if n != "captured"]
    got = dict(zip(names, dask.compute(*(getattr(found, n) for n in names)), strict=True))
    captured = None if found.captured is None else ByIdentity((x, g.compute()) for x, g in found.captured.items())
    assert_gradients_accurate(Gradients(**got, captured=captured), do, *arrays, **options)
    if "captured" in wrt:
        return
    out = Gradients(**{n: np.zeros_like(x) for n, x in got.items()})
    for _ in range(2):
        once = flashtile.attention_backward(do, *arrays, o, lse, engine="dask", **options)
        flashtile.attention_backward(do, *arrays, o, lse, engine="dask", out=out, accumulate=True, **options)
    assert_gradients_accurate(once, do, *arrays, **options)
    for n in got:
        assert np.allclose(getattr(out, n).astype("f8"), 2 * getattr(once, n).astype("f8"), rtol=1e-2, atol=1e-4), n


def test_a_part_of_a_gradient_needs_its_own_chain() -> None:
    """Of arrays in storage, of three axes; by threads and by processes the same bits."""
    q, k, v = (x[0] for x in uniform(Shape(1, 2, 1, 600, 1536, 8, 8), "float32"))
    how: dict[str, Any] = {"window": (100, 0), "align": 200}
    o, lse = flashtile.attention(q, k, v, kernel="reference", return_lse=True, **how)
    stored = [Stored(x, (1, 512, 8)) for x in (q, q, k, v, o)]
    g = flashtile.attention_backward(*stored, lse, **how)
    assert g.q.shape == q.shape and g.k.shape == k.shape
    last = g.k[:, 1024:].compute(scheduler="synchronous")
    assert not last.any() and not any(x.seen[0].any() for x in stored), "keys that nobody sees"
    one = g.k[:, :512].compute(scheduler="synchronous")
    assert stored[2].seen[0][0, :512].all() and not stored[2].seen[0][0, 512:].any()
    want = flashtile.attention_backward(q, q, k, v, o, lse, kernel="vanilla", **how)
    assert np.allclose(one, want.k[:, :512], atol=1e-5)
    plain = flashtile.attention_backward(*lazy((q, q, k, v, o), [-1] * 5), lse, **how)
    assert same_bits(plain.k.compute(scheduler="processes"), plain.k.compute(scheduler="synchronous"))


def test_gradients_without_keys() -> None:
    q, k, v = uniform(Shape(1, 2, 2, 100, 0, 8, 8), "float16")
    o, lse = flashtile.attention(q, k, v, return_lse=True)
    g = flashtile.attention_backward(q, *lazy((q, k, v), (-1, -1, -1)), o, lse)
    assert not g.q.compute().any() and g.k.compute().shape == k.shape and g.q.dtype == g.k.dtype == q.dtype


Q, K, V = uniform(Shape(1, 2, 2, 96, 96, 8, 8), "float32")


def unknown() -> Any:
    x = da.from_array(Q, chunks=(1, 2, 48, 8))
    return x[:, :, da.from_array(np.ones(96, bool), chunks=48)]


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "another engine": (SpecError, r"^engine: got 'starpu'", lambda: call(engine="starpu")),
    "another kernel": (
        UnavailableError,
        r"^kernel: got 'reference' with engine 'dask'",
        lambda: call(kernel="reference"),
    ),
    "out": (SpecError, "^out: got a ndarray", lambda: call(out=np.empty_like(Q))),
    "progress": (SpecError, "^progress: got True", lambda: call(progress=True)),
    "a lazy mask": (SpecError, "^mask: got a dask.array", lambda: call(mask=da.ones((96, 96), dtype=bool))),
    "lazy sinks": (SpecError, "^sinks: got a dask.array", lambda: call(sinks=da.ones(2))),
    "unknown lengths": (
        SpecError,
        "^q: got shape .*nan.*compute_chunk_sizes",
        lambda: flashtile.attention(unknown(), K, V),
    ),
    "a bias of integers": (SpecError, "^bias: got ", lambda: call(bias=da.ones((96, 96), dtype=int))),
    "a bias that does not fit": (SpecError, "^bias: got ", lambda: call(bias=da.ones((96, 95)))),
    "head sizes": (
        SpecError,
        "^k: got head size 4",
        lambda: flashtile.attention(*lazy((Q, K[..., :4], V), (-1, -1, -1))),
    ),
    "no rows": (SpecError, "^q: got S_q of 0", lambda: flashtile.attention(*lazy((Q[:, :, :0], K, V), (-1, -1, -1)))),
    "dropout without a seed": (SpecError, "^seed: got None", lambda: call(dropout_p=0.5)),
    "an unknown keyword": (SpecError, "^is_causal: ", lambda: call(is_causal=True)),
    "do": (SpecError, "^do: got shape", lambda: backward(do=Q[:, :, 1:])),
    "gradients to an array": (SpecError, "^out: got a Gradients", lambda: backward(out=flashtile.Gradients(Q, K, V))),
    "gradients that are added": (SpecError, "^accumulate: got True", lambda: backward(accumulate=True)),
    "gradients by another engine": (SpecError, "^engine: got 'direct'", lambda: backward(engine="direct")),
    "the gradient of a lazy bias": (
        UnavailableError,
        "^wrt: got 'bias' with a bias that is a Dask array",
        lambda: backward(wrt="bias", bias=da.ones((96, 96), chunks=-1)),
    ),
    "the gradient of a large array": (
        UnavailableError,
        r"^wrt: got an array of shape \(2000, 1000\) with engine 'dask', 8000000 bytes",
        lambda: backward(wrt="captured", score_mod=lambda s, b, h, i, j: s + LARGE[i, j]),
    ),
}


def call(**options: Any) -> Any:
    return flashtile.attention(*lazy((Q, K, V), (-1, -1, -1)), **options)


LARGE = np.zeros((2000, 1000), "float32")


def backward(do: Any = Q, **options: Any) -> Any:
    return flashtile.attention_backward(do, *lazy((Q, K, V), (-1, -1, -1)), Q, Q[..., 0], **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_at_the_call(name: str) -> None:
    kind, text, make = BAD[name]
    with pytest.raises(kind, match=text):
        make()


def test_importing_flashtile_imports_no_dask(tmp_path: Any) -> None:
    import sys

    from processes import run

    program = (
        "import sys, numpy as np, flashtile; x = np.ones((1, 1, 8, 8)); "
        "flashtile.attention(x, x, x); assert not any(m.split('.')[0] in ('dask', 'zarr') for m in sys.modules)"
    )
    assert run([sys.executable, "-c", program]).returncode == 0


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with dask.config.set(num_workers=2):
        yield


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)])
def test_sizes_of_0_in_memory(batch: int, q_len: int, kv_len: int) -> None:
    """By tasks as otherwise: gradients of whatever there is, added to what is there."""
    q, k, v = uniform(Shape(batch, 4, 2, q_len, kv_len, 8, 6), "float32")
    table = rng.standard_normal(12).astype("float32")
    options: dict[str, Any] = {
        "sinks": SINKS[:4],
        "bias": np.ones((4, 1, kv_len), "float32"),
        "score_mod": lambda s, b, h, i, j: s + table[i + 1],
    }
    wrt = ("q", "k", "v", "bias", "sinks", "captured")
    found = []
    for engine in ("dask", "direct"):
        o, lse = flashtile.attention(q, k, v, return_lse=True, engine=engine, **options)
        g = flashtile.attention_backward(o, q, k, v, o, lse, wrt=wrt, engine=engine, **options)
        assert g.captured is not None
        found.append([o, lse, g.q, g.k, g.v, g.bias, g.sinks, g.captured[table]])
    for x, y, like in zip(*found, (o, lse, q, k, v, options["bias"], SINKS[:4], table), strict=True):
        assert x.shape == y.shape == like.shape and x.dtype == y.dtype == like.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5)
