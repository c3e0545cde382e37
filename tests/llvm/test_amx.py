"""Matrix registers: the emulation against the rule of the instruction, bit by bit; the real code as text; permission.

Where this machine has AMX, the instructions themselves are held against their emulation.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import processes
import pytest
from assembly import functions, stack_traffic

from flashtile.kernels import cpu
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.backward import backward_text
from flashtile.kernels.cpu.passes.decode.kernel import decode_text
from flashtile.kernels.cpu.passes.forward import forward_text
from flashtile.kernels.cpu.passes.merge import merge_text
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.ir import Function, Module
from flashtile.llvm.machines import amx
from flashtile.llvm.products import TILES, TILES2, TILES3
from flashtile.llvm.products.tiles import Tiles

REAL, EMULATED = isas.known()["amx"], isas.known()["amx_emulated"]
HERE = [
    pytest.param(isa, id=isa.name, marks=[pytest.mark.skipif(bool(why), reason=f"{isa.name}: {why}")])
    for isa in (REAL, EMULATED)
    for why in [isas.unavailable(isa)]
]
SMALLEST = np.float32(2.0**-126)


def dot_of(isa: isas.ISA) -> object:
    """void run(totals, lefts, rights, n): n products of tiles of 1 KB each, one after the other in memory."""
    module = Module()
    f = Function(module, "run", "void", ["ptr", "ptr", "ptr", "i64"])
    stride = f.const("i64", amx.ROW_BYTES)
    isa.enter(f)
    tiles = isa.tile_registers(f)
    with f.range(0, f.args[3]) as n:
        at = [pointer + n * 1024 for pointer in f.args[:3]]
        for tile, address in zip((0, 4, 7), at, strict=True):
            tiles.load(tile, address, stride)
        tiles.dot_pairs(0, 4, 7)
        tiles.store(0, at[0], stride)
    isa.leave(f)
    f.ret()
    library = jit.Library(jit.object_code(module.text(), isa), ("run",))
    return library.function("run", None, *[ctypes.c_void_p] * 3, ctypes.c_int64)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def expected(total: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The rule in NumPy: in longdouble, where a product of two bf16 is exact and, with these data, its sum with a float
    as well, so that one rounding to fp32 is that of a fused multiply-add."""
    rows, lanes = (x.astype(np.float32) for x in (left, right.reshape(-1, 16, 16, 2)))
    chains = []
    for half in range(2):
        chain = np.zeros((len(total), 16, 16), np.float32)
        for k in range(16):
            x = flushed(rows[:, :, 2 * k + half])[:, :, None].astype(np.longdouble)
            y = flushed(lanes[:, k, :, half])[:, None, :].astype(np.longdouble)
            chain = flushed((x * y + chain).astype(np.float32))
        chains.append(chain)
    both = flushed((chains[0].astype(np.longdouble) + chains[1]).astype(np.float32))
    return flushed((both.astype(np.longdouble) + flushed(total)).astype(np.float32))


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(ml_dtypes.bfloat16)


def cases(n: int = 40) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Normal data, sums about the smallest normal number, denormal operands, overflow, infinities, NaN."""
    rng = np.random.default_rng(0)

    def wide(low: float, high: float) -> np.ndarray:
        exponents = rng.integers(low, high, (n, 16, 32)).astype(np.float64)
        return bf16(rng.standard_normal((n, 16, 32)) * 2.0**exponents)

    def total(scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n, 16, 16)).clip(-3, 3) * scale).astype(np.float32)

    def some(x: np.ndarray, value: float) -> np.ndarray:
        return np.where(rng.random(x.shape) < 0.003, ml_dtypes.bfloat16(value), x)

    yield "normal", total(), wide(0, 1), wide(0, 1)
    yield "about the smallest normal number", total(2.0**-126), wide(-66, -60), wide(-66, -60)
    yield "denormal operands", total(2.0**-128), wide(-134, -126), wide(0, 8)
    yield "overflow", total(2.0**126), wide(60, 64), wide(60, 64)
    yield "infinities", total(), some(wide(0, 1), np.inf), some(wide(0, 1), -np.inf)
    yield "NaN", total(), some(wide(0, 1), np.nan), wide(0, 1)


@pytest.mark.parametrize("isa", HERE)
def test_a_product_of_tiles_is_bit_equal_to_its_rule(isa: isas.ISA) -> None:
    run = dot_of(isa)
    for name, total, left, right in cases():
        got = total.copy()
        run(got.ctypes.data, left.ctypes.data, right.ctypes.data, len(total))  # type: ignore[operator]
        with np.errstate(all="ignore"):
            want = expected(total, left, right)
        nan = np.isnan(want)
        assert (np.isnan(got) == nan).all(), name
        assert (got.view(np.uint32)[~nan] == want.view(np.uint32)[~nan]).all(), name
        assert not ((np.abs(got) < SMALLEST) & (got != 0)).any(), name


def test_the_mode_of_the_emulation_does_not_leak() -> None:
    """Denormals live on in what is computed right before and after a product of tiles, and in the caller."""
    module = Module()
    f = Function(module, "run", "void", ["ptr", "ptr"])
    tiles, small = EMULATED.tile_registers(f), f.load("<16 x float>", f.args[1])
    before = small * 0.5
    tiles.zero(0), tiles.zero(4), tiles.zero(6)
    tiles.dot_pairs(0, 4, 6)
    f.store(before, f.args[0])
    f.store(small * 0.25, f.args[0] + 64)
    f.ret()
    library = jit.Library(jit.object_code(module.text(), EMULATED), ("run",))
    data, out = np.full(16, SMALLEST), np.empty(32, np.float32)
    library.function("run", None, ctypes.c_void_p, ctypes.c_void_p)(out.ctypes.data, data.ctypes.data)
    assert (out[:16] == SMALLEST * np.float32(0.5)).all() and (out[16:] == SMALLEST * np.float32(0.25)).all()
    assert (data * np.float32(0.5) != 0).all()


@pytest.mark.parametrize(
    ("storage", "product", "loads"),
    [("bfloat", TILES, 1), ("float", TILES, 1), ("half", TILES2, 2), ("float", TILES2, 2), ("float", TILES3, 3)],
    ids=lambda x: str(x),
)
def test_the_real_code_configures_once_and_releases_in_every_entry(storage: str, product: Tiles, loads: int) -> None:
    """All that can be seen of it without the machine: it compiles, with the instructions in their places. ``loads``:
    how often a step of depth loads rows of the left operand, past the nearest cache."""
    found = functions(jit.assembly(forward_text(Config(REAL, storage, product)), REAL))
    entry = "\n".join(found["forward"])
    assert len(re.findall(r"\bldtilecfg\b", entry)) == len(re.findall(r"\btilerelease\b", entry)) == 1
    assert entry.index("ldtilecfg") < entry.index("callq") and entry.rindex("tilerelease") > entry.rindex("callq")
    assert not any("tilecfg" in line for name, lines in found.items() if name != "forward" for line in lines)
    for registers in (1, 2):
        multiply = "\n".join(found[f"multiply_{registers}"])
        assert len(re.findall(r"\btdpbf16ps\b", multiply)) == 2 * registers * len(product.terms)
        assert len(re.findall(r"\btileloaddt1\b", multiply)) == 2 * loads
        assert len(re.findall(r"\btilestored\b", multiply)) == 2 * registers


@pytest.mark.parametrize(
    ("storage", "product", "names"),
    [
        ("bfloat", TILES, ("multiply_beside_2", "add_product_beside_2")),
        ("half", TILES2, ("multiply_beside_2", "add_product_beside_2")),
        ("float", TILES3, ("add_product_beside_2",)),
    ],
    ids=["bf16", "fp16", "fp32"],
)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_products_are_emitted_beside_weights_of_other_keys(
    storage: str, product: Tiles, names: tuple[str, ...], dropout: bool
) -> None:
    """Four products, a term of a step of depth, then their share of the weights: in the machine code either stands
    within the loop over the depth, so that a processor that looks 500 instructions ahead has both."""
    c = Config(REAL, storage, product, dropout=dropout)
    found = functions(jit.assembly(forward_text(c), REAL))
    power = r"\bvscalefps\b" if product.coarse else r"\bvpermps\b"  # of two: once a weight
    for name in names:
        code = "\n".join(found[name])
        steps = code[: code.index("tilestored")].split("tdpbf16ps")
        assert len(steps) == len(code.split("tdpbf16ps")) == 4 * len(product.terms) + 1
        weights = [len(re.findall(power, x)) for x in steps]
        # A register of words holds two lines' weights; in several parts every register has its own instructions.
        assert weights == [0] + [0, 0, 0, 2 * (c.registers if product.parts > 1 else 1)] * len(product.terms)
        assert not [line for line in stack_traffic(found[name], found[name]) if "mm" in line]
        assert f"callq\t{name}" in "\n".join(found["panel_2"])


@pytest.mark.parametrize(
    ("storage", "product", "loads"),
    [("bfloat", TILES, (1, 1)), ("float", TILES, (1, 1)), ("half", TILES2, (2, 2)), ("float", TILES3, (3, 4))],
    ids=lambda x: str(x),
)
def test_the_real_code_of_the_backward_has_its_instructions_in_their_places(
    storage: str, product: Tiles, loads: tuple[int, int]
) -> None:
    """Sums begin with what is there in two of its products, but that in three parts dQ's land apart; the exchange
    streams its right operand. ``loads``: of either operand, of a row of registers in a step of depth."""
    found = functions(jit.assembly(backward_text(Config(REAL, storage, product)), REAL))
    entry = "\n".join(found["backward"])
    assert len(re.findall(r"\bldtilecfg\b", entry)) == len(re.findall(r"\btilerelease\b", entry)) == 1
    assert entry.index("ldtilecfg") < entry.index("callq") and entry.rindex("tilerelease") > entry.rindex("callq")
    assert not any("tilecfg" in line for name, lines in found.items() if name != "backward" for line in lines)
    assert any(name.startswith("add_product") for name in found) == (product is not TILES3)
    for name, registers in (("multiply", (1, 2)), ("add_product", (2,)), ("exchange", (1, 2))):
        for n in registers if name != "add_product" or product is not TILES3 else ():
            code = "\n".join(found[f"{name}_{n}"])
            operands = 2 * loads[0], n * loads[1]
            onto, streamed = name != "multiply", operands[name == "exchange"]
            assert len(re.findall(r"\btdpbf16ps\b", code)) == 2 * n * len(product.terms)
            assert len(re.findall(r"\btileloaddt1\b", code)) == streamed
            assert len(re.findall(r"\btileloadd\b", code)) == sum(operands) - streamed + onto * 2 * n
            assert len(re.findall(r"\btilezero\b", code)) == (not onto) * 2 * n
            assert len(re.findall(r"\btilestored\b", code)) == 2 * n


def test_the_configuration_says_eight_tiles_of_16_rows_of_64_bytes() -> None:
    """The layout of Intel's manual: palette, start row, reserved, 16 words of row bytes, 16 bytes of rows."""
    raw = np.frombuffer(amx.CONFIGURATION, np.uint8)
    assert len(raw) == 64 and raw[0] == 1 and not raw[1:16].any()
    assert raw[16:48].view("<u2").tolist() == [64] * 8 + [0] * 8
    assert raw[48:].tolist() == [16] * 8 + [0] * 8


def test_without_tiles_the_kernels_are_those_of_the_machine_below() -> None:
    """So the suites need not run them again on it, nor those of passes/decode, which take no tiles."""
    for name, below in (("amx", "avx512_bf16"), ("amx_emulated", "avx512_bf16_emulated")):
        for storage in ("double", "float", "half"):
            for text in (forward_text, backward_text, decode_text, merge_text):
                mine, theirs = (text(Config(isas.known()[x], storage)) for x in (name, below))
                assert mine == theirs


ELSEWHERE = """
import os, threading
import numpy as np
import flashtile
ready, go, found = threading.Event(), threading.Event(), {}
def attend():
    q = np.random.default_rng(0).standard_normal((1, 1, 70, 40), dtype=np.float32)
    return flashtile.attention(q, q, q, precision="bf16").tobytes()
def wait():
    ready.set()
    go.wait(60)
    found["thread"] = attend()
thread = threading.Thread(target=wait)
thread.start()
ready.wait(60)
flashtile.set_num_threads(1)
found["main"] = attend()  # the first to ask for the registers
go.set()
thread.join()
read, write = os.pipe()
if os.fork() == 0:
    with os.fdopen(write, "wb") as pipe:
        pipe.write(attend())
    os._exit(0)
os.close(write)
with os.fdopen(read, "rb") as pipe:
    found["child"] = pipe.read()
assert os.wait()[1] == 0
assert len(found["main"]) == 70 * 40 * 4 and len(set(found.values())) == 1
said = flashtile.explain((1, 1, 70, 40), precision="bf16")
print(said.isa, said.product.partition(":")[0])
"""


@pytest.mark.parametrize("isa", HERE)
def test_threads_that_were_there_before_and_forked_children_compute_on_tiles(isa: isas.ISA) -> None:
    environment = {**os.environ, "FLASHTILE_ISA": isa.name}
    done = processes.run([sys.executable, "-c", ELSEWHERE], env=environment)
    assert (done.returncode, done.stdout.split()) == (0, [isa.name, "tiles"]), done.stderr


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """A machine that has the instructions, where the system refuses; what it was asked."""
    calls: list[tuple[int, ...]] = []

    def refuse(*numbers: int) -> int:
        calls.append(numbers)
        return errno.EPERM

    monkeypatch.delenv("FLASHTILE_ISA", raising=False)
    monkeypatch.setattr(amx, "_system_call", refuse)
    features = isas._host_features() | REAL.needs
    monkeypatch.setattr(isas, "_host_features", lambda: features)
    forget()
    yield calls
    forget()


def forget() -> None:
    """What was chosen while the machine was another one."""
    for kept in (amx.refusal, isas.named, *vars(cpu).values()):
        if hasattr(kept, "cache_clear"):
            kept.cache_clear()


def test_where_permission_is_refused_vector_kernels_serve_and_doctor_says_so(
    asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isas.unavailable(isas.known()["avx512_bf16"]) is not None:
        pytest.skip("another machine would serve")
    from flashtile import doctor
    from flashtile.errors import UnavailableError

    assert isas.current().name == "avx512_bf16"
    assert "amx" not in isas.usable()
    (reason,) = [why for room, name, _, why in doctor.survey() if (room, name) == ("isa", "amx")]
    assert "refuses matrix registers" in reason and "not permitted" in reason
    assert asked == [(158, 0x1023, 18)]
    monkeypatch.setenv("FLASHTILE_ISA", "amx")
    with pytest.raises(UnavailableError, match="refuses matrix registers"):
        isas.current()
