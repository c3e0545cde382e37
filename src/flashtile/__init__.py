"""flashtile: exact flash attention on tiles.

>>> import numpy as np, flashtile
>>> x = np.random.default_rng(0).standard_normal((1, 8, 512, 64), dtype=np.float32)
>>> o = flashtile.attention(x, x, x, causal=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashtile import errors, score
from flashtile.api import attention
from flashtile.errors import FlashtileError, KernelError, SpecError, UnavailableError
from flashtile.explain import Explanation, explain
from flashtile.gradient_problem import Gradients
from flashtile.gradients import attention_backward
from flashtile.merge import merge, merge_backward
from flashtile.threads import get_num_threads, set_num_threads
from flashtile.version import __version__ as __version__

if TYPE_CHECKING:
    from flashtile.plot import plot_coverage

__all__ = [
    "Explanation",
    "FlashtileError",
    "Gradients",
    "KernelError",
    "SpecError",
    "UnavailableError",
    "attention",
    "attention_backward",
    "errors",
    "explain",
    "get_num_threads",
    "merge",
    "merge_backward",
    "plot_coverage",
    "score",
    "set_num_threads",
]


def __dir__() -> list[str]:
    """The public names, and not the modules that happen to be loaded."""
    return sorted([*__all__, "__version__", "__doc__"])


def __getattr__(name: str) -> Any:
    """`plot_coverage`, loaded when it is first asked for."""
    if name == "plot_coverage":
        from flashtile.plot import plot_coverage

        return plot_coverage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
