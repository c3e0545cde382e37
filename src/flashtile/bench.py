"""`flashtile bench`: this machine's speed in a minute, beside NumPy and, where it is installed, PyTorch.

All run in one process with what else it holds; `python -m benchmarks` in a clone compares with every peer, each in a
process of its own, and measures against the machine's peak.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import flashtile
from flashtile.errors import KernelError
from flashtile.testing import expect, expect_gradients

ROUNDS = 5
SECONDS = 0.2  # a round of one contestant repeats its call for about so long


@dataclass(frozen=True)
class Case:
    """One shape (B, H, S, D), used for q, k and v, in one dtype."""

    shape: tuple[int, int, int, int]
    dtype: str
    causal: bool = False

    def flops(self, backward: bool = False) -> int:
        """Of the two products, of gradients five; causal counts the visible pairs."""
        return flashtile.explain(self.shape, dtype=self.dtype, causal=self.causal, backward=backward).flops

    def __str__(self) -> str:
        return f"{self.dtype} {'causal' if self.causal else 'dense'} ({','.join(map(str, self.shape))})"


CASES = (
    Case((1, 8, 1024, 64), "float32"),
    Case((1, 8, 1024, 64), "float32", causal=True),
    Case((1, 8, 1024, 128), "float32"),
    Case((1, 8, 1024, 64), "bfloat16"),
    Case((1, 8, 1024, 64), "float16"),
    Case((1, 8, 1024, 64), "float64"),
)

Contestant = Callable[[], tuple[np.ndarray, ...]]  # o, or the gradients of q, k and v


def cases_of(shape: tuple[int, int, int, int]) -> list[Case]:
    """Every dtype and mask of CASES, once, with another shape."""
    return list(dict.fromkeys(Case(shape, case.dtype, case.causal) for case in CASES))


def table(cases: list[Case], *, backward: bool = False) -> Iterator[str]:
    """The lines of the table, each as soon as its case is done: median GFLOP/s of each contestant, and our ratio to
    the best other. Of the forward, or of its gradients, given what it left.

    Raises: KernelError if a result of flashtile is not accurate; nothing wrong is timed.
    """
    peers = ["numpy"] + ["torch"] * (importlib.util.find_spec("torch") is not None)
    if importlib.util.find_spec("ml_dtypes") is None and any(case.dtype == "bfloat16" for case in cases):
        yield "no bfloat16: NumPy's comes from ml_dtypes (pip install ml_dtypes)"
        cases = [case for case in cases if case.dtype != "bfloat16"]
    yield f"{'GFLOP/s':<36}" + "".join(f"{name:>11}" for name in ["flashtile", *peers, "ratio"])
    for case in cases:
        speed = _measure(case, peers, backward)
        best = max((speed[name] for name in peers if name in speed), default=None)
        ratio = "-" if best is None else f"{speed['flashtile'] / best:.3g}"
        cells = [f"{speed[name]:.3g}" if name in speed else "wrong" for name in ["flashtile", *peers]]
        yield f"{case!s:<36}" + "".join(f"{cell:>11}" for cell in [*cells, ratio])


def _measure(case: Case, peers: list[str], backward: bool) -> dict[str, float]:
    """Median GFLOP/s by contestant; a peer whose result is not accurate is absent. Rounds are interleaved, so that a
    busy moment of the machine meets all."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(case.shape).astype(_dtype(case.dtype)) for _ in range(4 if backward else 3)]
    known: dict[str, Callable[..., Contestant]] = _DIFFERENTIATING if backward else _CONTESTANTS
    contestants = {name: known[name](*arrays, case.causal) for name in ["flashtile", *peers]}
    right = {name: _accurate(call(), *arrays, causal=case.causal) for name, call in contestants.items()}
    if not right["flashtile"]:
        raise KernelError(f"bench: got an inaccurate result for {case}, expected one within the accuracy rule")
    times: dict[str, list[float]] = {name: [] for name in contestants if right[name]}
    for _ in range(ROUNDS):
        for name, seconds in times.items():
            seconds.append(_time(contestants[name]))
    flops = case.flops(backward)
    return {name: flops / 1e9 / float(np.median(seconds)) for name, seconds in times.items()}


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # adds it to NumPy

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _wide(x: np.ndarray) -> type:
    """What NumPy computes in, which has no fast 16-bit products."""
    return np.float64 if x.dtype == np.float64 else np.float32


def _tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x) if x.dtype.kind == "f" else torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)


def _array(x: Any, like: np.ndarray) -> np.ndarray:
    import torch

    found: np.ndarray = x.numpy() if like.dtype.kind == "f" else x.view(torch.int16).numpy().view(like.dtype)
    return found


def _accurate(result: tuple[np.ndarray, ...], *arrays: np.ndarray, causal: bool) -> bool:
    """Whether the first head of a result obeys the accuracy rule."""
    q, k, v, *do = (x[:1, :1] for x in arrays)
    if do:
        gradients = expect_gradients(do[0], q, k, v, causal=causal)
        expected = [gradients.q, gradients.k, gradients.v]
    else:
        expected = [expect(q, k, v, causal=causal)[0]]
    try:
        for want, got in zip(expected, result, strict=True):
            want.check(got[:1, :1])
    except AssertionError:
        return False
    return True


def _time(call: Contestant) -> float:
    """Seconds of one call, averaged over a round."""
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS or not calls:
        call()
        calls += 1
    return elapsed / calls


def _flashtile(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> Contestant:
    return lambda: (flashtile.attention(q, k, v, causal=causal),)


def _flashtile_backward(q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, causal: bool) -> Contestant:
    o, lse = flashtile.attention(q, k, v, causal=causal, return_lse=True)

    def call() -> tuple[np.ndarray, ...]:
        found = flashtile.attention_backward(do, q, k, v, o, lse, causal=causal)
        return found.q, found.k, found.v

    return call


def _numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> Contestant:
    """The unfused three stages, in place where NumPy can; float16 in float32, for which there is a BLAS."""
    wide: Any = _wide(q)
    hidden = np.triu(np.ones((q.shape[2], k.shape[2]), bool), 1)

    def call() -> tuple[np.ndarray, ...]:
        s = np.matmul(q.astype(wide, copy=False), k.astype(wide, copy=False).swapaxes(-1, -2))
        s *= q.shape[-1] ** -0.5
        if causal:
            s[..., hidden] = -np.inf
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        o = np.matmul(s, v.astype(wide, copy=False))
        o /= s.sum(axis=-1, keepdims=True)
        return (o.astype(q.dtype, copy=False),)

    return call


def _numpy_backward(q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, causal: bool) -> Contestant:
    """The unfused five products, given the weights and the output that the unfused forward left."""
    wide: Any = _wide(q)
    scale = q.shape[-1] ** -0.5
    s = np.matmul(q.astype(wide), k.astype(wide).swapaxes(-1, -2)) * scale
    if causal:
        s[..., np.triu(np.ones((q.shape[2], k.shape[2]), bool), 1)] = -np.inf
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    o = np.matmul(p, v.astype(wide))

    def call() -> tuple[np.ndarray, ...]:
        query, key, value, arrived = (x.astype(wide, copy=False) for x in (q, k, v, do))
        ds = np.matmul(arrived, value.swapaxes(-1, -2))
        ds -= (arrived * o).sum(axis=-1, keepdims=True)
        ds *= p
        ds *= scale
        dq, dk = np.matmul(ds, key), np.matmul(ds.swapaxes(-1, -2), query)
        dv = np.matmul(p.swapaxes(-1, -2), arrived)
        return tuple(x.astype(q.dtype, copy=False) for x in (dq, dk, dv))

    return call


def _torch(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> Contestant:
    import torch

    torch.set_num_threads(flashtile.get_num_threads())
    query, key, value = (_tensor(x) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: (_array(attend(query, key, value, is_causal=causal), q),)


def _torch_backward(q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, causal: bool) -> Contestant:
    import torch

    torch.set_num_threads(flashtile.get_num_threads())
    query, key, value = tensors = tuple(_tensor(x).requires_grad_() for x in (q, k, v))
    arrived = _tensor(do)
    o = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return lambda: tuple(_array(x, q) for x in torch.autograd.grad(o, tensors, arrived, retain_graph=True))


_CONTESTANTS = {"flashtile": _flashtile, "numpy": _numpy, "torch": _torch}
_DIFFERENTIATING = {"flashtile": _flashtile_backward, "numpy": _numpy_backward, "torch": _torch_backward}
