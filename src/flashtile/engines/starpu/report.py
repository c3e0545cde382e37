"""What `flashtile doctor` says of StarPU: its version, where it is bound, its workers and limits."""

from __future__ import annotations

import os
from typing import Any

from flashtile.engines.starpu import build, runtime
from flashtile.threads import get_num_threads


def remark() -> str:
    """One line; nothing is compiled or started for it."""
    found = build.package()
    assert found is not None
    name, version = found
    if not build.built():
        return f"StarPU {version} ({name}); the binding is compiled at first use, or by flashtile starpu build"
    lib = build.load().lib
    limits = ", ".join(f"{lib.ft_constant(word)} {what}" for what, word in LIMITS)
    return f"StarPU {version} ({name}); {_workers(lib)}; at most {limits}"


LIMITS = (("CPU workers", b"MAXCPUS"), ("workers", b"NMAXWORKERS"), ("handles in a codelet", b"NMAXBUFS"))


def _workers(lib: Any) -> str:
    if not runtime.running():
        number = os.environ.get("STARPU_NCPU") or min(get_num_threads(), lib.ft_constant(b"MAXCPUS"))
        return f"not running, would start {number} CPU workers"
    now = runtime.current()
    return ", ".join(f"{now.workers(kind)} {kind} workers" for kind in runtime.ARCHITECTURES)
