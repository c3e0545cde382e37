"""A call's program: what happens to a score, in the order the definitions give, and which elements are visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ..errors import SpecError
from .alibi import alibi, check_slopes
from .bias import bias as bias_score
from .bounds import check_bounds, proven, within
from .broadcast import check_broadcast
from .builtin import builtin
from .capture import Access, ArrayCapture, ScalarCapture, Slot, capture, is_array
from .causal import causal as causal_mask
from .code import Code, number_captures
from .derivative import ArrayGradient
from .evaluate import Evaluation
from .expr import Expr, node, postorder, rewrite, substitute, text
from .mask import Mask, Score, as_mask, as_score
from .operations import apply, is_const, variable
from .remembered import Reading
from .softcap import is_off
from .softcap import softcap as softcap_score
from .window import window as window_mask


@dataclass(frozen=True, eq=False)
class Program:
    """What changes a score before the softmax, and what hides it.

    shape      (B, H, S_q, S_kv) that it was checked for
    code       its expressions, without the values that they captured: what a kernel is compiled for
    captures   arrays and numbers, the run-time parameters, by slot
    """

    shape: tuple[int, int, int, int]
    code: Code
    captures: tuple[ArrayCapture | ScalarCapture, ...]

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int, int],
        *,
        softcap: float | None = None,
        score_mod: Any = None,
        alibi_slopes: Any = None,
        bias: Any = None,
        mask: Any = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        offset: Any = 0,
    ) -> Program:
        """The program of a call's options: softcap, score_mod, ALiBi, bias, then the masks, which intersect.

        `offset` anchors the positional rules: an int or an integer array (B,).  Functions and mask objects are
        traced at every call, since what they close over may change, unless all that they see is known to be as before
        (`remembered`); built-in options, and masks and scores of this package, are traced once.
        A score_mod whose result is ``where(c, x, -inf)`` hides where it says -inf, as a mask does.
        Raises: SpecError for arrays whose shape or dtype does not fit, functions outside the language, and loads
                that are certain to leave their array.
        """
        captured = _captured(shape, alibi_slopes, bias, mask, offset)
        given = {
            "softcap": softcap,
            "alibi_slopes": alibi_slopes,
            "bias": bias,
            "mask": mask,
            "causal": causal,
            "window": window,
            "offset": offset,
        }
        if score_mod is None and (mask is None or is_array(mask)):
            return builtin(shape, given, captured, partial(cls, shape), lambda: cls.traced(shape, **given))
        reading = _reading(shape, mask, score_mod, given)
        found = None if reading is None else reading.find()
        if found is not None:
            for rule in (mask, score_mod):
                if isinstance(rule, (Mask, Score)):
                    rule.fits(shape)
            return cls(shape, *found)
        program = cls.traced(shape, score_mod=score_mod, **given)
        if reading is not None and (mask is None or program.mask is not None):  # a constant mask warns, every time
            reading.keep(program.code, program.captures)
        return program

    @classmethod
    def traced(
        cls,
        shape: tuple[int, int, int, int],
        *,
        softcap: Any,
        alibi_slopes: Any,
        bias: Any,
        mask: Any,
        causal: bool,
        window: Any,
        offset: Any,
        score_mod: Any = None,
    ) -> Program:
        """`of`, by running every rule on symbols."""
        scores = [] if is_off(softcap) else [softcap_score(softcap).expression()]
        visible = [causal_mask().expression(offset)] if causal else []
        if window is not None:
            visible.append(window_mask(*window).expression(offset))
        if mask is not None:
            rule = as_mask(mask)
            rule.fits(shape)
            visible.append(rule.expression(offset))
        if score_mod is not None:
            change = as_score(score_mod)
            change.fits(shape)
            kept, hidden = split_hidden(change.expression(offset))
            scores.append(kept)
            visible += hidden
        scores += [alibi(alibi_slopes).expression(offset)] if alibi_slopes is not None else []
        scores += [bias_score(bias).expression()] if bias is not None else []
        return cls.compose(shape, scores, visible)

    @classmethod
    def compose(cls, shape: tuple[int, int, int, int], scores: Sequence[Expr], masks: Sequence[Expr]) -> Program:
        """Scores applied one after the other, masks intersected, captures numbered, loads checked."""
        score = variable("s")
        for step in scores:
            score = substitute(step, variable("s"), score)
        mask: Expr | None = None
        for part in masks:
            mask = part if mask is None else apply("and", mask, part)
        if mask is not None and is_const(mask) and mask.data:
            mask = None
        given = None if score is variable("s") else score
        roots = [r for r in (given, mask) if r is not None]
        inside = within(roots, shape)
        if not inside:
            check_bounds(given, mask, shape)
            roots = proven(roots, shape)
        bound, captures, slots = number_captures(roots)
        parts = iter(bound)
        final = (next(parts) if given is not None else None, next(parts) if mask is not None else None)
        return cls(shape, _code(*final, slots, inside), captures)

    @property
    def score(self) -> Expr | None:
        """Float expression over (s, b, h, i, j), or None: scores stay as they are. s arrives scaled."""
        return self.code.score

    @property
    def mask(self) -> Expr | None:
        """Bool expression over (b, h, i, j), or None: every key is visible."""
        return self.code.mask

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What the captures are, without their values."""
        return self.code.slots

    @property
    def structure(self) -> str:
        """The code as text, the same in every process."""
        return self.code.structure

    @property
    def is_identity(self) -> bool:
        """Whether scores stay as they are and every key is visible."""
        return self.score is None and self.mask is None

    @property
    def variables(self) -> frozenset[str]:
        """The variables that the program depends on."""
        return frozenset().union(*(x.variables for x in (self.score, self.mask) if x is not None))

    @property
    def dense_loads(self) -> tuple[Expr, ...]:
        """Loads that depend on both i and j: what a kernel may want to read by tiles."""
        loads = (x for x in postorder(self.roots) if x.operation.name == "load")
        return tuple(x for x in loads if {"i", "j"} <= x.variables)

    @property
    def roots(self) -> list[Expr]:
        """The expressions that there are."""
        return [x for x in (self.score, self.mask) if x is not None]

    @property
    def score_derivative(self) -> Expr | None:
        """d score / d s as an expression; None where the score is s itself."""
        return self.code.score_derivative

    @property
    def array_gradients(self) -> tuple[ArrayGradient, ...]:
        """d score / d captured float arrays, one a distinct load."""
        return self.code.array_gradients

    def capture(self, source: Any) -> Any:
        """The captured value that a leaf of the expressions reads."""
        return self.captures[source.number]

    def run(
        self, roots: Sequence[Expr], s: Any, b: Any, h: Any, i: Any, j: Any, dtype: Any = np.float64
    ) -> list[np.ndarray]:
        """Any expressions of this program in NumPy; the variables broadcast against each other."""
        return Evaluation({"s": s, "b": b, "h": h, "i": i, "j": j}, self.capture, dtype).run(roots)

    def evaluate(self, s: Any, b: Any, h: Any, i: Any, j: Any, dtype: Any = np.float64) -> np.ndarray:
        """The new scores, -inf where hidden, in NumPy: the oracle of every other form."""
        shape = np.broadcast_shapes(*map(np.shape, (s, b, h, i, j)))
        score = np.asarray(s, dtype) if self.score is None else self.run([self.score], s, b, h, i, j, dtype)[0]
        hidden = ~self.visible(b, h, i, j)
        return np.where(np.broadcast_to(hidden, shape), np.asarray(-np.inf, dtype), np.broadcast_to(score, shape))

    def visible(self, b: Any, h: Any, i: Any, j: Any, dtype: Any = np.float64) -> np.ndarray:
        """The mask in NumPy, broadcast over the variables: True where key j is visible to row i."""
        shape = np.broadcast_shapes(*map(np.shape, (b, h, i, j)))
        return np.broadcast_to(True if self.mask is None else self.run([self.mask], 0.0, b, h, i, j, dtype)[0], shape)


def split_hidden(score: Expr) -> tuple[Expr, list[Expr]]:
    """A score that is -inf by choice, as the score elsewhere and masks that say where: ``where(c, x, -inf)``."""
    masks = []
    while score.operation.name == "where":
        condition, yes, no = score.args
        if is_const(no, -np.inf):
            masks.append(condition)
            score = yes
        elif is_const(yes, -np.inf):
            masks.append(apply("invert", condition))
            score = no
        else:
            break
    return score, masks


def _reading(shape: Any, mask: Any, score_mod: Any, given: dict[str, Any]) -> Reading | None:
    """What functions beside options that are numbers read; None where that, or an option, is to be looked at anew."""
    cap, window, offset = given["softcap"], given["window"], given["offset"]
    if not given["causal"] and window is None:
        offset = 0
    if given["alibi_slopes"] is not None or given["bias"] is not None or type(offset) is not int:
        return None
    if cap is not None and type(cap) is not float:
        return None
    band = [("causal", causal_mask())] if given["causal"] else []
    if window is not None:
        window = tuple(window)
        band.append(("window", window_mask(*window)))
    rest = shape, given["causal"], window, offset, cap
    return Reading.of(given["offset"], rest, band, [("mask", mask), ("score_mod", score_mod)])


def _captured(
    shape: tuple[int, int, int, int], slopes: Any, bias: Any, mask: Any, offset: Any
) -> dict[str, ArrayCapture]:
    """The arrays that were given as options, by their names. Raises: SpecError for one that does not fit."""
    found: dict[str, ArrayCapture] = {}
    if slopes is not None:
        found["alibi_slopes"] = check_slopes(slopes, shape)
    if bias is not None:
        found["bias"] = check_broadcast(bias, shape, "bias")
    if mask is not None and is_array(mask):
        found["mask"] = check_broadcast(mask, shape, "mask")
    if type(offset) is not int and is_array(offset):
        found["offset"] = capture(offset, "align")
        if tuple(offset.shape) != shape[:1] or found["offset"].type != "int":
            shown = f"{offset.dtype} of shape {tuple(offset.shape)}"
            raise SpecError(f"align: got {shown}, expected integers of shape (B,) = ({shape[0]},)")
    return found


@lru_cache(maxsize=256)
def _code(score: Expr | None, mask: Expr | None, slots: tuple[Slot, ...], inside: bool) -> Code:
    """The code of numbered expressions; ``inside``: whose loads need no clamp."""

    def unclamped(x: Expr) -> Expr | None:
        if not isinstance(x.data, Access):
            return None
        return node(x.operation, x.args, x.type, Access(x.data.source, (False,) * len(x.args)))

    final = iter(rewrite([r for r in (score, mask) if r is not None], unclamped if inside else lambda x: None))
    score, mask = (next(final) if root is not None else None for root in (score, mask))
    return Code(_structure(score, mask), score, mask, slots)


def _structure(score: Expr | None, mask: Expr | None) -> str:
    parts = (f"{name}: {text([x])}" for name, x in (("score", score), ("mask", mask)) if x is not None)
    return " | ".join(parts)
