"""The one exception family. A message reads "<argument>: got <what came>, expected <what was wanted>"."""

from __future__ import annotations

import numbers
import re
import reprlib
from collections.abc import Mapping

__all__ = ["FlashtileError", "KernelError", "KeywordError", "SpecError", "UnavailableError"]
__dir__ = __all__.copy  # the public names, and not what stands beside them


class FlashtileError(Exception):
    """Base of every error that flashtile raises on purpose."""


class SpecError(FlashtileError, ValueError):
    """The arguments of a call are wrong. Raised before any memory is touched."""


class KeywordError(SpecError, TypeError):
    """A call has a keyword that its function does not: a TypeError, as Python would raise, that says what was meant."""


class UnavailableError(FlashtileError, NotImplementedError):
    """The arguments are right, but this version or this machine cannot do what they ask."""


class KernelError(FlashtileError, RuntimeError):
    """A kernel failed while it ran; the output's content is undefined. The cause is chained."""


LONGEST = 200  # characters that a message shows of what came


def wrong(argument: str, got: object, expected: str) -> SpecError:
    """The error for a wrong argument, in the one wording the package uses: what came on one line, cut where an array's
    elements or a long list would hide what was expected."""
    text = str(got)
    if "\n" in text or len(text) > LONGEST:
        text = " ".join(text.split())
        text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    return SpecError(f"{argument}: got {text}, expected {expected}")


def described(value: object) -> str:
    """What came, for a message: numbers, strings and None themselves, of all else the kind."""
    if value is None or isinstance(value, (bool, numbers.Number, str)):
        return reprlib.repr(value)
    return f"a {type(value).__name__}"


def owned(value: object) -> str:
    """As `described`, the kind by its full name: of arrays it matters whose they are."""
    kind = type(value)
    return described(value) if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"


def rename(error: FlashtileError, names: Mapping[str, str]) -> None:
    """Call the arguments in an error's message what another signature calls them: the one that it begins with, and in
    the rest those whose names are no words of English."""
    argument, colon, rest = str(error).partition(":")
    argument = names.get(argument, argument)
    for name in (name for name in names if len(name) == 1 or "_" in name):
        rest = re.sub(rf"\b{name}\b", names[name], rest)
    error.args = (argument + colon + rest,)
