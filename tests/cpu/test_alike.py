"""Machines that differ in the dot of bf16 pairs generate the same code for every other dtype: `computes_apart` in
kernel_cases.py, which leaves such kernels out, rests on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.backward import backward_text
from flashtile.kernels.cpu.passes.decode.kernel import decode_text
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.llvm import machines
from flashtile.llvm.products import FMA, PAIRS

pytestmark = pytest.mark.core

PLAIN = machines.known()["avx512"]
WITH_DOT = [isa for isa in machines.known().values() if isa.bf16_dot and not isa.tiles and not isa.squares]


def test_there_are_such_machines() -> None:
    assert {isa.name for isa in WITH_DOT} == {"avx512_bf16", "avx512_bf16_emulated"}
    apart = {"name", "rank", "features", "needs", "bf16_dot"}
    alike = [x.name for x in fields(PLAIN) if x.name not in apart]
    assert all(getattr(isa, name) == getattr(PLAIN, name) for isa in WITH_DOT for name in alike)


@pytest.mark.parametrize("storage", ["double", "float", "half"])
@pytest.mark.parametrize("text", [forward_text, backward_text, decode_text])
def test_the_text_of_other_dtypes_is_the_same(text: Callable[[Config], str], storage: str) -> None:
    plain = text(Config(PLAIN, storage))
    assert all(text(Config(isa, storage)) == plain for isa in WITH_DOT)


def test_that_of_bf16_is_another() -> None:
    assert len({forward_text(Config(isa, "bfloat", PAIRS if isa.bf16_dot else FMA)) for isa in (PLAIN, *WITH_DOT)}) == 3
