"""The arguments of the dispatcher's operator after q, k and v: the options of a call as a schema can spell them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from flashtile.calls import Options, Request
from flashtile.score.capture import capture, is_array
from flashtile.score.frozen import freeze, thaw
from flashtile.score.keep import Keep, keep_of
from flashtile.score.mask import as_mask, as_score
from flashtile.score.options import ScoreOptions
from flashtile.score.softcap import check_cap, is_off
from flashtile.score.texts import parse
from flashtile.spec import PER_BATCH

Tensor = torch.Tensor

SCHEMA = (
    "Tensor? mask=None, Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? offsets=None, "
    'Tensor? seed=None, Tensor[]? captured=None, str score_mod="", str mask_mod="", float[]? numbers=None, '
    "bool causal=False, SymInt[]? window=None, str? align=None, SymInt? offset=None, float? scale=None, "
    'float? softcap=None, float dropout_p=0.0, str precision="ieee", str family="auto", str engine="auto"'
)


class Arguments(NamedTuple):
    """As in SCHEMA.

    score_mod, mask_mod  texts of frozen rules; `captured` and `numbers` fill their slots, the score's first
    window, align        -1 is an open side; `offset` is an integer given as align, `offsets` integers (B,)
    seed                 an int64 tensor of no axes, the seed's 64 bits
    family               the name of a kernel, by a word that inductor does not use itself
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    offsets: Tensor | None = None
    seed: Tensor | None = None
    captured: list[Tensor] | None = None
    score_mod: str = ""
    mask_mod: str = ""
    numbers: list[float] | None = None
    causal: bool = False
    window: list[int] | None = None
    align: str | None = None
    offset: int | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    precision: str = "ieee"
    family: str = "auto"
    engine: str = "auto"

    @property
    def differentiable(self) -> tuple[Any, ...]:
        """What may have a gradient beside q, k and v, in the order of every list of gradients."""
        return (self.sinks, self.bias, self.alibi_slopes, *(self.captured or ()))

    @property
    def others(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The tensors that have none."""
        return self.mask, self.offsets, self.seed

    def filled(self, others: Any = (None,) * 3, differentiable: Any = (None,) * 3) -> Arguments:
        """These arguments with other tensors."""
        mask, offsets, seed = others
        sinks, bias, slopes, *captured = differentiable
        return self._replace(
            mask=mask, offsets=offsets, seed=seed, sinks=sinks, bias=bias, alibi_slopes=slopes, captured=captured
        )

    @property
    def request(self) -> Request:
        """The call, as every door describes it."""
        align = PER_BATCH if self.offsets is not None else self.align if self.offset is None else self.offset
        window = None if self.window is None else tuple(self.window)
        options = Options(self.causal, window, align, self.scale, self.precision, self.family, self.engine)
        return Request(options, self.scores, None if self.offsets is None else self.offsets.detach().numpy())

    @property
    def scores(self) -> ScoreOptions | None:
        """The options that change scores, None where there are none."""
        rest = self.mask, self.bias, self.alibi_slopes, self.sinks, self.seed, self.softcap
        if not self.score_mod and not self.mask_mod and all(x is None for x in rest):
            return None
        arrays, numbers = iter(self.captured or ()), iter(self.numbers or ())

        def rule(text: str) -> Any:
            slots = parse(text)[2]
            mine = tuple(next(arrays) for s in slots if s.rank >= 0)
            return thaw(text, mine, tuple(next(numbers) for s in slots if s.rank < 0))

        score_mod = rule(self.score_mod) if self.score_mod else None
        mask = rule(self.mask_mod) if self.mask_mod else self.mask
        keep = None if self.seed is None else keep_of(self.dropout_p, int(self.seed) & ((1 << 64) - 1))
        return ScoreOptions(mask, self.bias, score_mod, self.softcap, self.alibi_slopes, self.sinks, keep)


def plain_arguments(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Arguments:
    """The operator's arguments of a call without an option that changes scores, or offsets. Raises: SpecError."""
    try:
        return _plain(options)
    except (TypeError, ValueError):
        options.spec(q, k, v)  # says which
        raise


@functools.lru_cache(maxsize=256)
def _plain(options: Options) -> Arguments:
    causal, window, align, scale, precision, kernel, engine = options
    return Arguments(
        causal=causal,
        window=None if window is None else [-1 if x is None else x for x in window],
        align=align if isinstance(align, str) else None,
        offset=None if align is None or isinstance(align, str) else int(align),
        scale=None if scale is None else float(scale),
        precision=precision,
        family=kernel,
        engine=engine,
    )


def arguments_of(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Arguments:
    """The operator's arguments of a call; its functions are traced. Raises: as `Request.of` for what it looks at before
    there are values: shapes, dtypes, functions."""
    options, scores, offsets, _ = request
    plain = options._replace(align=None) if options.align is PER_BATCH else options
    given = plain_arguments(q, k, v, plain)._replace(offsets=None if offsets is None else torch.from_numpy(offsets))
    if scores is None:
        return given
    assert isinstance(scores, ScoreOptions)
    mask, mask_mod, score_mod = scores.mask, None, None
    if scores.score_mod is not None or not (mask is None or is_array(mask)):
        spec = options.spec(q, k, v, scores.positional)
        where = request.offset(spec)
        shape = spec.batch, spec.heads, spec.q_len, spec.kv_len
        if mask is not None and not is_array(mask):
            rule = as_mask(mask)
            rule.fits(shape)
            mask, mask_mod = None, freeze(rule, where)
        if scores.score_mod is not None:
            change = as_score(scores.score_mod)
            change.fits(shape)
            score_mod = freeze(change, where)
    frozen = [x for x in (score_mod, mask_mod) if x is not None]
    keep = scores.keep
    return given._replace(
        mask=as_tensor(mask, "mask"),
        bias=as_tensor(scores.bias, "bias"),
        alibi_slopes=as_tensor(scores.alibi_slopes, "alibi_slopes"),
        sinks=as_tensor(scores.sinks, "sinks"),
        seed=None if keep is None else seed_tensor(keep),
        captured=[as_tensor(x, "captured array") for rule in frozen for x in rule.arrays],  # type: ignore[misc]  # no None
        score_mod="" if score_mod is None else score_mod.text,
        mask_mod="" if mask_mod is None else mask_mod.text,
        numbers=[n for rule in frozen for n in rule.numbers],
        softcap=None if is_off(scores.softcap) else check_cap(scores.softcap),
        dropout_p=0.0 if keep is None else keep.dropout_p,
    )


def seed_tensor(keep: Keep) -> Tensor:
    """The seed's 64 bits as an int64 tensor; a tensor drawn under a transform is one already."""
    seed: Any = keep.seed
    return seed if isinstance(seed, Tensor) else torch.tensor(seed - ((seed >> 63) << 64))


def as_tensor(x: Any, name: str) -> Tensor | None:
    """An array of any library as a tensor, which shares its memory where torch can have it so."""
    if x is None or isinstance(x, Tensor):
        return x
    found = capture(x, name)
    raw = found.array
    if not raw.flags.writeable or any(n < 0 for n in raw.strides):  # torch has neither
        raw = raw.copy()
    if found.element == "bf16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(raw)
