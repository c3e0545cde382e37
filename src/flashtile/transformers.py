"""The door for Transformers: a model of theirs attends by flashtile, by one name for `attn_implementation`.

Transformers asks for two functions of one name: one attends, the other says which keys a row may see. The second gives
a `LazyMask`, which holds rules, and nothing of size S_q x S_kv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import flashtile.torch
from flashtile import score
from flashtile.arrays import is_torch
from flashtile.errors import SpecError, UnavailableError, described, wrong
from flashtile.score.mask import as_mask

__all__ = ["LazyMask", "attention", "mask", "register"]
__dir__ = __all__.copy  # the public names, and not what stands beside them

Tensor = torch.Tensor
Window = tuple[int | None, int | None]

# Without "flash", "sdpa" and "flex", by which Transformers knows families of its own.
NAME = "tiled_attention"

# Keywords that say nothing about which scores there are, or what the mask or the rotated q and k say already.
_SAID_ELSEWHERE = {
    *("cache_position", "deterministic", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch"),
    *("output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict", "seq_idx"),
    *("sliding_window", "use_cache"),
}


def register() -> str:
    """Register flashtile's attention and its mask function with Transformers, for the whole process.

    Returns:  the name to give as `attn_implementation`. To register again changes nothing.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...                      num_attention_heads=4, num_key_value_heads=2, attn_implementation=register())
    >>> LlamaForCausalLM(config)(torch.arange(5)[None]).logits.shape
    torch.Size([1, 5, 64])
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


class LazyMask(BlockMask):
    """Which keys a row may see: the shape (B, 1, S_q, S_kv) of a mask, and rules instead of its elements.

    window and align are those of `flashtile.attention`, mask what other rules there are: a boolean tensor, a mask of
    `flashtile.score`, or None. It is a BlockMask by type alone: Transformers hands on, as it is, what is a tensor or a
    BlockMask of four axes, and looks into anything else.
    """

    def __init__(self, shape: tuple[int, int, int, int], window: Window | None, align: int, mask: Any) -> None:
        self._shape, self.window, self.align, self.mask = shape, window, align, mask

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __repr__(self) -> str:
        return f"LazyMask(shape={self.shape}, window={self.window}, align={self.align}, mask={self.mask!r})"

    __str__ = __repr__

    def to(self, device: Any) -> LazyMask:
        """Itself: its tensors are read where q lies, or refused there."""
        return self

    def to_dense(self) -> Tensor:
        """The elements, a boolean tensor (B, 1, S_q, S_kv), True = attend: for looking at, on small shapes."""
        program = score.Program.of(self._shape, mask=self.mask, window=self.window, offset=self.align)
        places = torch.meshgrid(*map(torch.arange, self.shape), indexing="ij")
        return torch.tensor(program.visible(*(x.numpy() for x in places)))

    def __getitem__(self, index: Any) -> Any:
        raise _looked_into("an index into", self.shape)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Models with attention of their own compute with the mask."""
        given = (*args, *(kwargs or {}).values())
        every = (x for y in given for x in (y if isinstance(y, (list, tuple)) else (y,)))  # as torch.cat has them
        shape = next(x.shape for x in every if isinstance(x, LazyMask))
        raise _looked_into(f"{getattr(function, '__name__', function)} of", shape)


def _looked_into(how: str, shape: tuple[int, ...]) -> UnavailableError:
    return UnavailableError(
        f"attention_mask: got {how} a lazy mask of shape {shape}, expected a model that hands the mask on as it is, or "
        "another attn_implementation"
    )


@torch.compiler.disable  # a graph breaks here, rather than follow a call into its tracing and compiling
def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as a model of Transformers calls it.

    Shapes:   query (B, H, S_q, D), key (B, H_kv, S_kv, D), value (B, H_kv, S_kv, D_v) -> (B, S_q, H, D_v), and no
              weights.
    Options:  attention_mask what `mask` made, whole as it is: is_causal and sliding_window are then said by it; or a
              tensor (B, 1, S_q, S_kv), boolean, True = attend, or added to the scores. position_bias is added, too.
              s_aux, or sinks, (H,) join the denominators. dropout draws its seed from torch's generator.
              cu_seq_lens_q, cu_seq_lens_k: rows see the keys of their own packed sequence.
    Raises:   as flashtile.torch.attention; SpecError where no mask came and the model is causal, or its mask function
              is not the one that `register` registers; UnavailableError for output_attentions and for keywords that
              are not known here, since what they ask for would be lost.
    Source:   Transformers 5.24, AttentionInterface.
    """
    _check_others(others)
    if attention_mask is None:
        _check_unmasked(module, query, is_causal)
    window: Window | None = None
    align: int | None = None
    seen: Any = None
    if isinstance(attention_mask, LazyMask):
        window, align, seen = attention_mask.window, attention_mask.align, attention_mask.mask
    elif attention_mask is not None:
        seen, position_bias = _stored(attention_mask, position_bias)
    if cu_seq_lens_q is not None:
        packed = score.varlen(cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
        seen = packed if seen is None else as_mask(seen) & packed
    o = flashtile.torch.attention(
        query,
        key,
        value,
        mask=seen,
        bias=position_bias,
        window=window,
        align=align,
        softcap=softcap,
        sinks=s_aux if sinks is None else sinks,
        scale=scaling,
        dropout_p=dropout,
        out=_room_for(query, value),
    )
    return o.transpose(1, 2).contiguous(), None


def _room_for(query: Tensor, value: Tensor) -> Tensor | None:
    """Memory for the output in the layout that a model goes on with, (B, S, H, D), as (B, H, S, D): it saves a copy.
    None where autograd or autocast has a say in what the output is."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(query.device.type):
        return None
    b, h, s, _ = query.shape
    return query.new_empty(b, s, h, value.shape[-1]).transpose(1, 2)


def _check_others(others: dict[str, Any]) -> None:
    """Raise for a keyword whose meaning would be lost."""
    for name, value in others.items():
        if value is None or value is False or name in _SAID_ELSEWHERE:
            continue
        if name == "output_attentions":
            expected = 'False: the S x S weights are never stored; attn_implementation="eager" stores them'
        else:
            expected = 'None: what it asks for is not known here; attn_implementation="eager" may know it'
        raise UnavailableError(f"{name}: got {described(value)}, expected {expected}")


def _check_unmasked(module: torch.nn.Module, query: Tensor, is_causal: bool | None) -> None:
    """Raise where None in place of a mask may not mean that every key is visible."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
    if AttentionMaskInterface._global_mapping.get(name) is not mask:
        expected = "one whose mask function is registered, too: that of flashtile.transformers.register()"
        raise wrong("attn_implementation", repr(name), expected)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and query.shape[2] != 1:
        kind = type(module).__name__
        raise wrong("attention_mask", f"None from {kind}, which is causal", "the mask that the mask function made")


def _stored(attention_mask: Any, position_bias: Tensor | None) -> tuple[Any, Tensor | None]:
    """A mask that is stored, as a mask or as a part of the bias."""
    if not is_torch(attention_mask):
        raise wrong("attention_mask", described(attention_mask), "a tensor, or what the mask function made")
    if attention_mask.dtype is torch.bool:
        return attention_mask, position_bias
    if not attention_mask.is_floating_point():
        raise wrong("attention_mask", f"dtype {attention_mask.dtype}", "torch.bool (True = attend) or a float dtype")
    return None, attention_mask if position_bias is None else attention_mask + position_bias


@torch.compiler.disable
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: Any = None,
) -> LazyMask:
    """The mask of a forward pass, as Transformers asks for it: never None, and nothing of size S_q x S_kv.

    Causal and window rules become a band, which kernels have formulas for; padding is a boolean tensor (B, 1, 1, S_kv),
    left out where it hides nothing that the band shows; packed sequences are documents; any other function over
    (batch, head, row, key) is traced as a mask of `flashtile.score`, with head 0, as Transformers calls it.

    Options:  q_offset, kv_offset the position of the first row, and of the first key. attention_mask (B, positions),
              boolean, False = padding. The keywords from local_size on change no key.
    Raises:   SpecError for a function that cannot be traced.
    Source:   Transformers 5.24, AttentionMaskInterface.
    """
    first, past = int(q_offset), int(kv_offset)
    low: int | None = None
    high: int | None = None
    rules = []
    for part in _parts(mask_function):
        band = _band(part)
        if band is None:
            rules.append(_rule(part, first, past))
            continue
        low, high = _least(low, band[0]), _least(high, band[1])
    align = first - past
    window = None if low is None and high is None else (low, high)
    visible = kv_length if high is None else min(kv_length, max(q_length + align + high, 0))
    padding = _padding(attention_mask, past, kv_length, visible)
    found: Any = padding
    for rule in rules:
        found = rule if found is None else as_mask(found) & rule
    return LazyMask((batch_size, 1, q_length, kv_length), window, align, found)


def _least(one: int | None, other: int | None) -> int | None:
    """The smaller of two distances; None is open."""
    return other if one is None else one if other is None else min(one, other)


def _padding(attention_mask: Tensor | None, first: int, length: int, visible: int) -> Tensor | None:
    """Which of the keys from the position `first` on are no padding, (B, 1, 1, length); None where all of the first
    `visible` ones are. Positions beyond the mask are padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise wrong("attention_mask", f"shape {tuple(attention_mask.shape)}", "(B, positions)")
    there = attention_mask[:, first : first + length].bool()
    if there.shape[1] >= visible and there[:, :visible].all():
        return None
    return torch.nn.functional.pad(there, (0, length - there.shape[1]))[:, None, None]


# Functions that masking_utils makes are known by their code, which all that come from one place share.
_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_SLIDING = masking_utils.sliding_window_overlay(1).__code__
_SYMMETRIC = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_REMAPPED = masking_utils.remap_positions_for_packed_sequence(
    masking_utils.causal_mask_function, torch.zeros(1, 1)
).__code__


def _is(function: Any, code: Any) -> bool:
    return getattr(function, "__code__", None) is code


def _held(function: Any) -> dict[str, Any]:
    """The variables that a function closes over."""
    cells = (x.cell_contents for x in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _parts(function: Any) -> Iterator[Any]:
    """Functions that must all hold where this one does."""
    if not _is(function, _AND):
        yield function
        return
    given = _held(function)["mask_functions"]
    packed = [_held(x)["packed_sequence_mask"] for x in given if _is(x, _PACKED)]
    for part in given:
        if packed and _is(part, _REMAPPED):
            held = _held(part)
            inner = list(_parts(held["mask_function"]))
            # Within a sequence positions count on as indices do, so that a band of the ones is a band of the others.
            if all(_band(x) for x in inner) and _count_on(held["position_ids"], packed[0]):
                yield from inner
                continue
        yield from _parts(part)


def _count_on(positions: Tensor, sequences: Tensor) -> bool:
    """Whether positions rise by 1 wherever the sequence stays the same, and that is one run each."""
    same = sequences.diff(dim=-1) == 0
    return bool(((positions.diff(dim=-1) == 1) | ~same).all() and (sequences.diff(dim=-1) >= 0).all())


def _band(function: Any) -> Window | None:
    """The window, of positions, that a function is; None if it is none."""
    if function is masking_utils.causal_mask_function:
        return None, 0
    if function is masking_utils.bidirectional_mask_function:
        return None, None
    if _is(function, _SLIDING):
        size = int(_held(function)["sliding_window"])
        return (size - 1, None) if size > 0 else None
    if _is(function, _SYMMETRIC):
        size = int(_held(function)["sliding_window"])
        return (size, size) if size >= 0 else None
    return None


def _rule(function: Any, first_row: int, first_key: int) -> Any:
    """A function that is no band, as a mask. Raises: SpecError where it cannot be traced."""
    if _is(function, _PACKED):
        return score.document(_held(function)["packed_sequence_mask"])

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return function(b, h * 0, i + first_row, j + first_key)

    name = f"mask_function {getattr(function, '__qualname__', type(function).__name__)}"
    rule = score.Mask(lambda offset: visible, name=name)
    try:
        return score.freeze(rule)  # all layers use it, and trace it once
    except SpecError:
        raise
    except Exception as cause:
        expected = "one that the score language can trace, or another attn_implementation"
        raise wrong("mask_function", f"{name.partition(' ')[2]}, which does not run on symbols", expected) from cause
