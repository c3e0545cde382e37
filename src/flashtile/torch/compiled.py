"""`attention` inside `torch.compile`: Python that its tracer reads, from the keywords to the operator, and no value."""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from flashtile.errors import wrong
from flashtile.score.frozen import FrozenMask, FrozenScore, freeze, join
from flashtile.score.mask import Composed, Mask, Score
from flashtile.spec import offset_of
from flashtile.torch.dispatch import outside_of_graphs
from flashtile.torch.operator import ATTENTION, draw

try:
    from flashtile.torch import followed
except ImportError:  # a torch whose tracer is another: functions that read values break the graph
    followed = None  # type: ignore[assignment]  # in place of the module

Tensor = torch.Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, unknown: Any = None, **keywords: Any) -> Any:
    """The call as one node of a graph, by the keywords of `flashtile.torch.attention`. Where a function can neither be
    followed nor is frozen, the graph breaks."""
    keywords = {**_DEFAULTS, **keywords}
    shape = _shape(q, k)
    score_mod, mask = keywords["score_mod"], keywords["mask"]
    if score_mod is not None:
        score_mod = _rule(score_mod, "score_mod", q, shape, keywords["align"])
    if mask is not None and not isinstance(mask, Tensor):
        mask = _rule(mask, "mask", q, shape, keywords["align"])
    if score_mod is False or mask is False:
        return _outside(q, k, v, **keywords)
    for name in ("progress", "out"):
        if keywords[name] is not None:
            raise wrong(name, "one in a compiled function", "None there")
    o, lse = ATTENTION(q, k, v, **_rules(score_mod, mask), **_options(**keywords))
    return (o, lse) if keywords["return_lse"] else o


class Followed(NamedTuple):
    """A rule as the tracer has it: a text, and tensors that fill its slots."""

    text: str
    arrays: list[Tensor]
    numbers: tuple[float, ...] = ()


def _shape(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """(B, H, S_q, S_kv) of a call; an axis that is not there has one element."""
    b, h, rows = (1, 1, 1, *q.shape[:-1])[-3:]
    return b, h, rows, k.shape[-2]


def _rule(rule: Any, argument: str, q: Tensor, shape: Any, align: Any) -> FrozenMask | FrozenScore | Followed | bool:
    """A mask, score or function as text; False where that cannot be made in a graph.

    Raises: SpecError where it does not fit the call.
    """
    if not isinstance(rule, Mask | Score):
        return _traced(rule, argument, q)
    rule.fits(shape)
    return _anchored(rule, argument, q, _where(align, rule.positional, shape))


def _where(align: Any, positional: bool, shape: Any) -> Any:
    """Where row 0 stands among the keys, for rules that ask: a number, or integers (B,)."""
    if align is None or isinstance(align, (int, str)):
        return offset_of(align, positional, shape[2], shape[3])
    return align


def _anchored(rule: Any, argument: str, q: Tensor, offset: Any) -> FrozenMask | FrozenScore | Followed | bool:
    """The rule, each part of one that is composed by itself."""
    if isinstance(rule, FrozenMask | FrozenScore):
        return rule
    if not isinstance(rule, Composed):
        return _traced(rule.build(offset), argument, q)
    texts: list[str] = []
    arrays: list[Any] = []
    numbers: list[float] = []
    for part in rule.parts:
        found = _anchored(part, argument, q, offset)
        if isinstance(found, bool):
            return False
        texts.append(found.text)
        arrays += found.arrays
        numbers += found.numbers
    return Followed(_joined(rule.operation, *texts), arrays, tuple(numbers))


_joined = torch.compiler.assume_constant_result(join)  # a constant of the texts


def _traced(function: Any, argument: str, q: Tensor) -> Followed | bool:
    """A function as text; False where that cannot be made in a graph."""
    if _is_alone(function, _ARGUMENTS[argument]) and (text := _pure(function)):
        return Followed(text, [])
    if followed is None or not callable(function):
        return False
    found = followed.rule(function, argument, q)
    return False if found is None else Followed(*found)


def _is_alone(rule: Any, arguments: int) -> bool:
    """Whether it is a function of as many arguments, none of them with a default, and closes over nothing."""
    if not isinstance(rule, FunctionType):
        return False
    return rule.__code__.co_argcount == arguments and not rule.__code__.co_freevars


@torch.compiler.assume_constant_result
def _pure(function: Any) -> str | bool:
    """The text of such a function, a constant of its code: the tracer calls this while it makes a graph. False where it
    reads more of its module than other modules, since no guard of the graph would see that change."""
    if not all(isinstance(x, ModuleType) for x in inspect.getclosurevars(function).globals.values()):
        return False
    try:
        found = freeze(function)
    except Exception:  # the call outside of the graph says what is wrong
        return False
    return False if found.arrays or found.numbers else found.text


def _rules(score_mod: FrozenScore | Followed | None, mask: FrozenMask | Followed | Tensor | None) -> dict[str, Any]:
    """A mask, and functions as the schema spells them."""
    stored = mask if isinstance(mask, Tensor) else None
    mask_mod = None if isinstance(mask, Tensor) else mask
    captured: list[Tensor] = []
    numbers: list[float] = []
    for rule in (score_mod, mask_mod):
        if rule is not None:
            if torch.compiler.is_exporting() and not all(isinstance(x, Tensor) for x in rule.arrays):
                # torch.export(strict=True) would keep their shapes and lose their elements, without a word.
                raise wrong("rule", "one that reads NumPy arrays", "tensors in a strict export, or strict=False")
            captured += [torch.as_tensor(x) for x in rule.arrays]
            numbers += rule.numbers
    return {
        "mask": stored,
        "captured": captured,
        "score_mod": "" if score_mod is None else score_mod.text,
        "mask_mod": "" if mask_mod is None else mask_mod.text,
        "numbers": numbers,
    }


def _options(window: Any, align: Any, dropout_p: float, seed: Any, kernel: str, **rest: Any) -> dict[str, Any]:
    """The other keywords as the schema spells them."""
    offsets = offset = None
    if isinstance(align, int):
        align, offset = None, align
    elif align is not None and not isinstance(align, str):
        align, offsets = None, torch.as_tensor(align).to(torch.int64)
    return {
        "offsets": offsets,
        "align": align,
        "offset": offset,
        "window": None if window is None else [-1 if x is None else x for x in window],
        "seed": _seed(dropout_p, seed),
        "dropout_p": dropout_p,
        "family": kernel,
        **{name: rest[name] for name in _AS_THEY_ARE},
    }


_ARGUMENTS = {"score_mod": 5, "mask": 4}
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("score_mod", "seed", "progress", "out")),
    "precision": "ieee",
    "kernel": "auto",
    "engine": "auto",
}
_AS_THEY_ARE = ("bias", "alibi_slopes", "sinks", "causal", "scale", "softcap", "precision", "engine")


def _uncompiled(*inputs: Tensor, **keywords: Any) -> Any:
    from flashtile.torch.attend import attention

    return attention(*inputs, **keywords)


# torch.compile's own error says so where it may not break the graph.
_REASON = (
    "a mask or score function that torch.compile cannot follow: give one that flashtile.score.freeze made outside of "
    "the graph"
)
_outside = outside_of_graphs(_REASON)(_uncompiled)


def _seed(dropout_p: float, seed: Any) -> Tensor | None:
    if dropout_p == 0:
        return None
    if seed is None:
        return draw()
    return torch.tensor(seed - (1 << 64) if seed >= 1 << 63 else seed)
