"""What a run ran on: processor, cores used, versions, and the environment that peers are started in."""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import tempfile
from pathlib import Path

# Workarounds for broken OpenBLAS builds that must not slow the NumPy peer down.
DROPPED_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
ROOT = Path(__file__).resolve().parent.parent


def folder_until_exit(name: str) -> Path:
    """A new folder that is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix=f"flashtile-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def core_name() -> str:
    """LLVM's name of the host's core, such as znver4."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name()


def features() -> frozenset[str]:
    """What LLVM says that the host has, such as amx-bf16."""
    import llvmlite.binding as llvm

    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def describe() -> str:
    return f"{cpu_model()} ({core_name()}), {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"


def _core_of(cpu: int) -> str:
    """Hyper-threads of one core share this string."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else str(cpu)


def pick_cpus(threads: int) -> list[int]:
    """CPUs to pin to: one a core first, hyper-threads of the same core only when cores run out."""
    first_of_core: dict[str, int] = {}
    allowed = sorted(os.sched_getaffinity(0))
    for cpu in allowed:
        first_of_core.setdefault(_core_of(cpu), cpu)
    order = list(first_of_core.values())
    order += [cpu for cpu in allowed if cpu not in order]
    return order[:threads]


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a benchmark process: thread counts set, this checkout importable."""
    env = {key: value for key, value in os.environ.items() if key not in DROPPED_VARIABLES}
    env.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    env["JAX_PLATFORMS"] = "cpu"
    paths = [str(ROOT), str(ROOT / "src"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return env
