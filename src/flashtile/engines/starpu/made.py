"""Kernels of score programs and of gradients for CUDA workers: compiled when a call first wants one, and kept with the
compiled kernels."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from flashtile.engines.starpu import build
from flashtile.errors import FlashtileError
from flashtile.kernels.triton import aot, compiler_missing
from flashtile.kernels.triton.specialisation import Specialisation
from flashtile.spec import AttentionSpec
from flashtile.version import __version__


def folder_of(what: Specialisation, spec: AttentionSpec, arch: str) -> Path | None:
    """A folder with the manifest of this kernel, of any tile; None where it cannot be compiled."""
    known = json.dumps([__version__, arch, what.kernel, aot.parameters_of(what), what.constants, aot.program_of(what)])
    folder = build.directory() / "kernels" / hashlib.sha256(known.encode()).hexdigest()[:32]
    if (folder / aot.MANIFEST).exists():
        return folder
    if compiler_missing() is not None:
        return None
    with suppress(FlashtileError, OSError):
        list(aot.build(folder, arch, [aot.laid_out(what, spec, arch)]))
        return folder
    return None
