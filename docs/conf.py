"""Sphinx configuration; the site builds with warnings as errors."""

from __future__ import annotations

import importlib.metadata
import re

project = "flashtile"
author = "The flashtile maintainers"
project_copyright = "The flashtile maintainers, Apache-2.0"
release = importlib.metadata.version("flashtile")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"flashtile {release}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"

# The headings of our docstrings (see CONTRIBUTING.md) become a list of fields, so that each stands on its own line.
HEADING = re.compile(r"^(Shapes|Units|Numerics|Errors|Raises|Source|Memory|Threads):\s*(?=\S)")


def docstring_headings_to_fields(app, what, name, obj, options, lines):
    lines[:] = [HEADING.sub(r":\1: ", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", docstring_headings_to_fields)
