"""Products: micro-kernels as data, each held to what it says by the code that it emits."""

from __future__ import annotations

import ctypes
import itertools
import re

import numpy as np
import pytest

from flashtile.dtypes import round_to_bf16
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.llvm import jit, machines, products
from flashtile.llvm.ir import Function, Module
from flashtile.llvm.products import FMA, PAIRS, SQUARES, TILES, TILES2, TILES3, Product

pytestmark = pytest.mark.core

MACHINES = list(machines.known().values())


def test_every_product_of_the_folder_is_known() -> None:
    found = {"fma": FMA, "pairs": PAIRS, "squares": SQUARES, "tiles": TILES, "tiles2": TILES2, "tiles3": TILES3}
    assert products.known() == found
    assert all(name == product.name == repr(product) for name, product in products.known().items())


@pytest.mark.parametrize("product", products.known().values(), ids=repr)
@pytest.mark.parametrize("isa", MACHINES, ids=lambda isa: isa.name)
def test_a_tile_is_as_large_as_its_data_say(isa: machines.ISA, product: Product) -> None:
    """One step of depth of the widest full tile multiplies rows x lanes words, counted in the emitted text."""
    if product.unavailable(isa):
        pytest.skip(str(product.unavailable(isa)))
    rows, lanes, depth = product.shape(isa, "float")
    c = Config(isa, "float", product)
    assert (rows, lanes, depth) == (c.rows, c.panel, c.per_word)
    text = forward_text(c)
    if product.lands == "memory":
        body = re.search(rf"^define internal void @multiply_{c.registers}\(.*?^\}}", text, re.M | re.S)
        assert body is not None
        if product is SQUARES:  # of 2 rows, 2 lanes and two words
            squares = len(re.findall(r"call <4 x float> @llvm\.aarch64\.neon\.bfmmla\(", body[0]))
            assert squares * 2 * 2 * 2 == rows * lanes * product.words
            return
        products_of_a_step = len(re.findall(r"call void @(?:llvm\.x86\.tdpbf16ps|tile_dot)\(", body[0]))
        assert (
            products_of_a_step * 16 * 16 == rows * lanes * len(product.terms) and c.key_words(1) == product.words == 16
        )
        return
    body = re.search(rf"^define internal void @scores_{isa.vectors}_full_0\(.*?^\}}", text, re.M | re.S)
    assert body is not None
    *_, remainder = re.findall(r"^body\d+:\n(.*?)br label", body[0], re.M | re.S)  # the loop of single words
    broadcasts = len(re.findall(r"load (?:float|i32), ", remainder))
    lines = len(re.findall(r"load <", remainder))
    assert broadcasts == rows and lines * isa.lanes("float") == lanes


def test_pairs_are_refused_where_the_machine_has_no_dot() -> None:
    assert FMA.unavailable(machines.known()["avx2"]) is None
    assert "avx2" in str(PAIRS.unavailable(machines.known()["avx2"]))
    assert PAIRS.unavailable(machines.known()["avx512_bf16"]) is None


def test_weights_may_be_coarse_only_where_a_product_rounds_them() -> None:
    assert PAIRS.rounds and TILES.rounds and not (FMA.rounds or TILES2.rounds or TILES3.rounds)
    assert PAIRS.coarse and TILES2.coarse and not (FMA.coarse or TILES3.coarse)


@pytest.mark.parametrize("product", [TILES, TILES2, TILES3], ids=repr)
def test_what_is_left_out_of_a_product_of_parts_is_as_small_as_what_is_rounded_off(product: Product) -> None:
    """Part n is below 2^-8n of the number: terms whose parts count together less than there are parts, each once, and
    between one and the next only one operand changes registers."""
    parts = range(product.parts)
    assert sorted(product.terms) == [(i, j) for i in parts for j in parts if i + j < product.parts]
    changes = [(a[0] != b[0]) + (a[1] != b[1]) for a, b in itertools.pairwise(product.terms)]
    assert changes == [1] * (len(product.terms) - 1)


@pytest.mark.parametrize("cut", [False, True], ids=["rounded", "cut"])
@pytest.mark.parametrize("product", [TILES2, TILES3], ids=repr)
def test_parts_add_up_to_the_number(product: Product, cut: bool) -> None:
    """Three parts to the last bit, two to 15 or 17 bits; the first is the bf16 that is nearest, or below."""
    isa = next((x for x in MACHINES if x.tiles and machines.unavailable(x) is None), None)
    if isa is None:
        pytest.skip("no machine here has matrix registers, or emulates them")
    module = Module()
    f = Function(module, "run", "void", ["ptr", "ptr"])
    numbers = [f.load("<16 x float>", f.args[0] + 64 * n) for n in range(2)]
    for n, word in enumerate(product.split(f, isa, numbers, cut=cut)):
        f.store(word, f.args[1] + 64 * n)
    f.ret()
    library = jit.Library(jit.object_code(module.text(), isa), ("run",))
    run = library.function("run", None, ctypes.c_void_p, ctypes.c_void_p)
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = (rng.standard_normal((2, 16)) * 2.0 ** rng.integers(-60, 60, (2, 16))).astype(np.float32)
        words = np.empty((product.parts, 16), np.uint32)
        run(x.ctypes.data, words.ctypes.data)
        parts = np.stack([words << 16, words & 0xFFFF0000]).view(np.float32).astype(np.float64)  # even, odd
        error = np.abs(parts.sum(1) - x)
        assert (error <= (0 if product is TILES3 else 2.0**-15 if cut else 2.0**-17) * np.abs(x)).all()
        first = x.view(np.uint32) & 0xFFFF0000 if cut else round_to_bf16(x).astype(np.uint32) << 16
        assert (parts[:, 0] == first.view(np.float32)).all()
