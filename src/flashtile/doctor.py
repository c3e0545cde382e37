"""`flashtile doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path

import flashtile
from flashtile import engines, kernels
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu_mpi import build as ranks
from flashtile.errors import FlashtileError
from flashtile.llvm import cache, processors
from flashtile.llvm import machines as isa
from flashtile.spec import PRECISIONS
from flashtile.threads import get_num_threads

Row = tuple[str, str, bool, str]  # room, name, available, why not (or a remark)

_PACKAGES = ("numpy", "llvmlite", "ml_dtypes", "torch", "jax", "matplotlib", "tqdm")


def survey() -> list[Row]:
    """Every kernel, instruction set, engine and door: (room, name, available, why not, or a remark)."""
    return [*kernels.survey(), *_isas(), *_products(), *engines.survey(), *_doors()]


def text() -> str:
    """The survey with the machine, the versions, the threads and the cache, for reading."""
    facts = [
        ("flashtile", f"{flashtile.__version__} in {Path(flashtile.__file__).parent}"),
        ("python", f"{platform.python_version()}, {platform.python_implementation()}, {sys.executable}"),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)),
        ("threads", str(get_num_threads())),
        ("cache", _cache()),
    ]
    lines = [f"{name:<10} {value}" for name, value in facts] + [""]
    if absent := [name for name in _PACKAGES if _version(name) == "-"]:
        lines.insert(-1, f"{'absent':<10} optional: pip install {' '.join(absent)}")
    for room, name, available, remark in survey():
        state = ("" if available else "not ") + "available" + (f": {remark}" if remark else "")
        lines.append(f"{room:<10} {name:<22} {state}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _cache() -> str:
    folder = cache.directory()
    try:
        sizes = [file.stat().st_size for file in folder.glob("*.o")]
    except OSError as e:
        return f"{folder}: {e.strerror}"
    return f"{folder}: {len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB"


def _isas() -> list[Row]:
    try:
        chosen = isa.current().name
    except FlashtileError:  # the survey of the kernels says why
        chosen = ""
    rows = []
    for name, machine in isa.known().items():
        reason = isa.unavailable(machine)
        rows.append(("isa", name, reason is None, reason or ("in use" if name == chosen else "")))
    return rows


def _products() -> list[Row]:
    """How the kernels multiply in each dtype, and in fp32 at each precision that is not its own."""
    try:
        machine = isa.current()
    except FlashtileError:  # the survey of the kernels says why
        return []
    asked = [(name, "ieee") for name in DTYPES] + [("float32", name) for name in PRECISIONS if name != "ieee"]
    rows = []
    for dtype, precision in asked:
        choice = processors.choose(machine, dtype, precision, forced=bool(isa.setting()))
        name = dtype if precision == "ieee" else f"{dtype}/{precision}"
        rows.append(("product", name, True, f"{choice.product.name}: {choice.why}"))
    return rows


def _doors() -> list[Row]:
    """The modules and packages beside api.py whose docstring begins "The door for". They are read, not imported: a door
    imports the package that it is for. One to an engine is open where that is available."""
    shut = {name: reason for _, name, available, reason in engines.survey() if not available}
    shut["starpu_mpi"] = ranks.missing() or ""
    folder = Path(flashtile.__file__).parent
    rows = []
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        package = file.name == "__init__.py" and file.parent != folder
        name, files = (file.parent.name, sorted(file.parent.glob("*.py"))) if package else (file.stem, [file])
        if (ast.get_docstring(ast.parse(file.read_bytes())) or "").startswith("The door for"):
            needs = set().union(*(_imports(ast.parse(x.read_bytes())) for x in files))
            missing = sorted(x for x in needs if importlib.util.find_spec(x) is None)
            reason = f"{', '.join(missing)} not installed: pip install {' '.join(missing)}" if missing else ""
            rows.append(("door", f"flashtile.{name}", not (reason or shut.get(name)), reason or shut.get(name, "")))
    return rows


def _imports(tree: ast.Module) -> set[str]:
    """The packages that a module imports when it is imported itself."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names
