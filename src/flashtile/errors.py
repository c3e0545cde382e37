"""The one exception family. A message reads "<argument>: got <what came>, expected <what was wanted>"."""

from __future__ import annotations


class FlashtileError(Exception):
    """Base of every error that flashtile raises on purpose."""


class SpecError(FlashtileError, ValueError):
    """The arguments of a call are wrong. Raised before any memory is touched."""


class UnavailableError(FlashtileError, NotImplementedError):
    """The arguments are right, but this version or this machine cannot do what they ask."""


class KernelError(FlashtileError, RuntimeError):
    """A kernel failed while it ran; the output's content is undefined. The cause is chained."""


def wrong(argument: str, got: object, expected: str) -> SpecError:
    """The error for a wrong argument, in the one wording the package uses."""
    return SpecError(f"{argument}: got {got}, expected {expected}")
