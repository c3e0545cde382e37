"""What is submitted: which tiles meet, in which order, at which declared cost; and what the models make of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plain import seen

from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.flow import Flow
from flashtile.plan.tiling import flops_of
from flashtile.score.options import ScoreOptions
from flashtile.spec import AttentionSpec

pytestmark = pytest.mark.usefixtures("starpu")

Script = Callable[..., Any]


def spec_of(
    q_len: int, kv_len: int, heads: int = 1, head_size: int = 16, dtype: str = "float32", **options: Any
) -> AttentionSpec:
    q = SimpleNamespace(shape=(1, heads, q_len, head_size), dtype=dtype)
    k = SimpleNamespace(shape=(1, heads, kv_len, head_size), dtype=dtype)
    return AttentionSpec.of(q, k, k, **options)


def flow_of(spec: AttentionSpec, tile_q: int, tile_k: int, **options: Any) -> Flow:
    return Flow(runtime.current(), spec, tile_q, tile_k, **options)


def met(flow: Flow, query_tile: int) -> list[int]:
    return flow.pairs.key_tile[flow.pairs.query_tile == query_tile].tolist()


def test_the_order_of_key_tiles() -> None:
    """i, i - 1, ..., 0, then from the last down to i + 1."""
    flow = flow_of(spec_of(500, 500), 100, 100)
    assert [met(flow, i) for i in range(5)] == [
        [0, 4, 3, 2, 1],
        [1, 0, 4, 3, 2],
        [2, 1, 0, 4, 3],
        [3, 2, 1, 0, 4],
        [4, 3, 2, 1, 0],
    ]
    assert flow.tasks["priority"][:5].tolist() == [4, 3, 2, 1, 0]  # what is left of the chain
    assert flow.tasks["values"][:5, 0].tolist() == [0, 1, 1, 1, 1]  # the first begins the state


def test_empty_tiles_make_no_task() -> None:
    causal = flow_of(spec_of(500, 500, causal=True), 100, 100)
    assert [met(causal, i) for i in range(5)] == [[0], [1, 0], [2, 1, 0], [3, 2, 1, 0], [4, 3, 2, 1, 0]]
    window = flow_of(spec_of(500, 500, window=(100, 0)), 100, 100)
    assert [met(window, i) for i in range(5)] == [[0], [1, 0], [2, 1], [3, 2], [4, 3]]
    far = flow_of(spec_of(200, 500, causal=True, align=-150), 100, 100)
    assert [met(far, i) for i in range(2)] == [[-1], [0]]  # a task without a key writes 0 and -inf
    assert far.tasks["flops"][0] == 0


def test_empty_tiles_of_a_mask_make_no_task() -> None:
    spec = spec_of(576, 500)
    mask = ScoreOptions(mask=lambda b, h, i, j: (i >= 288) | (j < 200) | (j >= 400))
    scored, scoring = mask.scoring(spec, False, None, 0)
    flow = flow_of(scored, 288, 100, scoring=scoring)
    assert [met(flow, i) for i in range(2)] == [[0, 4, 1], [2, 1, 0, 4, 3]]


@pytest.mark.parametrize("tiles", [(100, 100), (64, 96), (77, 31), (500, 600), (1, 600)])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "align": 40}, {"window": (50, 20), "align": -30}, {"window": (0, 0), "align": 0}],
    ids=str,
)
def test_flops_are_exact(options: dict[str, Any], tiles: tuple[int, int]) -> None:
    """Each task's against a count of the visible pairs of its tile, and their sum against the call's."""
    spec = spec_of(300, 400, heads=2, **options)
    flow = flow_of(spec, *tiles)
    left, right = (spec.band.left, spec.band.right) if spec.band else (None, None)
    visible = seen(300, 400, spec.offset, left, right)
    tile_q, tile_k = tiles
    for task, i, j in zip(flow.tasks, flow.pairs.query_tile, flow.pairs.key_tile, strict=True):
        pairs = visible[i * tile_q : (i + 1) * tile_q, j * tile_k : (j + 1) * tile_k].sum() if j >= 0 else 0
        assert task["flops"] == 4 * 16 * pairs
    assert flow.tasks["flops"].sum() == flops_of(spec)


MASKS: list[Any] = [
    lambda b, h, i, j: (j <= i) & ((i - j) % 3 != 1),
    lambda b, h, i, j: (i // 50 == j // 50) | (j < 10 * h),
    np.random.default_rng(0).random((2, 300, 400)) < 0.4,
]


@pytest.mark.parametrize("mask", MASKS, ids=["strided", "document", "stored"])
def test_flops_are_exact_for_masks(mask: Any) -> None:
    """Each task's against the mask itself; equal work has one footprint, whatever is visible of it."""
    spec, scoring = ScoreOptions(mask=mask).scoring(spec_of(300, 400, heads=2), False, None, 0)
    flow = flow_of(spec, 192, 96, scoring=scoring)
    b, h, i, j = np.ogrid[:1, :2, :300, :400]
    visible = np.broadcast_to(mask if isinstance(mask, np.ndarray) else mask(b, h, i, j), (1, 2, 300, 400))
    for task, head, qi, kj in zip(flow.tasks, flow.pairs.head, flow.pairs.query_tile, flow.pairs.key_tile, strict=True):
        pairs = visible[0, head, qi * 192 : (qi + 1) * 192, kj * 96 : (kj + 1) * 96].sum() if kj >= 0 else 0
        assert task["flops"] == 4 * 16 * pairs
    if isinstance(mask, np.ndarray):
        assert len(set(flow.tasks["footprint"].tolist())) == 6  # 192 or 108 rows by 96 keys, first or not, or by 16


def test_equal_costs_have_equal_footprints_and_different_costs_different_ones() -> None:
    flow = flow_of(spec_of(500, 500, causal=True), 100, 100)
    tiles = dict(
        zip(
            zip(flow.pairs.query_tile.tolist(), flow.pairs.key_tile.tolist(), strict=True),
            flow.tasks["footprint"].tolist(),
            strict=True,
        )
    )
    diagonal, full = {tiles[i, i] for i in range(5)}, {tiles[i, j] for i in range(5) for j in range(i)}
    assert len(diagonal) == len(full) == 1 and diagonal != full
    base = {"q_len": 500, "kv_len": 500, "heads": 1, "head_size": 16, "dtype": "float32"}
    others: list[dict[str, Any]] = [
        {"head_size": 32},
        {"dtype": "float64"},
        {"dtype": "float16"},
        {"precision": "bf16"},
        {"causal": True},
        {"window": (7, 7)},
    ]
    whole = flow_of(spec_of(**base), 100, 100).tasks["footprint"].tolist()
    assert len(set(whole)) == 2  # the first of a chain, and those that carry on
    for other in others:
        partial = flow_of(spec_of(**{**base, **other}), 100, 100)
        shared = set(partial.tasks["footprint"][partial.tasks["flops"] < 4 * 16 * 10_000].tolist()) & set(whole)
        assert not shared, other
        if "causal" not in other and "window" not in other and other != {"precision": "bf16"}:
            assert set(partial.tasks["footprint"].tolist()).isdisjoint(whole), other
    ragged = flow_of(spec_of(450, 470), 100, 100)
    # Of rows by keys, 100 by 100 begins a chain or carries on, 100 by 70 and 50 by 100 carry on, 50 by 70 begins one.
    assert len(set(ragged.tasks["footprint"].tolist())) == 5
    again = flow_of(spec_of(**{**base, "heads": 3}), 100, 100).tasks["footprint"].tolist()
    assert set(again) == set(whole)  # more heads are more tasks, not others


def test_a_score_program_has_its_own_footprint() -> None:
    spec = spec_of(384, 384)
    plain = set(flow_of(spec, 192, 192).tasks["footprint"].tolist())
    for options in (ScoreOptions(softcap=5.0), ScoreOptions(mask=np.tri(384, dtype=bool))):
        scored, scoring = options.scoring(spec, False, None, 0)
        found = set(flow_of(scored, 192, 192, scoring=scoring).tasks["footprint"].tolist())
        assert found and found.isdisjoint(plain)


def test_models_are_saved_and_used_by_the_next_process(script: Script, tmp_path: Any) -> None:
    """A run of dmda measures; another process finds the model on disk and expects a time near what was measured."""
    body = """
    from flashtile.engines.starpu import runtime
    from flashtile.engines.starpu.session import codelet
    from flashtile.engines.starpu.flow import Flow
    from flashtile.spec import AttentionSpec
    starpu.init(workers=2, scheduler="dmda", models=os.environ["MODELS"])
    given, tensors = registered(rows=96, q_len=960, kv_len=960, size=32)
    now = runtime.current()
    flow = Flow(now, AttentionSpec.of(*given[:3]), 96, 96)
    q, k, v, o, lse = (x.handles[0, 0, 1:2] for x in tensors)
    task = flow.tasks[1:2].copy()  # one that carries on, as nine in ten do
    handles = np.concatenate([q, k, v, o, lse])
    modes = np.array([1, 1, 1, 3, 3], "int32")
    at = now.ffi.from_buffer
    print(now.lib.ft_expected_length(codelet("forward", "float32").pointer, at("uint64_t[]", handles),
          at("int32_t[]", modes), 5, now.ffi.cast("ft_task *", at(task))))
    for _ in range(int(os.environ["RUNS"])):
        starpu.submit_forward(*tensors)
        starpu.wait()
    """
    models = str(tmp_path / "models")
    first = float(script(body, MODELS=models, RUNS="6", STARPU_CALIBRATE="1").stdout)
    again = float(script(body, MODELS=models, RUNS="0").stdout)
    assert not first > 0  # NaN or 0: nothing is known yet
    assert 5 < again < 50_000  # microseconds
