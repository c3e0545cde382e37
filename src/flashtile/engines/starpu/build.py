"""Compiles the shim against the installed StarPU, once for each version of either, and loads it.

cffi's API mode: the C compiler checks every declaration against StarPU's own header. The module lies in the cache
folder of the compiled kernels, under a digest of what it was made from.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from flashtile.errors import UnavailableError

PACKAGES = ("starpu-1.4", "starpu-1.3")  # by pkg-config, the newest first
VARIABLE = "FLASHTILE_STARPU"  # names another pkg-config package
HEADERS = ("launch.h", "shim.h")  # what Python sees
SOURCES = (*HEADERS, "launch_internal.h", "shim.c", "launch.c")
HERE = Path(__file__).parent
INSTALL = "apt-get install --no-install-recommends libstarpu-dev pkg-config gcc libc6-dev, and pip install cffi"


@functools.cache
def package() -> tuple[str, str] | None:
    """(pkg-config's name, version) of the StarPU to build against, None if there is none."""
    chosen = os.environ.get(VARIABLE)
    for name in (chosen,) if chosen else PACKAGES:
        try:
            found = subprocess.run(["pkg-config", "--modversion", name], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if found.returncode == 0:
            return name, found.stdout.strip()
    return None


def missing() -> str | None:
    """What is not there of what a build needs, with the remedy; None if all is."""
    if shutil.which("pkg-config") is None:
        return f"pkg-config is not installed, so StarPU cannot be found: {INSTALL}"
    if package() is None:
        names = os.environ.get(VARIABLE) or " or ".join(PACKAGES)
        return f"pkg-config does not know {names}: {INSTALL}; for a StarPU of your own set PKG_CONFIG_PATH"
    if importlib.util.find_spec("cffi") is None:
        return "the Python package cffi is not installed: pip install cffi"
    if _module_path().exists():
        return None
    if sys.version_info >= (3, 12) and importlib.util.find_spec("setuptools") is None:
        return "cffi compiles with setuptools, which is not installed: pip install setuptools"
    if not any(map(shutil.which, (*os.environ.get("CC", "").split()[:1], "cc", "gcc", "clang"))):
        return "no C compiler found: apt-get install gcc libc6-dev"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"{header} does not exist: apt-get install python3-dev"


def built() -> bool:
    """Whether the module is there already."""
    return _module_path().exists()


def build(force: bool = False) -> Path:
    """Compile the shim unless it is there; the path of the module.

    Raises: UnavailableError with what is missing, or with the compiler's last words.
    """
    if reason := missing():
        raise UnavailableError(f"starpu: {reason}")
    target = _module_path()
    if target.exists() and not force:
        return target
    found = package()
    assert found is not None
    links = flags("--libs", found[0])
    paths = [f"-Wl,-rpath,{flag[2:]}" for flag in links if flag.startswith("-L")]
    compile_flags = [*flags("--cflags", found[0]), f"-I{HERE}", "-O2", "-Wall"]
    launcher = [str(HERE / "launch.c")]
    headers = [HERE / name for name in HEADERS]
    return compiled(target, headers, HERE / "shim.c", launcher, compile_flags, [*links, "-ldl", *paths])


def compiled(
    target: Path, headers: list[Path], source: Path, others: list[str], compile_flags: list[str], links: list[str]
) -> Path:
    """Compile a C source into the module `target`, whose name is the file's; headers: what Python sees of it, without
    comments of several lines or includes.

    Raises: UnavailableError with the compiler's last words.
    """
    from cffi import FFI

    ffi = FFI()
    ffi.cdef("\n".join(header.read_text() for header in headers))
    options = {"sources": others, "extra_compile_args": compile_flags, "extra_link_args": links}
    ffi.set_source(target.name.partition(".")[0], source.read_text(), **options)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            made = ffi.compile(tmpdir=folder)
        except Exception as cause:  # cffi raises whatever setuptools raises
            raise UnavailableError(f"starpu: compiling {source} failed: {_last_words(cause)}") from cause
        os.replace(made, target)  # many processes may build at once
    return target


@functools.cache
def load() -> ModuleType:
    """The compiled module, built first if it must be. Raises: UnavailableError."""
    return imported(build(), "flashtile starpu build makes it anew")


def imported(path: Path, remedy: str) -> ModuleType:
    """A compiled module. Raises: UnavailableError with the remedy."""
    name = path.name.partition(".")[0]
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as cause:
        raise UnavailableError(f"starpu: {path} does not load ({cause}): {remedy}") from cause
    return module


@functools.cache
def _name() -> str:
    """Of the module: a digest of its sources, of StarPU's version and flags, and of this Python."""
    found = package()
    assert found is not None
    parts = [
        *((HERE / name).read_text() for name in SOURCES),
        *found,
        *flags("--cflags", found[0]),
        *flags("--libs", found[0]),
        str(sysconfig.get_config_var("SOABI")),
        _header_digest(found[0]),
    ]
    return "flashtile_starpu_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _header_digest(name: str) -> str:
    """Of StarPU's configuration header: two builds of one version may differ in their limits."""
    for flag in flags("--cflags", name):
        header = Path(flag[2:], "starpu_config.h")
        if flag.startswith("-I") and header.exists():
            return hashlib.sha256(header.read_bytes()).hexdigest()
    return ""


def _module_path() -> Path:
    return directory() / (_name() + str(sysconfig.get_config_var("EXT_SUFFIX")))


@functools.cache
def directory() -> Path:
    """In the cache of compiled kernels; where that refuses (others, or nobody, may write it), a folder of our own."""
    from flashtile.llvm import cache

    if cache.unavailable() is None:
        return cache.directory() / "starpu"
    folder = tempfile.TemporaryDirectory(prefix="flashtile-starpu-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def flags(what: str, name: str) -> list[str]:
    said = subprocess.run(["pkg-config", what, name], capture_output=True, text=True, check=True).stdout
    return shlex.split(said)  # 1.4 of Debian defines a macro with quotes in it


def _last_words(cause: Exception) -> str:
    return " ".join(str(cause).split())[-400:] or type(cause).__name__
