"""Whether two answers say the same: a table of answers with their kinds."""

import json
from pathlib import Path
from typing import Any

import pytest

from thyme.rewards import result

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row['kind'].replace(' ', '_')}" for i, row in enumerate(ROWS)])
def test_answer(row: dict[str, Any]) -> None:
    assert result(row["answer"], row["solution"], row["question"]) == float(row["right"])
