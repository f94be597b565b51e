"""Tables of an evaluation as a page shows them: table.md, which `thyme eval` writes, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_tables(path: Path) -> list[dict[str, Any]]:
    """What a file of Markdown tables and lines between them holds, in order.

    Returns:
        {"head", "rows"} for a table, its cells text, each row as long as its head; {"text"} for a line. Empty where
        there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    in_table = False
    for line in lines:
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if not line.startswith("|"):
            found += [{"text": line}] if line.strip() else []
        elif not in_table:
            found.append({"head": cells, "rows": []})
        elif set("".join(cells)) != {"-"}:
            table = found[-1]
            table["rows"].append((cells + [""] * len(table["head"]))[: len(table["head"])])
        in_table = line.startswith("|")
    return found
