"""What processors are good at: how fast each runs a product, in one table; machines (ISAs) say only what there is.

An instruction that exists may be a slow one: the dot of bf16 pairs runs at twice the rate of the fp32 multiply-add on
AMD's processors, and below it on Intel's, where matrix registers are what bf16 is for. A kernel takes the fastest
product that computes its dtype, and of equals the more exact. Reading ahead is such a matter, too: what one processor
does by itself, another must be asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from flashtile.llvm.machines import CPUINFO, ISA
from flashtile.llvm.products import FMA, PAIRS, SQUARES, TILES, TILES2, TILES3, Product


@dataclass(frozen=True)
class Ahead:
    """How a kernel asks memory, ahead of its use, for rows that it reads once.

    level           the cache that they are brought into: 1, the nearest, or 2
    streams         the processor reads ahead by itself where a kernel reads in the order of addresses, and faster
    one, several    how far ahead, where one query reads and where several do: keys times the bytes of an element
    """

    level: int = 2
    streams: bool = True
    one: int = 256
    several: int = 256


@dataclass(frozen=True)
class Processor:
    """A family of processors, and the multiply-adds a second of its products over those of fp32 by `fma`.

    vendor, families, models    as /proc/cpuinfo numbers them, Arm's by implementer and part; no models: every one
    ahead                       how memory is asked for what kernels of few queries read
    rates                       by the product's name; what is not named is not known, and not chosen. Of operands in
                                several parts: of the kernel as a whole, since splitting takes its time, too
    measured                    where the rates are from
    """

    name: str
    vendor: str = ""
    families: tuple[int, ...] = ()
    models: tuple[int, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    measured: str = ""
    ahead: Ahead = Ahead()

    def rate(self, product: Product) -> float:
        """Of a product, over fp32's; 0 where it is not known."""
        return 1.0 if product is FMA else self.rates.get(product.name, 0.0)


# Of Arm's cores the rates are those of the loops that are emitted, by LLVM's models of the cores (llvm-mca 19): 41, 22
# and 13 to 15 multiply-adds a cycle, half of each on N2.
_ARMS = {SQUARES.name: 2.8, PAIRS.name: 1.6}
_MODELLED = "by LLVM's model of the core, not measured"
TABLE = (
    Processor("AMD Zen 4", "AuthenticAMD", (25,), rates={PAIRS.name: 2.0}, measured="228 over 114 GFLOP/s a core"),
    Processor(
        "AMD Zen 5",
        "AuthenticAMD",
        (26,),
        rates={PAIRS.name: 1.85},
        measured="486 over 263 GFLOP/s a core",
        ahead=Ahead(level=1, streams=False, one=128),
    ),
    Processor(
        "Intel Sapphire, Emerald and Granite Rapids",
        "GenuineIntel",
        (6,),
        (143, 207, 173, 174),
        rates={PAIRS.name: 0.65, TILES.name: 11.7, TILES2.name: 2.9, TILES3.name: 1.5},
        measured="a core: the dot at 98 GFLOP/s, tiles at 2520, fp32 at 215 at best; attention in two and three parts "
        "at 2.9 and 1.5 times its rate in fp32",
    ),
    Processor("Arm Neoverse V1 and V2", "0x41", models=(0xD40, 0xD4F), rates=_ARMS, measured=_MODELLED),
    Processor("Arm Neoverse N2", "0x41", models=(0xD49,), rates=_ARMS, measured=_MODELLED),
)
# Of processors that nobody has measured, a product is trusted where every one of the vendor's that has it is fast.
UNKNOWN = (
    Processor("unknown, AMD's", "AuthenticAMD", rates={PAIRS.name: 2.0}, measured="as AMD's before it"),
    Processor("unknown, Intel's", "GenuineIntel", rates={TILES.name: 8.0}, measured="as Intel's that have tiles"),
    Processor("unknown", measured="only fp32's rate is taken for granted"),
)


def processor_of(cpuinfo: str) -> Processor:
    """The family of the first processor in the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    vendor, family, model = (said.get(name, "") for name in ("vendor_id", "cpu family", "model"))
    if "CPU implementer" in said:
        vendor, model = said["CPU implementer"], str(int(said.get("CPU part", "0"), 16))
    for known in (*TABLE, *UNKNOWN):
        fits = not known.vendor or known.vendor == vendor
        fits = fits and (not known.families or family in map(str, known.families))
        if fits and (not known.models or model in map(str, known.models)):
            return known
    raise AssertionError("the last one fits all")


@functools.cache
def here() -> Processor:
    """The processor of this machine."""
    try:
        return processor_of(CPUINFO.read_text())
    except OSError:
        return UNKNOWN[-1]


@dataclass(frozen=True)
class Choice:
    """A product, and why it is the one."""

    product: Product
    why: str


_SAID: dict[Product, str] = {
    TILES: "tiles of bf16 pairs",
    SQUARES: "squares of bf16",
    PAIRS: "the dot of bf16 pairs",
    TILES2: "tiles of bf16 pairs, operands in two parts",
    TILES3: "tiles of bf16 pairs, operands in three parts",
}


def _beside_fma(dtype: str, precision: str) -> tuple[Product, ...]:
    """What else computes a dtype at a precision, the most preferred first where FLASHTILE_ISA names the machine."""
    if dtype == "bfloat16" or precision == "bf16":
        return TILES, SQUARES, PAIRS
    if dtype == "float64":
        return ()
    return (TILES2,) if dtype == "float16" or precision in ("tf32", "fp16") else (TILES3,)


def choose(
    isa: ISA,
    dtype: str,
    precision: str,
    processor: Processor | None = None,
    *,
    forced: bool = False,
    lands: tuple[str, ...] = ("registers", "memory"),
) -> Choice:
    """The product for a dtype at a precision on a machine; processor: of this machine, if it is None.

    forced: FLASHTILE_ISA names the machine. Then what it has is used, whatever its rate.
    lands: where the caller can take a product's sums from (Product.lands).
    """
    able = _beside_fma(dtype, precision)
    plain = f"multiply-adds in {'fp64' if dtype == 'float64' else 'fp32'}"
    takes = [product for product in able if product.lands in lands]
    there = [product for product in takes if product.unavailable(isa) is None]
    if not there:
        return Choice(FMA, f"{plain}: {PAIRS.unavailable(isa)}" if PAIRS in able else plain)
    if forced:
        return Choice(there[0], f"{_SAID[there[0]]}: FLASHTILE_ISA={isa.name}")
    processor = here() if processor is None else processor
    best = max(there, key=processor.rate)
    rate = processor.rate(best)
    said = f"its rate is {rate:g} of fp32's" if rate else "its rate is not known"
    why = f"{said} on {processor.name} ({processor.measured})"
    if rate > 1:
        return Choice(best, f"{_SAID[best]}: {why}")
    return Choice(FMA, f"{plain}, not {_SAID[best]}: {why}")
