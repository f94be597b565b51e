"""What `thyme data synth` writes and what `thyme data check` finds in it, or in damaged copies of it."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from thyme.data.check import check_file
from thyme.data.tags import tag_problems
from thyme.rollout.prompts import SYSTEM_PROMPT, text_prompt, user_prompt
from thyme.toy.config import SCENARIOS, Mix, ToyConfig
from thyme.toy.scenarios import demonstrations, questions
from thyme.toy.writer import write_synthetic

CONFIG = ToyConfig(seed=1, mix=Mix(**dict.fromkeys(SCENARIOS, 1.0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    written = write_synthetic(folder, CONFIG, sft=12, rl=6, heldout=3)
    assert {path.name: rows for path, rows in written.items()} == {"sft.jsonl": 12, "rl.jsonl": 6, "heldout.jsonl": 3}
    return folder


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _image(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_sft_rows_hold_the_demonstrations(folder: Path) -> None:
    rows = demonstrations(1, 12, CONFIG.mix, no_code=CONFIG.no_code, box_noise=CONFIG.box_noise)
    for row, record in zip(rows, _rows(folder / "sft.jsonl"), strict=True):
        assert set(record) == {"image", "question", "response"}
        assert record["response"] == row.response
        assert [_image(encoded).tobytes() for encoded in record["image"]] == [image.tobytes() for image in row.images]
        question = row.question
        if question.image is None:
            assert record["question"] == text_prompt(question.question)
        else:
            assert record["question"] == user_prompt(question.question, question.image_path, question.image.size)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rl_rows_hold_the_questions(folder: Path, split: Any) -> None:
    records = _rows(folder / ("rl.jsonl" if split == "train" else "heldout.jsonl"))
    for question, record in zip(questions(1, len(records), CONFIG.mix, split), records, strict=True):
        assert set(record) == {"messages", "images", "solution", "question"}
        assert (record["question"], record["solution"]) == (question.question, question.solution)
        assert record["messages"][0] == {"role": "system", "content": SYSTEM_PROMPT}
        assert len(record["images"]) == (question.image is not None)


def test_the_same_config_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path, CONFIG, heldout=3)
    assert (tmp_path / "heldout.jsonl").read_bytes() == (folder / "heldout.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["heldout.jsonl"]


@pytest.mark.parametrize("counts", [{}, {"sft": -1}])
def test_bad_counts_are_named(counts: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows to write"):
        write_synthetic(tmp_path, CONFIG, **counts)


@pytest.mark.parametrize("name", ["sft", "rl", "heldout"])
def test_what_is_written_passes_the_check(folder: Path, name: str) -> None:
    report = check_file(folder / f"{name}.jsonl")
    assert report.problems == () and report.bad_rows == 0
    assert (report.sft_rows > 0) == (name == "sft") and report.images > 0


def _drop_image(row: dict[str, Any]) -> None:
    row["image"].pop()


def _spoil_image(row: dict[str, Any]) -> None:
    row["image"][0] = row["image"][0][:200]


def _no_base64(row: dict[str, Any]) -> None:
    row["image"][0] = "/data/picture.png"


def _replace(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def damage(row: dict[str, Any]) -> None:
        row["response"] = row["response"].replace(old, new, 1)

    return damage


def _remove_response(row: dict[str, Any]) -> None:
    row["response"] = " "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_image, "2 <image> in the text, 1 in image"),
        (_spoil_image, "image 0 cannot be read"),
        (_no_base64, "image 0 cannot be read"),
        (_replace("</code>", ""), "<code> is never closed"),
        (_replace("<code>", ""), "</code> at character"),
        (_replace("<code>", "<code><code>"), "opens inside <code>"),
        (_replace("</sandbox_output>", ""), "<sandbox_output> is never closed"),
        (_replace("</think>", ""), "<think> is never closed"),
        (_replace("<answer>", "<answr>"), "no <answer>"),
        (_remove_response, "response must be text"),
    ],
)
def test_a_damaged_sft_row_is_named(damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    write_synthetic(folder, ToyConfig(mix=Mix(**{**dict.fromkeys(SCENARIOS, 0.0), "rotate": 1.0})), sft=2)
    good, bad = _rows(folder / "sft.jsonl")
    damage(bad)
    (folder / "sft.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n")
    report = check_file(folder / "sft.jsonl")
    assert {problem.row for problem in report.problems} == {3} and report.bad_rows == 1
    assert any(message in problem.message for problem in report.problems)
    assert str(report.problems[0]).startswith(f"{folder / 'sft.jsonl'}: row 3: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "respo', "not JSON"),
        ("[1]", "a int, not an object"),
        ('{"messages": [], "question": "q", "solution": ""}', "solution must be text"),
        ('{"messages": [], "question": "q", "solution": "s"}', "one user turn, found 0"),
        ('{"messages": "hi", "question": "q", "solution": "s"}', "messages must be a list"),
        (
            '{"messages": [{"role": "user", "content": "<image>q"}], "question": "q", "solution": "s"}',
            "1 <image> in the text, 0 in images",
        ),
        (
            '{"messages": [{"role": "user", "content": "q"}], "images": "x", "question": "q", "solution": "s"}',
            "images must be a list",
        ),
    ],
)
def test_a_damaged_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    assert any(problem.row == 1 and message in problem.message for problem in check_file(path).problems)


def test_tags_of_different_kinds_may_nest() -> None:
    assert not list(
        tag_problems("<think>a<code>b</code><sandbox_output>c</sandbox_output></think>\n<answer>d</answer>")
    )


def test_a_missing_or_empty_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        check_file(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        check_file(tmp_path / "empty.jsonl")
