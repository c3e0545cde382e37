"""exp2, log2 and tanh against NumPy at twice the precision: the bounds that their docstrings state."""

from __future__ import annotations

import numpy as np
import pytest
from lanes import every_isa, run, ulps

from flashtile.llvm import math as vmath
from flashtile.llvm.machines import ISA

WIDER = {"float32": np.float64, "float64": np.longdouble}
LOWEST = {"float32": -126, "float64": -1022}  # exponent of the least normal number
NEGLIGIBLE = {"float32": -100, "float64": -960}  # exponents of weights that are taken for 0
DENSE = 1 << 16

pytestmark = [pytest.mark.parametrize("isa", every_isa()), pytest.mark.parametrize("real", WIDER)]


def samples(real: str, low: float, high: float, spread: int) -> np.ndarray:
    """Numbers between two bounds, dense near 0, and of every exponent down to -spread."""
    rng = np.random.default_rng(0)
    parts = rng.uniform(low, high, DENSE), rng.uniform(-1, 1, DENSE), rng.uniform(-0.1, 0.1, DENSE)
    tiny = np.ldexp(rng.uniform(-1, 1, DENSE), rng.integers(-spread, 0, DENSE))
    x = np.concatenate([*parts, tiny]).astype(real)
    return x[(low <= x) & (x <= high)]


def nans(real: str) -> np.ndarray:
    """Quiet and signalling NaN of both signs, with payloads all through the mantissa."""
    bits, mantissa = (np.int32, 23) if real == "float32" else (np.int64, 52)
    payloads = [1 << n for n in range(mantissa)] + [(1 << mantissa) - 1]
    infinity = int(np.array(np.inf, real).view(bits))
    positive = np.array([infinity | p for p in payloads], bits)
    return np.concatenate([positive, positive | np.iinfo(bits).min]).view(real)


def worst(got: np.ndarray, exact: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(ulps(got, exact).max())


def test_exp2(isa: ISA, real: str) -> None:
    lowest = LOWEST[real]
    x = samples(real, lowest, 2 - lowest, 60)
    x = x[x < 2 - lowest]
    assert x.max() > 2 - lowest - 0.1, "the upper end is not sampled"
    got = run(isa, lambda f, v: vmath.exp2(f, isa, v), x)
    assert worst(got, np.exp2(x.astype(WIDER[real]))) <= (1.0 if isa.fused else 1.2)


def test_exp2_is_exact_at_integers(isa: ISA, real: str) -> None:
    n = np.arange(LOWEST[real], 2 - LOWEST[real])
    got = run(isa, lambda f, v: vmath.exp2(f, isa, v), n.astype(real))
    assert (got == np.ldexp(np.ones(len(n), real), n)).all()
    low = n[n <= 0]
    exact = np.where(low < NEGLIGIBLE[real], 0, np.ldexp(np.ones(len(low), real), low))
    for coarse in (False, True):
        got = run(isa, lambda f, v, c=coarse: vmath.weight(f, isa, v, coarse=c), low.astype(real))
        if coarse and isa.scales and real == "float32":  # whose exponent is moved by no whole number
            assert got[low == 0] == 1 and (np.abs(got - exact) <= 2.0**-17 * exact).all()
        else:
            assert (got == exact).all()


def test_weight(isa: ISA, real: str) -> None:
    """0 where it is negligible; a coarse one is within 2^-17, and is coarse."""
    x = samples(real, LOWEST[real] - 10, 0, 60)
    got = run(isa, lambda f, v: vmath.weight(f, isa, v), x)
    assert (got[x < NEGLIGIBLE[real]] == 0).all()
    x, got = (values[x >= NEGLIGIBLE[real]] for values in (x, got))
    exact = np.exp2(x.astype(WIDER[real]))
    assert worst(got, exact) <= (1.0 if isa.fused else 1.2)
    coarse = run(isa, lambda f, v: vmath.weight(f, isa, v, coarse=True), x)
    assert 2.0**-22 < float((np.abs(coarse - exact) / exact).max()) < 2.0**-17


@pytest.mark.parametrize("name", ["exp2", "weight"])
def test_exp2_special_values(isa: ISA, real: str, name: str) -> None:
    def exp2(values: np.ndarray) -> np.ndarray:
        return run(isa, lambda f, v: getattr(vmath, name)(f, isa, v), values)

    info = np.finfo(real)
    bias = 1 - LOWEST[real]
    zeros = exp2(np.array([-np.inf, info.min, -bias - 1, -bias, -1e5, -1e10, -1e20, -1e35], real))
    assert (zeros == 0).all() and not np.signbit(zeros).any()
    denormal = info.smallest_subnormal
    assert (exp2(np.array([0.0, -0.0, -denormal, -info.tiny], real)) == 1).all()
    assert np.isnan(exp2(nans(real))).all()
    if name == "exp2":
        assert (exp2(np.array([denormal, info.tiny], real)) == 1).all()
        assert (exp2(np.array([bias + 1, info.max, np.inf], real)) == np.inf).all()


def test_log2(isa: ISA, real: str) -> None:
    rng = np.random.default_rng(0)
    lowest = LOWEST[real]
    all_exponents = np.ldexp(rng.uniform(1, 2, DENSE), rng.integers(lowest, -lowest, DENSE))
    x = np.concatenate([all_exponents, rng.uniform(0.5, 2, DENSE), rng.uniform(0.99, 1.01, DENSE)]).astype(real)
    x = np.append(x, np.array([np.finfo(real).tiny, np.nextafter(1, 0, dtype=real), np.nextafter(1, 2, dtype=real)]))
    x = x[x < 2.0**-lowest]
    got = run(isa, lambda f, v: vmath.log2(f, isa, v), x)
    exact = np.log2(x.astype(WIDER[real]))
    assert (np.abs(got - exact) / np.maximum(np.abs(exact), 1)).max() <= 2 * np.finfo(real).eps
    n = np.arange(lowest, -lowest)
    assert (run(isa, lambda f, v: vmath.log2(f, isa, v), np.ldexp(np.ones(len(n), real), n)) == n).all()


def test_tanh(isa: ISA, real: str) -> None:
    x = samples(real, -25, 25, -LOWEST[real])
    got = run(isa, lambda f, v: vmath.tanh(f, isa, v), x)
    assert worst(got, np.tanh(x.astype(WIDER[real]))) <= 3
    assert (np.abs(got) <= 1).all()
    odd = run(isa, lambda f, v: vmath.tanh(f, isa, v), -x)
    assert (odd == -got).all()


def test_tanh_special_values(isa: ISA, real: str) -> None:
    info = np.finfo(real)
    x = np.array([0.0, info.smallest_subnormal, info.tiny, 20, 1e3, info.max, np.inf], real)
    exact = np.tanh(x)
    for sign in (1, -1):
        got = run(isa, lambda f, v: vmath.tanh(f, isa, v), np.copysign(x, sign).astype(real))
        assert (got == sign * exact).all() and (np.signbit(got) == (sign < 0)).all()
    assert np.isnan(run(isa, lambda f, v: vmath.tanh(f, isa, v), nans(real))).all()
