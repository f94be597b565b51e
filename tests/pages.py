"""Markdown pages as a reader follows them: their fenced blocks, and the commands in these."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LANGUAGES = {"sh", "python", "toml", "json", "text"}
"""What a block of a page may be: run (sh, python), read as a recipe, read, or output that is only shown."""


@dataclass(frozen=True)
class Command:
    """One command of a page, as it stands there; continued lines are joined."""

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def is_plain(self) -> bool:
        """No shell is needed to understand it."""
        return not re.search(r"[|&;<>$`*]", re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", self.text))


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        needs: what the reader must have for it ("a GPU", "hours"), by its first line `# needs ...`; such a block is not
            run. None: it needs nothing that a test does not have.
        saved_as: the file that its first line `# NAME` names, which later commands of the page read.
    """

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def needs(self) -> str | None:
        found = re.match(r"# needs (.+)", self.text)
        return found[1] if found else None

    @property
    def saved_as(self) -> str | None:
        found = re.match(r"# ([\w/]+\.\w+)$", self.text.partition("\n")[0])
        return found[1] if found else None

    def commands(self) -> Iterator[Command]:
        line = self.line
        for text in re.split(r"(?<!\\)\n", self.text):
            line += 1
            if text.strip() and not text.lstrip().startswith("#"):
                yield Command(f"{self.page.name}:{line}", text.replace("\\\n", " "))
            line += text.count("\n")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        text = "\n".join(lines[start : number - 1])
        found.append(Block(page, start, lines[start - 1].strip().removeprefix("```"), text))
        start = None
    assert start is None, f"{page.name}:{start}: a block that does not end"
    return found
