"""Names that are no UTF-8, and texts that a terminal's encoding lacks, end no command."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.rows import thyme_sft
from thyme.any_text import printable
from thyme.result import Result

NAME = os.fsdecode(b"caf\xe9")


def thyme(*args: str | Path, **environment: str) -> tuple[int, bytes, bytes]:
    command = [sys.executable, "-m", "thyme", *map(str, args)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def test_bytes_go_out_as_they_came_and_the_rest_as_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "latin-1")
    printable(stream)
    stream.write(f"{NAME} \u00e9 \u7ea2 \ud83d")
    stream.flush()
    assert raw.getvalue() == b"caf\xe9 \xe9 \\u7ea2 \\ud83d"
    printable(io.StringIO())  # has no encoding


def test_json_has_the_escape() -> None:
    assert json.loads(Result({"path": Path(NAME)}).to_json().encode()) == {"path": NAME}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_verb_on_a_file_whose_name_is_no_text(encoding: str, tmp_path: Path) -> None:
    rows = tmp_path / f"{NAME}.jsonl"
    rows.write_text(json.dumps(thyme_sft(0)) + "\n" + json.dumps({"question": "\u7ea2"}) + "\n")
    code, out, err = thyme("data", "check", rows, PYTHONIOENCODING=encoding)
    assert code == 2 and b"caf\xe9.jsonl" in out and b"Traceback" not in err, (out, err)
    code, out, err = thyme("data", "check", rows, "--json", PYTHONIOENCODING=encoding)
    assert code == 2 and json.loads(out) and b"Traceback" not in err, (out, err)
