"""DistributedDataParallel: two processes train one layer as one process does on the two halves of a batch."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, run_together

from flashtile.gradient_problem import ByIdentity, Gradients
from flashtile.testing import assert_gradients_accurate

torch = pytest.importorskip("torch")
import flashtile.torch  # noqa: E402  (after torch is known to be there)

HALVES, H, S, D, STEPS = 2, 2, 6, 4, 3
SDPA = torch.nn.functional.scaled_dot_product_attention


class Layer(torch.nn.Module):
    """Attention whose scores a learnt table changes, which all samples of a batch share."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ours, self.proj = ours, torch.nn.Linear(8, 3 * H * D)
        self.table = torch.nn.Parameter(torch.randn(H, S))

    def qkv(self, x: Any) -> Any:
        """(B, S, 8) -> (3, B, H, S, D)"""
        return self.proj(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)

    def score(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.table[h, j]

    def forward(self, x: Any) -> Any:
        if self.ours:
            return flashtile.torch.attention(*self.qkv(x), score_mod=self.score)
        return SDPA(*self.qkv(x), attn_mask=self.table[:, None, :].expand(H, S, S))


def work(rank: int, store: str) -> None:
    """What one of the two processes does."""
    limit = timedelta(seconds=PATIENCE)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=HALVES, timeout=limit
    )
    for ours in (True, False):
        train(rank, ours)
    torch.distributed.destroy_process_group()


def train(rank: int, ours: bool) -> None:
    """Every step's gradients and weights beside those of one process, which computes the halves one by one."""
    alone, layer = Layer(ours), Layer(ours)
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (alone, parallel)]
    halves = torch.randn(HALVES, 3, S, 8, generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        check_table = expected_table(alone, halves.flatten(0, 1))
        parallel(halves[rank]).square().sum().backward()
        parts = [torch.autograd.grad(alone(x).square().sum(), list(alone.parameters())) for x in halves]
        for p, mine, *each in zip(alone.parameters(), layer.parameters(), *parts, strict=True):
            p.grad = sum(each) / HALVES
            assert torch.equal(mine.grad, p.grad) and mine.grad.any(), f"step {step}: gradients differ"
        check_table(layer.table.grad * HALVES)
        for optimizer in optimizers:
            optimizer.step()
        for p, mine in zip(alone.parameters(), layer.parameters(), strict=True):
            assert torch.equal(mine, p), f"step {step}: weights differ"


def expected_table(layer: Layer, x: Any) -> Any:
    """A check of the table's gradient summed over a batch, by the accuracy rule, whoever computes it."""
    q, k, v = layer.qkv(x).detach()
    do = 2 * layer(x).detach()  # of the sum of squares
    table = layer.table.detach().clone()

    def check(gradient: Any) -> None:
        got = Gradients(captured=ByIdentity([(table, gradient)]))
        score = lambda s, b, h, i, j: s + table[h, j]  # noqa: E731
        assert_gradients_accurate(got, do, q, k, v, score_mod=score, wrt=("captured",))

    return check


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_steps_of_distributed_data_parallel(tmp_path: Path) -> None:
    """Two halves are averaged with one rounding in either order, so bits are equal; torch's own attention stands beside
    flashtile's as a check of the harness."""
    run_together([[sys.executable, __file__, rank, tmp_path / "store"] for rank in range(HALVES)])


def test_programs_that_wait_for_each_other_end() -> None:
    """What tells of a failed worker, and of one that hangs, fails itself where it should, and leaves none behind."""
    wait = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(AssertionError, match="exit statuses .*None, 1.*\n(.*\n)*ZeroDivisionError"):
        run_together([wait, [sys.executable, "-c", "1 / 0"]])
    with pytest.raises(AssertionError, match=r"programs \[1\] still run after 2 s"):
        run_together([[sys.executable, "-c", ""], wait], patience=2)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
