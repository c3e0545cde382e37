"""Kernels for GPUs in Triton: flash forward, the merge of parts, and the unfused baseline, for CUDA and ROCm.

    specialisation.py  what a kernel is compiled for    tiles.py     tiles for each architecture, one table
    forward.py         the flash kernel                 vanilla.py   the unfused baseline
    merge.py           parts of the keys, and finish    tables.py    the coverage of a mask, as kernels walk it
    rows.py, language.py, functions.py, containment.py, dropout.py  what they are written with
    program.py         score programs in Triton's language
    host.py            a call: from addresses to launches, on any device.py
    cuda.py            a GPU, by driver.py              interpreter.py   Triton's interpreter, on the CPU
    jit.py, compiler.py   from a specialisation to machine code, for the GPU at hand or another
    resources.py       what machine code uses           aot.py       kernels compiled ahead of time, with a manifest
    selftest.py        the first use of a row on a device: verdicts      problems.py  what it computes
    choice.py          the rows that a call takes               timed.py     the faster of several
Triton is imported when a kernel is first needed: not by this file.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from flashtile import current
from flashtile.dtypes import DTYPES
from flashtile.kernels import (
    ArrayShapes,
    BackwardLayout,
    Capabilities,
    CompiledBackward,
    CompiledKernel,
    Family,
    Layout,
)
from flashtile.kernels.triton import driver, tiles
from flashtile.kernels.triton.backward_tiles import backward_tiles
from flashtile.kernels.triton.host import Forward
from flashtile.spec import PRECISIONS

if TYPE_CHECKING:
    from flashtile.kernels.triton.choice import Place
    from flashtile.kernels.triton.device import Device
    from flashtile.kernels.triton.selftest import Judge
    from flashtile.kernels.triton.specialisation import Tile
    from flashtile.kernels.triton.timed import Stopwatch
    from flashtile.plan import Plan
    from flashtile.spec import AttentionSpec

VERSIONS = (3, 6), (3, 10)  # from, to below: kernels compile with all between. torch 2.11 pins 3.6
PART_KEYS = 512  # fewest keys of a part: some tiles, so that a program outlives its start
ANY_ARCH = "sm_80"  # whose capabilities are told where no device is asked about


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU. It decides when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, None if they can."""
    if (reason := compiler_missing()) is not None:
        return reason
    if not interpreting():
        reason = driver.missing()
        return driver.NO_GPU + ", and TRITON_INTERPRET=1 is not set" if reason == driver.NO_GPU else reason
    if importlib.util.find_spec("torch") is None:
        return "torch, whose memory the interpreter uses, is not installed: pip install torch"
    return None


def compiler_missing() -> str | None:
    """Why Triton cannot be used here at all, None if it can."""
    version = installed_version()
    low, high = (".".join(map(str, v)) for v in VERSIONS)
    if version is None:
        return f"triton is not installed: pip install 'triton>={low},<{high}'"
    if not VERSIONS[0] <= (release() or (0,)) < VERSIONS[1]:
        return f"triton is {version}, not from {low} to below {high}: pip install 'triton>={low},<{high}'"
    return None


@functools.cache
def installed_version() -> str | None:
    """Triton's version, read from its source, since importing it takes a second; None if it is not installed."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    match = re.search(r"^__version__ = ['\"](\d+\.\d+[^'\"]*)", Path(found.origin).read_text(), re.MULTILINE)
    return match[1] if match else None


def release() -> tuple[int, ...] | None:
    """Triton's version as two numbers, (3, 9); None if it is not installed."""
    version = installed_version()
    return None if version is None else tuple(map(int, version.split(".")[:2]))


def arch_of(spec: AttentionSpec) -> str:
    """The architecture that would compute a spec."""
    if interpreting():
        return tiles.INTERPRETER
    if spec.device_kind != "cuda":
        return ANY_ARCH
    return driver.device(number_of(spec)).arch


def number_of(spec: AttentionSpec) -> int:
    """The number of the spec's device, as CUDA counts."""
    return int(spec.device.partition(":")[2] or 0)


def few_rows(spec: AttentionSpec) -> bool:
    """Whether the rows of all query heads that share a key/value head fit into the smallest tile."""
    return 0 < spec.q_len * spec.group <= tiles.FEW_ROWS


def packs(spec: AttentionSpec) -> bool:
    """Whether query heads that share a key/value head are computed in one tile: few rows, seeing the same keys."""
    by_head = spec.program is not None and spec.program.mask is not None and "h" in spec.program.mask.variables
    return few_rows(spec) and spec.group > 1 and not by_head


def capabilities(spec: AttentionSpec) -> Capabilities:
    """What the forward kernel does for this spec on its device."""
    arch = arch_of(spec)
    interpreted = arch == tiles.INTERPRETER
    tile, _ = _forward_tiles(spec)
    return Capabilities(
        name="triton",
        dtypes=frozenset(DTYPES),
        precisions=frozenset(PRECISIONS) - ({"tf32"} if interpreted else set()),
        max_head_size=tiles.MAX_HEAD_SIZE,
        query_block=1,
        tile_q=(tile.tile_q,),
        tile_k=(tile.tile_k,),
        options=frozenset(("band", "program", "sinks", "dropout")),
        directions=frozenset(("forward",) if backward_tiles(spec, arch) is None else ("forward", "backward")),
        native=False,
        isa=arch,
        variant="few queries" if few_rows(spec) else "forward",
        head_block=spec.group if packs(spec) else 1,
        part_keys=PART_KEYS,
        enough_items=None if interpreted or spec.device_kind != "cuda" else driver.device(number_of(spec)).processors,
        devices=frozenset(("cpu",) if interpreted else ("cuda",)),
        at_once=True,
    )


def refuses(spec: AttentionSpec) -> str | None:
    """Why a spec is not computed on its device: an architecture without tiles, or a self-test that failed there."""
    if interpreting():
        return None
    from flashtile.kernels.triton import choice

    device = driver.device(number_of(spec))
    if (reason := too_old(device.arch)) is not None:
        return reason
    if tiles.rows_of(device.arch) is None:
        return f"has no tiles for {device.name}, which is {device.arch}"
    return choice.refusal(spec, _place(spec), few_rows(spec), packs(spec), *_trials(spec))


def too_old(arch: str) -> str | None:
    """Why the installed Triton cannot compile for an architecture; None if it can."""
    needed = tiles.NEEDS.get(str(tiles.rows_of(arch)))
    if needed is None or (release() or needed) >= needed:
        return None
    return f"needs triton {'.'.join(map(str, needed))} for {arch}, not {installed_version()}"


def remark() -> str:
    """Which device computes, what failed its self-test there, and what was timed."""
    if interpreting():
        return "Triton's interpreter, on arrays in CPU memory"
    from flashtile.kernels.triton import selftest, timed

    device = driver.device(0)
    where = f"{device.name} ({device.arch})"
    version = str(installed_version())
    known = selftest.known_failures(where, version), timed.known(where, version)
    return "; ".join((f"{where}, triton {version}", *(line for lines in known for line in lines)))


def compile(spec: AttentionSpec, plan: Plan, layout: Layout) -> CompiledKernel:
    """The kernel of one spec, plan and layout; machine code is made at its first launch, and shared."""
    best, plain = _forward_tiles(spec)
    return Forward(spec, plan, layout, best, device_of(spec), plain)


def compile_backward(spec: AttentionSpec, layout: BackwardLayout, arrays: ArrayShapes) -> CompiledBackward:
    """The kernels of the gradients of one spec and layout."""
    from flashtile.kernels.triton.backward_host import Backward

    if interpreting() or spec.device_kind != "cuda":
        found = backward_tiles(spec, arch_of(spec))
        assert found is not None  # or there were no backward to compile
    else:
        from flashtile.kernels.triton import choice

        found = choice.usable_backward(spec, _place(spec), bool(arrays), *_trials(spec))
    return Backward(spec, layout, arrays, *found, device_of(spec))


def _forward_tiles(spec: AttentionSpec) -> tuple[Tile, Tile]:
    """The tiles of a call's forward: of arrays that tensor descriptors can cut, and of others."""
    few, arch = few_rows(spec), arch_of(spec)
    if interpreting() or spec.device_kind != "cuda" or tiles.rows_of(arch) is None:
        return tiles.forward_tile(spec, arch, few, described=True), tiles.forward_tile(spec, arch, few)
    from flashtile.kernels.triton import choice

    return choice.forward_tiles(spec, _place(spec), few, packs(spec))


def _place(spec: AttentionSpec) -> Place:
    """The device of a spec, as verdicts know it."""
    from flashtile.kernels.triton.choice import Place

    device = driver.device(number_of(spec))
    return Place(f"{device.name} ({device.arch})", device.arch, device.processors, str(installed_version()))


def _trials(spec: AttentionSpec) -> tuple[Judge | None, Stopwatch | None]:
    """What finds out, on the device of the call in progress, whether a row is right, and how fast; None where there is
    no call."""
    if not current.in_call():
        return None, None
    from flashtile.kernels.triton import problems

    given = capabilities, device_of(spec)
    return functools.partial(problems.judge, *given), functools.partial(problems.stopwatch, *given)


def device_of(spec: AttentionSpec) -> Device:
    """Where kernels run: the GPU, or Triton's interpreter."""
    if interpreting():
        from flashtile.kernels.triton.interpreter import Interpreter

        return Interpreter()
    from flashtile.kernels.triton.cuda import Gpu

    return Gpu()


FAMILY = Family("triton", unavailable, capabilities, compile, refuses, remark, compile_backward=compile_backward)
