"""The training example as a test: a small GPT whose losses follow those of PyTorch's SDPA from the same seeds."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_char_gpt.py"
STEPS = 60
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_losses_follow_torch(example: Any) -> None:
    """Three seeds: one seed of two engines is closer than two seeds of one, by far; and the loss falls."""
    text, sizes = example.Text(), example.Sizes()
    runs = [
        example.train(engine, seed, text, sizes, STEPS) for seed, engine in itertools.product(range(3), example.ENGINES)
    ]
    engines, seeds = example.closeness(runs)
    assert engines < 0.1 * seeds
    for run in runs:
        assert run.losses[0] > 4.5 and run.smooth[-1] < 3.3 and run.unseen < 3.5
        assert np.isfinite(run.losses).all()


def test_dropout_trains_and_repeats(example: Any) -> None:
    """The seed decides what is dropped: the same losses bit for bit, others than without dropout; and they fall."""
    text, sizes = example.Text(), example.Sizes(dropout=0.1)
    first, again = (example.train("flashtile", 0, text, sizes, STEPS) for _ in range(2))
    plain = example.train("flashtile", 0, text, example.Sizes(), STEPS)
    np.testing.assert_array_equal(first.losses, again.losses)
    assert (first.losses != plain.losses).any()
    assert first.smooth[-1] < 3.6 and first.unseen < 3.6


def test_closeness_sees_a_difference(example: Any) -> None:
    """The measure itself: of curves that differ more between engines than between seeds."""
    flat = np.ones(STEPS)
    runs = [
        example.Run(engine, seed, flat * (1 + 0.1 * seed + 0.3 * (engine == "flashtile")), 0.0, 0.0, None)
        for engine in example.ENGINES
        for seed in range(2)
    ]
    assert example.closeness(runs) == (pytest.approx(0.3), pytest.approx(0.1))
