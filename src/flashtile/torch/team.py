"""torch's own threads, which are awake where ours would sleep.

torch computes on a team of OpenMP, whose members stay awake for some milliseconds after each piece of work. Half of a
short call is the waking of other threads, and they would share the processors with torch's, which are still awake. So a
call takes torch's team as torch does: by the compiler's own entry to it, GOMP_parallel, which runs a function on each
member.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

from flashtile import threads
from flashtile.llvm import jit
from flashtile.llvm import machines as isas

# What each member runs, and the call of a team. A job: the function of the items, its parameters, the end of the items,
# how many of them to take at once, scratch, its bytes for each member; the next item, members so far, and of an item
# that failed its number plus 1, times 2^32, plus its status.
_TEXT = """
%job = type { ptr, ptr, i64, i64, ptr, i64, i64, i64, i64 }

define void @member(ptr %job) {
  %function = load ptr, ptr %job
  %params.at = getelementptr %job, ptr %job, i64 0, i32 1
  %params = load ptr, ptr %params.at
  %items.at = getelementptr %job, ptr %job, i64 0, i32 2
  %items = load i64, ptr %items.at
  %share.at = getelementptr %job, ptr %job, i64 0, i32 3
  %share = load i64, ptr %share.at
  %scratch.at = getelementptr %job, ptr %job, i64 0, i32 4
  %scratch = load ptr, ptr %scratch.at
  %step.at = getelementptr %job, ptr %job, i64 0, i32 5
  %step = load i64, ptr %step.at
  %next.at = getelementptr %job, ptr %job, i64 0, i32 6
  %members.at = getelementptr %job, ptr %job, i64 0, i32 7
  %failed.at = getelementptr %job, ptr %job, i64 0, i32 8
  %number = atomicrmw add ptr %members.at, i64 1 monotonic
  %offset = mul i64 %number, %step
  %mine = getelementptr i8, ptr %scratch, i64 %offset
  br label %take
take:
  %begin = atomicrmw add ptr %next.at, i64 %share monotonic
  %some = icmp slt i64 %begin, %items
  br i1 %some, label %work, label %done
work:
  %until = add i64 %begin, %share
  %whole = icmp slt i64 %until, %items
  %end = select i1 %whole, i64 %until, i64 %items
  %status = call i32 %function(ptr %params, i64 %begin, i64 %end, ptr %mine)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %take, label %failed
failed:
  %from = add i64 %begin, 1
  %high = shl i64 %from, 32
  %low = zext i32 %status to i64
  %told = or i64 %high, %low
  store atomic i64 %told, ptr %failed.at monotonic, align 8
  store atomic i64 %items, ptr %next.at monotonic, align 8
  br label %done
done:
  ret void
}

define i64 @team(ptr %parallel, ptr %function, ptr %params, i64 %first, i64 %items, i64 %share, ptr %scratch,
                 i64 %step, i32 %threads) {
  %job = alloca %job, align 64
  store %job zeroinitializer, ptr %job
  store ptr %function, ptr %job
  %params.at = getelementptr %job, ptr %job, i64 0, i32 1
  store ptr %params, ptr %params.at
  %items.at = getelementptr %job, ptr %job, i64 0, i32 2
  store i64 %items, ptr %items.at
  %share.at = getelementptr %job, ptr %job, i64 0, i32 3
  store i64 %share, ptr %share.at
  %scratch.at = getelementptr %job, ptr %job, i64 0, i32 4
  store ptr %scratch, ptr %scratch.at
  %step.at = getelementptr %job, ptr %job, i64 0, i32 5
  store i64 %step, ptr %step.at
  %next.at = getelementptr %job, ptr %job, i64 0, i32 6
  store i64 %first, ptr %next.at
  call void %parallel(ptr @member, ptr %job, i32 %threads, i32 0)
  %failed.at = getelementptr %job, ptr %job, i64 0, i32 8
  %failed = load i64, ptr %failed.at
  ret i64 %failed
}
"""


class Team:
    """See threads.Team."""

    def __init__(self, parallel: int) -> None:
        self._parallel = parallel
        self._library = jit.load(lambda: _TEXT, f"team {_TEXT}", isas.current(), ("team",))
        pointer, word, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        given = pointer, pointer, pointer, word, word, word, pointer, word, number
        self._run: Any = self._library.function("team", word, *given)

    def __call__(self, function: Any, params: bytes | int, *numbers: int) -> tuple[int, int]:
        failed = self._run(self._parallel, function, params, *numbers)
        return (failed >> 32) - 1, failed & 0xFFFFFFFF


def lend() -> None:
    """Let the engine share calls over torch's team, where torch has one that can be asked."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # another system, or a torch whose threads are others
        return
    if parallel:
        threads.lend(lambda: Team(parallel))


# A team's members stay in the parent, and the child would wait for them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: threads.lend(None))
