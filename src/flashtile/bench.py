"""`flashtile bench`: this machine's speed in a minute, beside NumPy and, where it is installed, PyTorch.

All run in one process with what else it holds; `python -m benchmarks` in a clone compares with every peer, each in a
process of its own, and measures against the machine's peak.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

import flashtile
from flashtile.errors import KernelError
from flashtile.testing import expect

ROUNDS = 5
SECONDS = 0.2  # a round of one contestant repeats its call for about so long


@dataclass(frozen=True)
class Case:
    """One shape (B, H, S, D), used for q, k and v, in one dtype."""

    shape: tuple[int, int, int, int]
    dtype: str
    causal: bool = False

    @property
    def flops(self) -> int:
        """Of the two products; causal counts the visible pairs."""
        return flashtile.explain(self.shape, dtype=self.dtype, causal=self.causal).flops

    def __str__(self) -> str:
        return f"{self.dtype} {'causal' if self.causal else 'dense'} ({','.join(map(str, self.shape))})"


CASES = (
    Case((1, 8, 1024, 64), "float32"),
    Case((1, 8, 1024, 64), "float32", causal=True),
    Case((1, 8, 1024, 128), "float32"),
    Case((1, 8, 1024, 64), "float16"),
    Case((1, 8, 1024, 64), "float64"),
)

Contestant = Callable[[], np.ndarray]


def cases_of(shape: tuple[int, int, int, int]) -> list[Case]:
    """Every dtype and mask of CASES, once, with another shape."""
    return list(dict.fromkeys(Case(shape, case.dtype, case.causal) for case in CASES))


def table(cases: list[Case]) -> Iterator[str]:
    """The lines of the table, each as soon as its case is done: median GFLOP/s of each contestant, and our ratio to
    the best other.

    Raises: KernelError if a result of flashtile is not accurate; nothing wrong is timed.
    """
    peers = ["numpy"] + ["torch"] * (importlib.util.find_spec("torch") is not None)
    yield f"{'GFLOP/s':<36}" + "".join(f"{name:>11}" for name in ["flashtile", *peers, "ratio"])
    for case in cases:
        speed = _measure(case, peers)
        best = max((speed[name] for name in peers if name in speed), default=None)
        ratio = "-" if best is None else f"{speed['flashtile'] / best:.3g}"
        cells = [f"{speed[name]:.3g}" if name in speed else "wrong" for name in ["flashtile", *peers]]
        yield f"{case!s:<36}" + "".join(f"{cell:>11}" for cell in [*cells, ratio])


def _measure(case: Case, peers: list[str]) -> dict[str, float]:
    """Median GFLOP/s by contestant; a peer whose result is not accurate is absent. Rounds are interleaved, so that a
    busy moment of the machine meets all."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(case.shape).astype(case.dtype) for _ in range(3))
    contestants = {name: _CONTESTANTS[name](q, k, v, case.causal) for name in ["flashtile", *peers]}
    right = {name: _accurate(call(), q, k, v, case.causal) for name, call in contestants.items()}
    if not right["flashtile"]:
        raise KernelError(f"bench: got an inaccurate result for {case}, expected one within the accuracy rule")
    times: dict[str, list[float]] = {name: [] for name in contestants if right[name]}
    for _ in range(ROUNDS):
        for name, seconds in times.items():
            seconds.append(_time(contestants[name]))
    return {name: case.flops / 1e9 / float(np.median(seconds)) for name, seconds in times.items()}


def _accurate(o: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> bool:
    """Whether the first head of a result obeys the accuracy rule."""
    exact, _ = expect(q[:1, :1], k[:1, :1], v[:1, :1], causal=causal)
    try:
        exact.check(o[:1, :1])
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
    return lambda: flashtile.attention(q, k, v, causal=causal)


def _numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> Contestant:
    """The unfused three stages, in place where NumPy can; float16 in float32, for which there is a BLAS."""
    wide = np.float32 if q.dtype == np.float16 else q.dtype
    hidden = np.triu(np.ones((q.shape[2], k.shape[2]), bool), 1)

    def call() -> np.ndarray:
        s = np.matmul(q.astype(wide, copy=False), k.astype(wide, copy=False).swapaxes(-1, -2))
        s *= q.shape[-1] ** -0.5
        if causal:
            s[..., hidden] = -np.inf
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        o = np.matmul(s, v.astype(wide, copy=False))
        o /= s.sum(axis=-1, keepdims=True)
        return o.astype(q.dtype, copy=False)

    return call


def _torch(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> Contestant:
    import torch

    torch.set_num_threads(flashtile.get_num_threads())
    query, key, value = (torch.from_numpy(x) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, key, value, is_causal=causal).numpy()


_CONTESTANTS = {"flashtile": _flashtile, "numpy": _numpy, "torch": _torch}
