"""The accuracy rule: how far an attention result may be from exact, judged from data and not from a constant.

The reference kernel says what is exact (fp64; longdouble for fp64 inputs). The unfused baseline in the same dtype
says what rounding costs on these very inputs: its largest error over four orders of the keys. A kernel may err
twice as much (a gradient three times), plus two units in the last place of the tensor's largest value. It is
finite where the reference is finite, and NaN or infinite exactly where the reference is.

lse may err by one thing more. Unlike the output it repeats a score's error in full, and the order of the keys says
nothing about the rounding of one q.k, so it is given what that sum of D products costs in any order, typically:
sqrt(D) units of roundoff of the largest scale * sum |q||k| (Higham and Mary 2019, A new approach to probabilistic
rounding error analysis).

Gradients begin with the output and lse as they are stored. What exact arithmetic makes of these, rounded once, is one
baseline more: no backward that begins with them can be nearer, and of a gradient that has few elements (sinks, slopes)
the orders of the keys say nothing about what a rounded output costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashtile.dtypes import dtype_of
from flashtile.kernels import reference, vanilla
from flashtile.kernels.gradients import Inputs, Sums
from flashtile.kernels.rule import visible
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

# How many times the baseline's largest error a tensor of each kind may err.
FACTOR = {"output": 2, "lse": 2, "gradient": 3}
_ORDERS = 4


@dataclass(frozen=True)
class Expected:
    """What one tensor should be, and the largest error it may have."""

    value: np.ndarray  # the reference, in the oracle's dtype
    allowed: float
    dtype: str  # of the tensor under test

    def check(self, got: Any, name: str = "result") -> None:
        """Raise AssertionError unless `got` is an array with the shape, the dtype and, in every element, the value
        expected."""
        __tracebackhide__ = True
        if not hasattr(got, "dtype"):  # what return_lse=True gave, say
            raise AssertionError(f"{name}: got {type(got).__name__}, expected an array")
        if dtype_of(got.dtype).name != self.dtype:
            raise AssertionError(f"{name}: got dtype {got.dtype}, expected {self.dtype}")
        if tuple(got.shape) != self.value.shape:
            raise AssertionError(f"{name}: got shape {tuple(got.shape)}, expected {self.value.shape}")
        values = values_of(got).astype(self.value.dtype)
        for what, holds in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
            self._reject(holds(values) != holds(self.value), values, f"{name}: {what} in one and not the other")
        with np.errstate(invalid="ignore"):
            error = np.abs(values - self.value)
        self._reject(error > self.allowed, values, f"{name}: error over the {float(self.allowed):.3g} allowed")

    def _reject(self, wrong: np.ndarray, values: np.ndarray, problem: str) -> None:
        """Fail on the first marked element, saying how many there are."""
        __tracebackhide__ = True
        if wrong.any():
            at = tuple(int(n) for n in np.argwhere(wrong)[0])
            came = f"got {values[at]!r}, expected {self.value[at]!r}"
            raise AssertionError(f"{problem}, in {wrong.sum()} of {wrong.size} elements; at {at}: {came}")


def expect_values(
    spec: AttentionSpec, inputs: Sequence[np.ndarray], offset: Any = None, scoring: Scoring | None = None
) -> tuple[Expected, Expected]:
    """What the output and lse of a validated call should be; the inputs q, k, v, of 2 to 4 axes, may be widened.

    offset is the spec's own, or (B,) integers; scoring the values of its program and sinks.
    """
    rank, dtype, precision = inputs[0].ndim, dtype_of(spec.dtype), spec.precision
    wide = [x[(None,) * (4 - rank)] for x in inputs]
    offset = spec.offset if offset is None else offset
    common: dict[str, Any] = {"scale": spec.scale, "band": spec.band, "offset": offset, "scoring": scoring}
    exact = reference.attend(*wide, dtype=reference.oracle_dtype(dtype.name), **common)
    accumulator = np.dtype(dtype.accumulator)
    narrow = [x.astype(accumulator) for x in wide]
    baselines = [
        vanilla.attend(*narrow, dtype=dtype.name, precision=precision, order=order, **common)
        for order in key_orders(spec.kv_len)
    ]
    lead = (0,) * (4 - rank)
    o = allow(exact.o, [vanilla.rounded(b.o, vanilla.STORED.get(dtype.name)) for b in baselines], dtype.name)
    lse = allow(exact.lse, [b.lse for b in baselines], dtype_of(accumulator).name, kind="lse")
    lse += math.sqrt(spec.head_size) * dtype_of(accumulator).eps / 2 * _largest_products(*wide[:2], **common)
    return Expected(exact.o[lead], o, dtype.name), Expected(exact.lse[lead], lse, dtype_of(accumulator).name)


def expect_sums(
    spec: AttentionSpec,
    inputs: Sequence[np.ndarray],
    scoring: Scoring | None = None,
    wanted: frozenset[str | int] = frozenset("qkv"),
) -> tuple[dict[str | int, Expected], np.ndarray, np.ndarray]:
    """What the gradients of a validated call should be, of names and slots; and o, as it is stored, and lse, from which
    they are to be computed. The inputs do, q, k, v, of four axes, may be widened; the spec's offset is a number."""
    dtype, offset = dtype_of(spec.dtype), spec.offset
    common: dict[str, Any] = {"scale": spec.scale, "band": spec.band, "offset": offset, "scoring": scoring}

    def sums(family: Any, values: Sequence[np.ndarray], o: Any, lse: Any, order: Any = None) -> dict[str | int, Any]:
        do, q, k, v = values
        found: Sums = family.backward(spec, Inputs(do, q, k, v, o, lse, None), offset, scoring, wanted, order)
        named = ((n, getattr(found, n)) for n in ("q", "k", "v", "sinks") if n in wanted)
        return dict([*named, *found.arrays.items()])

    truth, baselines, (o, lse) = gradient_baselines(spec, inputs, sums, **common)
    found = {}
    for name, value in truth.items():
        own = dtype.name if name in ("q", "k", "v") else dtype_of(np.dtype(dtype.accumulator)).name
        stored = [vanilla.rounded(x[name], own) if own in vanilla.STORED else x[name] for x in baselines]
        found[name] = Expected(value, allow(value, stored, own, kind="gradient"), own)
    return found, o, lse


def gradient_baselines(
    spec: AttentionSpec, inputs: Sequence[np.ndarray], backward: Callable[..., Any], **common: Any
) -> tuple[Any, list[Any], tuple[np.ndarray, np.ndarray]]:
    """What `backward` makes of the exact output and lse, of those of every baseline, and the first one's, as stored.

    inputs: do, q, k, v, of four axes, maybe widened; backward(family, inputs, o, lse, order); common: of `attend`.
    """
    dtype, kept = dtype_of(spec.dtype), vanilla.STORED.get(spec.dtype)
    exact = reference.attend(*inputs[1:], dtype=reference.oracle_dtype(dtype.name), **common)
    truth = backward(reference, inputs, exact.o, exact.lse, None)
    narrow = [x.astype(dtype.accumulator) for x in inputs]
    parts, found = [], []
    for order in key_orders(spec.kv_len):
        part = vanilla.attend(*narrow[1:], dtype=dtype.name, precision=spec.precision, order=order, **common)
        parts.append((vanilla.rounded(part.o, kept), part.lse))
        found.append(backward(vanilla, narrow, *parts[-1], order))
    with np.errstate(over="ignore"):
        o, lse = (x.astype(dtype.accumulator) for x in (exact.o, exact.lse))
        found.append(backward(reference, inputs, vanilla.rounded(o, kept), lse, None))
    return truth, found, parts[0]


def allow(exact: np.ndarray, baselines: Sequence[np.ndarray], dtype: str, *, kind: str = "output") -> float:
    """The allowed error of a tensor whose reference is `exact` and that the baseline computed so, in several orders.

    Elements that the reference has finite and a baseline has not (float16 scores overflow where they are stored)
    say nothing of rounding and are left out; ValueError where nothing else is left.
    """
    finite = np.isfinite(exact)
    if not finite.any():
        return 0.0
    errors = [
        np.max(np.abs(b[both].astype(exact.dtype) - exact[both]))
        for b in baselines
        if (both := finite & np.isfinite(b)).any()
    ]
    if not errors:
        raise ValueError("the baseline overflows in every element: the accuracy rule says nothing about these inputs")
    return float(FACTOR[kind] * max(errors) + 2 * ulp(np.max(np.abs(exact[finite])), dtype))


def ulp(x: float, dtype: str) -> float:
    """The distance from abs(x) to the next larger number of the dtype: one unit in the last place."""
    row = dtype_of(dtype)
    exponent = math.frexp(max(abs(float(x)), row.tiny))[1] - 1
    return row.eps * 2.0**exponent


def key_orders(kv_len: int) -> list[np.ndarray]:
    """The four orders in which the baseline sums the keys: as they come, and three fixed shuffles."""
    shuffles = np.random.default_rng(0)
    return [np.arange(kv_len), *(shuffles.permutation(kv_len) for _ in range(_ORDERS - 1))]


def _largest_products(
    q: np.ndarray, k: np.ndarray, *, scale: float, band: Any, offset: Any, scoring: Scoring | None
) -> float:
    """The largest |scale| * sum |q||k| of a visible pair whose score is finite; 0 without any."""
    (batch, heads, q_len, _), group = q.shape, q.shape[1] // max(k.shape[1], 1)
    offsets, largest = np.broadcast_to(offset, (batch,)), 0.0
    with np.errstate(all="ignore"):
        for b, h in np.ndindex(batch, heads):
            sums = np.abs(q[b, h]).astype(np.float64) @ np.abs(k[b, h // group]).astype(np.float64).T  # (S_q, S_kv)
            rows, keys = np.arange(q_len), np.arange(k.shape[2])
            counted = np.isfinite(sums)
            if (seen := visible(band, int(offsets[b]), rows, keys)) is not None:
                counted &= seen
            if scoring is not None and scoring.program is not None:
                counted &= scoring.program.visible(b, h, rows[:, None], keys[None, :])
            largest = max(largest, np.max(sums, where=counted, initial=0.0))
    return abs(scale) * largest


def values_of(x: Any) -> np.ndarray:
    """A tensor's values in a NumPy dtype that has arithmetic: bfloat16 as float32, a torch tensor as float64."""
    if type(x).__module__ == "torch":
        return x.detach().cpu().double().numpy()
    return np.asarray(x).astype(np.float32) if dtype_of(x.dtype).name == "bfloat16" else np.asarray(x)
