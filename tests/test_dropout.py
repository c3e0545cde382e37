"""Dropout in every kernel that declares it: the mask read out of it, exact in its expectation, and wrong arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes  # noqa: F401  # names bfloat16 to NumPy
import numpy as np
import pytest
from kernel_cases import Kernel, computes_apart, kernel_params

import flashtile
import flashtile.kernels
from flashtile import testing
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES
from flashtile.engines import starpu
from flashtile.errors import SpecError, UnavailableError
from flashtile.llvm import machines
from flashtile.score import dropout_keep
from flashtile.spec import AttentionSpec
from flashtile.testing import assert_accurate, assert_gradients_accurate

SEED = 0x123456789ABCDEF0
FAMILIES = dict(flashtile.kernels.families())


def knowing() -> list[Any]:
    """A test parameter for each kernel of this machine that declares dropout."""
    spec = AttentionSpec.of(*[np.empty((4, 8), np.float32)] * 3)
    return [
        param
        for param in kernel_params()
        if computes_apart(param.values[0], None)  # dropout on matrix registers: tests/cpu/test_cpu_tiles.py
        and "dropout" in FAMILIES[param.values[0].name].capabilities(spec).options  # type: ignore[union-attr]
    ]


@pytest.fixture(params=knowing())
def dropping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """`kernel`, of those that know dropout; its instruction set in force."""
    if request.param.isa is not None:
        monkeypatch.setenv("FLASHTILE_ISA", request.param.isa)
    clear_cache()
    yield request.param
    clear_cache()


def differentiating() -> list[Any]:
    """Those of them that also declare it for gradients."""
    spec = AttentionSpec.of(*[np.empty((4, 8), np.float32)] * 3)

    def able(name: str) -> bool:
        found = FAMILIES[name].capabilities(spec)  # type: ignore[union-attr]
        return "backward" in found.directions and "dropout" in (found.backward_options or found.options)

    return [param for param in knowing() if able(param.values[0].name)]


both_ways = pytest.mark.parametrize("dropping", differentiating(), indirect=True)
PROGRAMS = "mask", "score"  # options that compile kernels of their own


def in_each_dtype(kernels: list[Any]) -> Any:
    """A test for each kernel and dtype."""
    cases = [
        pytest.param(kernel.values[0], dtype, id=f"{kernel.id}-{dtype}")
        for kernel in kernels
        for dtype in DTYPES
        if computes_apart(kernel.values[0], dtype)
    ]
    return pytest.mark.parametrize(("dropping", "element"), cases, indirect=["dropping"])


def on_each(kernels: list[Any], *names: str) -> Any:
    """A test for each kernel, option and dtype. Of what is compiled for an option every kernel takes one dtype, another
    one than its neighbour's; in a nightly run all."""
    cases = []
    for n, param in enumerate(kernels):
        kernel = param.values[0]
        own = [dtype for dtype in DTYPES if computes_apart(kernel, dtype)]
        for name in names:
            usual = own[(n + PROGRAMS.index(name)) % len(own)] if name in PROGRAMS and kernel.isa else None
            for dtype in own:
                marks = [] if usual in (None, dtype) else [pytest.mark.slow]
                cases.append(pytest.param(kernel, name, dtype, id=f"{param.id}-{name}-{dtype}", marks=marks))
    return pytest.mark.parametrize(("dropping", "name", "element"), cases, indirect=["dropping"])


def inputs(dtype: str = "float32", shape: tuple[int, ...] = (2, 4, 2, 37, 75, 16, 24)) -> list[np.ndarray]:
    batch, heads, kv_heads, rows, keys, size, value_size = shape
    rng = np.random.default_rng(0)
    shapes = (batch, heads, rows, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size)
    return [rng.standard_normal(x).astype(dtype) for x in shapes]


def read_mask(kernel: Kernel, shape: tuple[int, int, int, int], piece: int, dtype: str, **options: Any) -> np.ndarray:
    """The weights that a kernel gives, times the number of keys: q = 0, and v an identity in pieces of columns."""
    batch, heads, rows, keys = shape
    q, k, eye = np.zeros((batch, heads, rows, 8), dtype), np.zeros((batch, heads, keys, 8), dtype), np.eye(keys)
    parts = []
    for first in range(0, keys, piece):
        v = np.broadcast_to(eye[:, first : first + piece].astype(dtype), (batch, heads, keys, min(piece, keys - first)))
        parts.append(kernel(q, k, v, **options))
    return np.concatenate(parts, axis=-1) * keys


@in_each_dtype(knowing())
@pytest.mark.parametrize(("shape", "piece"), [((2, 3, 70, 150), 64), ((1, 2, 5, 1030), 128), ((1, 1, 33, 7), 7)])
def test_the_mask_read_out(dropping: Kernel, shape: tuple[int, int, int, int], piece: int, element: str) -> None:
    """Whatever the tiles are: bit for bit the mask of the definition, and the weights' size."""
    weights = read_mask(dropping, shape, piece, element, dropout_p=0.25, seed=SEED)
    mask = dropout_keep(shape, 0.25, SEED)
    np.testing.assert_array_equal(weights != 0, mask)
    np.testing.assert_allclose(weights[mask].astype(float), 4 / 3, rtol=8 * DTYPES[element].eps)


@on_each(knowing(), "causal", "window", "mask")
def test_the_mask_read_out_of_what_is_seen(dropping: Kernel, name: str, element: str) -> None:
    """Wherever the first key of a panel or a block stands: the mask of the definition, on what the options show."""
    shape = 2, 4, 70, 200
    seen = read_mask(dropping, shape, 200, element, **OPTIONS[name]) != 0
    kept = read_mask(dropping, shape, 200, element, dropout_p=0.25, seed=SEED, **OPTIONS[name]) != 0
    assert seen.any() and not seen.all()
    np.testing.assert_array_equal(kept, seen & dropout_keep(shape, 0.25, SEED))


def test_the_mask_read_out_of_parts_of_the_keys(dtype: str) -> None:
    """Keys that are split over work items and merged, and more of them than a span has."""
    shape = 1, 1, 40, 2500
    plan = flashtile.explain((1, 1, 40, 8), (1, 1, 2500, 8), dtype=dtype, dropout_p=0.25, seed=SEED).plan
    assert plan.splits > 1 or "cpu" not in {param.values[0].name for param in knowing()}
    weights = read_mask(Kernel("auto", None), shape, 500, dtype, dropout_p=0.25, seed=SEED)
    np.testing.assert_array_equal(weights != 0, dropout_keep(shape, 0.25, SEED))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "causal", "window"])
def test_on_matrix_registers(name: str, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated: the mask, the rule, and an lse that is without it."""
    monkeypatch.setenv("FLASHTILE_ISA", "amx_emulated")
    clear_cache()
    kernel, shape, dropout = Kernel("cpu", "amx_emulated"), (2, 4, 70, 150), {"dropout_p": 0.25, "seed": SEED}
    if "amx_emulated" not in machines.usable():
        pytest.skip("the emulated matrix registers need AVX-512")
    seen = read_mask(kernel, shape, 150, storage, **OPTIONS[name]) != 0
    kept = read_mask(kernel, shape, 150, storage, **dropout, **OPTIONS[name]) != 0
    np.testing.assert_array_equal(kept, seen & dropout_keep(shape, 0.25, SEED))
    x = inputs(storage)
    o, lse = kernel(*x, return_lse=True, **dropout, **OPTIONS[name])
    testing.assert_accurate(o, *x, **dropout, **OPTIONS[name])
    np.testing.assert_array_equal(lse, kernel(*x, return_lse=True, **OPTIONS[name])[1])
    if storage == "bfloat16":  # else the backward is a vector kernel
        for product, found in read_mask_backward(kernel, shape, storage, **dropout, **OPTIONS[name]).items():
            np.testing.assert_array_equal(found != 0, kept, err_msg=product)
    monkeypatch.undo()
    clear_cache()


def read_mask_backward(
    kernel: Kernel, shape: tuple[int, int, int, int], dtype: str, **options: Any
) -> dict[str, np.ndarray]:
    """The weights that meet dO in dV and dP in dS, each (B, H, S_q, S_kv), by gradients of a call with q = 0.

    dV of a dO that is an identity is P; with v = 1, dO = 1 and o = 0, so that dP = 1 and delta = 0, dQ of a k that is
    an identity is scale times dS.
    """
    batch, heads, rows, keys = shape

    def eye(n: int) -> np.ndarray:
        return np.broadcast_to(np.eye(n).astype(dtype), (batch, heads, n, n))

    def full(x: float, *sizes: int) -> np.ndarray:
        return np.full((batch, heads, *sizes), x, dtype)

    def backward(do: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, wrt: str) -> np.ndarray:
        o, lse = kernel(q, k, v, return_lse=True, **options)
        more = {"wrt": wrt, "kernel": kernel.name, **options}
        return getattr(flashtile.attention_backward(do, q, k, v, np.zeros_like(o), lse, **more), wrt)

    dv = backward(eye(rows), full(0, rows, 8), full(0, keys, 8), full(1, keys, rows), "v")
    dq = backward(full(1, rows, 1), full(0, rows, keys), eye(keys), full(1, keys, 1), "q")
    return {"dV": dv.swapaxes(-1, -2), "dS": dq}


@on_each(differentiating(), "dense", "causal", "window", "mask")
def test_the_mask_read_out_of_gradients(dropping: Kernel, name: str, element: str) -> None:
    """The same in both products that drop, bit for bit, as in the forward."""
    shape = 2, 3, 70, 150
    seen = read_mask(dropping, shape, 150, element, **OPTIONS[name]) != 0
    dropout = {"dropout_p": 0.25, "seed": SEED}
    for product, found in read_mask_backward(dropping, shape, element, **dropout, **OPTIONS[name]).items():
        np.testing.assert_array_equal(found != 0, seen & dropout_keep(shape, 0.25, SEED), err_msg=product)


@in_each_dtype(differentiating())
def test_the_mask_read_out_of_gradients_in_parts(dropping: Kernel, element: str) -> None:
    """One head, whose keys are split over work items."""
    shape = 1, 1, 40, 600
    for product, found in read_mask_backward(dropping, shape, element, dropout_p=0.25, seed=SEED).items():
        np.testing.assert_array_equal(found != 0, dropout_keep(shape, 0.25, SEED), err_msg=product)


@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 5, 0)])
def test_nothing_to_drop(shape: tuple[int, int, int, int]) -> None:
    """No queries or no keys: an empty mask, and the checker takes such a call."""
    assert dropout_keep(shape, 0.25, SEED).shape == shape
    q, k = np.ones((2, 3, shape[2], 8)), np.ones((2, 3, shape[3], 8))
    o, lse = flashtile.attention(q, k, k, dropout_p=0.25, seed=SEED, return_lse=True)
    assert_accurate(o, q, k, k, dropout_p=0.25, seed=SEED)
    found = flashtile.attention_backward(o, q, k, k, o, lse, dropout_p=0.25, seed=SEED)
    assert_gradients_accurate(found, o, q, k, k, dropout_p=0.25, seed=SEED)


@on_each(differentiating(), "dense", "causal", "window", "mask", "score", "sinks")
def test_gradients_are_accurate(dropping: Kernel, name: str, element: str) -> None:
    x, options = inputs(element), {**OPTIONS[name], "dropout_p": 0.3, "seed": SEED}
    o, lse = dropping(*x, return_lse=True, **options)
    rng = np.random.default_rng(1)
    do, dlse = rng.standard_normal(o.shape).astype(element), rng.standard_normal(lse.shape).astype(lse.dtype)
    wrt = ["q", "k", "v", *({"alibi_slopes", "sinks"} & set(options))]
    got = flashtile.attention_backward(do, *x, o, lse, dlse=dlse, wrt=wrt, kernel=dropping.name, **options)
    testing.assert_gradients_accurate(got, do, *x, dlse=dlse, wrt=wrt, **options)
    assert flashtile.explain(*x, kernel=dropping.name, backward=True, **options).kernel == dropping.name


@in_each_dtype(differentiating())
def test_gradients_of_a_row_that_is_nan(dropping: Kernel, element: str) -> None:
    """0 times a weight that is NaN is NaN: so is dV of all keys that its row sees, kept or dropped."""
    (q, k, v), options = inputs(element), {"causal": True, "align": 20, "dropout_p": 0.5, "seed": 4}
    q[1, 0, 9, 3] = np.nan
    o, lse = dropping(q, k, v, return_lse=True, **options)
    found = flashtile.attention_backward(np.ones_like(o), q, k, v, o, lse, kernel=dropping.name, **options)
    seen = np.arange(75) <= 29
    np.testing.assert_array_equal(np.isnan(found.v[1, 0]).all(axis=1), seen)
    assert np.isnan(found.v).sum() == seen.sum() * v.shape[-1]
    assert np.isnan(found.q).any(axis=3).sum() == 1 and np.isnan(found.q[1, 0, 9]).all()


@in_each_dtype(differentiating())
def test_gradients_meet_an_infinite_value(dropping: Kernel, element: str) -> None:
    """What dO holds reaches dV of the keys that its row sees: infinite where kept, 0 times it, NaN, where dropped."""
    (q, k, v), dropout = inputs(element), {"dropout_p": 0.5, "seed": 4}
    options = {"causal": True, "align": 20, **dropout}
    o, lse = dropping(q, k, v, return_lse=True, **options)
    do = np.ones(o.shape, element)
    do[1, 0, 9, 3] = np.inf
    dv = flashtile.attention_backward(do, q, k, v, o, lse, wrt="v", kernel=dropping.name, **options).v
    kept, seen = dropout_keep((2, 4, 37, 75), **dropout)[1, 0, 9], np.arange(75) <= 29
    np.testing.assert_array_equal(np.isposinf(dv[1, 0, :, 3]), kept & seen)
    np.testing.assert_array_equal(np.isnan(dv[1, 0, :, 3]), ~kept & seen)
    assert np.isfinite(dv).sum() == dv.size - seen.sum()


@both_ways
def test_bits_of_gradients_do_not_depend_on_threads(dropping: Kernel) -> None:
    x, before = inputs(shape=(1, 2, 1, 150, 500, 16, 24)), flashtile.get_num_threads()
    o, lse = dropping(*x, return_lse=True, dropout_p=0.4, seed=5)
    results = []
    try:
        for threads in (1, 2, 3):
            flashtile.set_num_threads(threads)
            got = flashtile.attention_backward(o, *x, o, lse, kernel=dropping.name, dropout_p=0.4, seed=5)
            results.append(got.q.tobytes() + got.k.tobytes() + got.v.tobytes())
    finally:
        flashtile.set_num_threads(before)
    assert len(set(results)) == 1


OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True, "align": "bottom_right"},
    "window": {"window": (9, 3), "align": 20},
    "mask": {"mask": lambda b, h, i, j: (i + j) % 3 != h % 3},
    "score": {"softcap": 3.0, "alibi_slopes": np.full(4, 0.1), "align": 5},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0])},
}


@on_each(knowing(), *OPTIONS)
def test_accurate(dropping: Kernel, name: str, element: str) -> None:
    x, options = inputs(element), {**OPTIONS[name], "dropout_p": 0.3, "seed": SEED}
    o, lse = dropping(*x, return_lse=True, **options)
    testing.assert_accurate(o, *x, **options)
    testing.assert_accurate(lse, *x, kind="lse", **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_lse_is_without_dropout(dropping: Kernel, name: str) -> None:
    x = inputs(shape=(2, 4, 2, 70, 200, 16, 24))
    plain, dropped = (dropping(*x, return_lse=True, **OPTIONS[name], **o) for o in ({}, {"dropout_p": 0.5, "seed": 1}))
    np.testing.assert_array_equal(plain[1], dropped[1])
    assert (plain[0] != dropped[0]).any()


@pytest.mark.parametrize("p", [0, 0.0, 1e-6, np.float32(0)])
def test_nothing_is_drawn_at_0(dropping: Kernel, p: float) -> None:
    x = inputs()
    plain = dropping(*x)
    for seed in (None, SEED):
        np.testing.assert_array_equal(dropping(*x, dropout_p=p, seed=seed), plain)


def test_the_same_seed_gives_the_same_bits(dropping: Kernel) -> None:
    x = inputs()
    first = dropping(*x, dropout_p=0.4, seed=5)
    np.testing.assert_array_equal(dropping(*x, dropout_p=0.4, seed=5), first)
    for other in ({"dropout_p": 0.4, "seed": 6}, {"dropout_p": 0.5, "seed": 5}):
        assert (dropping(*x, **other) != first).any()  # values of the call, although the prepared one is the same


def test_bits_do_not_depend_on_threads(dropping: Kernel) -> None:
    x, before = inputs(shape=(2, 4, 2, 150, 75, 16, 24)), flashtile.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            flashtile.set_num_threads(threads)
            results.append(dropping(*x, dropout_p=0.4, seed=5, progress=lambda done, total: None))
    finally:
        flashtile.set_num_threads(before)
    assert all((r == results[0]).all() for r in results)


def test_expectation_is_exact(dropping: Kernel) -> None:
    """The mean over many seeds comes to the output without dropout, within five standard errors."""
    x = inputs("float64", (1, 2, 1, 9, 40, 8, 5))
    draws = np.array([dropping(*x, dropout_p=0.3, seed=seed) for seed in range(400)])
    error = np.abs(draws.mean(axis=0) - dropping(*x))
    assert (error <= 5 * draws.std(axis=0) / np.sqrt(len(draws))).all()


def test_what_a_mask_hides_stays_hidden(dropping: Kernel) -> None:
    """Poison at hidden keys changes no bit, and a row without keys is 0."""
    q, k, v = inputs()
    hidden = np.arange(75) % 5 == 2
    mask = np.broadcast_to(~hidden, (2, 4, 37, 75)).copy()
    mask[:, :, 4] = False
    options = {"mask": mask, "dropout_p": 0.3, "seed": 2}
    clean = dropping(q, k, v, **options)
    k[:, :, hidden], v[:, :, hidden] = np.nan, np.inf
    np.testing.assert_array_equal(dropping(q, k, v, **options), clean)
    assert (clean[:, :, 4] == 0).all() and np.isfinite(clean).all()


@in_each_dtype(knowing())
def test_an_infinite_value(dropping: Kernel, element: str) -> None:
    """Infinite where its weight is kept; 0 times it, which is NaN, where it is dropped; nothing where it is hidden."""
    q, k, v = inputs(element)
    v[:, :, 20, 3] = np.inf
    options = {"causal": True, "align": 0, "dropout_p": 0.5, "seed": 4}
    o = dropping(q, k, v, **options)
    kept, seen = dropout_keep((2, 4, 37, 75), 0.5, 4)[..., 20], np.arange(37) >= 20
    np.testing.assert_array_equal(np.isposinf(o[..., 3]), kept & seen)
    np.testing.assert_array_equal(np.isnan(o[..., 3]), ~kept & seen)
    assert np.isfinite(np.delete(o, 3, axis=-1)).all()


def test_a_visible_nan_makes_its_row_nan(dropping: Kernel) -> None:
    q, k, v = inputs()
    q[0, 0, 3] = np.nan
    o = dropping(q, k, v, dropout_p=0.9, seed=2)
    assert np.isnan(o[0, 0, 3]).all() and np.isnan(o).sum() == o.shape[-1]


def test_auto_takes_a_kernel_that_knows_dropout() -> None:
    x = inputs()
    chosen = flashtile.explain(*x, dropout_p=0.3, seed=1)
    assert chosen.spec.dropout and "dropout" in str(chosen)
    assert chosen.kernel == knowing()[0].values[0].name  # the first in the order of preference
    o = flashtile.attention(*x, dropout_p=0.3, seed=1)
    np.testing.assert_array_equal(o, flashtile.attention(*x, dropout_p=0.3, seed=1, kernel=chosen.kernel))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not isinstance(f, str) and f.unavailable() is None])
def test_a_kernel_without_it_says_so(name: str) -> None:
    x = inputs()
    if name in {param.values[0].name for param in knowing()}:
        assert kernel_runs(name, x)
    else:
        with pytest.raises(UnavailableError, match="dropout"):
            flashtile.attention(*x, dropout_p=0.3, seed=1, kernel=name)


def kernel_runs(name: str, x: list[np.ndarray]) -> bool:
    return bool((flashtile.attention(*x, dropout_p=0.3, seed=1, kernel=name) != flashtile.attention(*x)).any())


def test_tasks_drop_the_same_weights() -> None:
    """StarPU's flow has codelets of its own: the fused ones drop what threads drop, the unfused ones say that they
    do not, whatever the kernel of the same name does."""
    if reason := starpu.unavailable():
        pytest.skip(f"no StarPU: {reason}")
    given = {"dropout_p": 0.3, "seed": 1}
    q = np.zeros_like(inputs()[0])
    tasks, threads = (flashtile.attention(q, *inputs()[1:], **given, engine=engine) for engine in ("starpu", "direct"))
    np.testing.assert_allclose(tasks, threads, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnavailableError, match="dropout, which its tasks do not know"):
        flashtile.attention(*inputs(), **given, kernel="vanilla", engine="starpu")


BAD: list[tuple[dict[str, Any], str]] = (
    [
        ({"dropout_p": p, "seed": 1}, "dropout_p: got .*, expected a real number in")
        for p in (1, 1.0, -0.1, 1 - 2**-17, 1 - 2**-20, float("nan"), float("inf"), "0.1", None, True, np.zeros(2), 1j)
    ]
    + [
        ({"dropout_p": 0.1, "seed": seed}, "seed: got .*, expected an integer in")
        for seed in (None, -1, 2**64, 1.0, "1", True, np.zeros(1, int), float("nan"))
    ]
    + [({"seed": -1}, "seed: got -1, expected an integer in")]
)


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    x, out = inputs(), np.full((2, 4, 37, 24), 7, np.float32)
    for call in (
        lambda: flashtile.attention(*x, out=out, **options),
        lambda: flashtile.explain(*x, **options),
        lambda: dropout_keep((2, 3), options.get("dropout_p", 0.0), options.get("seed")),
    ):
        with pytest.raises(SpecError, match="^" + message):
            call()
    assert (out == 7).all()


@pytest.mark.parametrize("shape", [5, (3,), (1, 2, 3, 4, 5), (2, -1), (2.0, 3), "ab"])
def test_a_wrong_shape_of_a_mask(shape: Any) -> None:
    with pytest.raises(SpecError, match="^shape: got .*, expected"):
        dropout_keep(shape, 0.5, 1)


def test_the_largest_probability() -> None:
    """More than 2^-17 below 1 rounds to 1 - 2^-16: one of 65536 weights is kept, and counts 65536 times."""
    p = np.nextafter(1 - 2**-17, 0)
    o = flashtile.attention(np.zeros((400, 1)), np.zeros((800, 1)), np.ones((800, 1)), dropout_p=p, seed=1)
    kept = dropout_keep((400, 800), p, 1).sum(axis=1)
    np.testing.assert_allclose(o[:, 0], kept * 65536 / 800)


@pytest.mark.parametrize("door", ["attention", "scaled_dot_product_attention"])
def test_torch_draws_the_seed(door: str) -> None:
    torch = pytest.importorskip("torch")
    import flashtile.torch

    x = [torch.from_numpy(a) for a in inputs(shape=(2, 4, 4, 37, 75, 16, 24))]
    call = getattr(flashtile.torch, door)

    def draw(seed: int, p: float = 0.5) -> Any:
        torch.manual_seed(seed)
        return call(*x, dropout_p=p), call(*x, dropout_p=p)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    torch.manual_seed(0)
    seed = int(torch.randint((1 << 63) - 1, ()))  # which a compiled graph can draw, too
    by_numpy = flashtile.attention(*[a.numpy() for a in x], dropout_p=0.5, seed=seed)
    np.testing.assert_array_equal(first[0].numpy(), by_numpy)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    call(*x, dropout_p=0.0)
    call(*x, dropout_p=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(SpecError, match="^dropout_p: got 1.5"):
        call(*x, dropout_p=1.5)


def test_torch_takes_a_seed() -> None:
    torch = pytest.importorskip("torch")
    x = [torch.from_numpy(a) for a in inputs()]
    before = torch.get_rng_state()
    o = flashtile.attention(*x, dropout_p=0.5, seed=9)
    np.testing.assert_array_equal(o.numpy(), flashtile.attention(*inputs(), dropout_p=0.5, seed=9))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(SpecError, match="^seed: got -1"):
        flashtile.attention(*x, dropout_p=0.5, seed=-1)
