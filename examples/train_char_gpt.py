"""Train a small GPT on characters, its attention by PyTorch's SDPA and by flashtile, from the same seeds.

    $ python examples/train_char_gpt.py                                      # tiny, seconds
    $ python examples/train_char_gpt.py --width 128 --layers 4 --context 256 --batch 8 --steps 300 --plot losses.png
    $ python examples/train_char_gpt.py --width 256 --layers 6 --heads 8 --kv-heads 2 --context 512 --window 128 \
        --batch 16 --steps 5000 --engines flashtile                          # 4 million parameters

The text is Python's own reference of its statements, which the standard library ships. Query heads share key/value
heads, and every other layer sees a sliding window. Without dropout both engines compute the same function and see the
same batches, so their losses should be closer to each other than those of two seeds of one engine: it says how close.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import flashtile.torch

Attend = Callable[..., torch.Tensor]  # (q, k, v, window, dropout_p) -> o, causal; window 0: no limit
SMOOTH = 20  # steps whose losses are averaged


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, dropout_p: float) -> torch.Tensor:
    """SDPA, whose window is a mask."""
    attend = functional.scaled_dot_product_attention
    if not window:
        return attend(q, k, v, is_causal=True, dropout_p=dropout_p, enable_gqa=True)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    return attend(q, k, v, attn_mask=(j <= i) & (i - j < window), dropout_p=dropout_p, enable_gqa=True)


def by_flashtile(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, dropout_p: float) -> torch.Tensor:
    return flashtile.torch.attention(
        q, k, v, causal=True, window=(window - 1, 0) if window else None, dropout_p=dropout_p
    )


ENGINES: dict[str, Attend] = {"torch": by_torch, "flashtile": by_flashtile}


@dataclass(frozen=True)
class Sizes:
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 64
    window: int = 24
    batch: int = 4
    dropout: float = 0.0


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on normalised input and added to it."""

    def __init__(self, sizes: Sizes, window: int, attend: Attend) -> None:
        super().__init__()
        self.sizes, self.window, self.attend = sizes, window, attend
        width, size = sizes.width, sizes.width // sizes.heads
        self.split = [sizes.heads * size, sizes.kv_heads * size, sizes.kv_heads * size]
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, sum(self.split)), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape
        size = width // self.sizes.heads
        parts = self.qkv(self.before(x)).split(self.split, dim=-1)
        q, k, v = (part.view(batch, rows, -1, size).transpose(1, 2) for part in parts)
        o = self.attend(q, k, v, self.window, self.sizes.dropout if self.training else 0.0)
        x = x + self.drop(self.out(o.transpose(1, 2).reshape(batch, rows, width)))
        return x + self.drop(self.perceptron(self.between(x)))


class GPT(nn.Module):
    """Logits of the next character for every position: (batch, rows) -> (batch, rows, characters)."""

    def __init__(self, characters: int, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, sizes.width)
        self.position = nn.Embedding(sizes.context, sizes.width)
        windows = [sizes.window * (n % 2) for n in range(sizes.layers)]
        self.blocks = nn.Sequential(*(Block(sizes, window, attend) for window in windows))
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, characters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.embed(text) + self.position(torch.arange(text.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Text:
    """The characters as numbers; the last tenth is for validation."""

    def __init__(self) -> None:
        text = "\n".join(topics.values())
        self.characters = sorted(set(text))
        number = {character: n for n, character in enumerate(self.characters)}
        data = torch.tensor([number[character] for character in text])
        self.known, self.unseen = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    def batch(self, data: torch.Tensor, sizes: Sizes, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Pieces of the text, and the same a character further on."""
        starts = torch.randint(len(data) - sizes.context, (sizes.batch,), generator=generator)
        pieces = torch.stack([data[start : start + sizes.context + 1] for start in starts])
        return pieces[:, :-1], pieces[:, 1:]

    def spelled(self, numbers: torch.Tensor) -> str:
        return "".join(self.characters[n] for n in numbers)


@dataclass
class Run:
    engine: str
    seed: int
    losses: np.ndarray  # of each step, nats a character
    unseen: float  # the loss on text that was not trained on
    tokens_per_second: float
    model: GPT

    @property
    def smooth(self) -> np.ndarray:
        return np.convolve(self.losses, np.full(SMOOTH, 1 / SMOOTH), "valid")


def loss_of(model: GPT, pieces: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(pieces).flatten(0, 1), following.flatten())


def train(engine: str, seed: int, text: Text, sizes: Sizes, steps: int) -> Run:
    """The seed decides the first weights, the batches and, engine by engine, what dropout drops."""
    torch.manual_seed(seed)
    batches = torch.Generator().manual_seed(seed)
    model = GPT(len(text.characters), sizes, ENGINES[engine])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        loss = loss_of(model, *text.batch(text.known, sizes, batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    speed = steps * sizes.batch * sizes.context / (time.perf_counter() - start)
    model.eval()
    with torch.no_grad():
        unseen = [loss_of(model, *text.batch(text.unseen, sizes, batches)).item() for _ in range(10)]
    return Run(engine, seed, np.array(losses), float(np.mean(unseen)), speed, model)


def distance(one: Run, other: Run) -> float:
    """The mean distance of two loss curves, in nats a character."""
    return float(np.abs(one.smooth - other.smooth).mean())


def closeness(runs: list[Run]) -> tuple[float, float]:
    """The largest distance of two engines with one seed, and the least of two seeds with one engine."""
    pairs = list(itertools.combinations(runs, 2))
    engines = [distance(a, b) for a, b in pairs if a.seed == b.seed]
    seeds = [distance(a, b) for a, b in pairs if a.engine == b.engine]
    return max(engines), min(seeds)


@torch.no_grad()
def sample(model: GPT, text: Text, sizes: Sizes, length: int, start: str = "The ") -> str:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor([text.characters.index(character) for character in start])
    for _ in range(length):
        logits = model(numbers[None, -sizes.context :])[0, -1]
        following = torch.multinomial(functional.softmax(logits / 0.7, dim=-1), 1, generator=generator)
        numbers = torch.cat([numbers, following])
    return text.spelled(numbers)


def plot(path: Path, runs: list[Run]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        style, colour = {"torch": ("-", "0.6"), "flashtile": ("--", f"C{run.seed}")}[run.engine]
        axes.plot(run.smooth, style, color=colour, linewidth=3 if run.engine == "torch" else 1.2)
        axes.lines[-1].set_label(f"{run.engine}, seed {run.seed}")
    axes.set(xlabel="step", ylabel="loss, nats a character")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Sizes()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2, help="how many runs of each engine")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--sample", type=int, default=80, help="characters of text to write at the end")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses")
    options = parser.parse_args()
    text, sizes = Text(), Sizes(**{name: getattr(options, name) for name in vars(Sizes())})
    runs = []
    for seed, engine in itertools.product(range(options.seeds), options.engines):
        run = train(engine, seed, text, sizes, options.steps)
        runs.append(run)
        figures = f"loss {run.losses[0]:.3f} -> {run.smooth[-1]:.3f}, on unseen text {run.unseen:.3f}"
        print(f"{engine:10} seed {seed}: {figures}, {run.tokens_per_second:,.0f} tokens/s", flush=True)
    print(f"{sum(x.numel() for x in runs[0].model.parameters()):,} parameters")
    if len(options.engines) > 1 and options.seeds > 1 and not sizes.dropout:
        engines, seeds = closeness(runs)
        print(
            f"largest distance of the engines' curves {engines:.1e}, least of two seeds' {seeds:.1e} nats a character"
        )
        assert engines < seeds
    if options.plot:
        plot(options.plot, runs)
    print(sample(runs[-1].model, text, sizes, options.sample))


if __name__ == "__main__":
    main()
