"""Existing PyTorch code on flashtile: torch's own scaled_dot_product_attention, on CPU tensors, routed to the door."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch

from flashtile.errors import SpecError, UnavailableError, wrong
from flashtile.torch.sdpa import scaled_dot_product_attention

Tensor = torch.Tensor
_TORCHS = torch.ops.aten.scaled_dot_product_attention.default
_REASONS = 100  # a program has few; one that puts ever new numbers into them must not collect them without end


class Calls(NamedTuple):
    """Calls of torch's scaled_dot_product_attention on CPU tensors since `install`.

    taken        by flashtile; a compiled graph counts once, as it is made
    handed_back  to torch's own function: how many, by the reason
    """

    taken: int
    handed_back: dict[str, int]


class _Route:
    """What is installed: torch's registration, what was switched beside it, and what was counted."""

    def __init__(self) -> None:
        self.library: Any = None
        self.nested: Any = None  # torch's function for nested tensors, where there is one
        self.before: tuple[bool, bool] = (True, True)
        self.taken = 0
        self.handed_back: Counter[str] = Counter()
        self.lock = threading.Lock()


_route = _Route()


def install() -> contextlib.AbstractContextManager[None]:
    """Route `torch.nn.functional.scaled_dot_product_attention` on CPU tensors to flashtile, in the whole process.

    In eager mode, under autograd, in graphs compiled from now on; with dropout, and masks that need a gradient, too.
    `nn.MultiheadAttention` (with need_weights=False: others want the weights themselves) and
    `nn.TransformerEncoderLayer` follow, in training and in evaluation: torch's fused fast path is switched off, and so
    is AOTAutograd's cache on disk, which does not know of this.
    What flashtile cannot take goes to torch's own function; `calls` counts both. Dropout drops other elements than
    torch's, and a row that sees no key gives 0.

    Returns:  a context manager: leaving it uninstalls. Without `with` it stays until `uninstall`.
    Raises:   SpecError if it is installed already.

    >>> with install():
    ...     o = torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 2, 4, 8))
    >>> calls().taken
    1
    """
    from torch._functorch import config

    with _route.lock:
        if _route.library is not None:
            raise wrong("install", "a second call", "one uninstall() first: it is installed in the whole process")
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch warns that a kernel is replaced: that is what is asked for
            warnings.simplefilter("ignore")
            library.impl("scaled_dot_product_attention", _beneath_autograd, "CPU")
            library.impl("scaled_dot_product_attention", _routed, "AutogradCPU")
        _route.library = library
        _route.nested = _route_nested()
        _route.before = torch.backends.mha.get_fastpath_enabled(), config.enable_autograd_cache
        torch.backends.mha.set_fastpath_enabled(False)
        config.enable_autograd_cache = False
        _route.taken = 0
        _route.handed_back.clear()
    return _Installed()


def uninstall() -> None:
    """Undo `install`. Raises: SpecError if it is not installed."""
    from torch._functorch import config

    with _route.lock:
        if _route.library is None:
            raise wrong("uninstall", "a call while nothing is installed", "install() before it")
        _route.library._destroy()
        _route.library = None
        if _route.nested is not None:
            nested_operators().jagged_scaled_dot_product_attention = _route.nested
            _route.nested = None
        fast_path, config.enable_autograd_cache = _route.before
        torch.backends.mha.set_fastpath_enabled(fast_path)


def calls() -> Calls:
    """What was routed since `install`, also after `uninstall`."""
    with _route.lock:
        return Calls(_route.taken, dict(_route.handed_back))


class _Installed(contextlib.AbstractContextManager[None]):
    def __exit__(self, *exception: Any) -> None:
        if _route.library is not None:
            uninstall()


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function, as its dispatcher calls it."""
    given = query, key, value, attn_mask, dropout_p, is_causal
    o = _taken(*given, scale, enable_gqa)
    return _TORCHS.decompose(*given, scale=scale, enable_gqa=enable_gqa) if o is None else o


def _taken(*args: Any, **keywords: Any) -> Tensor | None:
    """The call by flashtile, None where it is to be handed back; counted either way."""
    try:
        o = scaled_dot_product_attention(*args, **keywords)
    except (SpecError, UnavailableError) as reason:
        with _route.lock:
            text = str(reason)
            known = text in _route.handed_back or len(_route.handed_back) < _REASONS
            _route.handed_back[text if known else "other reasons"] += 1
        return None
    with _route.lock:
        _route.taken += 1
    return o


def nested_operators() -> Any:
    """The module in which torch looks up its functions for nested tensors of layout torch.jagged: these do not reach
    the dispatcher's operator."""
    from torch.nested._internal import ops

    return ops


def _route_nested() -> Any:
    """Route that for nested tensors, too; torch's own, None if this torch has it elsewhere."""
    found = getattr(nested_operators(), "jagged_scaled_dot_product_attention", None)
    if found is not None:
        nested_operators().jagged_scaled_dot_product_attention = functools.partial(_jagged, found)
    return found


def _jagged(torchs: Any, query: Tensor, *args: Any, **keywords: Any) -> Tensor:
    if not query.is_cpu:
        return torchs(query, *args, **keywords)
    o = _taken(query, *args, **keywords)
    return torchs(query, *args, **keywords) if o is None else o


def _beneath_autograd(*args: Any, **keywords: Any) -> Tensor:
    with torch.no_grad():
        return _routed(*args, **keywords)
