"""What dir() of the package's modules offers: what the API page describes, and nothing else."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

DOCS = Path(__file__).parents[1] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
MODULES = sorted({found for found in re.findall(r"\bflashtile\.[a-z_]+", API) if find_spec(found)})
DIRECTIVE = re.compile(r"\.\. (?:auto(?:function|class)|py:data):: (\S+(?:\n {13}\S+)*)")


def documented(module: str) -> set[str]:
    """The names of a module that a page describes, with its whole path or under the page's current module."""
    names: set[str] = set()
    for page in DOCS.glob("*.md"):
        parts = re.split(r"\.\. currentmodule:: (\S+)", page.read_text(encoding="utf-8"))
        for current, text in zip(["", *parts[1::2]], parts[::2], strict=True):
            for *path, name in (n.split(".") for found in DIRECTIVE.findall(text) for n in found.split()):
                names |= {name} if (".".join(path) or current) == module else set()
            if found := re.search(rf"\.\. automodule:: {re.escape(module)}\n   :members: (.*)", text):
                names |= set(re.findall(r"\w+", found[1]))
    return names


def test_the_page_names_the_doors() -> None:
    doors = {"torch", "jax", "onnx", "starpu", "starpu_mpi", "nntile", "flash_attn", "transformers", "score", "testing"}
    assert {f"flashtile.{name}" for name in doors} < set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_lists_what_is_documented(name: str) -> None:
    """dir() offers what docs/api.md describes, and nothing that a module only uses."""
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        pytest.skip(str(e))
    assert set(dir(module)) == set(module.__all__) == documented(name)
    assert all(hasattr(module, public) for public in module.__all__)
