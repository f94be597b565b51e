"""What `thyme ask` accepts and refuses before any model is loaded."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.report import runs
from thyme.cli import main
from thyme.pictures import read_picture
from thyme.rollout.dialect import Dialect, read_dialect, write_dialect
from thyme.rollout.events import CodeBlock, CodeResult, TextPiece
from thyme.rollout.image_folder import ImageFolder
from thyme.sandbox import Fix, SandboxResult, Status
from thyme.train.manifest import Manifest, Origin, list_files, write_manifest
from thyme.verbs.ask import Config, _Printer, _told, answer, run
from thyme.verbs.folders import model_folder

ROOT = Path(__file__).parents[2]


def test_an_empty_question_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="question is empty"):
        answer(Config(model="nowhere", image="nothing.png", question=" \n"), Console())


def test_a_folder_or_a_training_checkpoint_is_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").write_text("weights")
    write_manifest(tmp_path, Manifest(stage="rl", step=1, origin=Origin(), files=list_files(tmp_path)))
    (tmp_path / "config.json").write_text('{"edited": true}')  # is nobody's business unless the run is resumed
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").write_text("weight")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: 6 bytes, not 7"):
        model_folder(tmp_path)


def test_the_folder_says_how_it_is_run(tmp_path: Path) -> None:
    assert read_dialect(tmp_path) is None
    write_dialect(tmp_path, Dialect(prompt_style="short", compat="released"))
    assert read_dialect(tmp_path) == Dialect(prompt_style="short", compat="released")
    (tmp_path / "thyme.json").write_text('{"prompt_style": "short"}')  # as earlier versions wrote it
    assert read_dialect(tmp_path) == Dialect(prompt_style="short")
    for content in ("{", "[]", '{"style": "short"}', '{"prompt_style": "long"}', '{"compat": "some"}'):
        (tmp_path / "thyme.json").write_text(content)
        with pytest.raises(ValueError, match=r"thyme\.json"):
            read_dialect(tmp_path)


def test_output_is_shown_and_cannot_steer_the_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    printer = _Printer(Console(file=out, width=200), ImageFolder(tmp_path))
    printer.show(TextPiece("[bold]a\x1b[31m\x07\n"))
    printer.show(CodeBlock("x = '\x1b[2J'"))
    fixed = SandboxResult(
        status=Status.OK, stdout="1\x9b", fixes=(Fix("import", 2, "added import math"),), wall_s=0.0123
    )
    printer.show(CodeResult(fixed, "<sandbox_output>1\x9b[0m</sandbox_output>"))
    shown = out.getvalue()
    assert not {c for c in shown if c != "\n" and not c.isprintable()}
    assert "[bold]a\\x1b[31m" in shown and "line 2: added import math." in shown and "12 ms" in shown
    assert "\n1\\x9b[0m\n" in shown


def test_a_question_in_words_that_the_toy_lacks_is_said_to_make_no_sense(
    demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    for question, words in (("What colour is the car?", ["colour", "car"]), ("What digit is on the red sign?", [])):
        asked = Config(model=str(demo_checkpoint), image=str(tmp_path / "a.png"), question=question, max_tokens=2)
        answer(asked, Console(file=io.StringIO()))
        err = capsys.readouterr().err
        assert err.count("\n") == bool(words) and all(word in err for word in words)


def test_pictures_are_shown_small_where_the_terminal_can(tmp_path: Path) -> None:
    result = SandboxResult(status=Status.OK, images=(Image.new("RGB", (60, 20), (1, 2, 3)),))
    shown = {}
    for name, color_system in (("colours", "truecolor"), ("none", None)):
        out = io.StringIO()
        printer = _Printer(
            Console(file=out, width=30, highlight=False, force_terminal=True, color_system=color_system),  # type: ignore[arg-type]
            ImageFolder(tmp_path),
            preview_columns=40,
        )
        printer.show(CodeResult(result, "<sandbox_output><image></sandbox_output>"))
        shown[name] = out.getvalue()
    assert shown["colours"].count("\u2580") == 30 * 5 and "1;2;3" in shown["colours"]
    assert "\u2580" not in shown["none"]
    assert all("image 60x20" in text for text in shown.values())


def test_json_and_trace_say_what_happened(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (84, 84), "red").save("a.png")
    question = "What digit is on the red sign?"
    config = Config(model=str(demo_checkpoint), image="a.png", question=question, max_tokens=4)
    words = ["--max-tokens", "4", "--trace", "trace.html", "--temperature", "1.0", "--seed", "3", "--json"]
    main(["ask", str(demo_checkpoint), "a.png", question, *words])
    said = json.loads(capsys.readouterr().out)
    assert (said["answer"], said["status"], said["tokens"]) == (None, "length", 4)
    assert len(said["rounds"]) == 1 and said["rounds"][0]["code"] is None
    page = Path("trace.html").read_text()
    data = json.loads(page.split('id="embedded">')[1].split("</script>")[0])
    view = data["answers"]["/api/a/rollout/trace/1"]
    assert view["question"]["text"] == question and view["num_tokens"] == 4
    assert "".join(view["tokens"]["text"]).endswith(said["rounds"][0]["text"])
    assert list(data["pictures"]) == [view["question"]["pictures"][0]["name"]]
    with pytest.raises(ValueError, match="no place for a file"):
        run(replace(config, trace=Path("nowhere/trace.html")))


def test_what_is_told_of_a_rollout_with_code(tmp_path: Path) -> None:
    asked = runs.question("q", runs.photograph(0))
    made = runs.rollout(asked, [runs.looked_closer(asked), runs.failed(), runs.said("<answer>7</answer>")], "7")
    told = json.loads(json.dumps(_told(made, ImageFolder(tmp_path))))
    first, second, third = told["rounds"]
    assert first["status"] == "ok" and first["repairs"] == ["From PIL import Image was added."]
    assert read_picture(first["images"][0]).size == (80, 60) and "img.crop(box)" in first["code"]
    assert second["error"] == {"type": "NameError", "message": "name 'imgg' is not defined", "line": 1}
    assert "status" not in third and told["answer"] == "7"


def test_the_command_line_answers_a_user_s_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for model, image, question, named in [
        ("model", "missing.png", "what?", "missing.png"),
        ("model", "broken.png", "what?", "broken.png"),
        ("model", "good.png", "  ", "question"),
        ("model", "good.png", "what?", "model"),
        ("empty", "good.png", "what?", "config.json"),
    ]:
        command = [sys.executable, "-m", "thyme", "ask", str(tmp_path / model), str(tmp_path / image), question]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and not done.stdout, done
        assert done.stderr.count("\n") == 1 and named in done.stderr and "Traceback" not in done.stderr, done
