"""Scores by hand: what counts as wrong, how sure a figure is, and what another run's difference is worth."""

import json
from collections.abc import Callable
from datetime import datetime, time
from decimal import Decimal
from math import comb
from pathlib import Path
from zipfile import ZipFile

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evals.benchmarks.published import ROWS, write_tsv
from thyme.evals.benchmarks import figures, scorers
from thyme.evals.benchmarks.item import Item, item_of
from thyme.evals.benchmarks.known import benchmark
from thyme.evals.benchmarks.predictions import read_predictions
from thyme.evals.benchmarks.report import mcnemar, score_predictions, shown_p, table
from thyme.evals.scoring import wilson


def items(name: str) -> list[Item]:
    return [item_of(row) for row in ROWS[name]]


def test_what_is_missing_and_what_is_not_understood_is_wrong_and_counted() -> None:
    score, scored = score_predictions(benchmark("V*"), items("VStarBench"), {"0": "A"})
    assert (score.overall, score.missing, score.unparsed, score.n) == (50.0, 1, 0, 2)
    assert score.splits == {"Attribute": 100.0, "Spatial": 0.0} and [one.value for one in scored] == [1.0, 0.0]
    score, _ = score_predictions(benchmark("V*"), items("VStarBench"), {"0": "A", "1": "I do not know at all, really"})
    assert (score.overall, score.missing, score.unparsed) == (50.0, 0, 1)


def test_predictions_of_another_file_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predictions are for indices that VStarBench does not have, such as '17'"):
        score_predictions(benchmark("V*"), items("VStarBench"), {"0": "A", "17": "B"})


def test_predictions_for_rows_that_are_not_scored_are_passed_over() -> None:
    one = items("VStarBench")[:1]
    said = {"0": "A", "1": "B", "17": "B"}
    score, _ = score_predictions(benchmark("V*"), one, said, others={"1"}, unread=1)
    assert (score.overall, score.n, score.missing) == (100.0, 1, 0)
    with pytest.raises(ValueError, match="2 predictions are for indices that VStarBench does not have, such as '1'"):
        score_predictions(benchmark("V*"), one, said, unread=1)


def test_an_empty_text_among_those_accepted_is_not_held_by_every_prediction() -> None:
    row = {"index": 0, "question": "?", "answer": "['', 'EXIT']"}
    assert [benchmark("OCRBench").score(item_of(row), said).value for said in ("exit", "door", "")] == [1.0, 0.0, 0.0]


def test_an_empty_prediction_is_never_right() -> None:
    for name in ("MME-RealWorld-Lite", "VStarBench", "HallusionBench", "OCRBench", "ChartQA_TEST", "MathVista_MINI"):
        known = benchmark(name)
        assert all(known.score(item, "").value == 0.0 for item in items(name))


@pytest.mark.parametrize(
    ("name", "index", "prediction", "right"),
    [
        ("OCRBench", 0, "The sign says stop\nsign.", True),
        ("OCRBench", 1, "x^2", True),
        ("OCRBench", 1, "X^2", False),
        ("OCRBench", 2, "a b c", False),
        ("ChartQA_TEST", 0, "104.9", True),
        ("ChartQA_TEST", 0, "106", False),
        ("MathVista_MINI", 0, "4", True),
        ("MathVista_MINI", 0, "B", True),
        ("MathVista_MINI", 0, "<answer>\\boxed{4}</answer>", True),
        ("MathVista_MINI", 0, "3", False),
        ("LogicVista", 0, "C, A", True),
        ("LogicVista", 0, "(A) and (C).", True),
        ("LogicVista", 0, "A", False),
        ("MME-RealWorld-Lite", 1, "The best answer is: (B) text B", True),
        ("HallusionBench", 0, "No, it is not.", True),
        ("HallusionBench", 0, "Yes and no", False),
    ],
)
def test_predictions_that_are_right_and_wrong(name: str, index: int, prediction: str, right: bool) -> None:
    assert benchmark(name).score(items(name)[index], prediction).value == float(right)


def test_figures_by_hand() -> None:
    hr = figures.cycles(items("HRBench4K"), [1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    assert hr == {"FSP": 25.0, "FCP": 50.0, "Overall": pytest.approx(500 / 12)}
    # Set 0: figure 0 right on both questions, figure 1 on one; set 1: all right.
    hallusion = figures.hallusion(items("HallusionBench"), [1, 1, 1, 0, 1, 1, 1, 1])
    assert hallusion == {"aAcc": 87.5, "fAcc": 75.0, "qAcc": 75.0, "Overall": pytest.approx(237.5 / 3)}
    asked = [item_of({"index": i, "question": f"{i // 2}?", "answer": "A"}) for i in range(6)]
    assert figures.pairs(asked, [1, 1, 1, 0, 0, 0])["Overall"] == pytest.approx(100 / 3)
    assert figures.pairs(asked[1:], [0, 1, 1, 0, 0])["Overall"] == 50.0  # what is left does not pair anew
    ocr = figures.ocr(items("OCRBench"), [1, 0, 1])
    assert ocr["Text Recognition"] == 100.0 and ocr["Overall"] == pytest.approx(200 / 3)
    assert figures.logic(items("LogicVista"), [1]) == {"inductive": 100.0, "spatial": 100.0, "Overall": 100.0}


def test_rows_of_another_layout_are_refused_by_figures_that_cannot_place_them() -> None:
    with pytest.raises(ValueError, match="HallusionBench: its rows are not of the published layout"):
        score_predictions(benchmark("HallusionBench"), items("VStarBench"), {})


def test_intervals_hold_the_figure_and_draw_questions_whole() -> None:
    rows = [row | {"index": i, "question": f"Question {i // 4}?"} for i, row in enumerate(ROWS["HRBench4K"] * 20)]
    many = [item_of(row) for row in rows]
    said = {item.index: item.answer if (int(item.index) // 4) % 3 else "not" for item in many}
    score, _ = score_predictions(benchmark("HRBench4K"), many, said)
    alone, _ = score_predictions(benchmark("mcq"), many, said)
    assert score.low < score.overall < score.high
    assert score.high - score.low > 1.5 * (alone.high - alone.low)  # four rows of a question are one draw


@pytest.mark.parametrize(("said", "overall"), [("A", 100.0), ("B", 0.0)])
def test_all_right_or_none_of_a_few_rows_is_no_certainty(said: str, overall: float) -> None:
    rows = [item_of({"index": i, "question": f"{i // 2}?", "A": "a", "B": "b", "answer": "A"}) for i in range(40)]
    for name, draws in (("mcq", 40), ("MMVP", 20)):  # MMVP's rows come in pairs
        score, _ = score_predictions(benchmark(name), rows, {item.index: said for item in rows})
        assert score.overall == overall
        assert (score.low, score.high) == pytest.approx([100 * end for end in wilson(overall / 100, draws)])
        assert score.high - score.low > 5


def test_mcnemar_is_the_exact_binomial() -> None:
    mine, theirs = [1.0] * 8 + [0.0] * 2 + [1.0] * 5, [0.0] * 8 + [1.0] * 2 + [1.0] * 5
    assert mcnemar(mine, theirs) == (8, 2, pytest.approx(2 * sum(comb(10, k) for k in range(3)) / 2**10))
    assert mcnemar([1.0], [1.0]) == (0, 0, 1.0)


def test_predictions_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"index": 3, "prediction": "A"}\n{"index": "x", "prediction": null, "more": 1}\n'
    )
    (tmp_path / "a.json").write_text(json.dumps([{"index": 3.0, "prediction": "A"}, {"index": "x", "prediction": ""}]))
    write_tsv(tmp_path / "a.tsv", [{"index": 3, "prediction": "A"}, {"index": "x", "prediction": ""}])
    book = openpyxl.Workbook()
    for row in (["index", "question", "prediction"], [3, "?", "A"], ["x", "?", None]):
        book.active.append(row)  # type: ignore[union-attr]
    book.save(tmp_path / "a.xlsx")
    for name in ("a.jsonl", "a.json", "a.tsv", "a.xlsx"):
        assert read_predictions(tmp_path / name) == {"3": "A", "x": ""}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"index": 1, "answer": "A"}\n', r"a\.jsonl, row 1: no 'prediction'"),
        ('{"prediction": "A"}\n', "row 1: no 'index'"),
        ('{"index": 1, "prediction": "A"}\n' * 2, "row 2: index 1 stands twice"),
        ("no json\n", "row 1: not JSON"),
        ("", "is empty"),
    ],
)
def test_predictions_that_cannot_be_read_name_file_and_row(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_predictions(tmp_path / "a.jsonl")


def test_cells_of_any_type_are_text(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    cells = [datetime(2020, 1, 2), time(1, 2), True, 3.5, "=A", None]
    for row in (["index", "prediction"], *enumerate(cells)):
        book.active.append(list(row))  # type: ignore[union-attr]
    book.save(tmp_path / "a.xlsx")
    texts = ["2020-01-02 00:00:00", "01:02:00", "True", "3.5", "", ""]
    assert list(read_predictions(tmp_path / "a.xlsx").values()) == texts
    rows = [{"index": Decimal(i), "prediction": said} for i, said in enumerate((b"A", "\xff".encode("latin-1")))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_predictions(tmp_path / "a.parquet") == {"0": "A", "1": "\ufffd"}


def test_a_sheet_is_read_whatever_size_it_states_and_named_where_it_is_damaged(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (["index", "prediction"], [3, "A"]):
        book.active.append(row)  # type: ignore[union-attr]
    book.save(tmp_path / "a.xlsx")

    def changed(name: str, change: Callable[[bytes], bytes]) -> Path:
        with ZipFile(tmp_path / "a.xlsx") as old, ZipFile(tmp_path / name, "w") as new:
            for part in old.namelist():
                data = old.read(part)
                new.writestr(part, change(data) if part.endswith("sheet1.xml") else data)
        return tmp_path / name

    small = changed("small.xlsx", lambda data: data.replace(b'ref="A1:B2"', b'ref="A1"'))
    assert b'ref="A1"' in ZipFile(small).read("xl/worksheets/sheet1.xml") and read_predictions(small) == {"3": "A"}
    with pytest.raises(ValueError, match=r"predictions .*cut\.xlsx: a damaged Excel table: ParseError"):
        read_predictions(changed("cut.xlsx", lambda data: data[: len(data) // 2]))


def test_a_table_has_the_papers_figures_beside_ours() -> None:
    score, _ = score_predictions(benchmark("V*"), items("VStarBench"), {"0": "A", "1": "A"})
    lines = table([score]).splitlines()
    assert lines[2].startswith("| VStarBench | Overall | 2 | 50.0 |") and lines[2].endswith("| 82.2 | 76.4 |")
    assert lines[3] == "|  | Attribute |  | 100.0 |  | 83.5 | 78.2 |"


def test_a_table_without_published_figures_has_no_columns_for_them() -> None:
    rows = items("VStarBench")
    score, _ = score_predictions(benchmark("mcq"), rows, {item.index: "A" for item in rows})
    assert table([score]).splitlines()[0] == "| Benchmark |  | n | score | 95 % |"
    assert (shown_p(0.0004), shown_p(0.0321)) == ("< 0.001", "0.032")


def test_the_rules_of_rewards_see_the_options() -> None:
    item = item_of({"index": 0, "question": "How many?", "choices": "['3', '4']", "answer": "B"})
    assert scorers.rules(item, "4").value == 1.0 and scorers.rules(item, "three").value == 0.0
