"""A call as XLA carries it: all but its arrays, as text."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flashtile import score
from flashtile.calls import Options
from flashtile.score.mask import as_mask

FORWARD, BACKWARD = "flashtile_attention", "flashtile_attention_backward"
DIFFERENTIABLE = "bias", "sinks"  # of the operands after query, key and value; and these, by their numbers:
LEARNED, READ = "learned ", "read "  # arrays that the score function captured, with a gradient or without


class _View(NamedTuple):
    """An array without its elements, in flashtile's order of the axes."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class DescribedCall:
    """What a call does, beside its arrays: part of the compiled program, as text."""

    scale: float | None
    is_causal: bool
    window: tuple[int, int] | None
    softcap: float | None
    score_mod: str | None  # as flashtile.score.freeze writes it
    numbers: tuple[float, ...]  # that it captured
    operands: tuple[str, ...]  # after query, key and value
    fixed: tuple[str, ...] = ()  # those of them that JAX does not follow: they have no gradient
    target: str = FORWARD  # the function that XLA calls

    @property
    def options(self) -> Options:
        return Options(self.is_causal, self.window, "top_left", self.scale)

    @property
    def text(self) -> str:
        return json.dumps(vars(self), sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(text: str) -> DescribedCall:
        found = json.loads(text)
        lists: dict[str, Any] = {name: tuple(x) for name, x in found.items() if isinstance(x, list)}
        return DescribedCall(**(found | lists))

    @property
    def band(self) -> dict[str, Any]:
        return {"causal": self.is_causal, "window": self.window, "align": "top_left", "scale": self.scale}

    def check(self, q: Any, k: Any, v: Any, shape: tuple[int, int, int, int]) -> None:
        """Raise SpecError now, while tracing, for what the run would refuse."""
        shapes = [_View((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in (q, k, v)]
        self.options.spec(shapes[0], shapes[1], shapes[2])
        score.Program.of(shape, softcap=self.softcap)

    @property
    def differentiable(self) -> list[str]:
        """The operands that have gradients."""
        learned = (x for x in self.operands if x in DIFFERENTIABLE or x.startswith(LEARNED))
        return [x for x in learned if x not in self.fixed]

    @staticmethod
    def captured(given: dict[str, Any]) -> tuple[Any, ...]:
        """What the score function captured, in its order."""
        return tuple(x for name, x in given.items() if name.startswith((LEARNED, READ)))

    def keywords(self, arrays: list[np.ndarray]) -> dict[str, Any]:
        """The call as flashtile.attention's keywords, from the arrays after query, key and value."""
        given = dict(zip(self.operands, arrays, strict=True))
        rules: list[Any] = [given["mask"]] if "mask" in given else []
        if "query_seq_lengths" in given:
            rows = given["query_seq_lengths"]
            rules.append(lambda b, h, i, j: i < rows[b])
        if "key_value_seq_lengths" in given:
            rules.append(score.padding(given["key_value_seq_lengths"]))
        mask = rules[0] if rules else None
        for rule in rules[1:]:
            mask = as_mask(mask) & rule
        return {
            **self.band,
            "mask": mask,
            "bias": given.get("bias"),
            "sinks": given.get("sinks"),
            "softcap": self.softcap,
            "score_mod": None
            if self.score_mod is None
            else score.thaw(self.score_mod, self.captured(given), self.numbers),
        }
