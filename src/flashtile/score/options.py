"""From the options of a call to what changes its scores: a program, and sinks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import address_of, extent_of
from ..dtypes import DTYPES
from ..errors import UnavailableError, described, wrong
from .builtin import argument_of
from .capture import ArrayCapture, capture, is_array
from .code import Code
from .expr import FARTHEST
from .keep import Keep, keep_of
from .mask import Mask, Score
from .program import Program

if TYPE_CHECKING:
    from ..spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class Scoring:
    """What changes the scores of one call: run-time values, beside the spec that knows their structure.

    program   with its captured values, or None
    sinks     (B, H) logits in the accumulator's dtype, or None; an ArrayCapture where they lie on a GPU
    keep      the threshold and seed of dropout, or None
    """

    program: Program | None
    sinks: Any  # np.ndarray, ArrayCapture or None
    keep: Keep | None = None

    @property
    def code(self) -> Code | None:
        return None if self.program is None else self.program.code

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """(name, first, last) of every array that is read where the caller has it, rather than copied: its bytes
        [first, last)."""
        captures = () if self.program is None else self.program.captures
        for x in (*captures, self.sinks):
            if not isinstance(x, ArrayCapture):
                continue
            array, place = x.array, x.place
            at, strides = (array.ctypes.data, array.strides) if place is None else (place.address, place.strides)
            if at:  # else it stands for one that has no memory yet
                below, above = extent_of(array.shape, strides, array.itemsize)
                yield argument_of(x.name), at + below, at + above

    def shapes(self, slots: Collection[Any]) -> dict[int, tuple[int, ...]]:
        """The shapes of the captured arrays in these slots, by their numbers; of anything else among them nothing."""
        captures = () if self.program is None else self.program.captures
        arrays = {n: x.array for n, x in enumerate(captures) if isinstance(x, ArrayCapture)}
        return {n: tuple(x.shape) for n, x in arrays.items() if n in slots}


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """The keywords of attention that change scores or weights, as the caller gave them; of dropout, `keep_of` them."""

    mask: Any = None
    bias: Any = None
    score_mod: Any = None
    softcap: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    keep: Keep | None = None

    @classmethod
    def taken_from(cls, keywords: dict[str, Any]) -> tuple[Any, ...]:
        """Its values, in their order, taken out of a door's keywords. Raises: as `keep_of`."""
        names = [x.name for x in fields(cls) if x.name != "keep"]
        return *(keywords.pop(name) for name in names), keep_of(keywords.pop("dropout_p"), keywords.pop("seed"))

    @property
    def positional(self) -> bool:
        """Whether a rule among them is anchored by the call's alignment."""
        if self.alibi_slopes is not None or isinstance(self.mask, Mask) and self.mask.positional:
            return True
        return isinstance(self.score_mod, Score) and self.score_mod.positional

    def scoring(self, spec: AttentionSpec, causal: bool, window: Any, offset: Any) -> tuple[AttentionSpec, Scoring]:
        """Trace and check the options; the spec that includes them, and their values.

        ``offset`` is the call's alignment, a number or (B,).  A band alone stays a band, for which kernels have
        formulas; where a mask is there as well, it becomes a part of the mask.
        Raises: SpecError naming the option.
        """
        shape = spec.batch, spec.heads, spec.q_len, spec.kv_len
        if self.mask is not None or self.positional:
            check_reach(offset)
        sinks = None if self.sinks is None else sinks_of(self.sinks, spec)
        given: dict[str, Any] = {
            "softcap": self.softcap,
            "score_mod": self.score_mod,
            "alibi_slopes": self.alibi_slopes,
            "bias": self.bias,
            "mask": self.mask,
            "offset": offset,
        }
        banded: dict[str, Any] = {"window": (_near(spec.band.left), _near(spec.band.right))} if spec.band else {}
        program = Program.of(shape, **given, **(banded if self.mask is not None else {}))
        if program.mask is not None and self.mask is None and banded:  # a score function that hides
            program = Program.of(shape, **given, **banded)
        for found in program.captures:
            if isinstance(found, ArrayCapture):
                check_device(found, spec.device)
        scoring = Scoring(None if program.is_identity else program, sinks, self.keep)
        band = None if program.mask is not None else spec.band
        dropout = self.keep is not None
        return spec.changed(band=band, program=scoring.code, sinks=sinks is not None, dropout=dropout), scoring


def check_reach(offset: Any) -> None:
    """Raise SpecError for an offset whose sum with positions might leave the language's int32."""
    if type(offset) is int and -FARTHEST <= offset <= FARTHEST:  # as at every call but a few
        return
    values = np.asarray(offset)
    if values.size and max(-int(values.min()), int(values.max())) > FARTHEST:
        got = offset if values.ndim == 0 else f"offsets from {values.min()} to {values.max()}"
        raise wrong("align", got, f"at most {FARTHEST} in size beside a mask or alibi_slopes")


def check_device(found: ArrayCapture, device: str) -> None:
    """Raise SpecError for an array that lies on another GPU than q, or on one at all where q does not."""
    if found.device not in ("cpu", device):
        expected = "one in CPU memory" + (f" or on {device}" if device != "cpu" else "") + ", as q"
        raise wrong(found.name.partition(":")[0], f"an array on {found.device}", expected)


def _near(distance: int | None) -> int | None:
    """A side of a window that reaches beyond every position is open."""
    return None if distance is None or distance > 3 * FARTHEST else distance


def read_beside(scoring: Scoring | None, offsets: np.ndarray | None) -> Iterator[tuple[str, int, int]]:
    """As `Scoring.spans`, of everything that a call reads beside q, k and v; offsets: those that are no number."""
    if offsets is not None:
        yield "align", (first := address_of(offsets)), first + offsets.nbytes
    if scoring is not None:
        yield from scoring.spans()


def sinks_of(sinks: Any, spec: AttentionSpec) -> np.ndarray | ArrayCapture:
    """Sinks as a contiguous (B, H) array of the accumulator's dtype; as they are where they lie on a GPU."""
    expected = f"floats of shape (H,) = ({spec.heads},) or (B, H) = ({spec.batch}, {spec.heads})"
    if not is_array(sinks):
        raise wrong("sinks", described(sinks), expected)
    found = capture(sinks, "sinks")
    if found.type != "float":
        raise wrong("sinks", f"dtype {sinks.dtype}", expected)
    if found.array.shape not in ((spec.heads,), (spec.batch, spec.heads)):
        raise wrong("sinks", f"shape {tuple(found.array.shape)}", expected)
    check_device(found, spec.device)
    if found.place is not None:
        return found
    values = found.widen(found.array, np.dtype(DTYPES[spec.dtype].accumulator))
    return np.ascontiguousarray(np.broadcast_to(values, (spec.batch, spec.heads)))


def masked_by_tile(spec: AttentionSpec, mask: str) -> tuple[AttentionSpec, Scoring]:
    """The spec with a program that reads a mask of its own size, wherever that will be."""
    from .bias import bias
    from .functions import where

    shape = (max(2, spec.q_len), max(2, spec.kv_len))  # an axis of one element would be read as one that broadcasts
    stand_in = np.broadcast_to(np.zeros((1, 1), numpy_of(mask)), shape)
    if mask == "bool":
        shown = Score(lambda offset: lambda s, b, h, i, j: where(stand_in[i, j], s, -np.inf))
    else:
        shown = bias(stand_in)
    program = Program.compose((spec.batch, spec.heads, *shape), [shown.expression()], [])
    return replace(spec, program=program.code), Scoring(program, None)


def numpy_of(name: str) -> np.dtype:
    """The NumPy dtype of this name; bfloat16 is that of ml_dtypes. Raises: UnavailableError without it."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError as cause:
        raise UnavailableError("mask: got bfloat16 without ml_dtypes, expected it: pip install ml_dtypes") from cause
    return np.dtype(bfloat16)
