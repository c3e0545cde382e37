"""The NumPy form of an expression, and what it reads out of bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .expr import Expr, postorder


class Evaluation:
    """Values of expressions at given variables (arrays that broadcast), in one float type."""

    def __init__(self, variables: dict[str, Any], capture: Callable[[Any], Any], float_type: Any = np.float64):
        self.float_type = np.dtype(float_type)
        self.capture = capture  # what a leaf's data stands for
        self.variables = {
            name: np.asarray(value, self.float_type if name == "s" else np.int32) for name, value in variables.items()
        }

    def run(self, roots: Sequence[Expr]) -> list[np.ndarray]:
        values: dict[Expr, Any] = {}
        with np.errstate(all="ignore"):  # inf and NaN are values here, and int32 wraps
            for x in postorder(roots):
                values[x] = np.asarray(x.operation.evaluate(x, self, [values[a] for a in x.args]))
        return [values[root] for root in roots]

    def reads_outside(self, root: Expr) -> tuple[np.ndarray, dict[Expr, np.ndarray]]:
        """Where the root's value depends on a load that is out of bounds, and for each load where it is.

        A branch that ``where`` does not take, and a side of & or | that the other side decides, do not count.
        """
        nodes = list(postorder([root]))
        values = dict(zip(nodes, self.run(nodes), strict=True))
        outside: dict[Expr, Any] = {}
        loads: dict[Expr, np.ndarray] = {}
        for x in nodes:
            below = [outside[a] for a in x.args]
            if x.operation.name == "load":
                shape = self.capture(x.data.source).array.shape
                beyond = [(values[a] < 0) | (values[a] >= n) for a, n in zip(x.args, shape, strict=True)]
                loads[x] = functools.reduce(np.logical_or, beyond, np.asarray(False))
                below.append(loads[x])
            outside[x] = _spoilt(x, [values[a] for a in x.args], below)
        return np.asarray(outside[root]), loads


def _spoilt(x: Expr, args: list[Any], below: list[Any]) -> Any:
    if x.operation.name == "where":
        return below[0] | np.where(args[0], below[1], below[2])
    if x.operation.name in ("and", "or") and x.type == "bool":
        decides = x.operation.name == "or"  # the value of one side that settles the result
        settled = [~b & (a == decides) for a, b in zip(args, below, strict=True)]
        return (below[0] | below[1]) & ~settled[0] & ~settled[1]
    result: Any = np.asarray(False)
    for b in below:
        result = result | b
    return result
