"""The documents as data: their sections, the examples in them and the fields that their tables list.

The examples' convention: in each section (`##`), the Python blocks are one program and the bash blocks one script. The
Python blocks of the section "Setup" come first in every program. Both run in a folder with an image `input.png` and the
repository's `docs`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

LANGUAGES = ("python", "bash")

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_ROW = re.compile(r"^\| (`.+?) \|", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    title: str
    text: str

    def blocks(self, language: str) -> list[str]:
        return [code for found, code in _BLOCK.findall(self.text) if found == language]

    def program(self, language: str) -> str:
        return "\n".join(self.blocks(language))

    @property
    def fields(self) -> set[str]:
        """The names in the first column of the section's tables."""
        return {name for cell in _ROW.findall(self.text) for name in re.findall(r"`(\w+)`", cell)}


def sections(document: str) -> dict[str, Section]:
    """The `##` sections of a document of the repository, by title without its backticks."""
    _, *parts = _HEADING.split((REPOSITORY / document).read_text())
    titles = [title.replace("`", "") for title in parts[::2]]
    return {title: Section(title, text) for title, text in zip(titles, parts[1::2], strict=True)}
