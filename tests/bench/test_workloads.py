"""The six workloads: that they ask what they say, on the toy, and that their figures are there."""

import json
from pathlib import Path

import product
import pytest
import workloads

from thyme.engine.step_cost import Ceilings
from thyme.toy.model import tiny_config, tiny_processor


def test_the_first_workload_is_nano_vllms() -> None:
    """Its script's seed gives these sums."""
    requests = workloads.nano_requests(256)
    assert (sum(len(prompt) for prompt, _ in requests), sum(out for _, out in requests)) == (142_827, 133_966)


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "SHAPES", {"toy": tiny_config()})
    monkeypatch.setattr(product, "processor", tiny_processor)
    monkeypatch.setattr(workloads, "_measured", [Ceilings(1e10, 1e11)])


@pytest.mark.usefixtures("_toy")
def test_turns_come_back_after_their_tools() -> None:
    (row,) = workloads.main(["--model", "toy", "--scale", "64", "--work", "W4"])
    drawn = row["out_tok_per_s"] * row["seconds"]
    assert row["ended"] == {"length": 4} and drawn == pytest.approx(4 * (300 // 64))


@pytest.mark.soak
@pytest.mark.usefixtures("_toy")
def test_every_workload_runs_and_draws_what_it_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    args = ("--model", "toy", "--scale", "64", "--json", str(out), "--work", *workloads.WORKS)
    rows = workloads.main(list(args))
    by_work = {row["work"]: row for row in rows}
    assert list(by_work)[:5] == ["W1", "W2", "W3", "W4", "W5"] and len(rows) == 5 + 8
    assert by_work["W1"]["ended"] == {"length": 4} and by_work["W4"]["ended"] == {"length": 4}
    for work in ("W2", "W3"):  # a group is computed once
        assert by_work[work]["ended"] == {"length": 8} and by_work[work]["prefilled_of_unique"] == 1.0
    asked = sum(max(1, out // 64) for _, out in workloads.nano_requests(256)[:4])
    assert round(by_work["W1"]["out_tok_per_s"] * by_work["W1"]["seconds"]) == asked
    assert all(row["of_roof"] > 0 and row["p50_ms"] <= row["p99_ms"] and row["peak_blocks"] > 0 for row in rows)
    assert all(row["host_us"] <= row["idle_us"] for row in rows)
    assert json.loads(out.read_text())["rows"] == rows
    assert "| W6 4 x 62 |" in capsys.readouterr().out


def test_pictures_are_refused_where_a_model_sees_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        workloads.main(["--model", "qwen3-0.6b", "--work", "W3"])
    assert "W3 shows pictures, and qwen3-0.6b sees none" in capsys.readouterr().err
