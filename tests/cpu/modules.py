"""Every module of machine code that the package generates, on every instruction set, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.add_parts import add_parts_text
from flashtile.kernels.cpu.passes.backward import backward_text
from flashtile.kernels.cpu.passes.decode.kernel import decode_text
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.kernels.cpu.passes.merge import merge_text
from flashtile.llvm import machines as isas
from flashtile.llvm.machines import ISA
from flashtile.llvm.products import FMA, PAIRS, SQUARES, TILES, TILES2, TILES3

STORAGES = ("double", "float", "half", "bfloat")


def configs(isa: ISA) -> dict[str, Config]:
    """The configurations that calls may lead to: with the bf16 dot bf16 takes it, and fp32 if it may; with matrix
    registers as well, fp16 in two parts, fp32 in two and three. Where such a machine has all else from the one below it
    (tests/llvm/test_amx.py), just what is its own."""
    found = {}
    for storage in STORAGES:
        products = {"bfloat": (PAIRS,), "float": (FMA, PAIRS)}.get(storage, (FMA,)) if isa.bf16_dot else (FMA,)
        if isa.tiles:
            products = {"bfloat": (TILES,), "float": (TILES, TILES2, TILES3), "half": (TILES2,)}.get(storage, ())
        if isa.squares:
            products = {"bfloat": (PAIRS, SQUARES), "float": (SQUARES,)}.get(storage, ())
        found |= {f"{storage}{'' if x is FMA else f'-{x.name}'}": Config(isa, storage, x) for x in products}
    return found


def modules(isa: ISA) -> dict[str, Callable[[], str]]:
    """The text of each module, generated when it is called for."""
    found: dict[str, Callable[[], str]] = {}
    for name, c in configs(isa).items():
        if not (c.isa.squares and c.product is PAIRS):  # which there is for few queries alone
            found[f"forward-{name}"] = partial(forward_text, c)
            found[f"backward-{name}"] = partial(backward_text, c)
        found[f"merge-{name}"] = partial(merge_text, c)
        found[f"add_parts-{name}"] = partial(add_parts_text, c)
        if c.product is FMA or c.storage == "bfloat" and not c.lands_in_memory:
            found[f"decode-{name}"] = partial(decode_text, c)
        if f"forward-{name}" in found and name in ("float", "bfloat-pairs", "bfloat-tiles", "bfloat-squares"):
            found[f"forward-{name}-dropout"] = partial(forward_text, replace(c, dropout=True))
            found[f"backward-{name}-dropout"] = partial(backward_text, replace(c, dropout=True))
    return found


def every_module(*, for_tests_too: bool) -> dict[str, tuple[ISA, Callable[[], str]]]:
    """isa-module -> (isa, text), also of instruction sets that this machine lacks: code is only generated."""
    machines = [isa for isa in isas.known().values() if for_tests_too or isa.rank]
    return {f"{isa.name}-{name}": (isa, text) for isa in machines for name, text in modules(isa).items()}
