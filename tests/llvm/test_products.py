"""Products: micro-kernels as data, each held to what it says by the code that it emits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.llvm import machines, products
from flashtile.llvm.products import FMA, PAIRS, TILES, Product

pytestmark = pytest.mark.core

MACHINES = list(machines.known().values())


def test_every_product_of_the_folder_is_known() -> None:
    assert products.known() == {"fma": FMA, "pairs": PAIRS, "tiles": TILES}
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
        products_of_a_step = len(re.findall(r"call void @(?:llvm\.x86\.tdpbf16ps|tile_dot)\(", body[0]))
        assert products_of_a_step * 16 * 16 == rows * lanes and c.key_words(1) == product.words == 16
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
    assert PAIRS.rounds and not FMA.rounds
    assert not replace(PAIRS, parts=2, terms=((0, 0), (0, 1), (1, 0))).rounds
