"""The names that a call is given by, and its keywords as type checkers see them. Nothing here runs in a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

Precision = Literal["ieee", "tf32", "bf16", "fp16"]
Alignment = Literal["top_left", "bottom_right"]


class Array(Protocol):
    """What NumPy arrays and torch tensors share."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


if TYPE_CHECKING:  # typing_extensions comes with the checker, and is no dependency
    from typing_extensions import TypedDict

    class Keywords(TypedDict, total=False):
        """Every keyword of `attention` but return_lse, which decides what it returns.

        kernel and engine are plain names: a kernel may come from another package, which no Literal here can list.
        """

        mask: Any
        bias: Any
        score_mod: Any
        causal: bool
        window: tuple[int | None, int | None] | None
        align: Any
        softcap: float | None
        alibi_slopes: Any
        sinks: Any
        scale: float | None
        dropout_p: float
        seed: int | None
        precision: Precision
        kernel: str
        engine: str
        progress: Any
        out: Any
