"""`thyme data review` as a reviewer uses it: look, run again, decide by key, edit; a second reviewer; export."""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from tests.report import runs
from tests.report.browser import Browser
from tests.report.conftest import Serve
from thyme.cli import main
from thyme.data.formats import full_prompt
from thyme.pictures import read_picture
from thyme.report.decisions import Decisions
from thyme.report.review_app import Rerun, Review, review_app
from thyme.report.review_row import ReviewRow, RowPictures, compared, picture_difference, rounds_of
from thyme.sandbox import SandboxConfig, SandboxResult, Status
from thyme.verbs.data_review import Config, ReviewRows, open_rows, problems, rerun


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def response(code: str, output: str, end: str = "It says 7.", answer: str = "7") -> str:
    block = f"<code>\n```python\n{code}\n```\n</code>\n<sandbox_output>{output}</sandbox_output>"
    return f"<think>Look closer. {block}\n{end}</think>\n<answer>{answer}</answer>"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three rows: a crop that comes back as it was, one that does not, and a value; the last one hostile."""
    path, lines = tmp_path / "rows.jsonl", []
    for number in range(3):
        picture = runs.photograph(number)
        asked = runs.question("image", picture, runs.HOSTILE if number == 2 else f"Question {number}?")
        code = f'img = Image.open("image.png")\nimg.crop({runs.BOX}).save("out.png")\nprint("out.png")'
        shown = picture.crop(runs.BOX)
        if number == 1:
            shown.paste("blue", (0, 0, 8, 6))
        texts = [
            response(code, "<image>"),
            response(code, "<image>"),
            response(f'print("42")  # {runs.HOSTILE}', f"41 {runs.HOSTILE}", runs.HOSTILE),
        ]
        pictures = [picture, shown] if number < 2 else [picture]
        row = {"image": [encoded(p) for p in pictures], "question": full_prompt(asked), "response": texts[number]}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def again() -> Iterator[Rerun]:
    with rerun(SandboxConfig(workers=1, memory_mib=256)) as (made, why_not):
        assert made is not None, why_not
        yield made


def review(rows: Path, decisions: Decisions, reviewer: str, again: Rerun | None) -> Review:
    data = open_rows(Config(rows=(rows,)))
    why = "" if again else "this machine lacks seccomp"
    said = {"title": "rows", "summary": data.summary(), "decisions": decisions, "reviewer": reviewer}
    return Review(ReviewRows(data), **said, rerun=again, problems=problems, why_not=why)  # type: ignore[arg-type]


def test_a_reviewer_looks_runs_again_and_decides(
    rows: Path, serve: Serve, browser: Browser, again: Rerun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.sqlite"
    with closing(Decisions(path)) as decisions:
        browser.open(serve(review_app(review(rows, decisions, "ann", again))))
        browser.wait("document.querySelector('.asked')?.innerText === 'Question 0?'")
        assert browser.count(".pair .box") == 1 and "120, 60, 200, 120" in browser.text(".pair")
        assert "Look closer." in browser.text(".band") and "img.crop" in browser.text("pre.code")
        browser.press("u")
        browser.wait("document.querySelector('#again')?.innerText.includes('the same pixels')")
        assert "the same text" in browser.text("#again") and "ok" in browser.text("#again")
        browser.press("a")  # and on to the next
        browser.wait("document.querySelector('.asked').innerText === 'Question 1?'")
        assert browser.text("#count") == "1 decision · 3 rows"
        browser.press("u")
        browser.wait("document.querySelector('#again .differs')")
        assert "1 % of the pixels differ" in browser.text("#again .differs")
        assert browser.count("#again .pair figure") == 3, "in the row, now, and the difference"
        browser.press("e")
        browser.wait("document.activeElement.id === 'response'")
        edited = "(() => { const r = document.querySelector('#response'); r.value = r.value.replace(%s); })()"
        browser.run(edited % "'</think>', ''")
        browser.click("#save")
        browser.wait("document.querySelector('.note.error')?.innerText.includes('training would refuse this')")
        browser.errors[:] = [error for error in browser.errors if "/decide" not in error]  # the answer 400 itself
        browser.run(edited % "'It says 7.', 'It says 7 indeed.</think>'")
        browser.click("#save")
        browser.wait("document.querySelector('#own')?.innerText === 'you: edit'")
        assert "It says 7 indeed." in browser.text(".band")
        browser.press("j")
        browser.wait("document.querySelector('.asked').innerText.includes('window.hit')")
        browser.press("u")
        browser.wait("document.querySelector('#again .diff .removed')")
        assert "- 41" in browser.text("#again .diff") and "+ 42" in browser.text("#again .diff")
        assert browser.run("window.hit === undefined && document.scripts.length") == 8
        browser.press("x")
        browser.wait("document.querySelector('#count').innerText === '3 decisions · 3 rows'")

        # A second reviewer, who sees the first when there is a decision of his own.
        browser.open(serve(review_app(review(rows, decisions, "bob", None))))
        browser.wait("document.querySelector('.asked')?.innerText === 'Question 0?'")
        assert "1 other reviewer decided; shown once you have" in browser.text(".decision")
        assert "ann: accept" not in browser.text() and "this machine lacks seccomp" in browser.text("#again")
        browser.press("a")
        browser.wait("document.querySelector('.asked').innerText === 'Question 1?'")
        browser.press("x")
        browser.wait("document.querySelector('.asked').innerText.includes('window.hit')")
        browser.press("x")
        browser.wait("document.querySelector('#agreement').innerText.includes('ann and bob: 2 of 3 alike, kappa 0.50')")
        browser.press("k")
        browser.press("k")  # faster than rows come
        browser.wait("document.querySelector('.other')?.innerText === 'ann: accept'")

    main(["data", "review", str(rows), "--decisions", str(path), "--export", str(tmp_path / "kept.jsonl")])
    said = capsys.readouterr().out
    assert "kept.jsonl: 1 rows" in said and "left out 2: not kept" in said and "kappa 0.500" in said
    (kept,) = (json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines())
    assert kept["image"] == json.loads(rows.read_text().splitlines()[0])["image"], "byte for byte"


def test_an_edit_is_what_is_exported(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], again: Rerun
) -> None:
    path = tmp_path / "d.sqlite"
    with closing(Decisions(path)) as decisions:
        made = review(rows, decisions, "ann", again)
        better = made.row(1)["response"].replace("It says 7.", "It says seven.")
        for wrong, words in (
            (made.row(1)["response"], "differs from the row's"),
            (better.replace("<image>", ""), "0 marks <image> for the row's 1 pictures"),
            (better.replace("</code>", ""), "<code> is never closed"),
            (None, "differs from the row's"),
        ):
            with pytest.raises(ValueError, match=words):
                made.decide(1, {"verdict": "edit", "response": wrong})
        with pytest.raises(ValueError, match="verdict None"):
            made.decide(1, {})
        made.decide(1, {"verdict": "edit", "response": better})
        assert made.run_again(1, better)["rounds"][0]["status"] == "ok"
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))  # decisions go with what rows say
    main(["data", "review", str(rows), "--decisions", str(path), "--export", str(tmp_path / "k.jsonl")])
    capsys.readouterr()
    (kept,) = (json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines())
    assert kept["response"] == better
    with pytest.raises(SystemExit):
        main(
            ["data", "review", str(rows), "--decisions", str(tmp_path / "none"), "--export", str(tmp_path / "l.jsonl")]
        )
    assert "no such file: review the rows first" in capsys.readouterr().err


def test_requests_of_other_sites_and_nonsense_change_nothing(rows: Path, serve: Serve, tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    with closing(Decisions(tmp_path / "d.sqlite")) as decisions:
        address = serve(review_app(review(rows, decisions, "ann", None)))

        def post(path: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
            sent = urllib.request.Request(address + path, data=body, headers={"Content-Type": kind})
            try:
                with urllib.request.urlopen(sent, timeout=30) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        good = b'{"verdict": "accept"}'
        assert post("api/row/0/decide", good, "text/plain")[0] == 415
        assert post("api/row/0/decide", good, "application/x-www-form-urlencoded")[0] == 415
        assert post("api/row/9/decide", good) == (404, '{"error":"there is no row 9"}')
        for body in (b"", b"{", b"[]", b'{"verdict": 3}', b'{"verdict": "edit"}'):
            assert post("api/row/0/decide", body)[0] == 400, body
        assert post("api/row/0/run", b"{}") == (400, '{"error":"code is not run here: this machine lacks seccomp"}')
        assert post("api/row/0/decide", b'{"note": "' + b"x" * 5_000_000 + b'"}')[0] == 413
        assert decisions.latest() == {}
        assert post("api/row/0/decide", good)[0] == 200 and len(decisions.latest()) == 1


def test_a_response_is_cut_into_rounds() -> None:
    text = response("x = 1", "a <image>\n<image>") + "<code>y</code> tail"
    first, second, third = rounds_of(text)
    assert (first.code, first.output, first.images) == ("x = 1", "a <image>\n<image>", 2)
    assert (second.code, second.output) == ("y", None) and third.text == " tail"
    assert [part.code for part in rounds_of("<answer>7</answer>")] == [None]


def test_what_differs_is_said() -> None:
    one, pictures = runs.photograph(0), RowPictures()
    assert picture_difference(one, one.copy(), pictures)["same"]
    other = one.copy()
    other.putpixel((0, 0), tuple((value + 128) % 256 for value in one.getpixel((0, 0))))  # type: ignore[union-attr]
    found = picture_difference(one, other, pictures)
    assert (found["same"], found["most"], found["share"]) == (False, 128, 1 / (320 * 200))
    assert "another size: 320x200, now 10x10" in picture_difference(one, one.resize((10, 10)), pictures)["words"]
    assert picture_difference(one, None, pictures)["words"] == "only in the row"
    row = ReviewRow(place="r:1", question=runs.question("q", one), response=response("print(1)", "1"))
    result = SandboxResult(status=Status.OK, stdout="1\n", wall_s=0.1)
    (same,) = compared(row, row.response, [result], pictures)
    assert not same["text_differs"] and same["pictures"] == []
    (differs,) = compared(row, row.response, [SandboxResult(status=Status.ERROR, images=(one,))], pictures)
    assert differs["text_differs"] and differs["pictures"][0]["words"] == "only in the new run"


@pytest.mark.soak
def test_the_pictures_of_the_readme_are_made_by_a_command(small: Path, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.report.screenshots", str(small), str(tmp_path / "out"), str(rows)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True, timeout=300)
    for name in ("view", "curves", "review"):
        picture = read_picture(tmp_path / "out" / f"{name}.png")
        assert picture.width == 1500 and len(picture.getcolors(2**24) or ()) > 60, f"{name}.png is blank"


def test_the_list_names_rows_that_nobody_opened_and_knows_decisions_by_what_rows_say(
    rows: Path, serve: Serve, browser: Browser, tmp_path: Path
) -> None:
    listed = "Array.from(document.querySelectorAll('.long-list .row')).map((r) => r.innerText.replace(/\\s+/g, ' '))"
    with closing(Decisions(tmp_path / "d.sqlite")) as decisions:
        review(rows, decisions, "ann", None).decide(0, {"verdict": "reject"})
        browser.open(serve(review_app(review(rows, decisions, "ann", None))))
        browser.wait(f"{listed}[2].includes('window.hit')")  # a hostile question, as text
        assert browser.run(f"{listed}.slice(0, 2)") == ["1 reject rows:1 Question 0?", "2 rows:2 Question 1?"]
        assert browser.run("window.hit === undefined && document.scripts.length") == 8

        # The file is sorted anew: the decision stays with its row, and `o` leads to those without one.
        rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
        browser.open(serve(review_app(review(rows, decisions, "ann", None))))
        browser.wait(f"{listed}[2] === '3 reject rows:3 Question 0?'")
        assert browser.run(f"{listed}[1]") == "2 rows:2 Question 1?"
        browser.press("o")
        browser.wait("document.querySelector('.asked').innerText === 'Question 1?'")
        browser.press("o")
        browser.wait("document.querySelector('.asked').innerText.includes('window.hit')")
        browser.press("x")
        browser.wait("document.querySelector('.asked').innerText === 'Question 1?'")
        browser.press("x")  # the last one: it stays, with its decision
        browser.wait("document.querySelector('#own')?.innerText === 'you: reject'")
        assert browser.text("#count") == "3 decisions · 3 rows" and browser.text(".asked") == "Question 1?"


def test_a_list_of_many_rows_asks_for_those_in_sight(serve: Serve, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    asked = ((runs.question("image", runs.photograph(0), f"Question {n}?")) for n in range(400))
    image = encoded(runs.photograph(0).resize((32, 32)))
    with path.open("w") as file:
        for one in asked:
            row = {"image": [image], "question": full_prompt(one), "response": response("print(7)", "7")}
            file.write(json.dumps(row) + "\n")
    with closing(Decisions(tmp_path / "d.sqlite")) as decisions:
        made = review(path, decisions, "ann", None)
        browser.open(serve(review_app(made)))
        browser.wait("document.querySelector('.long-list').innerText.includes('many:1 Question 0?')")
        browser.run("document.querySelector('.long-list').scrollTop = 1e9")
        browser.wait("document.querySelector('.long-list').innerText.includes('many:400 Question 399?')")
        assert len(made._names) < 300, "not those between"
        with pytest.raises(ValueError, match="at most 100"):
            made.listed(0, 101)
        assert made.listed(399, 50) == [{"place": "many:400", "question": "Question 399?", "verdict": ""}]
