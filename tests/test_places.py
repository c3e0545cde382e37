"""The places of the package, and which of them may import which: one table, held against the sources.

Imports are read, not run: of modules, of functions, and those that only a type checker sees. Within a place modules
import each other without circles; an import inside a function does not count there, since it is for what is optional
or slow to load.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import flashtile

pytestmark = pytest.mark.core


class Place(NamedTuple):
    """Modules by their names in the package, each with all below it that no other place names; what they may import."""

    modules: str
    imports: str = ""


# Bottom to top: a place imports itself and places above its line only, of those the ones that it names.
TABLE: dict[str, Place] = {
    "errors": Place("errors progress rooms version signature checks hints"),
    "arrays": Place("arrays arrayfiles dtypes threads", "errors"),
    "llvm": Place("llvm", "errors"),
    "score": Place("score", "errors arrays llvm"),
    "spec": Place("spec", "errors arrays score"),
    "options": Place("score.options", "errors arrays score spec"),
    "plan": Place("plan", "score spec"),
    "contract": Place("kernels", "errors arrays spec options plan"),
    "numpy": Place(
        "kernels.reference kernels.vanilla kernels.backward kernels.second kernels.rule kernels.views kernels.accuracy",
        "arrays score spec options plan contract",
    ),
    "cpu": Place("kernels.cpu", "errors arrays llvm score spec options plan contract"),
    "owners": Place("owners current", "errors arrays"),
    "triton": Place(
        "kernels.triton kernels.triton_vanilla",
        "errors arrays llvm score spec options plan contract numpy owners",
    ),
    # Of triton the driver alone, which knows nothing of Triton.
    "cudnn": Place("kernels.cudnn", "errors spec options plan contract owners triton"),
    "engines": Place("engines", "errors spec options contract"),
    "direct": Place("engines.direct", "errors arrays spec plan contract engines"),
    # Of llvm the cache's folder; of triton the kernels compiled ahead of time, and what they are compiled for.
    "starpu": Place("engines.starpu", "errors arrays llvm score spec options plan contract triton engines"),
    "starpu_mpi": Place("engines.starpu_mpi", "errors arrays score spec options contract starpu"),
    "dask": Place("engines.dask", "errors arrays score spec options contract engines starpu"),
    "calls": Place("calls", "errors arrays spec options contract engines"),
    "doors": Place(
        "api torch transformers flash_attn onnx jax xla xla_call xla_frame xla_native devices device_gradients lazy "
        "outofcore outofcore_gradients outputs scaling gradients gradient_problem merge explain plot picture starpu "
        "starpu_mpi nntile",
        "errors arrays llvm score spec options plan contract numpy owners engines direct starpu starpu_mpi dask calls",
    ),
    "package": Place("", "errors arrays score doors"),
    "tools": Place(
        "cli flags __main__ bench calibration demo doctor launch testing",
        "errors arrays llvm score spec options contract numpy triton engines starpu starpu_mpi calls doors package",
    ),
}

AT_IMPORT, IN_FUNCTION, FOR_CHECKERS = "at import", "in a function", "for checkers"
ROOT = Path(flashtile.__file__).parent


class Import(NamedTuple):
    """One module of the package that another imports; "" is the package itself."""

    source: str
    target: str
    when: str


def imports_of(module: str, text: str, known: Iterable[str], package: bool = False) -> Iterator[Import]:
    """Every import of the package's own modules in a module's text. `package`: it is an __init__.py."""
    known = set(known)
    here = module if package else module.rpartition(".")[0]

    def named(base: str, name: str) -> str:
        inside = f"{base}.{name}".lstrip(".")
        return inside if inside in known else base

    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "flashtile":
                    yield Import(module, rest, when)
        elif isinstance(node, ast.ImportFrom):
            first, _, rest = (node.module or "").partition(".")
            if node.level:
                above = here.split(".")[: len(here.split(".")) - node.level + 1] if here else []
                base = ".".join([*above, *filter(None, [node.module])])
            elif first == "flashtile":
                base = rest
            else:
                return
            yield from (Import(module, named(base, alias.name), when) for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = IN_FUNCTION
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = FOR_CHECKERS
        for child in ast.iter_child_nodes(node):
            yield from visit(child, when)

    yield from visit(ast.parse(text), AT_IMPORT)


def sources(root: Path) -> Mapping[str, tuple[Path, bool]]:
    """The file of every module below a folder by its name there, and whether it is a package's."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = file, package
    return found


def read(root: Path) -> tuple[list[str], list[Import]]:
    """Every module below a folder, and every import between them."""
    files = sources(root)
    found = [
        x for module, (file, package) in files.items() for x in imports_of(module, file.read_text(), files, package)
    ]
    return list(files), found


def place_of(module: str, table: Mapping[str, Place]) -> str | None:
    """The place that names the module, or the nearest package above it."""
    owners = {name: place for place, row in table.items() for name in row.modules.split() or [""]}
    while module and module not in owners:
        module = module.rpartition(".")[0]
        if not module:
            return None  # the package itself is a place, and holds nothing but itself
    return owners.get(module)


def forbidden(imports: Iterable[Import], table: Mapping[str, Place]) -> list[str]:
    """The arrows that the table does not allow, in words."""
    wrong = []
    for x in imports:
        source, target = place_of(x.source, table), place_of(x.target, table)
        if source is None or target is None:
            wrong.append(f"{x.source} -> {x.target}: no place holds {x.source if source is None else x.target}")
        elif source != target and target not in table[source].imports.split():
            wrong.append(f"{x.source} -> {x.target} ({x.when}): {source} may not import {target}")
    return sorted(set(wrong))


def unused(imports: Iterable[Import], table: Mapping[str, Place]) -> list[str]:
    """The arrows that the table allows and nobody needs."""
    there = {(place_of(x.source, table), place_of(x.target, table)) for x in imports}
    return [f"{a} -> {b}" for a, row in table.items() for b in row.imports.split() if (a, b) not in there]


def circles(imports: Iterable[Import]) -> list[set[str]]:
    """Sets of modules that import each other in a circle, imports in functions left out."""
    after: dict[str, set[str]] = {}
    for x in imports:
        if x.when != IN_FUNCTION and x.source != x.target:
            after.setdefault(x.source, set()).add(x.target)
    reach = {module: _reached(module, after) for module in after}
    found: list[set[str]] = []
    for module, seen in reach.items():
        together = {other for other in seen if module in reach.get(other, ())}
        if together and together not in found:
            found.append(together)
    return found


def _reached(start: str, after: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    stack = [*after.get(start, ())]
    while stack:
        module = stack.pop()
        if module not in seen:
            seen.add(module)
            stack += after.get(module, ())
    return seen


def test_every_import_is_an_arrow_of_the_table() -> None:
    modules, imports = read(ROOT)
    assert len(modules) > 100 and len(imports) > 400, "the sources were found"
    assert [m for m in modules if place_of(m, TABLE) is None] == []
    assert forbidden(imports, TABLE) == []


def test_every_arrow_of_the_table_is_needed() -> None:
    assert unused(read(ROOT)[1], TABLE) == []


def test_arrows_of_the_table_run_down() -> None:
    order = list(TABLE)
    for place, row in TABLE.items():
        for other in row.imports.split():
            assert order.index(other) < order.index(place), f"{place} -> {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(read(ROOT)[1]) == []


def write(root: Path, files: Mapping[str, str]) -> tuple[list[str], list[Import]]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read(root)


LOW_AND_HIGH = {"low": Place("low"), "high": Place("high high2", "low"), "package": Place("", "high")}


@pytest.mark.parametrize(
    "line",
    [
        "import flashtile.high",
        "from flashtile.high import x",
        "from flashtile import high",
        "from ..high import x",
        "from .. import high",
        "def f():\n    from flashtile import high",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flashtile.high.inner import X",
        "class C:\n    def m(self):\n        return lambda: __import__\n    import flashtile.high as above",
    ],
)
def test_an_arrow_that_runs_up_is_found(tmp_path: Path, line: str) -> None:
    """However it is spelled and wherever it stands."""
    files = {"__init__.py": "", "low/__init__.py": "", "low/a.py": line, "high/__init__.py": "", "high/inner.py": ""}
    _, imports = write(tmp_path, files)
    (found,) = forbidden(imports, LOW_AND_HIGH)
    assert found.startswith("low.a -> high") and found.endswith("low may not import high")


def test_what_the_table_allows_is_not_reported(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from flashtile.high import x",
        "low/__init__.py": "from .a import y",
        "low/a.py": "import ast\nfrom os import path",
        "high/__init__.py": "from flashtile.low import a\nfrom . import inner",
        "high/inner.py": "def f():\n    from ..low.a import y",
    }
    modules, imports = write(tmp_path, files)
    assert modules == ["", "high", "high.inner", "low", "low.a"]
    assert {(x.source, x.target) for x in imports} == {
        ("", "high"),
        ("low", "low.a"),
        ("high", "low.a"),
        ("high", "high.inner"),
        ("high.inner", "low.a"),
    }
    assert forbidden(imports, LOW_AND_HIGH) == [] and circles(imports) == []


def test_a_module_without_a_place_is_found(tmp_path: Path) -> None:
    _, imports = write(tmp_path, {"__init__.py": "", "new.py": "from flashtile import low", "low.py": ""})
    assert forbidden(imports, LOW_AND_HIGH) == ["new -> low: no place holds new"]
    assert place_of("new", LOW_AND_HIGH) is None and place_of("high.x.y", LOW_AND_HIGH) == "high"


def test_circles_are_found_and_lazy_imports_are_none(tmp_path: Path) -> None:
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .{} import X\n"
    files = {
        "a.py": "from . import b",
        "b.py": checked.format("c"),
        "c.py": "import flashtile.a",
        "d.py": "from . import a",
        "e.py": "def f():\n    from . import f",
        "f.py": "from . import e",
    }
    _, imports = write(tmp_path, files)
    assert circles(imports) == [{"a", "b", "c"}]


def test_an_arrow_that_nobody_needs_is_found(tmp_path: Path) -> None:
    _, imports = write(tmp_path, {"__init__.py": "", "high.py": "", "low.py": ""})
    assert unused(imports, LOW_AND_HIGH) == ["high -> low", "package -> high"]
