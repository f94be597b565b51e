"""A line in short: the quick way and the whole parse say the same, whatever the line holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report import runs
from thyme.report.rollout_summary import LONGEST_TEXT, mismatch_of, summarize, token_mismatches
from thyme.rollout.records import write_rollouts


@pytest.fixture
def lines(tmp_path: Path) -> list[bytes]:
    return runs.write_step(tmp_path, 0, runs.group_of_four(), shifts=[0.0, 1.0, 0.5, 0.0]).read_bytes().splitlines()


def test_the_quick_way_says_what_a_whole_parse_says(lines: list[bytes]) -> None:
    for line in lines:
        spaced = json.dumps(json.loads(line)).encode()  # with blanks behind commas, which the quick way does not take
        assert summarize(line) == summarize(spaced)
    first, second, third, _ = map(summarize, lines)
    assert (first.right, first.codes, first.failed, first.pictures) == (True, 1, 0, 1)
    assert (second.right, second.failed, second.answer, second.total) == (False, 1, "3", 0.0)
    assert (third.status, third.answer, third.rounds) == ("repetition", None, 1)
    assert first.tokens == sum(json.loads(lines[0])["tokens"]["sampled"]) > 50


def test_text_that_spells_the_border_changes_nothing(tmp_path: Path) -> None:
    spelled = '","tokens":{"sampled":[1,1,1]},"rewards":{"total":9.0}}'
    asked = runs.question("q", None, spelled)
    asked.meta["tokens"] = {"sampled": [1]}
    made = runs.rollout(asked, [runs.failed(spelled), runs.said(spelled)], spelled)
    path = tmp_path / "rollouts" / "step_0.jsonl"
    write_rollouts(path, [made], [{"total": 0.5, "error": spelled}])
    found = summarize(path.read_bytes())
    assert (found.tokens, found.total, found.rounds, found.failed) == (made.num_sampled, 0.5, 2, 1)


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b"7", b'{"question": {}}', b'{"question": 1, "turns": []}', b"\xff"]
)
def test_what_is_no_rollout_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        summarize(line)


def test_a_row_of_an_older_version_has_a_summary(lines: list[bytes]) -> None:
    row = json.loads(lines[0])
    for name in ("rewards", "tokens", "seed", "index"):
        del row[name]
    del row["question"]["scenario"]
    found = summarize(json.dumps(row).encode())
    assert (found.right, found.total, found.tokens, found.mismatch, found.index) == (None, None, 0, None, 0)


def test_the_mismatch_is_the_divergence_of_the_loss(lines: list[bytes]) -> None:
    """Of a shift d at every token: exp(d) - d - 1, also where a token was greedy."""
    assert [summarize(line).mismatch for line in lines] == pytest.approx([0, 0.718281828, 0.148721271, 0], abs=1e-6)
    tokens = json.loads(lines[1])["tokens"]
    found = token_mismatches(tokens)
    assert len(found) == len(tokens["token_ids"])
    assert all((value is None) == (not drawn) for value, drawn in zip(found, tokens["sampled"], strict=True))
    assert {round(value, 4) for value in found if value is not None} == {1.0}
    tokens["trainer_logprobs"] = tokens["trainer_logprobs"][1:]  # of another length: of no use
    assert token_mismatches(tokens) == [] and mismatch_of(tokens) is None and mismatch_of(None) is None


def test_long_text_is_cut_and_numbers_that_are_none_are_left_out(lines: list[bytes]) -> None:
    row: dict[str, Any] = json.loads(lines[0])
    row["question"]["question"] = "word " * 200
    row["rewards"]["total"] = float("nan")
    found = summarize(json.dumps(row).encode())
    assert len(found.question) == LONGEST_TEXT and found.total is None and found.right is True


def test_columns_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 columns for 4 rollouts"):
        write_rollouts(tmp_path / "rollouts" / "a.jsonl", runs.group_of_four(), columns=[{}])
