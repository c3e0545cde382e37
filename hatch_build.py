"""Hatchling's hook for the page that an index shows: README.md, with links that hold where it stands alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# [text](path) and ![text](path), unless the path is an address or a heading of the page.
RELATIVE = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)]+)\)")


def page(readme: str, source: str | None) -> str:
    """The README for an index. Relative links lead to `source`, the project's address on GitHub or a host with paths
    like its; while there is none, a link is its text and the path in the sources, and pictures are left out."""

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        if source is None:
            return "" if picture else f"{text} (`{path}`)"
        return f"{picture}[{text}]({source}/{'raw' if picture else 'blob'}/HEAD/{path})"

    return RELATIVE.sub(absolute, readme)


class IndexPage(MetadataHookInterface):
    """Makes `readme` of the metadata; the address is Source under [project.urls]."""

    def update(self, metadata: dict[str, Any]) -> None:
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = page(readme, metadata.get("urls", {}).get("Source"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
