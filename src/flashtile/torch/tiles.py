"""Attention over tiles in torch's own operations, so that torch differentiates it as often as it likes.

What is differentiated is recomputed tile by tile and forgotten, so memory beyond inputs and outputs is that of a few
blocks of scores, more of them for each derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.autograd.function import Function

from flashtile.gradient_problem import slots_of
from flashtile.kernels.rule import visible
from flashtile.score.capture import ArrayCapture
from flashtile.score.derivative import derivative
from flashtile.score.expr import Expr, postorder
from flashtile.score.keep import Keep
from flashtile.score.operations import apply, const, is_const, variable
from flashtile.score.operations import inside as reads_inside
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

Tensor = torch.Tensor
BLOCK_SCORES = 1 << 16  # of a tile: a third derivative holds some hundreds of arrays of this size
INPUTS, OUTPUTS = ("q", "k", "v", "sinks"), ("o", "lse")  # besides arrays, by their numbers


class Tiles:
    """A call, cut: whole batches of it where their scores are few, else heads, else rows of one."""

    def __init__(self, spec: AttentionSpec, scoring: Scoring, offset: Any, arrays: tuple[Any, ...]) -> None:
        self.spec, self.scoring = spec, scoring
        self.offsets = np.broadcast_to(offset, (spec.batch,))
        self.dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        self.real = np.dtype(np.float64 if spec.dtype == "float64" else np.float32)
        self.number = {slot: n for n, x in enumerate(arrays) if x is not None for slot in slots_of(scoring, x)}

    def each(self, finite: bool) -> Iterator[Tile]:
        """The tiles; smaller ones where products are formed element by element, since values are not all finite and
        what is hidden must be left out."""
        spec = self.spec
        room = BLOCK_SCORES // (1 if finite else max(1, spec.head_size, spec.value_size))
        row = max(1, spec.kv_len)
        whole = row * spec.q_len * spec.heads
        batches, heads = (room // whole, spec.heads) if 0 < whole <= room else (1, 1)  # all heads, or one
        rows = spec.q_len if row * spec.q_len <= room else max(1, room // row)
        for b in range(0, spec.batch, batches):
            for h in range(0, spec.heads, heads):
                for i in range(0, spec.q_len, max(1, rows)):
                    end = min(b + batches, spec.batch), h + heads, min(i + rows, spec.q_len)
                    yield Tile(self, slice(b, end[0]), slice(h, end[1]), slice(i, end[2]), finite)


class Tile:
    """Some rows of some heads, and all keys of those."""

    def __init__(self, tiles: Tiles, b: slice, h: slice, rows: slice, finite: bool) -> None:
        spec = tiles.spec
        self.tiles, self.finite, self.program = tiles, finite, tiles.scoring.program
        self.b, self.h, self.rows = (np.arange(x.start, x.stop) for x in (b, h, rows))
        kv = slice(h.start // spec.group, -(-h.stop // spec.group))
        self.places: dict[Any, tuple[slice, ...]] = {
            **dict.fromkeys(("q", "o", "lse"), (b, h, rows)),
            **dict.fromkeys(("k", "v"), (b, kv)),
            "sinks": (b, h),
        }
        self.shape = len(self.b), len(self.h), len(self.rows), spec.kv_len
        keys = np.arange(spec.kv_len)
        self.at = self.b[:, None, None, None], self.h[:, None, None], self.rows[:, None], keys
        shown = visible(spec.band, tiles.offsets[self.at[0]], self.rows, keys)  # type: ignore[arg-type]  # one for each batch
        if self.program is not None:
            also = self.program.visible(*self.at, tiles.real)
            shown = also if shown is None else shown & also
        self.shown = torch.from_numpy(np.array(np.broadcast_to(True if shown is None else shown, self.shape)))

    def place(self, kind: Any, x: Tensor) -> Tensor:
        """This tile's place in an input or output, or in its derivative: with the axes that it has of (B, H)."""
        if kind not in self.places:
            return x
        whole = x[(None,) * ({"lse": 3, "sinks": 2}.get(kind, 4) - x.ndim)]
        at = self.places[kind]
        return whole[(slice(None), at[1])] if kind == "sinks" and x.ndim == 1 else whole[at]

    def part(self, kind: Any, x: Tensor) -> Tensor:
        """This tile's part, as something to differentiate by."""
        return self.place(kind, x).detach().to(self.tiles.dtype, copy=True).requires_grad_()

    def add(self, kind: Any, total: Tensor, x: Tensor) -> None:
        self.place(kind, total).add_(x)

    def attend(self, given: Mapping[Any, Tensor]) -> tuple[Tensor, Tensor]:
        """o (b, h, r, D_v) and lse (b, h, r) of q (b, h, r, D), k (b, h_kv, n, D), v, sinks (b or 1, h) and arrays."""
        z = self.scores(given)
        seen = self.shown & ~torch.isneginf(z.detach())
        z = torch.where(seen, z, 0)
        sinks = given.get("sinks", z.new_full((1, 1), -torch.inf))[:, :, None]
        # The largest score is a constant here: what is computed does not depend on it.
        hidden = torch.where(seen, z.detach(), -torch.inf)
        peak = torch.cat([hidden, sinks.detach()[..., None].expand(*self.shape[:3], 1)], dim=3).amax(dim=3)
        peak = torch.where(torch.isneginf(peak), 0, peak)
        e = torch.where(seen, torch.exp(z - peak[..., None]), 0)
        none = torch.isneginf(sinks.detach())
        total = e.sum(dim=3) + torch.where(none, 0, torch.exp(torch.where(none, 0, sinks) - peak))
        empty = total == 0
        total = torch.where(empty, 1, total)
        lse = torch.where(empty, -torch.inf, peak + torch.log(total))
        p = e / total[..., None]
        if self.tiles.scoring.keep is not None:
            p = p * self.kept(self.tiles.scoring.keep)
        if self.finite:
            return torch.where(seen.any(dim=3, keepdim=True), self.product(p, given["v"]), 0), lse
        v = torch.where(seen[..., None], self.each_head(given["v"])[:, :, None], 0)
        return (p[..., None] * v).sum(dim=3), lse

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """(b, h, r, n) times (b, h_kv, n, m), the heads in groups."""
        grouped = x.view(x.shape[0], y.shape[1], x.shape[1] // y.shape[1], *x.shape[2:])
        return (grouped @ y[:, :, None]).view(*x.shape[:3], y.shape[3])

    def each_head(self, x: Tensor) -> Tensor:
        """Keys or values (b, h_kv, n, m) of every head: (b, h, n, m)."""
        group = self.shape[1] // x.shape[1]
        return x[:, :, None].expand(-1, -1, group, -1, -1).reshape(x.shape[0], self.shape[1], *x.shape[2:])

    def scores(self, given: Mapping[Any, Tensor]) -> Tensor:
        """Scores after the program; whatever where nothing is shown."""
        q, k = given["q"], given["k"]
        if self.finite:
            raw = self.tiles.spec.scale * self.product(q, k.mT)
        else:
            q, k = (torch.where(self.shown[..., None], x, 0) for x in (q[:, :, :, None], self.each_head(k)[:, :, None]))
            raw = self.tiles.spec.scale * (q * k).sum(dim=4)
        if self.program is None or self.program.score is None:
            return raw
        raw = torch.where(self.shown, raw, 0)
        loads = _loads(self.program.score)
        return _Score.apply(self, self.program.score, loads, raw, *(self.read(x, raw, given) for x in loads))

    def kept(self, keep: Keep) -> Tensor:
        """What dropout multiplies the weights by."""
        ones, heads = np.ones(self.shape[2:], self.tiles.real), self.tiles.spec.heads
        each = [[keep.drop(ones, b * heads + h, self.rows, self.at[3]) for h in self.h] for b in self.b]
        return torch.from_numpy(np.array(each, self.tiles.real))

    def run(self, expressions: list[Expr], raw: Tensor) -> list[np.ndarray]:
        assert self.program is not None
        with np.errstate(all="ignore"):
            found = self.program.run(expressions, raw.detach().numpy(), *self.at, self.tiles.real)
        return [np.broadcast_to(x, self.shape) for x in found]

    def read(self, load: Expr, raw: Tensor, given: Mapping[Any, Tensor]) -> Tensor:
        """What a load of the program reads, by an operation that gives it its gradient."""
        assert self.program is not None
        slot = load.data.source.number
        number, found = self.tiles.number.get(slot), self.program.captures[slot]
        assert isinstance(found, ArrayCapture)
        shape = found.array.shape
        if number not in given or 0 in shape:
            return raw.new_zeros(())
        places = self.run(list(load.args), raw)
        inside = (np.clip(x, 0, n - 1).astype(np.int64) for x, n in zip(places, shape, strict=True))
        where = tuple(map(torch.from_numpy, inside))
        array = given[number].reshape(shape)
        return array[where] if where else array.expand(self.shape)


class _Score(Function):
    """A program's expression of the raw score and of what its loads read. The derivatives are expressions, too."""

    @staticmethod
    def forward(ctx: Any, tile: Tile, expression: Expr, loads: tuple[Expr, ...], raw: Tensor, *read: Tensor) -> Tensor:
        ctx.tile, ctx.expression, ctx.loads = tile, expression, loads
        ctx.save_for_backward(raw, *read)
        found = torch.from_numpy(np.array(tile.run([expression], raw)[0], tile.tiles.real))
        return torch.where(tile.shown, found, 0)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        raw, *read = ctx.saved_tensors
        results: list[Tensor | None] = []
        for asked, by in zip(ctx.needs_input_grad[3:], (variable("s"), *ctx.loads), strict=True):
            slope = _slope(ctx.expression, by)
            if not asked or is_const(slope, 0.0):
                results.append(None)
                continue
            slopes = _Score.apply(ctx.tile, slope, ctx.loads, raw, *read)
            # A slope of 0 comes from a selection or a saturated cap, and what it would meet does not matter.
            nothing = ((slopes == 0) | (given == 0)) & ~(slopes.isfinite() & given.isfinite())
            results.append(torch.where(nothing, 0, torch.where(nothing, 0, given) * torch.where(nothing, 0, slopes)))
        return None, None, None, *results


@functools.lru_cache(maxsize=256)
def _loads(score: Expr) -> tuple[Expr, ...]:
    """The loads of float arrays by which a score has a derivative."""
    floats = (x for x in postorder([score]) if x.operation.name == "load" and x.type == "float")
    return tuple(x for x in floats if not is_const(derivative(score, x), 0.0))


@functools.lru_cache(maxsize=1024)
def _slope(expression: Expr, by: Expr) -> Expr:
    found = derivative(expression, by)
    if by.operation.name != "load" or is_const(found, 0.0):
        return found
    return apply("where", reads_inside(by), found, const(0.0))
