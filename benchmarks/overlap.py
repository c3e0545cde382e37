"""What interleaving gives on matrix registers: products of one half of a block beside weights of the other.

A processor looks some 500 instructions ahead, and a block's weights are thousands. Here is the heart of both alone, for
32 keys by 32 queries, as straight code: products only, weights only, one after the other, and finely mixed, the same
instructions in each. Scores land in one of two slots in the nearest cache and are weighed from the other. Whole kernels
with and without it are among variants.py's.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import numpy as np

from flashtile.kernels.cpu.config import Config
from flashtile.llvm import jit
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.machines import ISA
from flashtile.llvm.products import TILES, TILES2, TILES3
from flashtile.llvm.products.tiles import Tiles

ORDERS = ("products", "weights", "one after the other", "mixed")
PRODUCTS = {"bf16": ("bfloat", TILES), "fp16": ("half", TILES2), "fp32": ("float", TILES3)}
SIDE, LINE, REGISTER = 16, 128, 64  # rows of a tile, bytes of a line of 32 lanes, of a register
SLOT = 2 * SIDE * LINE
SECONDS = 0.05
PRODUCT = "tdpbf16ps"


def mixed(f: Function, *emits: Callable[[], None]) -> None:
    """The instructions of all, each one's spread evenly over the whole: products where there are some, and before each
    what leads to it. Nothing that is emitted may branch."""
    start, placed = len(f._lines), []
    for emit in emits:
        emit()
        lines = f._lines[start:]
        del f._lines[start:]
        counted = [PRODUCT in line for line in lines]
        counted = counted if any(counted) else [True] * len(lines)
        done = 0
        for line, counts in zip(lines, counted, strict=True):
            placed.append(((done + 0.5) / sum(counted), line))
            done += counts
    f._lines += [line for _, line in sorted(placed, key=lambda x: x[0])]


def text(isa: ISA, product: Tiles, storage: str, head_size: int, order: str) -> str:
    """void run(ptr memory, i64 count): so many strips. Memory: two slots of scores, weights, rows of keys, panel."""
    module, c = Module(), Config(isa, storage, product)
    f = Function(module, "run", "void", ["ptr", "i64"])
    memory, count = f.args
    isa.enter(f)
    with f.range(0, count) as n:
        into = memory + (n & 1) * SLOT
        before = memory + ((n + 1) & 1) * SLOT
        parts = {
            "products": lambda: _multiply(f, isa, product, into, memory + 3 * SLOT * product.parts, head_size),
            "weights": lambda: _weigh(f, c, before, memory + 2 * SLOT),
        }
        if order == "mixed":
            mixed(f, *parts.values())
        else:
            for name, emit in parts.items():
                if order in (name, "one after the other"):
                    emit()
    isa.leave(f)
    f.ret()
    return module.text()


def _multiply(f: Function, isa: ISA, product: Tiles, out: Value, operands: Value, head_size: int) -> None:
    """32 rows of keys by 32 lanes of queries, as Tiles.multiply, without its loop."""
    tiles = isa.tile_registers(f)
    row, words = f.const("i64", 2 * head_size * product.parts), head_size // 2
    line, panel = f.const("i64", LINE), operands + 4 * SIDE * head_size * product.parts
    places = [(n, r, j) for n, (r, j) in enumerate((r, j) for r in range(2) for j in range(2))]
    for n, _, _ in places:
        tiles.zero(n)
    for word in range(0, words, SIDE):
        held: tuple[int | None, int | None] = None, None
        for term in product.terms:
            for r in range(2) if held[0] != term[0] else ():
                at = operands + ((word + term[0] * words) * 4 + r * SIDE * 2 * head_size * product.parts)
                tiles.load(4 + r, at, row, streamed=True)
            for j in range(2) if held[1] != term[1] else ():
                tiles.load(6 + j, panel + ((word + term[1] * words) * LINE + j * REGISTER), line)
            held = term
            for n, r, j in places:
                tiles.dot_pairs(n, 4 + r, 6 + j)
    for n, r, j in places:
        tiles.store(n, out + (r * SIDE * LINE + j * REGISTER), line)


def _weigh(f: Function, c: Config, scores: Value, out: Value) -> None:
    """Scores to words of weights, as steps/softmax.py, without its loops; maxima are given."""
    high, low = (f.const(c.vector, x) for x in (0.125, 2.0**-30))
    for j in range(2):
        top = f.const(c.vector, 8.0)
        for first in range(0, 2 * SIDE, c.per_word):
            found = []
            for u in range(c.per_word):
                score = f.load(c.vector, scores + ((first + u) * LINE + j * REGISTER), align=REGISTER)
                found.append(vmath.weight_of(f, c.isa, score - top, high, low, coarse=c.product.coarse))
            for n, word in enumerate(c.product.split(f, c.isa, found, cut=True)):
                f.store(word, out + (n * SLOT + first // c.per_word * LINE + j * REGISTER), align=REGISTER)


def measure(isa: ISA, name: str, head_size: int) -> dict[str, float]:
    """Nanoseconds of a strip in each order, the least of many, taking turns."""
    storage, product = PRODUCTS[name]
    lines = 3 * SLOT * product.parts + (4 * SIDE + 2 * LINE) * head_size * product.parts
    memory = np.random.default_rng(0).standard_normal(lines // 4 + 16).astype(np.float32)
    memory.view(np.uint16)[3 * SLOT * product.parts // 2 :] &= 0xBFFF  # operands: bf16 below 2
    address = (memory.ctypes.data + REGISTER - 1) & -REGISTER
    runs = {}
    for order in ORDERS:
        library = jit.Library(jit.object_code(text(isa, product, storage, head_size, order), isa), ("run",))
        runs[order] = library.function("run", None, ctypes.c_void_p, ctypes.c_int64)
    times: dict[str, list[float]] = {order: [] for order in ORDERS}
    count = 1
    for _ in range(9):
        for order, run in runs.items():
            start = time.perf_counter()
            run(address, count)
            times[order].append((time.perf_counter() - start) / count)
        count = max(count, int(SECONDS / 9 / max(x[-1] for x in times.values())))
    return {order: min(found) * 1e9 for order, found in times.items()}


def report(isa: ISA) -> list[str]:
    """A row for each dtype and head size: nanoseconds a strip, and what mixing gives."""
    lines = [f"{'strip of 32 x 32':18}" + "".join(f"{order:>22}" for order in ORDERS) + f"{'mixing gives':>14}"]
    for name in PRODUCTS:
        for head_size in (64, 128):
            found = measure(isa, name, head_size)
            gain = found["one after the other"] / found["mixed"]
            cells = "".join(f"{found[order]:>19.0f} ns" for order in ORDERS)
            lines.append(f"{f'{name}, D = {head_size}':18}{cells}{gain:>14.2f}")
    return lines
