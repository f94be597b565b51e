"""Training on own files as a user does it: shards of the released layout, with a bad row in the middle of an epoch."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import SECOND, b64, thyme_rl, thyme_sft
from thyme.cli import main

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SFT = ("--sft.steps", "4", "--sft.batch-size", "3", "--threads", "1")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _shards(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"train-0000{shard}-of-00002.parquet", row_group_size=2)
    return folder


def _losses(name: str) -> list[float]:
    lines = Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_sft_on_two_shards_is_the_same_with_and_without_rows_prepared_ahead(
    hub_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [thyme_sft(i) for i in range(8)]
    rows[2]["response"] = rows[2]["response"].replace("</think>", "")
    rows[5]["image"] = ["QUJD", b64(SECOND)]
    folder = _shards(Path("set"), rows)
    for workers in (0, 1, 2):
        train = ("--data.train", str(folder), "--data.workers", str(workers), "--name", f"w{workers}")
        main(["sft", "--model", str(hub_folder), *SFT, *train])
    assert _losses("w0") == _losses("w1") == _losses("w2") and len(_losses("w0")) == 4
    err = capsys.readouterr().err
    assert "data.train: 7 rows of 2 files; left out 1: 1 tags (" in err
    assert err.count("data.train: 7 rows of 2 files; left out 2: 1 ") == 3 and "row 2: image 0 cannot be read" in err


def test_rollouts_of_questions_in_parquet(hub_folder: Path) -> None:
    folder = _shards(Path("set"), [thyme_rl(i) for i in range(4)])
    small = ("--engine.num-blocks", "200", "--engine.max-sequences", "4", "--engine.max-context", "1400")
    limits = ("--rollout.max-tokens", "4", "--rollout.group-size", "1", "--sandbox.workers", "1")
    main(["rollout", "--model", str(hub_folder), "--data.train", str(folder), "--count", "3", *small, *limits])
    lines = Path("runs/rollout/rollouts/step_0.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    assert len(questions) == 3 and {question["scenario"] for question in questions} == {"train"}
    assert all(question["image_path"].startswith("/mnt/data/sign_") for question in questions)


def test_unknown_rows_are_one_line(hub_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), "x.parquet")
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--model", str(hub_folder), "--data.train", "x.parquet"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "'text' are the keys of no layout" in err and err.count("\n") == 1
