"""The shim against StarPU 1.4, where the distribution has 1.3: compiled here; scripts/starpu-1.4 runs it, too."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from processes import run

from flashtile.engines.starpu import build

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "starpu-1.4"
UNREACHABLE = 75  # the script's status


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiler's, for the headers of 1.4 from Debian's archive, downloaded once and kept in build/."""
    done = run([str(SCRIPT), "headers"])
    if done.returncode == UNREACHABLE:
        pytest.skip(f"the headers of StarPU 1.4 cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    root = folder.parents[3]
    monkeypatch.setenv("PKG_CONFIG_PATH", str(folder))
    monkeypatch.setenv("PKG_CONFIG_SYSROOT_DIR", str(root))
    return [*build.flags("--cflags", "starpu-1.4"), f"-I{root}/usr/include"]


def test_the_shim_compiles_against_the_headers_of_1_4(flags: list[str], tmp_path: Path) -> None:
    """With every declaration that Python uses, and without a warning."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef("\n".join((build.HERE / name).read_text() for name in build.HEADERS))
    ffi.set_source("shim_of_1_4", (build.HERE / "shim.c").read_text())
    ffi.emit_c_code(str(tmp_path / "shim.c"))
    version = tmp_path / "version.h"
    version.write_text('#include <starpu.h>\n_Static_assert(STARPU_MINOR_VERSION == 4, "another version");\n')
    includes = [f"-I{build.HERE}", f"-I{sysconfig.get_path('include')}", "-include", str(version)]
    compiler = [*os.environ.get("CC", "cc").split(), "-c", "-O1", "-fPIC", "-Wall", "-Werror"]
    done = subprocess.run(
        [*compiler, *includes, *flags, "shim.c", "-o", "shim.o"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shim.o").stat().st_size > 10_000
