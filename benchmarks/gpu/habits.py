"""What only a device shows: that nothing waits, streams, graphs, threads, far addresses, other libraries' arrays.

Each habit is a function without arguments that returns what is wrong, or None. A dry run takes them at small sizes on
Triton's interpreter, with stand-ins for what is CUDA's own (stand_ins.py), so that their lines have run before; but for
those that want another machine altogether.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import host, stand_ins, tasks
from .steps import out_of_time

Habit = Callable[[], "str | None"]
HABITS: dict[str, Habit] = {}
ANYWHERE: set[str] = set()  # names of those that a dry run takes
dry = False


def habit(name: str, anywhere: bool = False) -> Callable[[Habit], Habit]:
    """Enter a habit under its name; anywhere: stand-ins for a device will do."""

    def enter(function: Habit) -> Habit:
        HABITS[name] = function
        if anywhere:
            ANYWHERE.add(name)
        return function

    return enter


def _random(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    made = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    return made if dry else made.cuda()


def _attend(*arrays: Any, **options: Any) -> Any:
    import flashtile.torch

    return flashtile.torch.attention(*arrays, kernel="triton", **options)


def _held(o: Any, lse: Any, *arrays: Any, **options: Any) -> str | None:
    """What the accuracy rule says of an answer."""
    from flashtile.testing import expect

    right = expect(*(x.cpu() for x in arrays), **options)
    try:
        for expected, got, name in zip(right, (o, lse), ("output", "lse"), strict=True):
            expected.check(got.cpu(), name)
    except AssertionError as error:
        return str(error)[:300]
    return None


def _same(got: Any, want: Any, otherwise: str) -> str | None:
    import torch

    return None if torch.equal(got, want) else otherwise


@habit("nothing waits, and the caller's stream is used", anywhere=True)
def nothing_waits() -> str | None:
    import torch

    q = _random(1, 2, 40, 64) if dry else _random(2, 8, 512, 64)
    slopes = torch.rand(q.shape[1], device=q.device)
    want = _attend(q, q, q, causal=True, alibi_slopes=slopes)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(side):
            got = _attend(q, q, q, causal=True, alibi_slopes=slopes)
    except RuntimeError as error:
        return f"the call waited: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    return _same(got, want, "other bits than on the default stream")


@habit("a stream that is busy orders the launch", anywhere=True)
def ordered() -> str | None:
    import torch

    stream, q = torch.cuda.Stream(), _random(1, 4, 60 if dry else 700, 64)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        o, lse = _attend(late, q, q, causal=True, return_lse=True)
    stream.synchronize()
    return _held(o, lse, q, q, q, causal=True)


@habit("a CUDA graph, replayed with other contents", anywhere=True)
def graph() -> str | None:
    return _replayed(causal=True)


@habit("a CUDA graph of a call with tables", anywhere=True)
def graph_with_tables() -> str | None:
    """Documents, and the tiles that they hide, are copied from the host: neither is on the capture's stream yet."""
    ids = np.arange(513) // 100
    return _replayed(mask=lambda b, h, i, j: ids[i] == ids[j])


def _replayed(**options: Any) -> str | None:
    import torch

    q = _random(1, 2, 40, 64) if dry else _random(2, 4, 513, 64)
    want, x = _attend(q, q, q, **options), torch.zeros_like(q)
    _attend(x, x, x, **options)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        o = _attend(x, x, x, **options)
    x.copy_(q)
    captured.replay()
    torch.cuda.synchronize()
    return _same(o, want, "a replayed graph gave other bits")


@habit("a CUDA graph, keys in parts", anywhere=True)
def graph_of_parts() -> str | None:
    import torch

    heads, keys = (2, 1200) if dry else (8, 8192)
    q, k = _random(1, 4 * heads, 1, 64), _random(1, heads, keys, 64)
    want = _attend(q, k, k)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        o = _attend(q, k, k)
    captured.replay()
    torch.cuda.synchronize()
    return _same(o, want, "a replayed graph gave other bits")


@habit("strides of 2^31 elements", anywhere=True)
def far() -> str | None:
    import torch

    some = _random(2, 1, 40 if dry else 256, 64, dtype="float16")
    apart = 2**20 if dry else 2**31
    memory = torch.empty(apart + 2**20, device=some.device, dtype=torch.float16)
    q = torch.as_strided(memory, some.shape, (apart, 64 * 256, 64, 1)).copy_(some)
    return _held(*_attend(q, q, q, causal=True, return_lse=True), q, q, q, causal=True)


@habit("eight threads on eight streams", anywhere=True)
def threads() -> str | None:
    import torch

    q, times = (_random(1, 1, 40, 64), 1) if dry else (_random(1, 8, 400, 64), 50)
    want = _attend(q, q, q, causal=True)
    torch.cuda.synchronize()
    different: list[int] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for n in range(times):
                if not torch.equal(_attend(q, q, q, causal=True), want):
                    different.append(n)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return f"{len(different)} of {8 * times} calls differ" if different else None


@habit("the same bits in every repetition", anywhere=True)
def repeated() -> str | None:
    import torch

    q, times = (_random(1, 2, 70, 64), 2) if dry else (_random(4, 16, 2000, 128), 200)
    first = _attend(q, q, q, causal=True)
    different = sum(not torch.equal(_attend(q, q, q, causal=True), first) for _ in range(times))
    return f"{different} of {times} repetitions differ (a race)" if different else None


@habit("many keys", anywhere=True)
def many_keys() -> str | None:
    keys = 300 if dry else 100_000
    q, k = _random(1, 1, 30, 64, dtype="float32"), _random(1, 1, keys, 64, dtype="float32")
    return _held(*_attend(q, k, k, return_lse=True), q, k, k)


@habit("hidden NaN and inf change no bit", anywhere=True)
def hidden() -> str | None:
    n = 50 if dry else 250
    q, k, v = (_random(1, 4, n + 20, 64) for _ in range(3))
    clean = _attend(*(x[:, :, :n].contiguous() for x in (q, k, v)), causal=True)
    k[:, :, n:], v[:, :, n + 1] = float("nan"), float("inf")
    return _same(_attend(q, k, v, causal=True)[:, :, :n], clean, "rows that see no NaN changed")


@habit("tensors on two devices are refused", anywhere=True)
def two_devices() -> str | None:
    import flashtile

    q = _random(1, 1, 8, 64)
    k = q.to("meta") if dry else q.cpu()
    try:
        _attend(q, k, k)
    except flashtile.SpecError:
        return None
    return "no error"


@habit("CuPy arrays on a stream of their own")
def cupy_arrays() -> str | None:
    import cupy

    import flashtile
    from flashtile.testing import expect

    for dtype in ("float16", "float32", "float64"):
        with cupy.cuda.Stream(non_blocking=True):
            q = cupy.random.standard_normal((2, 4, 300, 64)).astype(dtype)
            o, lse = flashtile.attention(q, q, q, causal=True, kernel="triton", return_lse=True)
            x, *got = (cupy.asnumpy(a) for a in (q, o, lse))
        for expected, have, name in zip(expect(x, x, x, causal=True), got, ("output", "lse"), strict=True):
            expected.check(have, name)
    return None


@habit("JAX arrays", anywhere=True)
def jax_arrays() -> str | None:
    import jax

    import flashtile
    from flashtile.testing import expect

    for dtype in ("float32", "bfloat16"):
        shape = (1, 2, 60, 64) if dry else (2, 4, 300, 64)
        q = jax.random.normal(jax.random.key(0), shape).astype(dtype)
        o, lse = flashtile.attention(q, q, q, causal=True, kernel="triton", return_lse=True)
        x = np.asarray(q)
        for expected, have, name in zip(expect(x, x, x, causal=True), (o, lse), ("output", "lse"), strict=True):
            expected.check(np.asarray(have), name)
    return None


@habit("JAX arrays that are dropped at once", anywhere=True)
def lent() -> str | None:
    """JAX gives their memory to its next operation; the kernel may still have to read them."""
    import jax
    import jax.numpy as jnp

    import flashtile

    shape, times = ((1, 2, 40, 64), 2) if dry else ((4, 16, 4096, 64), 30)
    base = jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)
    want = np.asarray(flashtile.attention(base + 0, base + 0, base + 0, causal=True, kernel="triton"))
    wrong = 0
    for n in range(times):
        x = base + 0
        o = flashtile.attention(x, x, x, causal=True, kernel="triton")
        del x
        junk = [jnp.full_like(base, n) for _ in range(4)]
        wrong += not np.array_equal(np.asarray(o), want)
        del junk
    return f"{wrong} of {times} results were overwritten" if wrong else None


@habit("StarPU's CUDA workers")
def cuda_workers() -> str | None:
    """Attention and its gradients by tasks of kernels compiled ahead of time, where a StarPU with CUDA is."""
    from flashtile import starpu
    from flashtile.engines.starpu import unavailable
    from flashtile.kernels.triton import aot

    if (reason := unavailable()) is not None:
        raise ImportError(reason)
    starpu.init()
    has_some = starpu.workers("cuda")
    starpu.shutdown()
    if not has_some:
        raise ImportError("this StarPU has no CUDA workers")
    with tempfile.TemporaryDirectory() as folder:
        import torch

        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        for _ in aot.build(Path(folder), arch, tasks.kernels(arch)):
            pass
        starpu.init(workers=1, cuda_kernels=folder)
        starpu.restrict("cuda")
        tasks.attention(1500)
        starpu.shutdown()
    return None


@habit("the kernel in Gluon", anywhere=True)  # the last: its groups of warps might wait for each other for ever
def in_gluon() -> str | None:
    """On Hopper alone, where no call takes it: whether it is right. A dry run launches it on a driver that does
    nothing, in another process, since nothing of it runs in an interpreter."""
    import torch

    from flashtile.kernels.triton import gluon, release

    arch = "sm_90" if dry else "sm_{}{}".format(*torch.cuda.get_device_capability())
    if arch != "sm_90" or (release() or (0,)) < gluon.NEEDS:
        raise ImportError(f"is for sm_90 and Triton {gluon.NEEDS}, this is {arch} and {release()}")
    if dry:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", "from benchmarks.gpu import habits; habits.rehearse_gluon()"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stderr[-300:] if done.returncode else None
    for size, options in IN_GLUON:
        o, lse, *inputs = _launched_in_gluon(size, options)
        if wrong := _held(o, lse, *inputs, **options):
            return f"head size {size}, {options}: {wrong}"
    return None


IN_GLUON: tuple[tuple[int, dict[str, Any]], ...] = (
    (64, {"align": "top_left", "causal": True}),
    (128, {"align": 90, "causal": True}),
    (128, {"align": "top_left"}),
)


def _launched_in_gluon(size: int, options: dict[str, Any]) -> tuple[Any, ...]:
    """o, lse, q, k and v of a launch."""
    import torch

    from flashtile import current, devices
    from flashtile.arrays import view_of
    from flashtile.kernels import Layout
    from flashtile.kernels.triton import cuda, gluon
    from flashtile.spec import AttentionSpec

    os.environ[gluon.VARIABLE] = "1"
    q, (k, v) = _random(2, 4, 500, size), (_random(2, 2, 590, size) for _ in range(2))
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    spec = AttentionSpec.of(q, k, v, **options)
    layout = Layout(*(view_of(x).strides4() for x in (q, k, v, o)))
    with current.calling(devices.owner_of("torch"), q):
        gluon.attend(spec, layout, *(x.data_ptr() for x in (q, k, v, o, lse)), cuda.Gpu(), "sm_90")
    return o, lse, q, k, v


def rehearse_gluon() -> None:
    """In a process of its own: one of these launches, on a driver that does nothing."""
    global dry
    dry = True
    host.pretend()
    if host.launches(lambda: _launched_in_gluon(*IN_GLUON[1])) != 1:
        raise SystemExit("launched nothing")


def every(without_device: bool) -> Iterator[tuple[str, str, str]]:
    """(habit, verdict, why) of each: ok, WRONG, or not run with its reason; as they come, since one may never end."""
    global dry
    dry = without_device
    for name, look in HABITS.items():
        if dry and name not in ANYWHERE:
            yield name, "not run", "needs a device, and no stand-in will do"
            continue
        if out_of_time():
            yield name, "not run", "out of time"
            continue
        began = time.monotonic()
        try:
            with stand_ins.installed() if dry else contextlib.nullcontext():
                why = look()
            yield name, "ok" if why is None else "WRONG", why or f"{time.monotonic() - began:.1f} s"
        except ImportError as missing:
            yield name, "not run", str(missing)
        except Exception as error:  # one that breaks must not hide the others
            yield name, "WRONG", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
