"""A run in one file, opened from disk: all that the server would say, and nothing asked for."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report import runs
from tests.report.browser import Browser
from thyme.cli import main
from thyme.report.json_text import to_json, to_script
from thyme.report.page import VIEW, asset
from thyme.report.single_file import report_page
from thyme.verbs.spelling import open_run


def test_a_report_is_looked_at_without_a_server(
    small: Path, browser: Browser, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "sent.html"
    main(["report", str(small), "--out", str(out)])
    assert "16 rollouts, " in capsys.readouterr().out and not list(tmp_path.glob(".*"))
    browser.open(out.as_uri())
    browser.wait("document.querySelectorAll('.band-a > article header').length >= 3")
    assert "after: 120, 60, 200, 120 (code and pixels)" in browser.text(".band-a")
    browser.wait("document.querySelector('.pair img').naturalWidth > 0")
    assert browser.count(".live") == 0
    browser.press("3")
    browser.wait("document.querySelector('#count').textContent === '2 of 8'")
    browser.press("g")
    browser.wait("document.querySelectorAll('.curve polyline').length >= 3")
    sources = (
        "[...document.querySelectorAll('[src],[href]')].map((e) => e.getAttribute('src') || e.getAttribute('href'))"
    )
    assert all(source.startswith(("data:", "#")) for source in browser.run(sources))


def test_a_report_for_which_there_is_no_room_leaves_nothing(small: Path, tmp_path: Path) -> None:
    """The file's size is limited, as a disk's is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: an OSError in its place
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(SystemExit) as ended:
            main(["report", str(small), "--out", str(tmp_path / "a.html")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handled)
    assert ended.value.code == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_untrusted_text_in_a_report_is_text(browser: Browser, tmp_path: Path) -> None:
    asked = runs.question("q", None, runs.HOSTILE)
    runs.write_step(tmp_path, 0, [runs.rollout(asked, [runs.failed(runs.HOSTILE)], runs.HOSTILE)])
    (tmp_path / "config.toml").write_text('model = "tiny"')
    page = report_page(open_run(tmp_path), 10).text
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    (tmp_path / "report.html").write_text(page)
    browser.open((tmp_path / "report.html").as_uri())
    browser.wait("document.querySelector('.asked')?.innerText.includes('window.hit')")
    assert browser.run("window.hit === undefined")


def test_a_row_that_cannot_be_shown_says_so_in_its_place(small: Path, browser: Browser, tmp_path: Path) -> None:
    path = small / "rollouts" / "step_2.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    odd = json.loads(lines[0])
    odd["turns"][0]["result"]["error"] = 7
    path.write_bytes(json.dumps(odd).encode() + b"\n" + b"".join(lines[1:]))
    (tmp_path / "a.html").write_text(report_page(open_run(small), 100).text)
    browser.open((tmp_path / "a.html").as_uri() + "#/rollouts/step_2/1")
    browser.wait("document.querySelectorAll('.band-a > article header').length >= 2")
    assert "step_2, line 1: written by another version, or damaged" in browser.text("#detail > .note")


def test_what_does_not_fit_is_left_out_in_whole_groups_and_said(small: Path, browser: Browser, tmp_path: Path) -> None:
    page = report_page(open_run(small), 9)
    assert (page.rollouts, page.of) == (8, 16)
    (tmp_path / "a.html").write_text(page.text)
    browser.open((tmp_path / "a.html").as_uri())
    browser.wait("document.querySelector('#count')?.textContent === '4 of 8'")
    assert report_page(open_run(small), 0).rollouts == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], "run nowhere: no such folder"),
        (["report", "."], "no run: it has neither metrics.jsonl nor rollouts"),
        (["view", "nowhere"], "run nowhere: no such folder"),
        (["view", ".", "--port", "70000"], "port: 70000 must be in [0, 65535]"),
        (["report", ".", "--model", "gone"], "model gone: no tokenizer.json"),
        (["data", "review", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_is_no_run_is_said_in_a_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and words in said
    assert list(tmp_path.iterdir()) == []


def test_json_is_what_browsers_read() -> None:
    value = {"a": [1.0, float("nan"), float("-inf")], "b": "\ud800</script>&", 3: None}
    assert json.loads(to_json(value)) == {"a": [1.0, None, None], "b": "\ud800</script>&", "3": None}
    assert json.loads(to_script(value)) == json.loads(to_json(value))
    assert not set("<>&") & set(to_script(value))


def test_no_script_makes_markup_of_text() -> None:
    """Elements are made, text is put into them; nothing parses markup, and nothing comes from elsewhere."""
    for name in {*VIEW, "review.js"}:
        script = asset(name)
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
        ):
            assert way not in script, f"{name} uses {way}"
        addresses = script.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in addresses and "https://" not in addresses, name


def test_a_page_is_written_without_torch_and_without_a_server() -> None:
    loaded = "[name for name in ('torch', 'transformers', 'starlette', 'uvicorn') if name in sys.modules]"
    code = (
        f"import sys, thyme.report.single_file, thyme.report.run_folder, thyme.verbs.spelling; sys.exit(bool({loaded}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
