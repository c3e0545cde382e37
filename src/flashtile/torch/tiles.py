"""Attention over tiles in torch's own operations, so that torch differentiates it as often as it likes.

A tile is some rows of one head and all its keys: what is differentiated is recomputed tile by tile and forgotten, so
memory beyond inputs and outputs is that of a few blocks of scores, more of them for each derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.autograd.function import Function

from flashtile.gradients import slots_of
from flashtile.kernels.rule import Rule, rule_of, visible
from flashtile.kernels.second import BLOCK_SCORES
from flashtile.score.capture import ArrayCapture
from flashtile.score.derivative import derivative
from flashtile.score.expr import Expr, postorder
from flashtile.score.operations import apply, const, is_const, variable
from flashtile.score.operations import inside as reads_inside
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

Tensor = torch.Tensor
INPUTS, OUTPUTS = ("q", "k", "v", "sinks"), ("o", "lse")  # besides arrays, by their numbers


class Tiles:
    """A call, cut."""

    def __init__(self, spec: AttentionSpec, scoring: Scoring, offset: Any, arrays: tuple[Any, ...]) -> None:
        self.spec, self.scoring = spec, scoring
        self.offsets = np.broadcast_to(offset, (spec.batch,))
        self.dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        self.real = np.dtype(np.float64 if spec.dtype == "float64" else np.float32)
        self.number = {slot: n for n, x in enumerate(arrays) if x is not None for slot in slots_of(scoring, x)}

    def each(self, finite: bool) -> Iterator[Tile]:
        """The tiles; of fewer rows where products are formed element by element, since values are not all finite and
        what is hidden must be left out."""
        spec = self.spec
        wide = 1 if finite else max(1, spec.head_size, spec.value_size)
        many = max(1, BLOCK_SCORES // max(1, spec.kv_len * wide))
        for b, h in np.ndindex(spec.batch, spec.heads):
            for begin in range(0, spec.q_len, many):
                yield Tile(self, b, h, slice(begin, min(begin + many, spec.q_len)), finite)


class Tile:
    """Some rows of one head, and all its keys."""

    def __init__(self, tiles: Tiles, b: int, h: int, rows: slice, finite: bool) -> None:
        spec = tiles.spec
        self.tiles, self.b, self.h, self.slice, self.finite = tiles, b, h, rows, finite
        self.rows, self.keys = np.arange(rows.start, rows.stop), np.arange(spec.kv_len)
        self.rule: Rule = rule_of(tiles.scoring, b, h, spec.heads)
        self.shape = len(self.rows), spec.kv_len
        shown = visible(spec.band, int(tiles.offsets[b]), self.rows, self.keys)
        program = self.rule.program
        if program is not None:
            also = program.visible(b, h, self.rows[:, None], self.keys[None, :], tiles.real)
            shown = also if shown is None else shown & also
        self.shown = torch.from_numpy(np.array(np.broadcast_to(True if shown is None else shown, self.shape)))

    def place(self, kind: Any, rank: int) -> tuple[Any, ...]:
        """Where this tile has its part of an input or output, or of its derivative."""
        if kind in ("q", "o", "lse"):
            at: tuple[Any, ...] = (self.b, self.h, self.slice)[-(rank - (kind != "lse")) :]
            return at
        if kind in ("k", "v"):
            return (self.b, self.h // self.tiles.spec.group)[-(rank - 2) :] if rank > 2 else ()
        if kind == "sinks":
            return (self.b, self.h)[-rank:]
        return ()

    def part(self, kind: Any, x: Tensor) -> Tensor:
        """This tile's part, as something to differentiate by."""
        return x[self.place(kind, x.ndim)].detach().to(self.tiles.dtype, copy=True).requires_grad_()

    def add(self, kind: Any, total: Tensor, x: Tensor) -> None:
        total[self.place(kind, total.ndim)] += x

    def attend(self, given: Mapping[Any, Tensor]) -> tuple[Tensor, Tensor]:
        """o (r, D_v) and lse (r,) of q (r, D), k (n, D), v (n, D_v), sinks () and arrays."""
        z = self.scores(given)
        seen = self.shown & ~torch.isneginf(z.detach())
        z = torch.where(seen, z, 0)
        sink = given.get("sinks", z.new_tensor(self.rule.sink))
        # The largest score is a constant here: what is computed does not depend on it.
        hidden = torch.where(seen, z.detach(), -torch.inf)
        peak = torch.cat([hidden, sink.detach().expand(len(z), 1)], dim=1).amax(dim=1)
        peak = torch.where(torch.isneginf(peak), 0, peak)
        e = torch.where(seen, torch.exp(z - peak[:, None]), 0)
        total = e.sum(dim=1)
        if not torch.isneginf(sink.detach()):
            total = total + torch.exp(sink - peak)
        none = total == 0
        total = torch.where(none, 1, total)
        lse = torch.where(none, -torch.inf, peak + torch.log(total))
        p = e / total[:, None]
        if self.rule.keep is not None:
            p = p * torch.from_numpy(self.rule.drop(np.ones(self.shape, self.tiles.real), self.rows, self.keys))
        if self.finite:
            return torch.where(seen.any(dim=1)[:, None], p @ given["v"], 0), lse
        v = torch.where(seen[:, :, None], given["v"], 0)
        return (p[:, :, None] * v).sum(dim=1), lse

    def scores(self, given: Mapping[Any, Tensor]) -> Tensor:
        """Scores (r, n) after the program; whatever where nothing is shown."""
        q, k = given["q"], given["k"]
        if self.finite:
            raw = self.tiles.spec.scale * (q @ k.T)
        else:
            q, k = (torch.where(self.shown[:, :, None], x, 0) for x in (q[:, None, :], k[None, :, :]))
            raw = self.tiles.spec.scale * (q * k).sum(dim=2)
        program = self.rule.program
        if program is None or program.score is None:
            return raw
        raw = torch.where(self.shown, raw, 0)
        loads = _loads(program.score)
        return _Score.apply(self, program.score, loads, raw, *(self.read(x, raw, given) for x in loads))

    def run(self, expressions: list[Expr], raw: Tensor) -> list[np.ndarray]:
        program = self.rule.program
        assert program is not None
        at = self.b, self.h, self.rows[:, None], self.keys[None, :]
        with np.errstate(all="ignore"):
            found = program.run(expressions, raw.detach().numpy(), *at, self.tiles.real)
        return [np.broadcast_to(x, self.shape) for x in found]

    def read(self, load: Expr, raw: Tensor, given: Mapping[Any, Tensor]) -> Tensor:
        """What a load of the program reads (r, n), by an operation that gives it its gradient."""
        slot = load.data.source.number
        number = self.tiles.number.get(slot)
        found = self.rule.program.captures[slot]  # type: ignore[union-attr]
        assert isinstance(found, ArrayCapture)
        shape = found.array.shape
        if number not in given or 0 in shape:
            return raw.new_zeros(())
        places = self.run(list(load.args), raw)
        where = tuple(
            torch.from_numpy(np.clip(x, 0, n - 1).astype(np.int64)) for x, n in zip(places, shape, strict=True)
        )
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
