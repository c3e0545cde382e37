"""The names that a call is given by, and its types as checkers and editors see them. Nothing here runs in a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex, TypeVar

import numpy as np

from flashtile.progress import Report

# Names rather than `str`: a checker sees a wrong one, an editor offers the right ones. What runs still lists the
# folders kernels/ and engines/; a test holds these lists against them.
Kernel = Literal["auto", "cpu", "cudnn", "reference", "triton", "triton_vanilla", "vanilla"]
Engine = Literal["auto", "dask", "direct", "starpu"]
Precision = Literal["ieee", "tf32", "bf16", "fp16"]
Alignment = Literal["top_left", "bottom_right"]


class Array(Protocol):
    """What NumPy arrays, torch tensors and arrays on a GPU share."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


# What arrays of other libraries have and NumPy's lack: a call must match overloads of one kind alone, since a checker
# that sees an array of any shape or dtype match two says Any.
class OfCuda(Protocol):
    """torch tensors and CuPy arrays."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


class OfJax(Protocol):
    """JAX arrays."""

    @property
    def sharding(self) -> Any: ...


Align = Alignment | SupportsIndex | Sequence[int] | Array | None
Window = tuple[int | None, int | None] | None
Progress = bool | Report | None

# A NumPy array goes by its shape and dtype, since subclasses come back as plain arrays; others by their own type.
S = TypeVar("S", bound=tuple[int, ...])
D = TypeVar("D", bound=np.dtype[Any])
Other = TypeVar("Other", bound=OfCuda | OfJax)
Plain = np.ndarray[S, D]
Lse = np.ndarray[Any, np.dtype[np.floating[Any]]]

if TYPE_CHECKING:  # typing_extensions comes with every checker, and is no dependency
    from typing_extensions import TypedDict

    class Keywords(TypedDict, total=False):
        """Every keyword of `attention` but return_lse, which decides what it returns."""

        mask: Any
        bias: Any
        score_mod: Any
        causal: bool
        window: Window
        align: Align
        softcap: float | None
        alibi_slopes: Any
        sinks: Any
        scale: float | None
        dropout_p: float
        seed: int | None
        precision: Precision
        kernel: Kernel
        engine: Engine
        progress: Progress
        out: Any
        memory_limit: int | None
