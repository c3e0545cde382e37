"""The machine code for few queries: what it keeps in registers, and how it asks memory for what it will read. Neither
changes a result, so no other test would miss it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from assembly import functions, innermost_loops, stack_traffic
from modules import every_module
from test_spills import hot_part

import flashtile
from flashtile.calls import clear_cache
from flashtile.kernels import Layout, cpu
from flashtile.kernels.cpu import few, parts
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.backward import backward_text
from flashtile.kernels.cpu.passes.decode.kernel import decode_text
from flashtile.kernels.cpu.passes.decode.rows import bytes_ahead
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.llvm import jit, machines, processors
from flashtile.llvm.ir import Function, Module
from flashtile.llvm.processors import TABLE, Ahead
from flashtile.llvm.products import known
from flashtile.plan import make_plan

ISA = machines.known()["avx512"]
MODULES = {name: at for name, at in every_module(for_tests_too=False).items() if "-decode-" in name}
ZEN5 = next(processor.ahead for processor in TABLE if processor.name == "AMD Zen 5")


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


@pytest.mark.parametrize("name", ["avx512_bf16-bfloat-pairs", "avx512-float", "avx2-float", "avx2-double"])
def test_sums_of_their_backward_stay_in_registers(name: str) -> None:
    machine, storage, *product = name.split("-")
    c = Config(machines.known()[machine], storage, known()[(*product, "fma")[0]], across=True)
    found = functions(jit.assembly(hot_part(backward_text(c), "backward"), c.isa))
    loops = [loop for name, lines in found.items() if name.startswith("scores") for loop in innermost_loops(lines)]
    wide = [line for loop in loops for line in loop if re.search(r"\(%rsp.*[yz]mm|[yz]mm.*\(%rsp", line)]
    assert len(loops) > 4 and not wide


@pytest.mark.parametrize("storage", ["float", "half"])
@pytest.mark.parametrize(("ahead", "locality"), [(Ahead(), "2"), (ZEN5, "3")], ids=["second cache", "nearest"])
def test_every_line_is_asked_for(storage: str, ahead: Ahead, locality: str) -> None:
    """Keys of a tile, one of its lines each, and of a last one alone; lines of values, of two keys a step and of a last
    one."""
    c = Config(ISA, storage, ahead=ahead)
    line = 64 // (c.lanes * c.element)  # registers
    for function, count in {"scores_4": 4 + 1, "scores_1": 8 + 1, "values_4_4": 12, "values_1_16": 48}.items():
        expected = count if function.startswith("scores") else count // line
        assert asked(c, function) == [locality] * expected, function


def asked(c: Config, function: str, text: Callable[[Config], str] = decode_text) -> list[str]:
    """The localities of what an emitted function asks memory for."""
    body = re.search(rf"^define internal \w+ @{function}\(.*?^}}", text(c), re.DOTALL | re.MULTILINE)
    assert body, function
    return re.findall(r"@llvm\.prefetch\.p0\(ptr \S+, i32 0, i32 (\d), i32 1\)", body[0])


@pytest.mark.parametrize(
    ("ahead", "stride", "keys", "one", "several"),
    [
        (Ahead(), 256, 128, 0, 128),  # one row in the order of addresses is left to the processor
        (Ahead(), 8192, 128, 128, 128),
        (Ahead(), 384, 128, 0, 128),  # most of each key: 256 bytes of it
        (Ahead(), 256, 127, 0, 0),  # the last block
        (ZEN5, 256, 128, 64, 128),
        (ZEN5, 8192, 128, 64, 128),
        (ZEN5, 256, 127, 0, 0),
    ],
)
def test_how_far_ahead(ahead: Ahead, stride: int, keys: int, one: int, several: int) -> None:
    """In keys of 16 bits, of which a tile reads 256 bytes each."""
    c = Config(machines.current(), "half", ahead=ahead)
    assert c.key_block == 128
    for rows, expected in ((1, one), (2, several), (4, several)):
        f = Function(Module(), "ahead", "i64", ("i64", "i64"))
        f.ret(bytes_ahead(c, f.args[0], 256, f.args[1], rows))
        library = jit.Library(jit.object_code(f.module.text(), c.isa), ("ahead",))
        function = library.function("ahead", ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
        assert function(stride, keys) == expected * stride, rows


def test_only_kernels_of_few_queries_depend_on_it() -> None:
    """Other kernels are the same files on all processors that share a cache."""
    c = Config(ISA, "half")
    assert replace(c, ahead=ZEN5) != c and parts._merge_config(replace(c, ahead=ZEN5)) == parts._merge_config(c)
    told = flashtile.explain((1, 8, 1, 64), (1, 8, 300, 64), kernel="cpu")
    assert told.variant == "decode" and cpu.backward_config(told.spec).ahead == Ahead()
    assert cpu._ahead_config(c).ahead == processors.here().ahead


def test_tiles_of_few_rows_ask_for_the_next_block() -> None:
    """Between tiles of either product, at every width of a panel."""
    c = Config(ISA, "float")
    for width in range(1, c.registers + 1):
        assert (
            asked(replace(c, asks=True), f"panel_{width}", forward_text) == ["2"] * 4
        )  # K at an edge or not, twice; V
        assert not asked(c, f"panel_{width}", forward_text)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "options", "asks"),
    [
        (32, 16384, {}, True),
        (96, 16384, {"causal": True, "align": "bottom_right", "softcap": 5.0}, True),
        (32, 1000, {}, False),  # in cache
        (200, 16384, {}, False),  # a block is long in use
        (32, 16384, {"mask": flashtile.score.window(100, 0), "align": 0}, False),  # most blocks are skipped
    ],
)
def test_which_tiles_ask(q_len: int, kv_len: int, options: dict[str, Any], asks: bool) -> None:
    """It changes no bit."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 32), dtype=np.float32) for n in (q_len, kv_len, kv_len))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHTILE_ISA", "avx512" if machines.unavailable(ISA) is None else "generic")
        for least in (few.ASKING_BYTES, 1 << 60):
            patch.setattr(few, "ASKING_BYTES", least)
            clear_cache()
            found.append(flashtile.attention(q, k, v, kernel="cpu", **options).tobytes())
            spec = flashtile.explain(q, k, v, kernel="cpu", **options).spec
            plan = make_plan(spec, cpu.capabilities(spec))
            kernel: Any = cpu.compile(spec, plan, Layout(*(x.strides for x in (q, k, v, q))))
            assert kernel._config.asks == (asks and least < 1 << 60)
    clear_cache()
    assert found[0] == found[1]
