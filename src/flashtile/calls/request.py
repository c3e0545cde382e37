"""What a call asks for beside its arrays, described once: the keywords of a door end here."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from flashtile.errors import described, wrong
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import LARGEST_POSITION, PER_BATCH, AttentionSpec, band_of, check_align, scale_of


class Options(NamedTuple):
    """The keywords of attention that decide which kernel runs. `align` is PER_BATCH where an array came."""

    causal: Any = False
    window: Any = None
    align: Any = None
    scale: Any = None
    precision: Any = "ieee"
    kernel: Any = "auto"
    engine: Any = "auto"

    def spec(self, q: Any, k: Any, v: Any, positional: bool = False) -> AttentionSpec:
        """Validate the options against q, k and v (anything with `shape` and `dtype`); see AttentionSpec.of. Kernel and
        engine are picked later; here they must be names, since the options are part of keys."""
        as_name("kernel", self.kernel)
        as_name("engine", self.engine)
        return AttentionSpec.of(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            align=self.align,
            scale=self.scale,
            precision=self.precision,
            positional=positional,
        )

    def scored(self, scores: ScoreOptions, q: Any, k: Any, v: Any, offsets: np.ndarray | None) -> Scored:
        """Validate a call with options that change scores: its spec, and their values, read anew at every call."""
        spec = self.spec(q, k, v, scores.positional)
        offset = offsets if spec.offset is None else spec.offset
        return Scored(*scores.scoring(spec, self.causal, self.window, offset))


class Scored(NamedTuple):
    """What options that change scores mean in a call. Their functions are traced for it, which happens once."""

    spec: AttentionSpec
    scoring: Scoring


class Request(NamedTuple):
    """What a call asks for beside its arrays: the options of its kernel, what changes its scores, None if nothing
    does, and the offsets of batches where `align` was an array; and, of a traced one, what its kernel depends on of q,
    k and v (`Arrays.key`), which whoever traced it had to ask."""

    options: Options
    scores: ScoreOptions | Scored | None = None
    offsets: np.ndarray | None = None
    key: Hashable = None

    def of(self, q: Any, k: Any, v: Any) -> Scored:
        """Validate the call on these arrays, or what stands for them: its spec, and what changes its scores."""
        if isinstance(self.scores, Scored):
            return self.scores
        if self.scores is None:
            return Scored(self.options.spec(q, k, v), Scoring(None, None))
        return self.options.scored(self.scores, q, k, v, self.offsets)

    def offset(self, spec: AttentionSpec) -> Any:
        """Where row 0 stands among the keys: a number, or one for each batch."""
        return self.offsets if spec.offset is None else spec.offset


# Of these types what equals a right option is one.
_NONE = type(None)
_ALIGN_TYPES, _SCALE_TYPES, _SIDE_TYPES = frozenset((_NONE, str, int)), frozenset((_NONE, float, int)), {_NONE, int}

_new = tuple.__new__  # past the checks of a NamedTuple's own, which a tiny call would feel


def describe(q: Any, scores: tuple[Any, ...], options: tuple[Any, ...]) -> Request:
    """A door's keywords as a request: those that change scores, in the order of `ScoreOptions`, and those that decide
    which kernel runs, in the order of `Options`. Of q the shape is looked at.

    Raises: SpecError for a `causal`, `window`, `align` or `scale` that is none: 1 equals True, 2.0 equals 2, and a call
    prepared before would be found for them. The rest is validated when such a call is first prepared.
    """
    given = offsets = None
    mask, bias, score_mod, softcap, alibi_slopes, sinks, keep = scores
    if not (mask is bias is score_mod is softcap is alibi_slopes is sinks is keep is None):
        given = ScoreOptions(*scores)
    chosen: Options = _new(Options, options)
    if chosen[1] is not None and type(chosen[1]) is list:  # as good as a tuple, but no part of a key
        chosen = chosen._replace(window=tuple(chosen.window))
    if type(chosen[2]) not in _ALIGN_TYPES:
        align, offsets = split_align(chosen.align, tuple(q.shape))
        chosen = chosen._replace(align=align)
    causal, window, align, scale = chosen[:4]
    if not (
        type(causal) is bool
        and type(align) in _ALIGN_TYPES
        and type(scale) in _SCALE_TYPES
        and (window is None or (type(window) is tuple and _SIDE_TYPES.issuperset(map(type, window))))
    ):
        band_of(causal, window)
        check_align(align)
        scale_of(scale, 1)
    return _new(Request, (chosen, given, offsets, None))


def gathered(**keywords: Any) -> tuple[tuple[Any, ...], Options]:
    """The keywords of a public door as `describe` takes them: those that change scores, and those that decide which
    kernel runs, every one of them and nothing else."""
    scores = ScoreOptions.taken_from(keywords)
    options = Options(*(keywords.pop(name) for name in Options._fields))
    assert not keywords, f"would be lost: {keywords}"
    return scores, options


def as_name(argument: str, value: object) -> str:
    """The name of a kernel or engine, which must be a string."""
    if not isinstance(value, str):
        raise wrong(argument, repr(value), "a name")
    return value


def as_offsets(align: Any, batch: int) -> np.ndarray:
    """An integer array given as `align`, as the contiguous int64 array that kernels read."""
    expected = f"an integer array of shape ({batch},)"
    try:
        offsets = np.asarray(align)
    except Exception as cause:
        raise wrong("align", described(align), expected) from cause
    if offsets.dtype.kind not in "iu":
        raise wrong("align", f"dtype {offsets.dtype}", expected)
    if offsets.shape != (batch,):
        raise wrong("align", f"shape {offsets.shape}", expected)
    if offsets.size and not -LARGEST_POSITION <= int(offsets.min()) <= int(offsets.max()) <= LARGEST_POSITION:
        raise wrong("align", f"offsets from {offsets.min()} to {offsets.max()}", f"at most {LARGEST_POSITION}")
    return np.ascontiguousarray(offsets, np.int64)


def split_align(align: Any, q_shape: tuple[int, ...]) -> tuple[Any, np.ndarray | None]:
    """(what `align` contributes to a cache key, the offsets if it is an array)."""
    if align is None or isinstance(align, (str, int, float, np.generic)):
        return align, None
    return PER_BATCH, as_offsets(align, q_shape[0] if len(q_shape) == 4 else 1)
