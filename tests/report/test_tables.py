"""table.md as a page reads it: what an evaluation wrote, cell by cell."""

from pathlib import Path

from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.known import benchmark
from thyme.evals.benchmarks.report import summarize, table
from thyme.evals.benchmarks.scorers import Scored
from thyme.report.tables import read_tables


def test_what_an_evaluation_writes_is_read(tmp_path: Path) -> None:
    items = [
        Item(
            index=str(i), question="?", options={"A": "a", "B": "b"}, answer="A", category="relative_position", more={}
        )
        for i in range(4)
    ]
    score = summarize(benchmark("V*"), items, [Scored(float(i > 0), "A") for i in range(4)])
    path = tmp_path / "table.md"
    path.write_text(table([score]) + "\nunder\ncontrols:\n\nof it:\n| | n |\n| --- | --- |\n| tools | 4 |\n| | |\n")
    scores, text, more, controls = read_tables(path)
    assert scores["head"] == ["Benchmark", "", "n", "score", "95 %", "Thyme-7B", "Qwen2.5-VL-7B"]
    assert scores["rows"][0][:4] == ["VStarBench", "Overall", "4", "75.0"] and scores["rows"][0][5:] == ["82.2", "76.4"]
    assert text == {"text": "under controls:"} and more == {"text": "of it:"}
    assert controls == {"head": ["", "n"], "rows": [["tools", "4"], ["", ""]]}


def test_rows_of_another_length_and_no_file_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    assert read_tables(path) == []
    path.write_bytes(b"| a | b |\n| --- | --- |\n| 1 |\n| 1 | 2 | 3 |\n\xff\n| c |")
    first, text, last = read_tables(path)
    assert (
        first["rows"] == [["1", ""], ["1", "2"]] and text == {"text": "\ufffd"} and last == {"head": ["c"], "rows": []}
    )
