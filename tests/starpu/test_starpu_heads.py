"""Several heads in one task: fewer tasks, the same bits, forward and backward; tiles of several heads at the door."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform

import flashtile
from flashtile.calls import clear_cache
from flashtile.engines.starpu import backward, engine, flow, units
from flashtile.errors import KernelError, SpecError
from flashtile.testing import assert_accurate

pytestmark = pytest.mark.usefixtures("starpu")

SHAPE = Shape(2, 4, 4, 110, 150, 16, 24)  # B, H, H_kv, S_q, S_kv, D, D_v: tiles of 64 rows and 60 keys, both ragged
RNG = np.random.default_rng(4)
SEEN = RNG.random((110, 150)) < 0.7
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "heads apart": lambda x: x,
    "heads inside": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "every second head": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
}
# Options, and how many heads a task has where as many as there are were asked for.
SHARED = Shape(2, 4, 2, 110, 150, 16, 24)
CASES: dict[str, tuple[dict[str, Any], str, str, int]] = {
    "causal": ({"causal": True, "align": 37}, "float32", "heads apart", 8),
    "by rows": ({"causal": True, "align": 37}, "float32", "heads inside", 4),
    "shared keys": ({"causal": True, "align": 37}, "float32", "heads apart", 8),
    "sinks": ({"sinks": np.linspace(-1, 2, 4), "causal": True, "align": 40}, "float16", "every second head", 8),
    "an offset a batch": ({"window": (40, 30), "align": np.array([-60, 40])}, "float32", "heads apart", 4),
    "a mask a head": ({"mask": np.stack([SEEN, SEEN, ~SEEN, ~SEEN])[None]}, "float32", "heads apart", 1),
}


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[int]]]:
    """Makes tasks of at most so many heads; returns the list of what flows have got."""
    got: list[int] = []

    def noting(kind: Any) -> None:
        make = kind.__init__

        def made(self: Any, *given: Any, **named: Any) -> None:
            make(self, *given, **named)
            got.append(self.heads)

        monkeypatch.setattr(kind, "__init__", made)

    noting(flow.Flow)
    noting(backward.BackwardFlow)
    monkeypatch.setattr(engine, "TILE_Q", (64,))
    monkeypatch.setattr(engine, "TILE_K", 60)

    def ask(heads: int) -> list[int]:
        clear_cache()
        got.clear()
        monkeypatch.setattr(units, "most", lambda *given: heads)
        return got

    yield ask
    clear_cache()


def computed(arrays: Any, do: np.ndarray, options: dict[str, Any]) -> list[np.ndarray]:
    """o, lse and every gradient, by tasks."""
    wrt = ("q", "k", "v", *(["sinks"] if "sinks" in options else []))
    o, lse = flashtile.attention(*arrays, return_lse=True, engine="starpu", **options)
    g = flashtile.attention_backward(do, *arrays, o, lse, wrt=wrt, engine="starpu", **options)
    return [o, lse, g.q, g.k, g.v, *([] if g.sinks is None else [g.sinks])]


@pytest.mark.parametrize("name", list(CASES))
def test_bits_do_not_depend_on_how_many(name: str, grouped: Callable[[int], list[int]]) -> None:
    options, dtype, layout, heads = CASES[name]
    shape = SHARED if name == "shared keys" else SHAPE
    arrays = [LAYOUTS[layout](x) for x in uniform(shape, dtype)]
    do = RNG.standard_normal((*SHAPE.q[:3], SHAPE.value_size)).astype(arrays[0].dtype)
    got = grouped(1)
    expected = computed(arrays, do, options)
    assert got == [1, 1]
    got = grouped(100)
    found = computed(arrays, do, options)
    assert got == [heads, 1 if shape is SHARED else heads]
    assert all(same_bits(x, y) for x, y in zip(found, expected, strict=True))
    assert_accurate(found[0], *arrays, **options)


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that a task is worth its cost, as long as workers have enough of them; whole groups, or parts of one."""

    class Machine:
        kernels: Any = None

        def workers(self, architecture: str | None = None) -> int:
            return 2 if architecture in (None, "cuda") else 0

    now: Any = Machine()
    spec = flow_spec(heads=12, kv_heads=4, batch=2)
    assert list(units.sizes(spec)) == [1, 3, 6, 12, 24]
    assert [units.most(now, spec, 1, units.WORTH / n) for n in (0.5, 2.0, 100.0)] == [1, 2, 3]  # 24 chains, 8 wanted
    assert units.most(now, spec, 8, units.WORTH / 100) == 24
    now.kernels = object()
    assert units.most(now, spec, 1, units.WORTH) == 24  # a GPU takes all


def flow_spec(heads: int, kv_heads: int, batch: int) -> Any:
    from types import SimpleNamespace

    from flashtile.spec import AttentionSpec

    q, k = (SimpleNamespace(shape=(batch, n, 64, 16), dtype="float32") for n in (heads, kv_heads))
    return AttentionSpec.of(q, k, k)


KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def test_a_failing_head_is_named(starpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task over two batches; the heads after it are not computed."""
    arrays, ran = uniform(Shape(2, 2, 2, 40, 40, 16, 16), "float32"), []
    given = [starpu.register(x, 64, heads=4) for x in (*arrays, np.empty_like(arrays[0]), np.empty((2, 2, 40), "f"))]
    made: list[flow.Flow] = []
    init = flow.Flow.__init__

    @KERNEL
    def kernel(params: int, begin: int, end: int, scratch: int) -> int:
        ran.append(begin)
        return 9 if begin == 2 else 0

    def broken(self: Any, *rest: Any, **named: Any) -> None:
        init(self, *rest, **named)
        self.program.data.cpu = ctypes.cast(kernel, ctypes.c_void_p).value
        made.append(self)

    monkeypatch.setattr(flow.Flow, "__init__", broken)
    assert starpu.submit_forward(*given, softcap=2.5) == 1
    with pytest.raises(KernelError, match="failed on batch 1, head 0, query tile 0, key tile 0 with status 9"):
        starpu.wait()
    assert ran == [0, 1, 2]
    for tensor in given:
        tensor.unregister()


def test_tiles_of_several_heads_at_the_door(starpu: Any) -> None:
    """Forward by pairs of tiles, merged and cast; gradients; what a tile holds."""
    shape = Shape(2, 4, 4, 100, 120, 16, 16)
    q, k, v = uniform(shape, "float16")
    o, do = np.empty_like(q), RNG.standard_normal(q.shape).astype("float16")
    lse, dq, dk = np.empty(q.shape[:3], "float32"), np.zeros_like(q), np.zeros(k.shape, "float32")
    of_q = {n: starpu.register(x, 48, heads=4) for n, x in {"q": q, "o": o, "lse": lse, "do": do, "dq": dq}.items()}
    of_k = {n: starpu.register(x, 64, heads=4) for n, x in {"k": k, "v": v, "dk": dk}.items()}
    halves = [
        (starpu.empty(q.shape, "float32", 48, heads=4), starpu.empty(lse.shape, "float32", 48, heads=4)) for _ in "12"
    ]
    halves[0] = halves[0][0], of_q["lse"]
    for j, (state, logs) in enumerate(halves):  # each has seen one key tile
        for b, i in np.ndindex(2, 3):
            at, key = (b, 0, i), (b, 0, j)
            tiles = of_q["q"][at], of_k["k"][key], of_k["v"][key], state[at], logs[at]
            assert starpu.submit_forward(*tiles, carry=False, last=True) == 1
    assert starpu.submit_merge(*halves[0], *halves[1]) == starpu.submit_finish(*halves[0], of_q["o"]) == 6
    given = {name: of_q[name] for name in ("do", "q", "o", "lse", "dq")} | of_k
    pending = starpu.submit_backward(**given)
    assert pending.tasks == 6 + 12 + 6  # delta, pairs of tiles of four heads, dQ rounded
    pending.wait()
    with of_q["o"].acquire((1, 0, 2)) as tile, of_q["lse"].acquire((1, 0, 2)) as logs:
        assert tile.shape == (4, 4, 16) and logs.shape == (4, 4)
        assert same_bits(tile.copy(), o[1, :, 96:]) and same_bits(logs.copy(), lse[1, :, 96:])
    assert repr(of_k["k"]).endswith("2 x 1 x 2 tiles of 64 rows of 4 heads>")
    for tensor in (*of_q.values(), *of_k.values(), *(x for half in halves for x in half if x is not of_q["lse"])):
        tensor.unregister()
    assert_accurate(o, q, k, v)
    expected = flashtile.attention_backward(do, q, k, v, o, lse)
    for found, want in ((dq, expected.q), (dk, expected.k)):
        assert np.abs(found.astype("float32") - want.astype("float32")).max() < 0.02


REFUSED: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("heads: got 3, expected a divisor of the 4 heads", lambda s, x: s.register(x, 8, heads=3)),
    ("heads: got 0, expected a divisor", lambda s, x: s.empty((2, 4, 8, 8), "float32", 8, heads=0)),
    ("heads: got 12, expected a divisor .* batches that divide 2", lambda s, x: s.register(x, 8, heads=12)),
    ("heads: got 4 with shape .*, expected 1, or planes", lambda s, x: s.register(x[:, :2], 8, heads=4)),
    ("heads: got 2 with shape .*", lambda s, x: s.register(np.broadcast_to(x[:, :1], x.shape), 8, heads=2)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_heads_that_no_block_describes(starpu: Any, message: str, call: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(SpecError, match=message):
        call(starpu, np.zeros((2, 4, 8, 8), "float32"))


def test_tiles_whose_heads_do_not_go_together(starpu: Any) -> None:
    q, k = np.zeros((1, 4, 8, 8), "float32"), np.zeros((1, 2, 8, 8), "float32")
    o, lse = np.zeros_like(q), np.zeros((1, 4, 8), "float32")
    made: list[Any] = []

    def tensors(**heads: int) -> list[Any]:
        heads = {"q": 4, "k": 2, "v": 2, "o": 4, "lse": 4, **heads}
        arrays = {"q": q, "k": k, "v": k, "o": o, "lse": lse}
        made[:] = [starpu.register(x, 8, heads=heads[name]) for name, x in arrays.items()]
        return made

    refused: list[tuple[str, dict[str, int], dict[str, Any]]] = [
        ("k: got tiles of 1 heads, expected 2, to go with 4 of q", {"k": 1}, {}),
        ("lse: got tiles of 1 heads, expected 4", {"lse": 1}, {}),
        ("q: got tiles of 4 heads, which differ by options, .*, expected tiles of 1", {}, {"mask": by_head()}),
        ("kernel: got 'vanilla' with tiles of 4 heads", {}, {"kernel": "vanilla"}),
    ]
    for message, heads, options in refused:
        with pytest.raises(SpecError, match=message):
            starpu.submit_forward(*tensors(**heads), **options)
        for tensor in made:
            tensor.unregister()


def by_head() -> np.ndarray:
    return np.random.default_rng(0).random((1, 4, 8, 8)) < 0.5
