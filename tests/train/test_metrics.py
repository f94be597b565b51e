"""metrics.jsonl: always strict JSON, and a resumed stage rewrites its own lines only."""

import json
from pathlib import Path

from thyme.train.metrics import MetricsLog


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_and_non_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, "sft")
    returned = log.log(0, {"loss": 1.5, "bad": float("nan"), "worse": float("inf")})
    log.close()
    (line,) = lines(path)
    assert line["stage"] == "sft" and line["step"] == 0 and line["loss"] == 1.5
    assert line["bad"] is None and line["worse"] is None
    assert returned["time/wall_s"] == line["time/wall_s"] >= 0


def test_a_resumed_stage_rewrites_what_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for stage, steps in (("base", 3), ("sft", 4)):
        log = MetricsLog(path, stage)
        for step in range(steps):
            log.log(step, {"try": 1})
        log.close()
    with path.open("a") as file:
        file.write('{"stage": "sft", "st')  # killed while writing
    log = MetricsLog(path, "sft", first_step=2)
    log.log(2, {"try": 2})
    log.close()
    assert [(line["stage"], line["step"], line["try"]) for line in lines(path)] == [
        ("base", 0, 1),
        ("base", 1, 1),
        ("base", 2, 1),
        ("sft", 0, 1),
        ("sft", 1, 1),
        ("sft", 2, 2),
    ]


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    assert MetricsLog(None, "sft").log(3, {"loss": 1.0})["step"] == 3
    assert not list(tmp_path.iterdir())
