"""The accuracy rule: how far an attention result may be from exact, judged from data and not from a constant.

The reference kernel says what is exact (fp64; longdouble for fp64 inputs). The unfused baseline in the same dtype
says what rounding costs on these very inputs: its largest error over four orders of the keys. A kernel may err
twice as much (a gradient three times), plus two units in the last place of the tensor's largest value. It is
finite where the reference is finite, and NaN or infinite exactly where the reference is.

lse may err by one thing more. Unlike the output it repeats a score's error in full, and the order of the keys says
nothing about the rounding of one q.k, so it is given what that sum of D products costs in any order, typically:
sqrt(D) units of roundoff of the largest scale * sum |q||k| (Higham and Mary 2019, A new approach to probabilistic
rounding error analysis).

    from flashtile.testing import assert_accurate
    o = flashtile.attention(q, k, v, causal=True)
    assert_accurate(o, q, k, v, causal=True)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashtile.calls import Options
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.gradients import ByIdentity, Gradients, Problem
from flashtile.kernels import reference, vanilla
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.signature import Align, Precision, Window
from flashtile.spec import PER_BATCH, AttentionSpec, integer

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
        """Raise AssertionError unless `got` has the shape, the dtype and, in every element, the value expected."""
        __tracebackhide__ = True
        if dtype_of(got.dtype).name != self.dtype:
            raise AssertionError(f"{name}: got dtype {got.dtype}, expected {self.dtype}")
        if tuple(got.shape) != self.value.shape:
            raise AssertionError(f"{name}: got shape {tuple(got.shape)}, expected {self.value.shape}")
        values = _values(got).astype(self.value.dtype)
        for what, holds in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
            self._reject(holds(values) != holds(self.value), values, f"{name}: {what} in one and not the other")
        with np.errstate(invalid="ignore"):
            error = np.abs(values - self.value)
        self._reject(error > self.allowed, values, f"{name}: error over the {float(self.allowed):.3g} allowed")

    def _reject(self, bad: np.ndarray, values: np.ndarray, problem: str) -> None:
        """Fail on the first marked element, saying how many there are."""
        __tracebackhide__ = True
        if bad.any():
            at = tuple(int(n) for n in np.argwhere(bad)[0])
            came = f"got {values[at]!r}, expected {self.value[at]!r}"
            raise AssertionError(f"{problem}, in {bad.sum()} of {bad.size} elements; at {at}: {came}")


def expect(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    **scores: Any,
) -> tuple[Expected, Expected]:
    """What `flashtile.attention` of the same arguments should return: the output, and lse.

    Shapes:  as `flashtile.attention`: (B, H, S, D), (H, S, D) or (S, D); NumPy arrays or CPU torch tensors; `scores`
             are its options mask, bias, score_mod, softcap, alibi_slopes and sinks.
    Units:   lse in nats.
    Numerics: see the module's text; lse is judged by the same rule, in the accumulator's dtype.
    Raises:  SpecError as `flashtile.attention`; ValueError where the baseline overflows in every element that the
             reference has finite, for the rule then says nothing.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    align, offsets = _split(align)
    options = Options(causal, window, align, scale, precision, "auto", "auto")
    changes = ScoreOptions(**scores, keep=keep_of(dropout_p, seed))
    spec, scoring = options.scored(changes, q, k, v, offsets)
    offset = offsets if spec.offset is None else spec.offset
    return expect_values(spec, [_values(x) for x in (q, k, v)], offset, scoring)


def _split(align: Any) -> tuple[Any, np.ndarray | None]:
    """`align` as `Options` has it, and the offsets if they are an array."""
    per_batch = not (align is None or isinstance(align, str) or integer(align) is not None)
    return (PER_BATCH, np.asarray(align)) if per_batch else (align, None)


def expect_gradients(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    dlse: Any = None,
    wrt: Iterable[str] = ("q", "k", "v"),
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    **scores: Any,
) -> Gradients:
    """What the gradients of sum(do * o) + sum(dlse * lse) should be, however they are computed.

    Shapes:  do as o, dlse as lse; the rest as `expect`. `wrt` as in `flashtile.attention_backward`.
    Returns: Gradients of `Expected`, None where `wrt` does not ask.
    Numerics: each by the module's rule for gradients: three times the largest error of the unfused backward, over four
             orders of the keys, each from the output and lse of the unfused forward in that order.
    Raises:  as `expect`.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    align, offsets = _split(align)
    options = Options(causal, window, align, scale, precision, "auto", "auto")
    changes = ScoreOptions(**scores, keep=keep_of(dropout_p, seed))
    problem = Problem.of((q, k, v), options, changes, offsets, wrt)
    spec, dtype = problem.spec, dtype_of(problem.spec.dtype)
    wide = [_values(x)[(None,) * (4 - x.ndim)] for x in (do, q, k, v)]
    common: dict[str, Any] = {"scale": spec.scale, "band": spec.band, "offset": problem.offset}
    common["scoring"] = problem.scoring
    row = None if dlse is None else _values(dlse)
    exact = reference.attend(*wide[1:], dtype=reference.oracle_dtype(dtype.name), **common)
    truth = problem.values(problem.differentiate(reference, [*wide, exact.o, exact.lse, row]))
    narrow = [x.astype(dtype.accumulator) for x in wide]
    baselines = []
    for order in key_orders(spec.kv_len):
        part = vanilla.attend(*narrow[1:], dtype=dtype.name, precision=spec.precision, order=order, **common)
        stored = vanilla.rounded(part.o, vanilla.STORED.get(dtype.name))
        baselines.append(problem.values(problem.differentiate(vanilla, [*narrow, stored, part.lse, row], order)))
    found: dict[str, Any] = {}
    captured = []
    for (name, source, value), *others in zip(truth, *baselines, strict=True):
        own = dtype_of(source.dtype).name
        allowed = allow(value, [_stored(x, own) for _, _, x in others], own, kind="gradient")
        found[name] = Expected(value, allowed, own)
        captured += [(source, found[name])] if name == "captured" else []
    return Gradients(**{**found, "captured": ByIdentity(captured) if "captured" in problem.names else None})


def assert_gradients_accurate(got: Gradients, do: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    """Raise AssertionError unless `got` is what `flashtile.attention_backward` should return, whatever computed it.

    Shapes:  got.q as q and so on, got.captured[array] as the array; None, or no such array, where `wrt` does not ask.
    Options: as `expect_gradients`: those of the call, dlse and wrt.
    Numerics: each one's dtype, shape and every element, by the rule of this module.
    Raises:  AssertionError naming the gradient; else as `expect_gradients`.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    __tracebackhide__ = True
    expected = expect_gradients(do, q, k, v, **options)
    for name, want in vars(expected).items():
        have = getattr(got, name)
        if (have is None) != (want is None):
            raise AssertionError(f"{name}: got {'none' if have is None else 'one'}, expected a gradient where wrt asks")
        if name != "captured":
            pairs = [(have, want)] if want is not None else []
        else:
            pairs = [(have.get(x), want[x]) for x in want or ()]
        for gradient, right in pairs:
            if gradient is None:
                raise AssertionError(f"{name}: got none for an array, expected a gradient of each one captured")
            right.check(gradient, name)


def _stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Sums rounded to the dtype that they are kept in, in one that has arithmetic."""
    return vanilla.rounded(x, dtype) if dtype in vanilla.STORED else x.astype(DTYPES[dtype].numpy)


def expect_values(
    spec: AttentionSpec, inputs: Sequence[np.ndarray], offset: Any = None, scoring: Scoring | None = None
) -> tuple[Expected, Expected]:
    """`expect` of a call that is validated already, whose inputs may be widened: q, k, v of 2 to 4 axes.

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


def assert_accurate(got: Any, q: Any, k: Any, v: Any, *, kind: str = "output", **options: Any) -> None:
    """Raise AssertionError unless `got` is what `flashtile.attention(q, k, v, **options)` should return.

    Shapes:  got (B, H, S_q, D_v) for kind "output", (B, H, S_q) for kind "lse", or with as few axes as q.
    Units:   lse in nats.
    Numerics: the dtype, the shape and every element, by the rule of this module.
    Raises:  AssertionError naming the first wrong element; else as `expect`.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    __tracebackhide__ = True
    if kind not in ("output", "lse"):
        raise ValueError(f"kind: got {kind!r}, expected 'output' or 'lse'")
    o, lse = expect(q, k, v, **options)
    (o if kind == "output" else lse).check(got, kind)


def allowed_error(q: Any, k: Any, v: Any, *, kind: str = "output", **options: Any) -> float:
    """The largest error that `assert_accurate` of the same arguments lets pass, in the units of the tensor."""
    o, lse = expect(q, k, v, **options)
    return {"output": o, "lse": lse}[kind].allowed


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
    """The distance from |x| to the next larger number of the dtype: one unit in the last place."""
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
            if (seen := reference.visible(band, int(offsets[b]), rows, keys)) is not None:
                counted &= seen
            if scoring is not None and scoring.program is not None:
                counted &= scoring.program.visible(b, h, rows[:, None], keys[None, :])
            largest = max(largest, np.max(sums, where=counted, initial=0.0))
    return abs(scale) * largest


def _values(x: Any) -> np.ndarray:
    """A tensor's values in a NumPy dtype that has arithmetic: bfloat16 as float32, a torch tensor as float64."""
    if type(x).__module__ == "torch":
        return x.detach().cpu().double().numpy()
    return np.asarray(x).astype(np.float32) if dtype_of(x.dtype).name == "bfloat16" else np.asarray(x)
