"""Compiles the shim against the installed StarPU-MPI, beside the binding of StarPU itself."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

from flashtile.engines.starpu import build as starpu
from flashtile.errors import UnavailableError

HERE = Path(__file__).parent
INSTALL = "apt-get install --no-install-recommends libstarpu-dev libopenmpi-dev openmpi-bin, and pip install mpi4py"


def missing() -> str | None:
    """What is not there of what a build needs, with the remedy; None if all is."""
    if (reason := starpu.missing()) is not None:
        return reason
    if package() is None:
        return f"pkg-config does not know {_name_of(starpu.package())}: {INSTALL}"
    if shutil.which("mpicc") is None:
        return f"mpicc is not installed: {INSTALL}"
    if importlib.util.find_spec("mpi4py") is None:
        return f"the Python package mpi4py is not installed: {INSTALL}"
    return None


@functools.cache
def package() -> str | None:
    """pkg-config's name of the StarPU-MPI that goes with the StarPU of the binding; None if it is not there."""
    name = _name_of(starpu.package())
    found = subprocess.run(["pkg-config", "--exists", name], timeout=60)
    return None if found.returncode else name


def _name_of(found: tuple[str, str] | None) -> str:
    return "starpumpi" + ("" if found is None else found[0].removeprefix("starpu"))


def build() -> Path:
    """Compile the shim unless it is there; the path of the module. Raises: UnavailableError."""
    if reason := missing():
        raise UnavailableError(f"starpu_mpi: {reason}")
    target = _path()
    if target.exists():
        return target
    compile_flags, links = _flags()
    paths = [f"-Wl,-rpath,{flag[2:]}" for flag in links if flag.startswith("-L")]
    compile_flags = [*compile_flags, f"-I{HERE}", "-O2", "-Wall"]
    return starpu.compiled(target, [HERE / "shim.h"], HERE / "shim.c", [], compile_flags, [*links, *paths])


@functools.cache
def load() -> ModuleType:
    """The compiled module, built first if it must be. Raises: UnavailableError."""
    path = build()
    return starpu.imported(path, f"delete it, and it is made anew; {INSTALL}")


@functools.cache
def _flags() -> tuple[list[str], list[str]]:
    """(compiler's, linker's). The package file of StarPU-MPI does not name those of MPI."""
    name = package()
    assert name is not None
    said = [_words("mpicc", f"--showme:{what}") for what in ("compile", "link")]
    return [*starpu.flags("--cflags", name), *said[0]], [*starpu.flags("--libs", name), *said[1]]


def _words(*command: str) -> list[str]:
    return shlex.split(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@functools.cache
def _path() -> Path:
    compile_flags, links = _flags()
    sources = [(HERE / name).read_text() for name in ("shim.h", "shim.c")]
    parts = [*sources, *compile_flags, *links, *(starpu.package() or ()), str(sysconfig.get_config_var("SOABI"))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    return starpu.directory() / f"flashtile_starpu_mpi_{digest}{suffix}"
