"""Each primitive of an instruction set as it is emitted, against what its docstring says in NumPy."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from kernel_cases import kernel_params
from lanes import every_isa, run

from flashtile.errors import UnavailableError
from flashtile.llvm import machines as isas
from flashtile.llvm.machines import ISA

STORAGES = {"half": np.dtype(np.float16), "bfloat": np.dtype(ml_dtypes.bfloat16)}
ALL_BITS = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
FAST_COUNTS = (1, None)  # a scalar, a full register


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the last bit, zeros with their signs; NaN with its sign, but any payload."""
    nan = np.isnan(expected)
    assert (np.isnan(got) == nan).all()
    assert (np.signbit(got) == np.signbit(expected)).all()
    assert (got[~nan] == expected[~nan]).all()


def hard_to_round(storage: str) -> np.ndarray:
    """Every 16-bit value, every midpoint between two neighbours, and the floats next to each; all exponents; NaNs."""
    with np.errstate(invalid="ignore"):  # NaN among them
        values = np.sort(ALL_BITS.view(STORAGES[storage]).astype(np.float64))
    values = values[np.isfinite(values)]
    middles = (values[:-1] + values[1:]) / 2
    infinite = values[-1] + (values[-1] - values[-2]) / 2  # from here on
    exact = np.concatenate([values, middles, [infinite, -infinite]]).astype(np.float32)
    near = [np.nextafter(exact, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    anywhere = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    payloads = (0x7F800000 | 1 << np.arange(23)).astype(np.uint32)
    nans = np.concatenate([payloads, payloads | np.uint32(1 << 31)]).view(np.float32)
    denormals = np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, 3.4028235e38, -3.4028235e38], np.float32)
    return np.concatenate([exact, *near, anywhere, nans, denormals])


@pytest.mark.parametrize("isa", every_isa())
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("count", FAST_COUNTS)
def test_widen(isa: ISA, storage: str, count: int | None) -> None:
    count = count or isa.lanes("float")
    got = run(isa, lambda f, bits: isa.widen(f, bits, storage), ALL_BITS, count=count)
    same(got, ALL_BITS.view(STORAGES[storage]).astype(np.float32))


@pytest.mark.parametrize("isa", every_isa())
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("count", FAST_COUNTS)
def test_narrow(isa: ISA, storage: str, count: int | None) -> None:
    x = hard_to_round(storage)
    got = run(isa, lambda f, v: isa.narrow(f, v, storage), x, count=count or isa.lanes("float"))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(STORAGES[storage])
    same(got.view(STORAGES[storage]).astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("isa", every_isa())
def test_narrow_pairs(isa: ISA) -> None:
    """Two vectors to one of pairs, the even one in the low halves; the instruction takes denormals as 0."""
    x = hard_to_round("bfloat")
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0) | np.isnan(x)]
    even, odd = x, x[::-1].copy()
    got = run(isa, lambda f, a, b: isa.narrow_pairs(f, a, b), even, odd, count=isa.lanes("float"))
    halves = got.view(ml_dtypes.bfloat16).astype(np.float32).reshape(-1, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        for half, source in ((halves[:, 0], even), (halves[:, 1], odd)):
            same(half, source.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("isa", every_isa())
def test_narrow_both(isa: ISA) -> None:
    """Two vectors to one, the lanes of one after those of the other."""
    x = hard_to_round("bfloat")
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0) | np.isnan(x)]
    n = isa.lanes("float")
    x = x[: len(x) // n * n]
    low, high = x, x[::-1].copy()
    got = run(isa, lambda f, a, b: f.cast("bitcast", isa.narrow_both(f, a, b), f"<{n} x i32>"), low, high, count=n)
    halves = got.view(ml_dtypes.bfloat16).astype(np.float32).reshape(-1, 2, n)
    with np.errstate(over="ignore", invalid="ignore"):
        for half, source in ((halves[:, 0], low), (halves[:, 1], high)):
            same(half.ravel(), source.astype(ml_dtypes.bfloat16).astype(np.float32))


def pairs(rng: np.random.Generator, n: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Words of two bf16, and the same as an (n, 2) array of fp32."""
    values = rng.integers(-60, 60, (n, 2)) if whole else rng.standard_normal((n, 2))
    stored = values.astype(ml_dtypes.bfloat16)
    return stored.view(np.int32)[:, 0], stored.astype(np.float32)


@pytest.mark.parametrize("isa", every_isa())
@pytest.mark.parametrize("emulated", [False, True], ids=["dot", "emulated"])
def test_dot_pairs(isa: ISA, emulated: bool) -> None:
    dot = isa.emulated_dot_pairs if emulated else isa.dot_pairs
    rng = np.random.default_rng(0)
    for whole in (True, False):
        (a, wide_a), (b, wide_b) = (pairs(rng, 4096, whole) for _ in range(2))
        acc = rng.integers(-1000, 1000, 4096).astype(np.float32)
        got = run(isa, lambda f, c, x, y: dot(f, c, x, y), acc, a, b, count=isa.lanes("float"))
        products = wide_a.astype(np.float64) * wide_b
        exact = acc + products.sum(-1)
        if whole:
            assert (got == exact).all()
        else:
            room = 2.0**-24 * 2 * (np.abs(acc) + np.abs(products).sum(-1))  # two roundings of partial sums
            assert (np.abs(got - exact) <= room).all()
            assert (np.abs(got - exact) > 0).any()


@pytest.mark.parametrize("isa", every_isa())
def test_scale_and_fraction(isa: ISA) -> None:
    """Right on every machine that has the instructions, whether or not it takes them for cheap."""
    if type(isa).fraction is ISA.fraction:
        assert not isa.scales
        with pytest.raises(NotImplementedError):
            run(isa, lambda f, x: isa.fraction(f, x), np.ones(16, np.float32))
        return
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-120, 120, 4000), np.arange(-60, 60), rng.uniform(-1, 1, 40) * 1e9]).astype(
        np.float32
    )
    got = run(isa, lambda f, v: isa.fraction(f, v), x)
    exact = x - np.floor(x.astype(np.float64))
    assert (got < 1).all() and (got <= exact).all() and (exact - got < 2.0**-24).all()
    number, power = rng.standard_normal(4096).astype(np.float32), rng.uniform(-60, 60, 4096).astype(np.float32)
    power[::2] = np.rint(power[::2])
    got = run(isa, lambda f, v, p: isa.scale(f, v, p), number, power)
    assert (got == np.ldexp(number, np.floor(power).astype(int))).all()


@pytest.mark.parametrize("isa", every_isa())
@pytest.mark.parametrize("real", ["float32", "float64"])
def test_multiply_add(isa: ISA, real: str) -> None:
    """One rounding where the machine has it, else one a step."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(256).astype(real) for _ in range(2))
    c = -(a * b)  # so that the rounding of the product is all that is left
    got = run(isa, lambda f, x, y, z: isa.multiply_add(f, x, y, z), a, b, c)
    if isa.fused:
        exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
        assert got.tolist() == [float(e) for e in exact]
        assert (got != 0).any()
    else:
        assert (got == 0).all()


def test_every_fallback_is_worse_than_what_falls_back_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHTILE_ISA", raising=False)
    ranks = [isa.rank for isa in isas.known().values()]
    assert ranks == sorted(ranks, reverse=True)
    assert isas.current().rank == max(isas.known()[name].rank for name in isas.usable())


@pytest.mark.parametrize("name", ["avx1024", "neon"])
def test_an_instruction_set_that_cannot_be_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in isas.usable():
        pytest.skip(f"{name} can be used here")
    monkeypatch.setenv("FLASHTILE_ISA", name)
    with pytest.raises(UnavailableError, match=name):
        isas.current()


def test_an_instruction_set_prints_the_same_in_every_process() -> None:
    """The print is part of cache keys; the order of a set differs from process to process."""
    assert all("frozenset" not in repr(isa) for isa in isas.known().values())


def test_the_generated_kernels_are_tested_on_every_instruction_set_of_this_machine() -> None:
    kernels = [parameter.values[0] for parameter in kernel_params()]
    assert [kernel.isa for kernel in kernels if kernel.name == "cpu"] == isas.usable()
    assert {kernel.isa for kernel in kernels if kernel.name in ("reference", "vanilla")} == {None}
