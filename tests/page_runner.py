"""The Python examples of a Markdown page; as a program, run in a process of its own, which imports little."""

from __future__ import annotations

import doctest
import pathlib
import re
import sys

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> str:
    """The Python blocks of a Markdown page, one after another, each line on its own line number."""
    lines = [""] * text.count("\n")
    for block in PYTHON_BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for offset, line in enumerate(block[1].splitlines()):
            lines[first + offset] = line
    return "\n".join(lines) + "\n"


def run_page(text: str, name: str, path: str) -> doctest.TestResults:
    """Run the examples of one page in one namespace; failures are printed."""
    test = doctest.DocTestParser().get_doctest(python_blocks(text), {}, name, path, 0)
    return doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test)


if __name__ == "__main__":
    own = pathlib.Path(sys.argv[1])
    ran = run_page(own.read_text(), own.name, str(own))
    sys.exit(ran.failed > 0 or not ran.attempted)
