"""`thyme eval` on benchmarks, as a user runs it: asked, saved as it goes, gone on with, scored."""

import json
from pathlib import Path

import pytest

from tests.evals.benchmarks.published import ROWS, choice, picture, write_tsv
from tests.evals.benchmarks.test_source import REAL
from thyme.cli import main
from thyme.report.run_folder import RunFolder

BRIEF = ["--rollout.max-tokens", "24", "--threads", "1"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    """The exit code."""
    try:
        main(["eval", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def lines(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_benchmark_is_asked_saved_and_scored(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("VStarBench", "HallusionBench"):
        write_tsv(Path(f"{name}.tsv"), ROWS[name])
    model = ["--model", str(demo_checkpoint), "--eval.samples", "2", "--eval.temperature", "1", "--eval.at-once", "3"]
    assert run(*model, "--eval.benchmark", "v*, HallusionBench", "--eval.data", ".", "--name", "both", *BRIEF) == 0
    out = capsys.readouterr().out
    assert "| VStarBench | Overall | 2 |" in out and "| 55.6 | 48.3 |" in out and "scored by rules" not in out
    star, hallusion = json.loads(Path("runs/both/score.json").read_text())
    assert star["n"] == 2 and hallusion["n"] == 8 and set(hallusion["splits"]) == {"aAcc", "fAcc", "qAcc"}
    assert 0.0 <= star["tools"]["pass_at_2"] <= 100.0 and star["tools"]["tokens"] <= 24
    settings, *answers = lines("runs/both/predictions/HallusionBench.jsonl")
    assert {answer["index"] for answer in answers} == {row["index"] for row in ROWS["HallusionBench"]}
    assert settings["settings"]["benchmark"] == "HallusionBench"  # type: ignore[index]
    traces = lines("runs/both/rollouts/HallusionBench.jsonl")
    assert len(traces) == 16
    by_row = {(trace["group"], trace["question"]["id"].rpartition("/")[2]) for trace in traces}  # type: ignore[index]
    assert by_row == {(place, row["index"]) for place, row in enumerate(ROWS["HallusionBench"])}, "not by three at once"
    assert Path("runs/both/table.md").read_text() in out
    run_folder = RunFolder(Path("runs/both"))
    table = run_folder.table("HallusionBench")
    worth = {answer["index"]: answer["values"] for answer in answers}
    for id_, index, right in zip(table["question_id"], table["index"], table["right"], strict=True):
        assert right == (worth[id_.rpartition("/")[2]][index] > 0)  # type: ignore[index]
    view = run_folder.rollout("VStarBench", 1)
    assert view["question"]["pictures"][0]["width"] > 0 and view["rewards"]["result"] in (0.0, 1.0)
    alone = ("--eval.benchmark", "v*", "--eval.data", ".", "--name", "bare", "--eval.picture-gib", "0")
    assert run(*model, *alone, *BRIEF) == 0
    assert not Path("runs/bare/images").exists()
    view = RunFolder(Path("runs/bare")).rollout("VStarBench", 1)
    assert view["question"]["pictures"] == [] and "eval.picture_gib" in " ".join(view["notes"])


def test_a_run_that_was_killed_asks_what_is_left(
    demo_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tsv(Path("a.tsv"), [choice(i, "AB"[i % 2], image=picture("blue")) for i in range(6)])
    arguments = ["--model", str(demo_checkpoint), "--eval.benchmark", "mcq", "--eval.data", "a.tsv", *BRIEF]
    assert run(*arguments, "--name", "whole") == 0
    assert run(*arguments, "--name", "killed") == 0
    whole = lines("runs/whole/predictions/mcq.jsonl")
    path = Path("runs/killed/predictions/mcq.jsonl")
    kept = path.read_text().splitlines(keepends=True)[:4]
    path.write_text("".join(kept) + '{"index": "5", "predic')
    assert run(*arguments, "--name", "killed") == 2
    assert "--eval.resume true goes on with it" in capsys.readouterr().err
    assert run(*arguments, "--name", "killed", "--eval.resume", "true", "--eval.against", "runs/whole") == 0
    again = lines(str(path))
    assert again[:4] == whole[:4]
    assert sorted(again[1:], key=str) == sorted(whole[1:], key=str) and len(again) == 7
    assert "against runs/whole: +0.0 points (0 gained, 0 lost of 6, p 1.000)" in capsys.readouterr().out
    assert run(*arguments, "--name", "killed", "--eval.resume", "true", "--eval.seed", "7") == 2
    assert "was made with sampling.seed = 0, this run has 7: repeat it" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_are_left_out_and_named(
    demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tsv(Path("a.tsv"), [choice(0), choice(1, image="bm9waWN0dXJl"), choice(2)])
    arguments = ["--model", str(demo_checkpoint), "--eval.benchmark", "mcq", "--eval.data", "a.tsv", *BRIEF]
    assert run(*arguments) == 0
    said = capsys.readouterr()
    assert json.loads(Path("runs/eval/score.json").read_text())["n"] == 2
    assert "left out: 1 picture (a.tsv, index 1: image 0" in said.err


def test_predictions_of_others_are_scored_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    write_tsv(Path("MMVP.tsv"), [choice(i, "AB"[i % 2], question=f"{i // 2}?") for i in range(6)])
    predictions = [{"index": i, "prediction": p} for i, p in enumerate(["A", "The answer is B.", "(A)", "A", "red"])]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    assert run("--score", "p.jsonl", "--eval.benchmark", "mmvp", "--eval.data", "MMVP.tsv", "--name", "scored") == 0
    score = json.loads(Path("runs/scored/score.json").read_text())
    assert (score["benchmark"], score["n"], score["unparsed"], score["missing"]) == ("MMVP", 6, 0, 1)
    assert score["overall"] == pytest.approx(100 / 3) and score["splits"] == {"Average": pytest.approx(400 / 6)}
    assert "1 of 6 missing, counted as wrong" in capsys.readouterr().out
    few = ("--eval.benchmark", "MMVP,mmvp", "--eval.data", "MMVP.tsv", "--name", "few")  # one benchmark, said twice
    assert run("--score", "p.jsonl", *few, "--eval.limit", "2") == 0
    assert json.loads(Path("runs/few/score.json").read_text())["n"] == 2
    with Path("MMVP.tsv").open("a") as file:
        file.write("6\tcut short\n")
    with Path("p.jsonl").open("a") as file:
        file.write('{"index": 6, "prediction": "A"}\n')
    assert run("--score", "p.jsonl", *few) == 0
    assert "left out: 1 wrong number of fields" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--eval.benchmark", "HRBench16K", "--eval.data", "a.tsv"], "did you mean 'HRBench8K'"),
        (["--eval.benchmark", "mcq", "--eval.data", "none.tsv"], "none.tsv: no such file or folder"),
        (["--eval.benchmark", "mcq"], "eval.data must say where its file is"),
        (["--eval.data", "a.tsv"], "eval.benchmark names it"),
        (["--score", "p.jsonl"], "which benchmark are they predictions for"),
        (["--eval.benchmark", "mcq,vqa", "--eval.data", "a.tsv"], "give their folder"),
        (["--eval.benchmark", "mcq", "--eval.data", "a.tsv", "--score", "none.jsonl"], "none.jsonl: no such file"),
        (["--score", "p.jsonl", "--control", "all"], "control: --score asks no model"),
        (["--score", "p.jsonl", "--eval.robustness", "jpeg"], "eval.robustness: --score asks no model"),
        (["--score", "p.jsonl", "--eval.against", "runs/x"], "eval.against: --score asks no model"),
        (["--control", "all,blindfold"], "'blindfold' is none"),
        (["--eval.robustness", "all,fog"], "'fog' is none"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_opened(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tsv(Path("a.tsv"), [choice(0)])
    assert run(*arguments, "--model", "no-model") == 2
    assert said in capsys.readouterr().err


def test_controls_are_the_same_questions_without_what_is_said_to_help(
    demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(demo_checkpoint), "--control", "all", "--eval.base", str(demo_checkpoint)]
    arguments += [*BRIEF, "--rollout.max-tokens-per-round", "24"]
    assert run("demo", *arguments, "--eval.num-questions", "4", "--name", "held") == 0
    out = capsys.readouterr().out
    score = json.loads(Path("runs/held/score.json").read_text())
    names = ["tools", "tool_free", "format_only", "result_only", "blind", "ats_off", "base"]
    assert [one["control"] for one in score["controls"]["runs"]] == names
    assert all(f"| {name} | 4 |" in out for name in names) and "Solved only with tools: " in out
    base = score["controls"]["runs"][-1]
    assert (base["difference"], base["gained"], base["lost"], base["p"]) == (0.0, 0, 0, 1.0)
    for name in names[1:]:
        assert len(lines(f"runs/held/predictions/heldout.{name}.jsonl")) == 5
    assert run("demo", *arguments, "--control", "blindfold") == 2
    assert "'blindfold' is none: tool_free, format_only" in capsys.readouterr().err


def test_the_paper_s_protocol_is_asked_for_and_told_wherever_its_figures_are(
    demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tsv(Path("a.tsv"), [choice(i, image=picture("blue")) for i in range(2)])
    asked = ["--model", str(demo_checkpoint), "--eval.benchmark", "mcq", "--eval.data", "a.tsv", *BRIEF]
    by_paper = ["--eval.paper-protocol", "true", "--eval.paper-retries", "1"]
    assert run(*asked, "--name", "once") == 0
    assert "paper's protocol" not in capsys.readouterr().out and len(lines("runs/once/rollouts/mcq.jsonl")) == 2
    assert run(*asked, *by_paper, "--control", "tool_free", "--name", "paper") == 0
    out = capsys.readouterr().out
    score = json.loads(Path("runs/paper/score.json").read_text())
    answers = lines("runs/paper/predictions/mcq.jsonl")[1:]
    tries = [int(answer["attempt"]) for answer in answers]  # type: ignore[call-overload]
    by_retry, without = tries.count(1), tries.count(2)
    assert without, "the untrained checkpoint answers"
    counts = {"retries": 1, "from_retry": by_retry, "from_fallback": without}
    assert score["protocol"] == counts == score["controls"]["runs"][0]["protocol"]
    assert f"(1 retries, then without tools): {by_retry} answers of a retry, {without} without tools" in out
    assert out.count("paper's protocol: by retry / without tools |") == 2 and f"| {by_retry} / {without} |" in out
    assert len(lines("runs/paper/rollouts/mcq.jsonl")) == sum(tries) + 2
    assert "paper_protocol = true" in Path("runs/paper/config.toml").read_text()
    assert run(*asked, "--name", "paper", "--eval.resume", "true") == 2
    assert "was made with paper_protocol = {'retries': 1}, this run has None" in capsys.readouterr().err
    assert run(*asked, *by_paper, "--name", "other", "--eval.against", "runs/once") == 2
    assert "asked without the paper's protocol, this run is not" in capsys.readouterr().err
    assert not Path("runs/other").exists()
    held = ["demo", "--model", str(demo_checkpoint), *BRIEF, "--rollout.max-tokens-per-round", "24", *by_paper]
    assert run(*held, "--eval.num-questions", "2", "--name", "held") == 0
    assert json.loads(Path("runs/held/score.json").read_text())["protocol"]["retries"] == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--eval.samples", "2"], "one answer a question, but samples is 2"),
        (["--eval.every-steps", "2"], "asked once while training"),
        (["--eval.retries", "2"], "leave them out with eval.benchmark, eval.paper_protocol and"),
        (["--eval.paper-retries", "-1"], "-1 must be at least 0"),
        (["--score", "p.jsonl", "--eval.benchmark", "mcq", "--eval.data", "a.tsv"], "asks no model"),
    ],
)
def test_what_the_paper_s_protocol_does_not_say_is_refused(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--eval.paper-protocol", "true", *more) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not REAL, reason="no benchmark rows: set THYME_DATA to the folder that holds benchmarks/")
def test_real_rows_run_through_a_checkpoint_and_a_hugging_face_folder(demo_checkpoint: Path, hub_folder: Path) -> None:
    data = str(REAL[0].parent)
    for name, model in (("toy", demo_checkpoint), ("hub", hub_folder)):
        arguments = [
            "--model",
            str(model),
            "--eval.benchmark",
            "BLINK,MMVP",
            "--eval.data",
            data,
            "--name",
            name,
            *BRIEF,
        ]
        assert run(*arguments, "--eval.limit", "2", "--max-pixels", "50176") == 0
        assert [score["n"] for score in json.loads(Path(f"runs/{name}/score.json").read_text())] == [2, 2]


def test_the_same_rows_are_asked_with_disturbed_pictures(
    demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [choice(i, "AB"[i % 2], image=picture("blue")) for i in range(3)]
    write_tsv(Path("a.tsv"), [*rows, choice(3, question="Is it on the left?")])
    arguments = ["--model", str(demo_checkpoint), "--eval.benchmark", "mcq", "--eval.data", "a.tsv", *BRIEF]
    arguments += ["--rollout.max-tokens-per-round", "24"]
    assert run(*arguments, "--eval.robustness", "flipped, jpeg", "--control", "tool_free", "--name", "robust") == 0
    out = capsys.readouterr().out
    score = json.loads(Path("runs/robust/score.json").read_text())
    assert [(one["disturbance"], one["n"]) for one in score["robustness"]] == [("flipped", 3), ("jpeg", 4)]
    assert all(one["lost"] == one["clean"] - one["accuracy"] for one in score["robustness"])
    assert [one["control"] for one in score["controls"]["runs"]] == ["tools", "tool_free"]
    assert "| flipped | 3 |" in out and "won back by tools" in out
    for name, count in (("", 4), (".tool_free", 4), (".flipped", 3), (".flipped.tool_free", 3), (".jpeg", 4)):
        assert len(lines(f"runs/robust/predictions/mcq{name}.jsonl")) == count + 1
    assert len(lines("runs/robust/evidence/mcq.flipped.jsonl")) == 3
    assert not Path("runs/robust/evidence/mcq.flipped.tool_free.jsonl").exists()
    assert run(*arguments, "--eval.robustness", "rotate") == 2
    assert "'rotate' is none: rotated, flipped" in capsys.readouterr().err
