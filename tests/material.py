"""Real material that is not part of the repository: where it lies, and what it holds."""

import json
import os
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("THYME_DATA", Path(__file__).parents[2] / "shared" / "data"))
MISSING = f"no published traces in {DATA}: set THYME_DATA to the folder that holds published_traces/"


def published_cases() -> dict[str, dict[str, Any]]:
    """Cases that the authors of Thyme published, by the path of their folder; none where they are not at hand."""
    files = sorted(DATA.glob("published_traces/case*/case.json"))
    return {str(file.parent): json.loads(file.read_text("utf-8")) for file in files}
