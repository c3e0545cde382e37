"""Hot loops keep everything in registers: read off the machine code that is emitted for every instruction set.

Code generation needs no such machine, so all are checked everywhere; all but those that exist for tests only.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
from assembly import functions, innermost_loops, stack_traffic
from modules import every_module

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.machines import ISA

HOT = {
    "forward": ("scores", "accumulate", "softmax"),
    "backward": ("scores", "accumulate", "exchange", "differentiate"),
}
HOT_TILES = {
    "forward": ("multiply", "accumulate", "softmax", "program"),
    "backward": ("multiply", "accumulate", "exchange", r"derivative_\d_full"),
}
MODULES = {
    name: at
    for name, at in every_module(for_tests_too=False).items()
    if name.split("-")[1] in HOT and "dropout" not in name
}


def hot_part(text: str, kernel: str = "forward") -> str:
    """The module's declarations and its hot functions alone: all that needs to be compiled to see their loops."""
    declarations, *definitions = re.split(r"^(?=define )", text, flags=re.MULTILINE)
    names = (HOT_TILES if "@multiply_1(" in text else HOT)[kernel]
    if "@add_product_" in text:  # what accumulates: `accumulate` calls it, and has no loop
        names = tuple("add_product" if name == "accumulate" else name for name in names)
    hot = [d for d in definitions if re.match(rf"define internal \w+ @(?:{'|'.join(names)})[_(]", d)]
    hot = [d for d in hot if not d.startswith("define internal void @exchange(")]  # it calls tiles, and has none
    # A step of depth with its share of weights has more scalars than registers: test_amx.py looks for vectors there.
    hot = [d for d in hot if not re.match(r"define internal void @(\w+_beside|softmax_(begin|end))_", d)]
    for prefix in names:
        assert any(re.search(f"@{prefix}", d) for d in hot), f"{prefix} has another name now"
    return declarations + "".join(hot)


@functools.cache  # the hot functions of the 16-bit types are often those of fp32
def spills(isa: ISA, text: str) -> dict[str, list[str]]:
    """Stack traffic in the innermost loops of each function of a module."""
    found = {}
    for name, lines in functions(jit.assembly(text, isa)).items():
        loops = innermost_loops(lines)
        assert loops, f"no loop found in {name}"
        if traffic := [line for loop in loops for line in stack_traffic(loop, lines)]:
            found[name] = traffic
    return found


@pytest.mark.parametrize("name", MODULES)
def test_hot_loops_do_not_touch_the_stack(name: str) -> None:
    isa, text = MODULES[name]
    assert spills(isa, hot_part(text(), name.split("-")[1])) == {}


@pytest.mark.parametrize("name", ["avx512", "avx2", "neon"])
def test_a_tile_larger_than_the_register_file_is_noticed(name: str) -> None:
    isa = isas.known()[name]
    large = replace(isa, vectors=isa.vectors + 2)
    found = spills(large, hot_part(forward_text(Config(large, "float"))))
    assert any(function.startswith("scores") for function in found)
    assert any(function.startswith("accumulate") for function in found)


X86 = """
	.globl	f
f:
	pushq	%rbp
	movq	%rdi, -8(%rsp)
.LBB0_1:
	vaddps	-64(%rsp), %ymm0, %ymm1
.LBB0_2:
	vmovups	(%rbp,%rax), %ymm0
	jne	.LBB0_2
	jmp	.LBB0_1
	popq	%rbp
	retq
	.size	f, .-f
"""

AARCH64 = """
f:
	stp	x29, x30, [sp, #-16]!
	mov	x29, sp
.LBB0_1:
	ldr	q0, [x29, #16]
	cbnz	x8, .LBB0_1
	ret
"""


def test_the_reader_of_assembly() -> None:
    """Loops are told from what stands around them, innermost from outer, and a frame pointer from a register."""
    (lines,) = functions(X86).values()
    (loop,) = innermost_loops(lines)
    assert [line.split()[0] for line in loop] == [".LBB0_2:", "vmovups", "jne"]
    assert stack_traffic(loop, lines) == []
    assert len(stack_traffic(loop, ["\tmovq\t%rsp, %rbp", *lines])) == 1
    assert len(stack_traffic(lines, lines)) == 4
    (lines,) = functions(AARCH64).values()
    (loop,) = innermost_loops(lines)
    assert len(stack_traffic(loop, lines)) == 1
