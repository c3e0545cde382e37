"""The machine code for few queries: what it keeps in registers."""

from __future__ import annotations

import re

import pytest
from assembly import functions, innermost_loops, stack_traffic
from modules import every_module

from flashtile.llvm import jit

MODULES = {name: at for name, at in every_module(for_tests_too=False).items() if "-decode-" in name}


@pytest.mark.parametrize("name", MODULES)
def test_sums_stay_in_registers(name: str) -> None:
    isa, text = MODULES[name]
    spilled = {}
    for function, lines in functions(jit.assembly(text(), isa)).items():
        if re.match(r"(values|scores)_\d", function):
            loops = innermost_loops(lines)
            assert loops, function
            traffic = [line for loop in loops for line in stack_traffic(loop, lines)]
            spilled[function] = [line for line in traffic if re.search(r"[xyz]mm|\bq\d", line)]
    assert len(spilled) > 6 and not any(spilled.values()), spilled
