"""Random functions of the score language: the same Python function runs on NumPy arrays and on symbols."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

# Each kind: name -> (function, operand types, result type).  bool, int and float stand for b, i, f.
_EXACT: dict[str, tuple[Any, str, str]] = {
    **{
        op.__name__ + "_i": (op, "ii", "i")
        for op in (
            operator.add,
            operator.sub,
            operator.mul,
            operator.floordiv,
            operator.mod,
            operator.xor,
            np.minimum,
            np.maximum,
        )
    },
    "and_i": (operator.and_, "ii", "i"),
    "or_i": (operator.or_, "ii", "i"),
    "invert_i": (operator.invert, "i", "i"),
    "neg_i": (operator.neg, "i", "i"),
    "abs_i": (abs, "i", "i"),
    "shl_i": (lambda x, y: np.left_shift(x, y & 7), "ii", "i"),
    "shr_i": (lambda x, y: np.right_shift(x, y & 7), "ii", "i"),
    **{
        op.__name__ + "_f": (op, "ff", "f")
        for op in (
            operator.add,
            operator.sub,
            operator.mul,
            operator.truediv,
            operator.floordiv,
            np.minimum,
            np.maximum,
        )
    },
    "neg_f": (operator.neg, "f", "f"),
    "abs_f": (abs, "f", "f"),
    "floor_f": (np.floor, "f", "f"),
    "sqrt_f": (lambda x: np.sqrt(abs(x)), "f", "f"),
    "where_i": (np.where, "bii", "i"),
    "where_f": (np.where, "bff", "f"),
    "float": (lambda x: x * 0.5, "i", "f"),
    "int_b": (lambda x: np.where(x, 3, -2), "b", "i"),
    **{
        op.__name__ + t: (op, t * 2, "b")
        for t in "if"
        for op in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
    },
    "and_b": (operator.and_, "bb", "b"),
    "or_b": (operator.or_, "bb", "b"),
    "xor_b": (operator.xor, "bb", "b"),
    "invert_b": (operator.invert, "b", "b"),
}
_APPROXIMATE = {
    "exp": (lambda x: np.exp(np.minimum(x, 20.0)), "f", "f"),
    "tanh": (np.tanh, "f", "f"),
    "log": (lambda x: np.log(abs(x) + 0.5), "f", "f"),
    "exp2": (lambda x: np.exp2(np.minimum(x, 20.0)), "f", "f"),
}


@dataclass(frozen=True)
class Tree:
    """A kind and its operands, or a leaf: a variable's name or a number."""

    kind: Any
    args: tuple[Tree, ...] = ()

    def run(self, variables: dict[str, Any]) -> Any:
        if not self.args:
            return variables[self.kind] if isinstance(self.kind, str) else _number(self.kind)
        return _KINDS[self.kind][0](*(a.run(variables) for a in self.args))

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.args))})" if self.args else str(self.kind)


def _number(n: Any) -> Any:
    """Traced numbers of this module are run-time parameters; half of them are made literals."""
    return int(n) if isinstance(n, int) and n % 2 == 0 else float(n) if n == 0.5 else n


_KINDS = {**_EXACT, **_APPROXIMATE}


def trees(result: str, *, scores: bool, approximate: bool = False, depth: int = 4) -> st.SearchStrategy[Tree]:
    """Functions of (s), b, h, i, j that give a bool, an int or a float ("b", "i", "f"), and use a variable."""
    return _typed(result, scores, approximate, depth).filter(lambda t: not _constant(t))


def _constant(tree: Tree) -> bool:
    return all(map(_constant, tree.args)) if tree.args else not isinstance(tree.kind, str)


def _typed(type_: str, scores: bool, approximate: bool, depth: int) -> st.SearchStrategy[Tree]:
    if type_ == "i":
        leaf = st.sampled_from("bhijij").map(Tree) | st.integers(-9, 9).map(Tree)
    elif type_ == "f":
        leaf = st.sampled_from([0.5, -1.25, 3.0, 0.0, 2.0**-20]).map(Tree)
        leaf = st.just(Tree("s")) | leaf if scores else leaf
    else:
        leaf = st.nothing()
    kinds = {n: k for n, k in (_KINDS if approximate else _EXACT).items() if k[2] == type_}
    if depth == 0:
        return leaf if type_ != "b" else st.sampled_from("ij").map(lambda v: Tree("lti", (Tree(v), Tree(4))))

    def grow(name: str) -> st.SearchStrategy[Tree]:
        operands = (_typed(t, scores, approximate, depth - 1) for t in kinds[name][1])
        grown = st.tuples(*operands).map(lambda args: Tree(name, args))
        return grown.filter(lambda t: not _constant(t))  # Python would compute it, with Python's unbounded integers

    return leaf | st.sampled_from(sorted(kinds)).flatmap(grow)


def as_score(tree: Tree) -> Any:
    return lambda s, b, h, i, j: tree.run({"s": s, "b": b, "h": h, "i": i, "j": j})


def as_mask(tree: Tree) -> Any:
    return lambda b, h, i, j: tree.run({"b": b, "h": h, "i": i, "j": j})
