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
html_static_path = ["_static"]
html_css_files = ["width.css"]
html_title = f"flashtile {release}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"

default_role = "code"
smartquotes = False

HEADING = re.compile(r"(Shapes|Units|Options|Returns|Numerics|Memory|Threads|Errors|Raises|Source):\s+(?=\S)")
OPTION = re.compile(r"(\w+(?:, \w+)*) +(.*)")


def headings_to_fields(app, what, name, obj, options, lines):
    """Make the headings of our docstrings (see CONTRIBUTING.md) a list of fields, and Options a list in its own."""
    result: list[str] = []
    column = 0  # at which the text of the current field began; 0 outside of fields
    listed = False  # the field is Options
    for line in lines:
        if heading := HEADING.match(line):
            if not column and result and result[-1]:
                result.append("")
            column, listed = heading.end(), heading[1] == "Options"
            result.append(f":{heading[1]}:")
            line = " " * column + line[column:]
        if not line.startswith(" "):
            column = 0
            result.append(line)
        elif listed and line[column : column + 1].strip() and (option := OPTION.match(line[column:])):
            result.append(f"  * `{option[1]}` {option[2]}")
        else:
            result.append((" " * (4 if listed else 2) + line.strip()) if column else line)
    lines[:] = result


def setup(app):
    app.connect("autodoc-process-docstring", headings_to_fields)
