"""Which product computes a dtype: by the processor's rates, by what the machine has, by FLASHTILE_ISA."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import flashtile
from flashtile import cli, doctor, engines, kernels
from flashtile.calls import clear_cache
from flashtile.kernels import cpu
from flashtile.llvm import machines, processors
from flashtile.llvm.products import FMA, PAIRS, SQUARES, TILES, TILES2, TILES3, Product, known

pytestmark = pytest.mark.core

INFO = """processor	: 0
vendor_id	: {}
cpu family	: {}
model		: {}
model name	: whatever it is sold as
flags		: fpu avx512_bf16

processor	: 1
vendor_id	: somebody else's
"""
ARMS = """processor	: 0
BogoMIPS	: 2100.00
Features	: fp asimd atomics sve bf16 i8mm
CPU implementer	: {}
CPU architecture: 8
CPU part	: {}
"""
PROCESSORS = {
    "Zen 4": (("AuthenticAMD", 25, 17), "AMD Zen 4", PAIRS),
    "Zen 5": (("AuthenticAMD", 26, 2), "AMD Zen 5", PAIRS),
    "a later one of AMD's": (("AuthenticAMD", 27, 1), "unknown, AMD's", PAIRS),
    "Sapphire Rapids": (("GenuineIntel", 6, 143), "Intel Sapphire, Emerald and Granite Rapids", FMA),
    "Granite Rapids": (("GenuineIntel", 6, 173), "Intel Sapphire, Emerald and Granite Rapids", FMA),
    "Cooper Lake": (("GenuineIntel", 6, 85), "unknown, Intel's", FMA),
    "nobody's": (("HygonGenuine", 24, 1), "unknown", FMA),
}
IN_PARTS = [
    ("float64", "ieee", FMA),
    ("float32", "ieee", TILES3),
    ("float32", "tf32", TILES2),
    ("float32", "fp16", TILES2),
    ("float16", "ieee", TILES2),
]


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_family_gets_the_product_that_it_is_good_at(name: str) -> None:
    numbers, family, product = PROCESSORS[name]
    processor = processors.processor_of(INFO.format(*numbers))
    assert processor.name == family
    dot, plain = machines.known()["avx512_bf16"], machines.known()["avx512"]
    for dtype, precision in (("bfloat16", "ieee"), ("float32", "bf16")):
        choice = processors.choose(dot, dtype, precision, processor)
        assert choice.product is product and processor.name in choice.why
        assert processors.choose(dot, dtype, precision, processor, forced=True).product is PAIRS
        assert processors.choose(plain, dtype, precision, processor).product is FMA
    matrix = machines.known()["amx"]
    tiles = processors.choose(matrix, "bfloat16", "ieee", processor)
    assert tiles.product is (TILES if "Intel" in family else product) and processor.name in tiles.why
    assert processors.choose(matrix, "bfloat16", "ieee", processor, lands=("registers",)).product is product
    for dtype, precision, in_parts in IN_PARTS:
        chosen = processors.choose(matrix, dtype, precision, processor)
        assert chosen.product is (in_parts if "Granite" in family else FMA)
        assert processor.name in chosen.why or in_parts is FMA
        assert processors.choose(dot, dtype, precision, processor).product is FMA
        assert processors.choose(dot, dtype, precision, processor, forced=True).product is FMA
        assert processors.choose(matrix, dtype, precision, processor, forced=True).product is in_parts


@pytest.mark.parametrize(
    ("implementer", "part", "family", "product"),
    [
        ("0x41", "0xd40", "Arm Neoverse V1 and V2", SQUARES),
        ("0x41", "0xd4f", "Arm Neoverse V1 and V2", SQUARES),
        ("0x41", "0xd49", "Arm Neoverse N2", SQUARES),
        ("0x41", "0xd46", "unknown", FMA),  # Cortex-A510
        ("0x61", "0x022", "unknown", FMA),
    ],
)
def test_arms_processors_get_squares_where_they_are_known_to_be_fast(
    implementer: str, part: str, family: str, product: Product
) -> None:
    processor = processors.processor_of(ARMS.format(implementer, part))
    assert processor.name == family
    machine = machines.known()["neon_bf16"]
    for dtype, precision in (("bfloat16", "ieee"), ("float32", "bf16")):
        choice = processors.choose(machine, dtype, precision, processor)
        assert choice.product is product and processor.name in choice.why
        few = processors.choose(machine, dtype, precision, processor, lands=("registers",))
        assert few.product is (PAIRS if product is SQUARES else FMA)
        assert processors.choose(machine, dtype, precision, processor, forced=True).product is SQUARES
        assert processors.choose(machines.known()["neon"], dtype, precision, processor).product is FMA
    for dtype, precision, _ in IN_PARTS:
        assert processors.choose(machine, dtype, precision, processor).product is FMA


def test_what_linux_says_of_arms_processors_is_read(tmp_path: Path) -> None:
    """LLVM names some of it only."""
    (tmp_path / "cpuinfo").write_text(ARMS.format("0x41", "0xd40"))
    assert machines.known()["neon_bf16"].needs - {"aarch64"} <= machines._said_by_linux(tmp_path / "cpuinfo")
    assert machines._said_by_linux(tmp_path / "none") == set()


def test_rates_are_of_products_that_exist_and_every_processor_has_fp32s() -> None:
    for processor in (*processors.TABLE, *processors.UNKNOWN):
        assert set(processor.rates) <= set(known())
        assert processor.rate(FMA) == 1 and processor.measured


def test_a_machine_without_cpuinfo_is_an_unknown_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processors, "CPUINFO", tmp_path / "none")
    assert processors.here.__wrapped__().name == "unknown"
    assert processors.processor_of("").name == "unknown"


def test_on_a_processor_with_a_slow_dot_bf16_is_computed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so; the answer is right as ever."""
    if machines.unavailable(machines.known()["avx512_bf16"]):
        pytest.skip("this machine has no dot of bf16 pairs")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    slow = processors.processor_of(INFO.format("GenuineIntel", 6, 173))
    monkeypatch.delenv("FLASHTILE_ISA", raising=False)
    monkeypatch.setattr(processors, "here", lambda: slow)
    forget()
    try:
        said = flashtile.explain((1, 2, 40, 16), dtype="bfloat16")
        assert said.isa == "avx512_bf16" and said.product.startswith("fma: ") and "Granite" in str(said)
        asked = flashtile.explain((1, 2, 40, 16), precision="bf16")
        assert any("honoured at higher precision" in note for note in asked.notes)
        q = np.random.default_rng(0).standard_normal((1, 2, 40, 16)).astype(ml_dtypes.bfloat16)
        from flashtile.testing import assert_accurate

        assert_accurate(flashtile.attention(q, q, q, causal=True), q, q, q, causal=True)
    finally:
        forget()


def test_doctor_names_the_product_of_each_dtype_and_precision_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Granite Rapids, whatever this machine is."""
    granite = processors.processor_of(INFO.format("GenuineIntel", 6, 173))
    monkeypatch.delenv("FLASHTILE_ISA", raising=False)
    monkeypatch.setattr(processors, "here", lambda: granite)
    monkeypatch.setattr(machines, "current", lambda: machines.known()["amx"])
    said = {name: why for room, name, _, why in doctor.survey() if room == "product"}
    starts = {"float64": "fma", "float32": "tiles3", "float16": "tiles2", "bfloat16": "tiles"}
    starts |= {"float32/tf32": "tiles2", "float32/bf16": "tiles", "float32/fp16": "tiles2"}
    assert {name: why.partition(":")[0] for name, why in said.items()} == starts
    assert all(granite.name in why and "fp32's" in why for name, why in said.items() if name != "float64")


def forget() -> None:
    """What was chosen for the processor as it was."""
    clear_cache()
    for kept in vars(cpu).values():
        if hasattr(kept, "cache_clear"):
            kept.cache_clear()


WRONG = "FLASHTILE_ISA: got 'avx1024', expected one of "


@pytest.fixture
def misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTILE_ISA", "avx1024")
    clear_cache()


def test_a_misspelt_instruction_set_raises_from_arrays(misspelt: None) -> None:
    x = np.ones((1, 1, 3, 4), np.float32)
    for call in (flashtile.attention, flashtile.explain):
        with pytest.raises(flashtile.UnavailableError, match=WRONG):
            call(x, x, x)
    assert flashtile.attention(x, x, x, kernel="reference").shape == x.shape  # which needs none


def test_a_misspelt_instruction_set_raises_from_tensors(misspelt: None) -> None:
    torch = pytest.importorskip("torch")
    import flashtile.torch

    x = torch.ones(1, 1, 3, 4)
    for door in (flashtile.torch.attention, flashtile.torch.scaled_dot_product_attention):
        with pytest.raises(flashtile.UnavailableError, match=WRONG):
            door(x, x, x)


DOORS = {
    "gradients": "flashtile.attention_backward(x, x, x, x, x, x[..., 0])",
    "decode": "flashtile.attention(x[:, :, :1], x, x)",
    "by name": "flashtile.attention(x, x, x, kernel='cpu')",
    "flash_attn": "flashtile.flash_attn.flash_attn_func(*[torch.ones(1, 3, 1, 4)] * 3)",
    "flex": "flashtile.torch.flex_attention(t, t, t)",
    "autograd": "flashtile.torch.attention(t.requires_grad_(), t, t)",
    "jax": "flashtile.jax.dot_product_attention(x, x, x)",
    "onnx": "flashtile.onnx.attention(x, x, x)",
    "dask": "flashtile.attention(x, x, x, engine='dask')",
    "starpu": "flashtile.attention(x, x, x, engine='starpu')",
}


@pytest.mark.parametrize("door", DOORS)
def test_a_misspelt_instruction_set_raises_from_every_door(door: str, misspelt: None) -> None:
    """Rather than leave the call to the unfused kernel in silence."""
    call, x = DOORS[door], np.ones((1, 1, 3, 4), np.float32)
    names = {"flashtile": flashtile, "x": x}
    if "torch" in call or "(t" in call:
        torch = pytest.importorskip("torch")
        names |= {"torch": torch, "t": torch.ones(1, 1, 3, 4)}
    for name in re.findall(r"flashtile\.(torch|jax|onnx|flash_attn)\.", call):
        pytest.importorskip(name.replace("flash_attn", "torch"))
        importlib.import_module(f"flashtile.{name}")
    if engine := re.search(r"engine='(\w+)'", call):
        reasons = {name: why for _, name, available, why in engines.survey() if not available}
        if engine[1] in reasons:
            pytest.skip(reasons[engine[1]])
    error = RuntimeError if door == "jax" else flashtile.UnavailableError  # XLA says it in an error of its own
    with pytest.raises(error, match=WRONG):
        eval(call, names)


@pytest.mark.parametrize("command", [["explain", "--shape", "1,1,3,4"], ["bench", "--shape", "1,1,3,4"]])
def test_a_misspelt_instruction_set_ends_a_command(
    command: list[str], misspelt: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == cli.BAD_INPUT
    assert WRONG in capsys.readouterr().err


def test_a_survey_names_a_misspelt_instruction_set_and_goes_on(misspelt: None) -> None:
    rows = {name: (available, why) for _, name, available, why in kernels.survey()}
    assert not rows["cpu"][0] and rows["cpu"][1].startswith(WRONG) and rows["reference"][0]
