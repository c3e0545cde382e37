"""Short calls on torch's own threads: every item once, failures told, the bits of the pool, none in a forked child."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile import threads as offered
from flashtile.engines import direct
from flashtile.errors import KernelError
from flashtile.kernels import NativeRun, Stage
from flashtile.plan import Plan

torch = pytest.importorskip("torch")

import flashtile.torch  # noqa: E402

if offered.team() is None:
    pytest.skip("this torch has no team that can be asked", allow_module_level=True)

KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@pytest.fixture
def team() -> Iterator[Any]:
    """The team, offered again after the test."""
    yield offered.team()
    flashtile.torch.team.lend()


class Counting:
    """A native kernel that counts how often each item runs, and fails at one."""

    scratch_bytes = 100
    merge_stage: Stage | None = None
    run: Any

    def __init__(self, items: int, failing: int = -1) -> None:
        self.counts, self.failing = [0] * items, failing
        self.lock, self.scratch, self.threads = threading.Lock(), {}, set()
        self.run = KERNEL(self._run)

    def _run(self, params: bytes, begin: int, end: int, scratch: int) -> int:
        assert params == b"parameters"
        with self.lock:
            self.scratch.setdefault(threading.get_ident(), set()).add(scratch)
            for item in range(begin, end):
                self.counts[item] += 1
        return 7 * (begin <= self.failing < end)


class CountingMerge(Counting):
    """The same in two stages, each on a block of the parameters; it fails in the second one."""

    def __init__(self, items: int, merged: int, failing: int = -1) -> None:
        super().__init__(items)
        self.merging = Counting(merged, failing)
        self.run = NativeRun(self.run, 0)
        self.merge_stage = Stage(merged, NativeRun(self.merging.run, 1), direct.ROUND_FLOPS, 64)


def prepared(kernel: Counting, flops: int = direct.ROUND_FLOPS) -> Any:
    items = len(kernel.counts)
    plan = Plan(batch=1, heads=1, query_tiles=items, splits=1, tile_q=1, tile_k=1, flops=flops)
    return direct.prepare(plan, kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("items", [2, 7, 1000])
def test_every_item_runs_once(team: Any, threads: Callable[[int], None], n: int, items: int) -> None:
    threads(n)
    kernel = Counting(items)
    prepared(kernel)(b"parameters")
    assert kernel.counts == [1] * items
    addresses = [x for found in kernel.scratch.values() for x in found]
    assert len(set(addresses)) == len(addresses) <= n and all(x % 64 == 0 for x in addresses)


def test_parameters_may_be_an_address(team: Any, threads: Callable[[int], None]) -> None:
    """As NNTile's arrays give them."""
    threads(2)
    parameters, kernel = ctypes.create_string_buffer(b"parameters"), Counting(7)
    prepared(kernel)(ctypes.addressof(parameters))
    assert kernel.counts == [1] * 7


def test_a_status_names_the_place(team: Any, threads: Callable[[int], None]) -> None:
    threads(2)
    with pytest.raises(
        KernelError, match=r"work items \[32, 40\) of 64, from batch 0, head 0, query tile 32: status 7"
    ):
        prepared(Counting(64, failing=33))(b"parameters")


def test_calls_of_a_length_alone_and_with_threads_alone(team: Any, threads: Callable[[int], None]) -> None:
    """Neither what one core does sooner, nor what lasts so long that waiting threads do not matter; and none of one
    thread."""
    asked = []

    def spy(*given: Any) -> tuple[int, int]:
        asked.append(given[3] - given[2])
        return team(*given)

    offered.lend(lambda: spy)
    for n, flops, expected in (
        (2, direct.SMALL_FOR_TEAM, []),
        (2, direct.SMALL_FOR_TEAM + 1, [8]),
        (2, direct.ROUND_FLOPS, [8]),
        (2, direct.LONG_FLOPS, [2, 6]),
        (2, direct.LONG_FLOPS + 1, []),
        (1, direct.ROUND_FLOPS, []),
    ):
        asked.clear()
        threads(n)
        kernel = Counting(8)
        prepared(kernel, flops)(b"parameters")
        assert asked == expected and kernel.counts == [1] * 8
    threads(2)
    prepared(Counting(8))(b"parameters", lambda done, total: None)
    assert asked == [], "progress is reported by the pool"


def test_steps_of_a_decoder_are_given_away_by_the_time_that_they_read(
    team: Any, threads: Callable[[int], None]
) -> None:
    """At whatever number of keys: 1 MFLOP in fp32 takes as long as 4 where many queries share a key."""
    threads(2)
    asked = []

    def spy(*given: Any) -> tuple[int, int]:
        asked.append(given[3] - given[2])
        return team(*given)

    offered.lend(lambda: spy)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 8, n, 64), dtype=np.float32) for n in (1, 700))
    enough = direct.SMALL_FOR_TEAM // (4 * 2 * 8 * 128) + 1
    for n, given in ((enough - 1, []), (enough, [8]), (700, [8]), (enough - 1, [])):
        asked.clear()
        flashtile.attention(q, k[:, :, :n], k[:, :, :n], kernel="cpu")
        assert asked == given, n


def test_rounds_end_in_time_for_an_interrupt(team: Any, threads: Callable[[int], None]) -> None:
    """A call of 0.3 s and more is handed over in rounds, and an error in one of them ends it."""
    threads(2)
    rounds = []

    def spy(*given: Any) -> tuple[int, int]:
        rounds.append(tuple(given[2:4]))
        return team(*given)

    class Slow(Counting):
        def _run(self, params: bytes, begin: int, end: int, scratch: int) -> int:
            time.sleep(0.005 * (end - begin))
            return super()._run(params, begin, end, scratch)

    offered.lend(lambda: spy)
    kernel = Slow(200)
    prepared(kernel, 10 * direct.ROUND_FLOPS)(b"parameters")
    assert kernel.counts == [1] * 200 and rounds[0] == (0, 20) and len(rounds) >= 3
    assert [begin for begin, _ in rounds[1:]] == [end for _, end in rounds[:-1]] and rounds[-1][1] == 200

    rounds.clear()
    failing = Slow(200, failing=20)
    with pytest.raises(KernelError, match=r"of 200, from batch 0, head 0, query tile 20: status 7"):
        prepared(failing, 10 * direct.ROUND_FLOPS)(b"parameters")
    assert len(rounds) == 2 and sum(failing.counts) < 200

    def interrupted(*given: Any) -> tuple[int, int]:
        if given[2]:
            signal.raise_signal(signal.SIGINT)
        return team(*given)

    offered.lend(lambda: interrupted)
    ended = Slow(200)
    with pytest.raises(KeyboardInterrupt):
        prepared(ended, 10 * direct.ROUND_FLOPS)(b"parameters")
    assert sum(ended.counts) == 20


def test_rounds_go_by_the_keys_of_the_call(team: Any, threads: Callable[[int], None]) -> None:
    """Not by those of an earlier one, of which it has the rest: here a hundredth as many."""
    threads(2)
    rounds = []
    offered.lend(lambda: lambda *given: (rounds.append(given[3]), team(*given))[1])
    q, k = torch.ones(1, 2, 1024, 64), torch.ones(1, 2, 24_000, 64)
    for keys, expected in ((240, 1), (24_000, 2)):
        rounds.clear()
        with torch.no_grad():
            flashtile.torch.attention(q, k[:, :, :keys], k[:, :, :keys])
        assert len(rounds) >= expected


def results() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 128, 32, generator=generator, requires_grad=True) for _ in range(3))
    o = flashtile.torch.attention(q, k, v, causal=True, softcap=5.0)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))]


def test_the_bits_are_those_of_the_pool(team: Any, threads: Callable[[int], None]) -> None:
    threads(2)
    calls = []
    offered.lend(lambda: lambda *given: (calls.append(given[3]), team(*given))[1])
    ours = results()
    assert len(calls) == 2
    offered.lend(None)
    assert all(map(torch.equal, ours, results()))
    assert len(calls) == 2


def in_parts() -> list[Any]:
    """Of one head: its keys are computed in parts, and so is dQ."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 1, 24, 64), (1, 1, 4096, 64), (1, 1, 4096, 64)
    q, k, v = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    o = flashtile.torch.attention(q, k, v)
    few = flashtile.torch.attention(q.detach()[:, :, :8], k.detach(), v.detach())
    return [few, o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))]


def test_keys_in_parts_go_to_the_team(team: Any, threads: Callable[[int], None]) -> None:
    """As those of a decoder's step, between two of torch's operators; the merge of their results is small."""
    threads(2)
    calls = []
    offered.lend(lambda: lambda *given: (calls.append(given[3]), team(*given))[1])
    ours = in_parts()
    assert len(calls) == 3 and min(calls) > 1
    offered.lend(None)
    assert all(map(torch.equal, ours, in_parts()))


def test_a_merge_that_is_not_small_goes_to_the_team(team: Any, threads: Callable[[int], None]) -> None:
    threads(2)
    kernel = CountingMerge(8, 10, failing=7)
    with pytest.raises(KernelError, match=r"merging the parts of rows \[7, 8\) of 10 failed: status 7"):
        prepared(kernel)((b"parameters", b"parameters"))
    kernel = CountingMerge(8, 10)
    prepared(kernel)((b"parameters", b"parameters"))
    assert kernel.counts == [1] * 8 and kernel.merging.counts == [1] * 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_none(team: Any, threads: Callable[[int], None]) -> None:
    """It would wait for members that stayed in the parent."""
    threads(2)
    kernel = Counting(8)
    prepared(kernel)(b"parameters")
    child = os.fork()
    if child == 0:  # pragma: no cover
        fine = False
        try:
            kernel = Counting(8)
            prepared(kernel)(b"parameters")
            fine = offered.team() is None and kernel.counts == [1] * 8
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
