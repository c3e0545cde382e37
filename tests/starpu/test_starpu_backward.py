"""Gradients by engine="starpu": the accuracy rule over tiles, the same bits whoever computes them, dropout, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import Shape, numpy_dtype, placed, read_from, same_bits, uniform

import flashtile
from flashtile.calls import clear_cache, prepared
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import engine, session
from flashtile.engines.starpu import gradients as call
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.kernels.cpu import array_sums
from flashtile.testing import assert_accurate, assert_gradients_accurate

pytestmark = pytest.mark.usefixtures("starpu")

Script = Callable[..., Any]
SHAPE = Shape(2, 2, 1, 110, 150, 16, 9)
rng = np.random.default_rng(5)
MASK = rng.random((2, 1, 110, 150)) < 0.3
MASK[:, :, 48:96] = False  # a query tile without keys
MASK[1, :, :, 60:120] = False  # a key tile that one batch does not see
BIAS = rng.standard_normal((2, 110, 150)).astype("float32")
TABLE, ROWS, KEYS = (rng.standard_normal(n).astype("float32") for n in (261, 110, (2, 150)))
BUCKETS = rng.integers(0, 7, 261)


def reading(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Arrays that tiles meet in, each along other axes: all, keys and heads, queries."""
    return s + TABLE[i - j + 150] + ROWS[i] * KEYS[b, j] + TABLE[BUCKETS[i - j + 150]]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"scale": -0.3},
    "causal": {"causal": True, "align": "bottom_right"},
    "window, an offset a batch": {"window": (40, 30), "align": np.array([-60, 40])},
    "mask and sinks": {"mask": MASK, "sinks": np.linspace(-1, 2, 2)},
    "bias": {"bias": BIAS},
    "a bias for all heads": {"bias": BIAS[0], "softcap": 3.0},
    "slopes": {"alibi_slopes": np.linspace(0.01, 0.2, 2), "align": 0, "causal": True},
    "a function": {"score_mod": reading},
    "dropout": {"dropout_p": 0.3, "seed": 7, "causal": True, "align": 37},
    "dropout, mask and bias": {"dropout_p": 0.1, "seed": 2**64 - 1, "mask": MASK, "bias": BIAS},
}
PAIRS = [(name, list(DTYPES)[n % len(DTYPES)]) for n, name in enumerate(OPTIONS)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that a test of a few hundred rows has many."""
    monkeypatch.setattr(engine, "TILE_Q", (64,))
    monkeypatch.setattr(engine, "TILE_K", 60)
    clear_cache()
    yield
    clear_cache()


def asked(options: dict[str, Any]) -> tuple[str, ...]:
    names = [name for name in ("bias", "sinks", "alibi_slopes") if name in options]
    return ("q", "k", "v", *names, *(["captured"] if "score_mod" in options else []))


def arrived(shape: Shape, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """do and dlse."""
    r = np.random.default_rng(9)
    real = DTYPES[DTYPES[dtype].accumulator].numpy
    do = r.standard_normal((*shape.q[:3], shape.value_size)).astype(numpy_dtype(dtype))
    return do, r.standard_normal(shape.q[:3]).astype(real)


def backward(q: Any, k: Any, v: Any, do: Any, dlse: Any, wrt: Any = ("q", "k", "v"), **options: Any) -> Any:
    """As a program would: forward and backward by tasks."""
    forward = {name: x for name, x in options.items() if name not in ("out", "accumulate")}
    o, lse = flashtile.attention(q, k, v, return_lse=True, engine="starpu", **forward)
    return flashtile.attention_backward(do, q, k, v, o, lse, dlse=dlse, wrt=wrt, engine="starpu", **options)


def parts(found: Any) -> list[np.ndarray]:
    named = [getattr(found, name) for name in ("q", "k", "v", "bias", "sinks", "alibi_slopes")]
    return [x for x in (*named, *(found.captured or {}).values()) if x is not None]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("name", "element"), PAIRS)
def test_options_by_the_accuracy_rule(name: str, element: str) -> None:
    """Several tiles in both directions, both ragged; grouped heads; head sizes that differ. Twice the same bits."""
    options, arrays = OPTIONS[name], uniform(SHAPE, element)
    do, dlse = arrived(SHAPE, element)
    found = backward(*arrays, do, dlse, asked(options), **options)
    assert_gradients_accurate(found, do, *arrays, dlse=dlse, wrt=asked(options), **options)
    again = backward(*arrays, do, dlse, asked(options), **options)
    assert all(same_bits(x, y) for x, y in zip(parts(found), parts(again), strict=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("name", "element"), [("dropout", "float32"), ("dropout, mask and bias", "bfloat16")])
def test_dropout_in_the_forward(name: str, element: str) -> None:
    """The very weights that the reference drops, over several tiles."""
    options, arrays = OPTIONS[name], uniform(SHAPE, element)
    o, lse = flashtile.attention(*arrays, return_lse=True, engine="starpu", **options)
    assert_accurate(o, *arrays, **options)
    assert_accurate(lse, *arrays, kind="lse", **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("limit", "turns"), [(20_000, 2), (0, 1)])
def test_arrays_too_large_for_copies_take_turns(limit: int, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy for each query tile, or none at all: tasks that would meet run one after the other."""
    monkeypatch.setattr(engine, "TILE_Q", (96,))  # of panels of any size
    monkeypatch.setattr(array_sums, "COPIES_BYTES", limit)
    options, arrays = {**OPTIONS["a function"], "bias": BIAS[0]}, uniform(SHAPE, "float32")
    do, dlse = arrived(SHAPE, "float32")
    made: list[int] = []
    turn_of = array_sums.TileArrays.turn_of

    def noted(self: Any, **at: Any) -> Any:
        made.append(self.turns)
        return turn_of(self, **at)

    monkeypatch.setattr(array_sums.TileArrays, "turn_of", noted)
    found = backward(*arrays, do, dlse, ("q", "bias", "captured"), **options)
    assert made == [turns]
    assert_gradients_accurate(found, do, *arrays, dlse=dlse, wrt=("q", "bias", "captured"), **options)


def test_unfused_tasks_refuse_dropout() -> None:
    arrays = uniform(Shape(), "float32")
    with pytest.raises(UnavailableError, match="engine: got 'starpu' with kernel 'vanilla' and dropout"):
        flashtile.attention(*arrays, engine="starpu", kernel="vanilla", dropout_p=0.5, seed=1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("wrt", [("q",), ("k",), ("v",), ("k", "q"), ("bias", "v")], ids=str)
def test_only_what_is_asked_for(wrt: Any) -> None:
    arrays, options = uniform(SHAPE, "float32"), OPTIONS["bias"]
    do, dlse = arrived(SHAPE, "float32")
    some, every = (backward(*arrays, do, dlse, names, **options) for names in (wrt, ("q", "k", "v", "bias")))
    for name in ("q", "k", "v", "bias"):
        got = getattr(some, name)
        assert got is None if name not in wrt else same_bits(got, getattr(every, name)), name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_gradients_are_added_once(element: str) -> None:
    """out= and accumulate: sums join what is there, those of 16 bits with one rounding. Arrays of any place."""
    dtype, arrays = element, uniform(SHAPE, element)
    do, dlse = arrived(SHAPE, dtype)
    fresh = backward(*arrays, do, dlse)
    laid = [placed(x, (0, 2, 1, 3), (1, 1, 2, 1), 0) for x in (*arrays, do)]
    before = [np.full(x.shape, 3, x.dtype) for x in arrays]
    rows = [placed(before[0], (0, 1, 2, 3), (1, 1, 1, 2), 0), before[1], placed(before[2], (0, 2, 1, 3), (1,) * 4, 0)]
    out = flashtile.Gradients(*rows)
    found = backward(*laid, dlse, out=out, accumulate=True)
    real = DTYPES[DTYPES[dtype].accumulator].numpy
    for name in ("q", "k", "v"):
        got, alone = (getattr(x, name).astype(real) for x in (found, fresh))
        # A key tile is given to by 3 query tiles of 2 heads, each of which rounds; 16-bit gradients round once.
        spacing = 6 * np.spacing(np.float32(3)) if dtype == "float32" else 2.0**-7 * 2
        assert np.abs(got - 3 - alone).max() <= spacing, name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("element", ["float64", "bfloat16"])
def test_what_a_mask_hides_reaches_nothing(element: str) -> None:
    """NaN and inf in hidden keys change no bit of any gradient, and hidden keys get 0."""
    shape = Shape(1, 2, 2, 110, 190, 24, 17)
    q, k, v = uniform(shape, element)
    do, dlse = arrived(shape, element)
    for options in ({"causal": True, "align": 0}, {"mask": np.tri(110, 190, dtype=bool)}):
        clean = backward(q, k, v, do, dlse, **options)
        broken = k.copy(), v.copy()
        for x in broken:
            x[:, :, 110::2], x[:, :, 111::2] = np.nan, np.inf
        found = backward(q, *broken, do, dlse, **options)
        assert all(same_bits(x, y) for x, y in zip(parts(found), parts(clean), strict=True))
        assert not found.k[:, :, 110:].any() and not found.v[:, :, 110:].any()


@settings(max_examples=8)
@given(data=st.data())
def test_random_shapes_and_tilings(data: st.DataObject) -> None:
    """Tiles of any size on lengths that they do not divide."""
    draw = data.draw
    kv_heads, lengths, sizes = draw(st.integers(1, 2)), st.integers(1, 150), st.integers(1, 40)
    heads = kv_heads * draw(st.integers(1, 3))
    shape = Shape(draw(st.integers(1, 2)), heads, kv_heads, draw(lengths), draw(lengths), draw(sizes), draw(sizes))
    options: dict[str, Any] = {"causal": draw(st.booleans()), "align": draw(st.integers(-100, 100))}
    element = draw(st.sampled_from(list(DTYPES)))
    before = engine.TILE_Q, engine.TILE_K
    engine.TILE_Q, engine.TILE_K = (draw(st.integers(1, 200)),), draw(st.integers(8, 200))
    clear_cache()
    try:
        arrays, (do, dlse) = uniform(shape, element), arrived(shape, element)
        found = backward(*arrays, do, dlse, **options)
        assert_gradients_accurate(found, do, *arrays, dlse=dlse, **options)
    finally:
        engine.TILE_Q, engine.TILE_K = before
        clear_cache()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 4), (4, 0)])
def test_empty_sizes(q_len: int, kv_len: int) -> None:
    shape = Shape(1, 2, 2, q_len, kv_len, 8, 8)
    found = backward(*uniform(shape, "float32"), *arrived(shape, "float32"))
    assert [x.shape for x in parts(found)] == [shape.q, shape.k, shape.v] and not any(x.any() for x in parts(found))


def test_bits_depend_neither_on_workers_nor_on_the_scheduler(script: Script, tmp_path: Any) -> None:
    body = """
    import hashlib
    from flashtile.engines.starpu import engine
    engine.TILE_Q, engine.TILE_K = (64,), 96
    starpu.init(workers=int(os.environ["N"]))
    digest = hashlib.sha256()
    table = np.linspace(-1, 1, 1000, dtype="float32")
    own = dict(score_mod=lambda s, b, h, i, j: s + table[i - j + 500], sinks=np.ones(3), wrt=("q", "captured", "sinks"))
    plain = dict(causal=True, align="bottom_right")
    for dtype, options in (("float16", dict(dropout_p=0.2, seed=1)), ("float32", plain), ("float32", own)):
        q, k, v, do, _ = arrays(q_len=250, kv_len=300, heads=3, size=32, dtype=dtype)
        wrt = options.pop("wrt", ("q", "k", "v"))
        o, lse = flashtile.attention(q, k, v, engine="starpu", return_lse=True, **options)
        g = flashtile.attention_backward(o, q, k, v, o, lse, engine="starpu", wrt=wrt, **options)
        for x in (g.q, g.k, g.v, g.sinks, *(g.captured or {}).values()):
            digest.update(b"" if x is None else x.tobytes())
    print(digest.hexdigest())
    """
    models = str(tmp_path / "models")
    runs = [("1", "eager"), ("4", "random"), ("2", "dmda")]
    printed = {script(body, N=n, STARPU_SCHED=scheduler, STARPU_PERF_MODEL_DIR=models).stdout for n, scheduler in runs}
    assert len(printed) == 1


def test_torch_autograd_goes_by_tasks(starpu: Any) -> None:
    torch = pytest.importorskip("torch")
    import flashtile.torch

    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 60, 16, requires_grad=True) for _ in range(3)]
    with starpu.profile() as profile:
        o = flashtile.torch.attention(*inputs, causal=True, dropout_p=0.1, engine="starpu")
        o.square().sum().backward()
    ran = {task.codelet for task in profile.tasks}
    assert ran == {f"flashtile_{name}_float32" for name in ("forward", "delta", "backward")}
    by_tasks = [x.grad for x in inputs]
    torch.manual_seed(0)
    again = [torch.randn(1, 2, 60, 16, requires_grad=True) for _ in range(3)]
    flashtile.torch.attention(*again, causal=True, dropout_p=0.1).square().sum().backward()
    for x, y in zip(by_tasks, again, strict=True):
        torch.testing.assert_close(x, y.grad)


def flow_of(arrays: Any, do: Any, dlse: Any) -> Any:
    """The flow that a call on these arrays has left in the cache."""
    clear_cache()
    backward(*arrays, do, dlse)
    (found,) = [c for c in prepared.backwards.values() if c.pack is call.Addresses]
    ((_, flow),) = found.run.__self__._kept.values()  # type: ignore[attr-defined]
    return flow


def test_costs_and_what_a_task_holds(starpu: Any, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs are exact, equal work has one footprint, a task is given more buffers than Debian's StarPU has room for."""
    monkeypatch.setattr(engine, "TILE_Q", (96,))  # of panels of any size
    shape = Shape(1, 1, 1, 192, 120, 16, 8)
    arrays, (do, dlse) = uniform(shape, "float32"), arrived(shape, "float32")
    flow = flow_of(arrays, do, dlse)
    assert flow.program.data.handles + 1 == 10
    assert flow.tasks["flops"].sum() == 192 * 120 * 2 * (3 * 16 + 2 * 8)
    assert len(flow.tasks) == 2 * 2 and len(set(flow.tasks["footprint"].tolist())) == 1
    assert sorted(flow.tasks["priority"].tolist()) == [0] * 2 + [1] * 2


KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@pytest.mark.usefixtures("small_tiles")
def test_a_failing_kernel_is_raised_with_codelet_and_tile() -> None:
    shape = Shape(1, 2, 1, 130, 230, 16, 16)
    arrays, (do, dlse) = uniform(shape, "float32"), arrived(shape, "float32")
    expected = backward(*arrays, do, dlse)
    broken = flow_of(arrays, do, dlse)
    native = broken.program.data.cpu

    @KERNEL
    def kernel(params: int, begin: int, end: int, scratch: int) -> int:
        return 9 if begin == 1 else 0

    broken.program.data.cpu = ctypes.cast(kernel, ctypes.c_void_p).value
    try:
        with pytest.raises(KernelError, match=r"flashtile_backward_float32 failed on batch 0, head 1, .* status 9"):
            backward(*arrays, do, dlse)
    finally:
        broken.program.data.cpu = native
    assert all(same_bits(x, y) for x, y in zip(parts(backward(*arrays, do, dlse)), parts(expected), strict=True))


def test_a_codelet_that_no_worker_can_run(starpu: Any) -> None:
    arrays, (do, dlse) = uniform(Shape(), "float32"), arrived(Shape(), "float32")
    expected = backward(*arrays, do, dlse)
    codelet = session.current().codelets["flashtile_backward_float32"]
    codelet.place("cuda")  # as a fault may leave it: restrict refuses
    try:
        with pytest.raises(UnavailableError, match="flashtile_backward_float32"):
            backward(*arrays, do, dlse)
    finally:
        codelet.place("cpu")
    assert all(same_bits(x, y) for x, y in zip(parts(backward(*arrays, do, dlse)), parts(expected), strict=True))


def test_calls_do_not_grow(script: Script) -> None:
    done = script(
        """
        import resource
        from flashtile.engines.starpu import runtime
        q, k, v, do, _ = arrays(q_len=100, kv_len=100, dtype="float16")
        o, lse = flashtile.attention(q, k, v, return_lse=True)
        def calls(n):
            for _ in range(n):
                for more in ({}, dict(sinks=np.ones(2), wrt=("q", "sinks"))):
                    flashtile.attention_backward(do, q, k, v, o, lse, engine="starpu", **more)
        calls(30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calls(120)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(runtime.current().handles))
        """,
        STARPU_NCPU="1",  # a second worker would poll, and take as much time again
    )
    grown, handles = map(int, done.stdout.split())
    assert grown < 4000 and handles == 0  # KiB


# The door


def registered(shape: Shape, element: str, rows: int, keys: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """q, k, v; and every tensor of a backward pass, of which the gradients are 0."""
    from flashtile import starpu as door

    q, k, v = uniform(shape, element)
    do, dlse = arrived(shape, element)
    arrays = {"do": do, "q": q, "k": k, "v": v, "o": np.zeros_like(do), "lse": np.zeros_like(dlse), "dlse": dlse}
    arrays |= {"dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    return [q, k, v], {n: door.register(x, keys if n[-1] in "kv" else rows) for n, x in arrays.items()}


@pytest.mark.parametrize("element", ["float32", "float16"])
def test_forward_and_backward_on_registered_tiles(starpu: Any, element: str) -> None:
    """Submitted one after the other, without waiting; gradients of the other operands come with the wait."""
    arrays, tensors = registered(SHAPE, element, 48, 70)
    options = {"bias": BIAS, "sinks": np.linspace(-1, 2, 2), "causal": True, "align": 30, "dropout_p": 0.2, "seed": 3}
    dlse = tensors.pop("dlse")
    n = starpu.submit_forward(*(tensors[x] for x in ("q", "k", "v", "o", "lse")), **options)
    pending = starpu.submit_backward(**tensors, dlse=dlse, wrt=("bias", "sinks"), **options)
    others = pending.wait()
    assert n > 0 and pending.tasks > n and others.q is None
    do, logs = (tensors["do"]._keep, dlse._keep)
    found = {name: tensors[f"d{name}"]._keep for name in "qkv"}
    for tensor in (*tensors.values(), dlse):
        tensor.unregister()
    found = flashtile.Gradients(**found, bias=others.bias, sinks=others.sinks)
    wrt = ("q", "k", "v", "bias", "sinks")
    assert_gradients_accurate(found, do, *arrays, dlse=logs, wrt=wrt, **options)


def test_errors_of_the_door(starpu: Any) -> None:
    """One error for each, before any task; tiles that nothing has written are named."""
    _, tensors = registered(Shape(1, 2, 1, 20, 30, 8, 4), "float16", 10, 16)
    more = {
        "short": starpu.empty((1, 2, 19, 8), "float16", 10),
        "wide": starpu.empty((1, 1, 30, 8), "float64", 16),
        "other rows": starpu.empty((1, 1, 30, 4), "float16", 15),
        "unwritten": starpu.empty((1, 2, 20, 4), "float16", 10),
    }
    cases = [
        ({"dq": more["short"]}, r"dq: got shape \(1, 2, 19, 8\), expected \(1, 2, 20, 8\) as q"),
        ({"dk": more["wide"]}, "dk: got dtype float64, expected float16 or float32"),
        ({"dv": more["other rows"]}, "dv: got tiles of 15 rows, expected 16 rows as in v"),
        ({"dk": tensors["k"]}, "dk: got an array within the memory that k spans"),
        ({"do": np.zeros(3)}, "do: got a ndarray, expected a registered tensor"),
        ({"wrt": ("q",)}, "wrt: got 'q', expected names among bias, sinks, alibi_slopes, captured"),
        ({"wrt": ("bias",)}, "wrt: got 'bias' in a call without bias"),
        ({"dq": None, "dk": None, "dv": None}, "dq, dk, dv: got None with an empty wrt"),
        ({"do": more["unwritten"]}, r"tile \(0, 0, 0\) of a tensor of shape \(1, 2, 20, 4\), which was never written"),
        ({"causal": True}, "align: got None with 20 queries and 30 keys"),
    ]
    for changed, message in cases:
        with pytest.raises(SpecError, match=message):
            starpu.submit_backward(**{**tensors, **changed})
    starpu.wait()
    for tensor in (*tensors.values(), *more.values()):
        tensor.unregister()


@pytest.mark.parametrize("which", ["dq", "dk", "dv"])
@pytest.mark.parametrize("name", read_from(np.zeros((1, 2, 96), np.float32), 96))
def test_gradients_in_the_memory_of_what_changes_scores(starpu: Any, name: str, which: str) -> None:
    _, tensors = registered(Shape(1, 2, 2, 96, 96, 8, 8), "float32", 96, 96)
    with pytest.raises(SpecError, match=f"^{which}: got an array within the memory that {name} spans"):
        starpu.submit_backward(**tensors, **read_from(tensors[which]._keep, 96)[name])
    for tensor in tensors.values():
        tensor.unregister()


def test_sinks_alone_ask_for_no_pair_of_tiles(starpu: Any) -> None:
    sinks = np.array([0.5, -1.0])
    _, tensors = registered(Shape(1, 2, 1, 20, 30, 8, 4), "float32", 10, 16)
    for name in ("dq", "dk", "dv"):
        tensors.pop(name).unregister()
    starpu.submit_forward(*(tensors[x] for x in ("q", "k", "v", "o", "lse")), sinks=sinks)
    pending = starpu.submit_backward(**tensors, sinks=sinks, wrt="sinks")
    found = pending.wait()
    q, k, v, do, dlse = (tensors[x]._keep for x in ("q", "k", "v", "do", "dlse"))
    for tensor in tensors.values():
        tensor.unregister()
    assert pending.tasks == 2 * 2
    assert_gradients_accurate(found, do, q, k, v, dlse=dlse, wrt="sinks", sinks=sinks)
