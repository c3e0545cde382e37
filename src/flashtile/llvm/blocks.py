"""Memory that is laid out from one declaration: parameter blocks, and areas of scratch memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from types import SimpleNamespace

from flashtile.llvm.ir import Function, Value

WORD = 8  # bytes
ALIGNMENT = 64


def pointers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "ptr")


def integers(names: str | Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(names.split() if isinstance(names, str) else names, "i64")


def reals(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "double")


def strides_of(tensors: Iterable[str]) -> dict[str, str]:
    """The byte strides of tensors along (B, H, S, D): q_b, q_h, q_s, q_d, ..."""
    return integers(f"{tensor}_{axis}" for tensor in tensors for axis in "bhsd")


class Block:
    """A block of 64-bit words that have names and types, in their order: how Python packs it, and how code reads it.

    Pointers come first where they differ from call to call and all else stays: `head` packs them, `tail` the rest.
    """

    def __init__(self, *groups: Mapping[str, str]) -> None:
        self.types: dict[str, str] = {}
        for group in groups:
            if twice := group.keys() & self.types.keys():
                raise ValueError(f"{', '.join(sorted(twice))}: named twice in one block")
            self.types |= group
        self.index: Mapping[str, int] = {name: n for n, name in enumerate(self.types)}
        codes = ["d" if type_ == "double" else "q" for type_ in self.types.values()]
        self._first = next((n for n, type_ in enumerate(self.types.values()) if type_ != "ptr"), len(codes))
        self.head: Callable[..., bytes] = struct.Struct("".join(codes[: self._first])).pack
        self._tail = struct.Struct("".join(codes[self._first :])).pack
        behind = list(self.types)[self._first :]
        self._values_behind = itemgetter(*behind) if len(behind) > 1 else lambda values: [values[x] for x in behind]

    def tail(self, values: Mapping[str, float]) -> bytes:
        """All words but the leading pointers."""
        return self._tail(*self._values_behind(values))

    def pack(self, values: Mapping[str, float]) -> bytes:
        """The whole block."""
        return self.head(*(values[name] for name in list(self.types)[: self._first])) + self.tail(values)

    @property
    def bytes(self) -> int:
        return len(self.types) * WORD

    # -- emitted code ----------------------------------------------------------------------------------

    def load(self, f: Function, base: Value) -> SimpleNamespace:
        """Every word, by its name."""
        return SimpleNamespace(**{name: self.read(f, base, name) for name in self.types})

    def read(self, f: Function, base: Value, name: str) -> Value:
        return f.load(self.types[name], base + WORD * self.index[name], align=WORD)

    def write(self, f: Function, base: Value, **values: Value) -> None:
        for name, value in values.items():
            if value.type != self.types[name]:
                raise TypeError(f"{name}: got {value.type}, expected {self.types[name]}")
            f.store(value, base + WORD * self.index[name])


class Areas:
    """Areas of memory by name, one after the other, each on a cache line of its own."""

    def __init__(self, sizes: Mapping[str, int], start: int = 0) -> None:
        self.at: dict[str, int] = {}
        self.bytes = start
        for name, size in sizes.items():
            self.at[name] = self.bytes
            self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
