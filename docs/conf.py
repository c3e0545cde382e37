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

default_role = "code"

HEADING = re.compile(r"(Shapes|Units|Options|Returns|Numerics|Memory|Threads|Errors|Raises|Source):\s+(?=\S)")


def headings_to_fields(app, what, name, obj, options, lines):
    """Make the headings of our docstrings (see CONTRIBUTING.md) a list of fields, each on a line of its own.

    What hangs below a heading keeps its lines where they are a table, as in Options, and flows elsewhere.
    """
    result: list[str] = []
    table: int | None = None  # the column at which the lines of a table begin
    for line in lines:
        if heading := HEADING.match(line):
            table = heading.end() if heading[1] == "Options" else None
            first = line[heading.end() :]
            if result and result[-1] and not result[-1].startswith((":", " ")):
                result.append("")
            result += [f":{heading[1]}:", *(["  ::", "", f"    {first}"] if table else [f"  {first}"])]
        elif table and line.startswith(" " * table):
            result.append(" " * 4 + line[table:])
        else:
            in_field = line.startswith(" ") and result and result[-1].startswith("  ") and not table
            result.append(f"  {line.strip()}" if in_field else line)
    lines[:] = result


def setup(app):
    app.connect("autodoc-process-docstring", headings_to_fields)
