"""Scores equal to VLMEvalKit's on the same predictions, by its own functions: rows that are real and rows that are
made, predictions with traps. One difference is ours: where nothing was predicted, nothing is right."""

import random
from collections import Counter
from typing import Any

import pytest

from tests import theirs
from tests.evals.benchmarks import traps
from tests.evals.benchmarks.published import ROWS
from tests.evals.benchmarks.test_source import REAL
from thyme.evals.benchmarks import figures, matching, scorers
from thyme.evals.benchmarks.item import Item, item_of
from thyme.evals.benchmarks.known import benchmark
from thyme.evals.benchmarks.source import BenchmarkFile

pytestmark = pytest.mark.soak

OPTIONS = (
    {"A": "red", "B": "blue", "C": "green", "D": "black"},
    {"A": "3", "B": "13", "C": "30", "D": "5"},
    {"A": "yes", "B": "no"},
    {"A": "A is closer", "B": "B is closer"},
    {"A": "a cat on a mat", "B": "a cat", "C": "a mat", "D": "none", "E": "all of them"},
    {"A": "Zebra", "B": "E", "C": "I cannot tell", "D": "the image"},
)


def made(number: int, options: dict[str, str], answer: str) -> Item:
    return Item(index=str(number), question="Which is it?", options=options, answer=answer, more={})


def test_choices_are_found_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    can_infer = theirs.module("utils/matching_util.py", monkeypatch).can_infer
    generator = random.Random(0)
    said: Counter[str] = Counter()
    rows = [made(i, options, "A") for i, options in enumerate(OPTIONS * 8)]
    for path in REAL:
        rows += BenchmarkFile(benchmark("mcq"), path).items
    for item in rows:
        for prediction in traps.choices(item.options, generator):
            wanted = can_infer(prediction, dict(item.options))
            mine = matching.option(prediction, item.options)
            assert mine == (wanted or None), (prediction, item.options)
            said["found" if mine else "not"] += 1
            for answer in item.options:
                row = made(0, dict(item.options), answer)
                assert scorers.multiple_choice(row, prediction).value == float(wanted == answer)
    assert said["found"] > 1_000 and said["not"] > 500


def test_first_letters_boxes_and_words_are_found_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    first = theirs.module("dataset/utils/multiple_choice.py", monkeypatch).extract_characters_regex
    boxed = theirs.module("dataset/utils/visulogic.py", monkeypatch).extract_answer
    word = theirs.module("dataset/utils/yorn.py", monkeypatch).YOrN_Extraction
    generator = random.Random(1)
    count = 0
    for options in OPTIONS * 8:
        for prediction in [*traps.choices(options, generator), *traps.WORDS]:
            count += 1
            assert matching.boxed_letter(prediction) == {"Z": None}.get(boxed(prediction)[0], boxed(prediction)[0])
            assert (matching.yes_or_no(prediction) or "Unknown") == word(prediction), prediction
            if "<answer>" not in prediction and prediction.strip():
                assert (matching.first_letter(prediction) or "") == first(prediction), prediction
    assert count > 2_000


def test_numbers_are_as_near(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = theirs.module("dataset/utils/vqa_eval.py", monkeypatch)
    for target in ("100", "0", "5%", "0.05", "STOP", "2019", "-3.5", "1e3"):
        for prediction in (*traps.NUMBERS, *traps.WORDS, "0.05", "5 %", "2020", "-3.4", "999"):
            line = {"answer": target, "prediction": prediction}
            theirs_say = max(rules.process_line(line, method="relaxed_accuracy")["match"])
            item = Item(index="0", question="?", options={}, answer=target, more={})
            assert scorers.relaxed(item, prediction).value == float(theirs_say), (target, prediction)


def test_marks_are_taken_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = theirs.module("dataset/utils/vqa_eval.py", monkeypatch)
    for text in (
        *traps.CHOICES,
        *traps.WORDS,
        *traps.NUMBERS,
        "a, b",
        "a,b",
        "1,000 - 2",
        "U.S.A. 3.5 a.b ...",
        "x/y z?",
    ):
        assert matching.without_punctuation(text) == rules.process_punctuation(text), text


def frame(name: str, values: list[float], column: str, predictions: list[str] | None = None) -> Any:
    import pandas

    data = pandas.DataFrame(ROWS[name])
    data[column] = values
    if predictions is not None:
        data["prediction"] = predictions
    return data


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_theirs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(seed)

    def drawn(name: str) -> tuple[list[Item], list[float]]:
        return [item_of(row) for row in ROWS[name]], [float(generator.random() < 0.6) for _ in ROWS[name]]

    items, values = drawn("HallusionBench")
    rating = theirs.module(
        "dataset/utils/yorn.py", monkeypatch, load=lambda _: frame("HallusionBench", values, "score")
    ).Hallusion_rating("file")
    overall = rating[rating["split"] == "Overall"].iloc[0]
    mine = figures.hallusion(items, values)
    assert [mine[name] for name in ("aAcc", "fAcc", "qAcc")] == pytest.approx(
        [overall[name] for name in ("aAcc", "fAcc", "qAcc")]
    )

    items, values = drawn("HRBench4K")
    report = theirs.module("dataset/utils/hrbench.py", monkeypatch).report_acc_hrbench(
        frame("HRBench4K", values, "hit")
    )
    average = report[report["cycle"] == "Average"].set_index("type")["accuracy"] * 100
    mine = figures.cycles(items, values)
    assert [mine["FSP"], mine["FCP"], mine["Overall"]] == pytest.approx(
        [average[n] for n in ("single", "cross", "all")]
    )

    items, values = drawn("MME-RealWorld-Lite")
    rating = theirs.module(
        "dataset/utils/multiple_choice.py", monkeypatch, load=lambda _: frame("MME-RealWorld-Lite", values, "score")
    ).get_dimension_rating("file")
    mine = figures.tasks(items, values)
    for name in ("Perception", "Reasoning"):
        assert mine[name] == pytest.approx(100 * rating[name]["Avg"])
    assert mine["Overall"] == pytest.approx(100 * rating["Overall"])


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_problems_are_weighed_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    generator = random.Random(seed)
    rows = []
    for problem in range(525):  # their score divides by the 525 problems of the published file
        length = 2 if problem < 360 else 3
        for step in [*map(str, range(1, length + 1)), "multi"]:
            letter = generator.choice("ABCD")
            said = generator.choice(
                (f"Answer: {letter}", f"<Answer>: {letter}.", "Answer: E", "", f"The Answer is{letter}")
            )
            rows.append(
                {"index": len(rows), "ID": problem, "key": f"{length}steps_{step}", "question": "?", "answer": letter}
                | {"prediction": said, **dict.fromkeys(map("knowledge concept_{}".format, (1, 2, 3)), "c")}
            )
    data = pandas.DataFrame(rows)
    score = theirs.module("dataset/utils/wemath.py", monkeypatch, load=lambda _: data.copy()).wemath_evaluate_models
    pandas.DataFrame._append = lambda self, row, ignore_index: pandas.DataFrame([row])  # type: ignore[attr-defined]
    found = score("file")
    items = [item_of(row) for row in rows]
    values = [
        scorers.letter_behind_answer(item, str(row["prediction"])).value for item, row in zip(items, rows, strict=True)
    ]
    mine = figures.steps(items, values)
    assert f"{mine['Overall']:.2f}%" == found["Score (Strict)"][0]
    assert f"{mine['Score (Loose)']:.2f}%" == found["Score (Loose)"][0]


def test_prompts_are_the_ones_of_thymes_own_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = theirs.module("vlm/thyme/prompt.py", monkeypatch).ThymePromptMixin()
    builder.set_dump_image(lambda line: "x.png")
    for build, name, rows in (
        (builder._build_mcq_prompt, "VStarBench", [*ROWS["VStarBench"][:1], ROWS["HRBench4K"][0] | {"hint": "Look."}]),
        (builder._build_mcq_prompt, "BLINK", [ROWS["HRBench4K"][0] | {"question": "这是什么颜色?"}]),
        (builder._build_yorn_prompt, "HallusionBench", ROWS["HallusionBench"]),
        (builder._build_vqa_prompt, "ChartQA_TEST", ROWS["ChartQA_TEST"]),
        (builder._build_vqa_prompt, "MMVet_Hard", ROWS["LogicVista"]),
    ):
        for row in rows:
            assert benchmark(name).prompt(item_of(row)) == build(row, name)[-1]["value"]
