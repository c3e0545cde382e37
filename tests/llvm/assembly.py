"""Reads emitted assembly, x86-64 in AT&T form or aarch64: functions, their innermost loops, their stack traffic."""

from __future__ import annotations

import re

_LABEL = re.compile(r"^([.\w]+):")
_X86_JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
_ARM_JUMP = re.compile(r"^\s+(?:b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L\w+)$")
_X86_FRAME = re.compile(r"^\s+movq\s+%rsp, %rbp")
_ARM_FRAME = re.compile(r"^\s+(?:mov|add)\s+x29, sp\b")


def functions(assembly: str) -> dict[str, list[str]]:
    """The lines of every function by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        label = _LABEL.match(line)
        if label and not label[1].startswith(".L"):
            lines = found[label[1]] = []
        elif line.lstrip().startswith(".size"):
            lines = []
        else:
            lines.append(line)
    return found


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """The bodies of loops that hold no other: from the target of a backward jump to the jump."""
    labels = {label[1]: n for n, line in enumerate(lines) if (label := _LABEL.match(line))}
    loops = set()
    for end, line in enumerate(lines):
        jump = _X86_JUMP.match(line) or _ARM_JUMP.match(line)
        if jump and (start := labels.get(jump[1], end + 1)) <= end:
            loops.add((start, end))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [lines[start : end + 1] for start, end in sorted(inner)]


def stack_traffic(loop: list[str], function: list[str]) -> list[str]:
    """Instructions of the loop that touch the stack, through the stack pointer or the function's frame pointer."""
    bases = [r"\(%rsp[,)]", r"^\s+(?:push|pop)", r"\[sp\b"]
    if any(_X86_FRAME.match(line) for line in function):
        bases.append(r"\(%rbp[,)]")
    if any(_ARM_FRAME.match(line) for line in function):
        bases.append(r"\[x29\b")
    touches = re.compile("|".join(bases))
    return [line for line in loop if touches.search(line)]
