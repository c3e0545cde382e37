"""The interval form of expressions: what they can be over boxes of (b, h, i, j), and whether loads stay in bounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import SpecError
from .capture import Access, ArrayCapture
from .code import is_dense
from .evaluate import Evaluation
from .expr import Expr, node, postorder
from .interval import Interval, anything
from .ranges import range_extremes, unknown

Shape = tuple[int, int, int, int]


class Bounds:
    """Intervals of expressions over many boxes at once, one array element a box.

    Float bounds are those of values computed in `float_type`, the type the kernel computes in.
    """

    def __init__(self, variables: dict[str, Interval], capture: Callable[[Any], Any], float_type: Any = np.float32):
        self.float_type = np.dtype(float_type)
        self.capture = capture
        self.variables = {"s": anything(np.zeros((), self.float_type)), **variables}

    def run(self, roots: Sequence[Expr]) -> list[Interval]:
        found: dict[Expr, Interval] = {}
        with np.errstate(all="ignore"):
            for x in postorder(roots):
                found[x] = x.operation.bound(x, self, [found[a] for a in x.args])
        return [found[root] for root in roots]

    def extremes(self, load: Expr, index: list[Interval]) -> Interval:
        """Least and greatest element that a load can read, its indices clamped.

        An array with an element for each (i, j) may hold anything: finding out would take as long as using it. So may
        one that is not to be read here.
        """
        source = self.capture(load.data.source)
        if source.place is not None or is_dense(load):
            return unknown(source, self.float_type)
        shape = source.array.shape
        return range_extremes(source, [clipped(i, n) for i, n in zip(index, shape, strict=True)], self.float_type)


def clipped(index: Interval, n: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last index in bounds of an axis of n; one object where the index is known."""
    low = np.clip(index.lo, 0, n - 1)
    return low, low if index.hi is index.lo else np.clip(index.hi, 0, n - 1)


def itself(source: Any) -> Any:
    """The captured value of a leaf that still holds it (before captures are numbered)."""
    return source


def whole(shape: Shape) -> dict[str, Interval]:
    """The one box of all elements."""
    return {v: Interval(np.asarray(0), np.asarray(n - 1)) for v, n in zip("bhij", shape, strict=True)}


def proven(roots: list[Expr], shape: Shape) -> list[Expr]:
    """The roots with the clamp taken off every index that stays in bounds over the whole shape."""
    if 0 in shape or not roots:
        return roots
    indices = list(dict.fromkeys(a for x in postorder(roots) if x.operation.name == "load" for a in x.args))
    within = dict(zip(indices, Bounds(whole(shape), itself, np.float64).run(indices), strict=True))
    final: dict[Expr, Expr] = {}
    for x in postorder(roots):  # keyed by the original nodes: an index may itself hold loads
        args, data = tuple(final[a] for a in x.args), x.data
        if x.operation.name == "load":
            sizes = data.source.array.shape
            clamp = tuple(bool(within[a].lo < 0 or within[a].hi >= n) for a, n in zip(x.args, sizes, strict=True))
            data = Access(data.source, clamp)
        final[x] = node(x.operation, args, x.type, data)
    return [final[root] for root in roots]


def within(roots: list[Expr], shape: Shape) -> bool:
    """Whether every load reads at positions, or constants, that its array has: `proven` and `check_bounds` then have
    nothing to find."""
    lengths = dict(zip("bhij", shape, strict=True))

    def inside(index: Expr, n: int) -> bool:
        if index.operation.name == "const":
            return 0 <= index.data < n
        return index.operation.name == "var" and 0 < lengths[index.data] <= n

    loads = (x for x in postorder(roots) if x.operation.name == "load")
    return all(inside(*pair) for x in loads for pair in zip(x.args, x.data.source.array.shape, strict=True))


def check_bounds(score: Expr | None, mask: Expr | None, shape: Shape) -> None:
    """Raise SpecError if a visible element is certain to read outside a captured array.

    Looks at the corners and middles of (b, h, i, j): an array that is too short for its axis shows there. A load
    whose result is not used at an element (``where``, a decided & or |, a hidden element) is no error there.
    Nothing is certain where arrays that are not read here decide which elements those are.
    """
    roots = [x for x in (mask, score) if x is not None]
    if _unread([mask] if mask is not None else []) or (score is not None and _unread(_steering(score))):
        return
    if 0 in shape or not any(x.operation.name == "load" for x in postorder(roots)):
        return
    points = np.array(list(itertools.product(*(sorted({0, n // 2, n - 1}) for n in shape)))).T
    variables = {"s": 0.0, **dict(zip("bhij", points, strict=True))}
    at = Evaluation(variables, itself)
    hidden = np.zeros(points.shape[1], bool)
    for root in roots:
        outside, loads = at.reads_outside(root)
        wrong = np.flatnonzero(np.broadcast_to(outside, hidden.shape) & ~hidden)
        if wrong.size:
            _raise_outside(at, loads, points, int(wrong[0]))
        if root is mask:
            hidden = ~np.broadcast_to(at.run([root])[0], hidden.shape)


def _steering(root: Expr) -> list[Expr]:
    """What decides where loads read, and whether what they read is used."""
    indices = [a for x in postorder([root]) if x.operation.name == "load" for a in x.args]
    return indices + [x.args[0] for x in postorder([root]) if x.operation.name == "where"]


def _unread(roots: list[Expr]) -> bool:
    """Whether one of these depends on an array that is not read here."""
    return any(x.operation.name == "load" and x.data.source.place is not None for x in postorder(roots))


def _raise_outside(at: Evaluation, loads: dict[Expr, np.ndarray], points: np.ndarray, where: int) -> None:
    b, h, i, j = (int(p) for p in points[:, where])
    for load, outside in loads.items():
        if np.broadcast_to(outside, points.shape[1:])[where]:
            source: ArrayCapture = load.data.source
            index = tuple(int(np.broadcast_to(v, points.shape[1:])[where]) for v in at.run(load.args))
            raise SpecError(
                f"{source.name}: got index {index} at b={b}, h={h}, i={i}, j={j}, "
                f"expected one within its shape {source.array.shape}"
            )
    raise AssertionError("an element depends on a load out of bounds, but no load is")
