"""What compiled code uses and how it is called, read from the machine code itself.

NVIDIA's tools that read it, cuobjdump and nvdisasm, come in Triton's wheel; AMD's assembly says it in comments. Neither
needs a GPU or its driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Opcodes whose number says something of a kernel: arithmetic, special functions, memory, and the stack (spills).
COUNTED = ("FFMA", "DFMA", "MUFU", "LDG", "STG", "LDGSTS", "UTMALDG", "LDS", "LDSM", "STS", "LDL", "STL", "BAR")

_FUNCTION = re.compile(r" Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_PARAMETER = re.compile(r"Ordinal\s*:\s*0x([0-9a-f]+)\s+Offset\s*:\s*0x([0-9a-f]+)\s+Size\s*:\s*0x([0-9a-f]+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """Where one argument lies in the block of parameters, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Resources:
    """One kernel's use of a processor: registers and stack of a thread, bytes; instructions in its text.

    A kernel spills where it stores registers to its stack: local_stores counts these instructions, local_loads those
    that bring them back. tensor counts tensor-core instructions by their whole name (HMMA.16816.F32.BF16), instructions
    the others of COUNTED by their first word.
    """

    registers: int
    stack: int
    static_shared: int
    local_stores: int
    local_loads: int
    tensor: dict[str, int]
    instructions: dict[str, int]
    parameters: tuple[Parameter, ...]

    @property
    def spills(self) -> int:
        """Instructions that move registers to the stack and back."""
        return self.local_stores + self.local_loads


def resources_of(compiled: Any) -> Resources:
    """The resources of a `triton.compile` result. Raises: RuntimeError if the tools say something unexpected."""
    if "cubin" in compiled.asm:
        return of_cubin(compiled.asm["cubin"], compiled.metadata.name)
    return of_amd(compiled.asm["amdgcn"])


def of_cubin(cubin: bytes, name: str) -> Resources:
    """The resources of the kernel `name` in NVIDIA machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(file))
        layout = _tool("cuobjdump", "-elf", str(file))
        text = _tool("nvdisasm", "-c", str(file))
    found = {match[1]: tuple(map(int, match.groups()[1:])) for match in _FUNCTION.finditer(usage)}
    if name not in found:
        raise RuntimeError(f"cuobjdump: got functions {sorted(found)}, expected {name}")
    registers, stack, shared = found[name]
    opcodes = Counter(match[1] for match in _INSTRUCTION.finditer(text))
    counts = _first_words(opcodes)
    return Resources(
        registers,
        stack,
        shared,
        local_stores=counts["STL"],
        local_loads=counts["LDL"],
        tensor={opcode: n for opcode, n in sorted(opcodes.items()) if "MMA" in opcode.partition(".")[0]},
        instructions={opcode: counts[opcode] for opcode in COUNTED if counts[opcode]},
        parameters=_parameters(layout),
    )


def of_amd(assembly: str) -> Resources:
    """The resources of the kernel in AMD assembly, which has one."""
    opcodes = Counter(re.findall(r"^\s+([vs]_\w+|scratch_\w+|global_\w+|buffer_\w+|ds_\w+)", assembly, re.MULTILINE))
    numbers = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = numbers["vgpr_spill_count"]
    sizes = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)", assembly)
    return Resources(
        registers=numbers["vgpr_count"],
        stack=numbers["private_segment_fixed_size"],
        static_shared=numbers["group_segment_fixed_size"],
        local_stores=spilled,
        local_loads=spilled,
        tensor={opcode: n for opcode, n in sorted(opcodes.items()) if "mfma" in opcode},
        instructions={},
        parameters=tuple(Parameter(int(offset), int(size)) for offset, size in sizes),
    )


def _first_words(opcodes: Counter[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for opcode, n in opcodes.items():
        counts[opcode.partition(".")[0]] += n
    return counts


def _parameters(layout: str) -> tuple[Parameter, ...]:
    """By ordinal; the file lists them backwards."""
    found: Iterable[tuple[int, ...]] = (tuple(int(x, 16) for x in m.groups()) for m in _PARAMETER.finditer(layout))
    return tuple(Parameter(offset, size) for _, offset, size in sorted(found))


def _tool(name: str, *arguments: str) -> str:
    """What one of NVIDIA's tools in Triton's wheel prints."""
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
