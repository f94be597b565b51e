"""Tables of an evaluation as a page shows them: table.md, which `thyme eval` writes, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_tables(path: Path) -> list[dict[str, Any]]:
    """What a file of Markdown tables and text between them holds, in order.

    Returns:
        {"head", "rows"} for a table, its cells text, each row as long as its head; {"text"} for a paragraph. Empty
        where there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    before = ""
    for line in lines:
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if not line.startswith("|"):
            if line.strip() and before.strip() and "text" in found[-1]:
                found[-1]["text"] += f" {line}"  # of one paragraph
            elif line.strip():
                found.append({"text": line})
        elif not before.startswith("|"):
            found.append({"head": cells, "rows": []})
        elif set("".join(cells)) != {"-"}:
            table = found[-1]
            table["rows"].append((cells + [""] * len(table["head"]))[: len(table["head"])])
        before = line
    return found
