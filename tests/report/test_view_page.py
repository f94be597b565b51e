"""`thyme view` as a reader uses it, in a browser: click, filter, keys, links, a run under way, and text that would do
harm if any markup were made of it. Every test also fails on an error in the page's console."""

import dataclasses
import io
import json
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.report import runs
from tests.report.browser import Browser
from tests.report.conftest import Serve
from thyme.report.page import VIEW
from thyme.report.view_app import view_app
from thyme.rollout.journal import Journal
from thyme.toy.model import tiny_processor
from thyme.verbs.spelling import open_run

READY = "document.querySelectorAll('.band-a > article header').length > 0"


def view(serve: Serve, *folders: Path) -> str:
    return serve(view_app({key: open_run(folder) for key, folder in zip("ab", folders, strict=False)}))


def at_hand(browser: Browser) -> str:
    return browser.text("article.at-hand header")


def place_of(browser: Browser) -> str:
    return str(browser.run("decodeURIComponent(location.hash)"))


def test_a_group_is_shown_as_columns_of_rounds(serve: Serve, browser: Browser, small: Path) -> None:
    browser.open(view(serve, small))
    browser.wait(READY)
    assert browser.run("document.querySelector('#file').selectedOptions[0].text") == "step 2", "the newest"
    browser.wait("document.querySelectorAll('.band-a > article header').length >= 3")
    assert browser.count(".band-a > article") == 4
    first = browser.text(".band-a > article:first-child")
    for part in (
        "The sign is small.",
        "img.crop(box)",
        "repaired: from PIL import Image was added",
        "out.png",
        "total",
        "1.5",
    ):
        assert part in first, part
    assert "after: 120, 60, 200, 120 (code and pixels)" in first
    assert browser.text(".py-keyword, .py-call") and browser.count(".py-string") >= 3
    # The box lies where the crop was made, whatever size the picture is shown at.
    browser.wait("document.querySelector('.pair img').complete && document.querySelector('.pair img').naturalWidth > 0")
    share = browser.run(
        "(() => { const b = document.querySelector('.pair .box').getBoundingClientRect();"
        "const p = document.querySelector('.pair .picture img').getBoundingClientRect();"
        "return [(b.left - p.left) / p.width, (b.top - p.top) / p.height, b.width / p.width, b.height / p.height]; })()"
    )
    assert share == pytest.approx([120 / 320, 60 / 200, 80 / 320, 60 / 200], abs=0.02)
    assert "NameError: name 'imgg' is not defined" in browser.text(".band-a > article:nth-child(2)")
    pixels = np.asarray(Image.open(io.BytesIO(browser.photograph())).convert("RGB"))
    assert pixels.std() > 20 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500, "the screenshot is blank"


def test_filters_clicks_and_keys(serve: Serve, browser: Browser, small: Path) -> None:
    browser.open(view(serve, small))
    browser.wait(READY)
    assert browser.text("#count") == "8 of 8"
    for name, kept in (("failed", 2), ("wrong", 4), ("silent", 2), ("repetition", 2), ("evidence", 2), ("mismatch", 1)):
        browser.click(f"[data-filter={name}]")
        browser.wait(f"document.querySelector('#count').textContent === '{kept} of 8'")
        assert browser.count(".row") == kept and f"show={name}" in place_of(browser)
        browser.click(f"[data-filter={name}]")
        browser.wait("document.querySelector('#count').textContent === '8 of 8'")
    browser.press("2")
    browser.press("4")
    browser.wait("document.querySelector('#count').textContent === '2 of 8'")
    browser.press("2")
    browser.press("4")
    browser.wait("document.querySelector('#count').textContent === '8 of 8'")
    browser.press("j")
    browser.wait("document.querySelector('article.at-hand header').innerText.includes('rollout 1')")
    browser.press("n")
    browser.wait("document.querySelector('.question').innerText.includes('crop-1')")
    assert place_of(browser).startswith("#/rollouts/step_2/5")
    browser.press("p")
    browser.wait("document.querySelector('.question').innerText.includes('crop-0')")
    browser.press("[")
    browser.wait("location.hash.startsWith('#/rollouts/step_0')")
    browser.press("]")
    browser.wait("location.hash.startsWith('#/rollouts/step_2')")
    browser.click(".row[data-position='6']")
    browser.wait("location.hash.startsWith('#/rollouts/step_2/7')")
    browser.wait("document.querySelector('article.at-hand header')?.innerText.includes('repetition')")
    browser.press("/")
    browser.type("crop-1")
    browser.wait("document.querySelector('#count').textContent === '4 of 8'")
    browser.press("Escape")
    browser.press("?")
    browser.wait("document.querySelector('.overlay .keys')")
    browser.press("Escape")
    assert browser.count(".overlay") == 0
    browser.run("history.back()")
    browser.click(".thumbs .picture")
    browser.wait("document.querySelector('.overlay img').naturalWidth === 320")
    browser.press("Escape")


def look(browser: Browser, address: str, line: int, colour: str) -> None:
    """Opens a rollout of step 2 with its tokens in colours."""
    browser.open(f"{address}#/rollouts/step_2/{line}?colour={colour}")
    browser.wait(f"document.querySelector('#detail').dataset.key.includes('\"{colour}\"')")
    browser.wait(f"document.querySelectorAll(\"article.at-hand[data-line='{line}'] .token\").length > 0")


def test_tokens_are_coloured_by_what_is_known_of_them(serve: Serve, browser: Browser, small: Path) -> None:
    address = view(serve, small)
    look(browser, address, 4, "mismatch")
    shade = "[...document.querySelectorAll('article.at-hand .token')].map((t) => t.style.backgroundColor)"
    assert browser.run(f"{shade}.every((c) => c === 'rgba(180, 0, 180, 0.85)')"), "all are off by 1.5 nats"
    assert "trainer less engine 1.5" in browser.run("document.querySelector('article.at-hand .token').title")
    browser.press("c")  # none
    browser.press("c")
    browser.wait("location.hash.includes('colour=kind')")
    look(browser, address, 1, "temperature")
    grey = "(t) => t.style.backgroundColor === 'rgba(120, 120, 120, 0.35)'"
    code = browser.run(
        f"[...document.querySelectorAll('article.at-hand .token')].filter({grey}).map((t) => t.innerText).join('')"
    )
    assert code.replace("\n", "").startswith("img = Image.open(") and "The sign" not in code, "greedy, and only that"
    for colour in ("kind", "logprob", "entropy"):
        look(browser, address, 1, colour)
        text = browser.run(
            "[...document.querySelectorAll('article.at-hand .token')].map((t) => t.textContent).join('')"
        )
        assert "<think>The sign is small." in text and "It says 7.</think>" in text
    browser.open(f"{address}#/rollouts/step_0/1?colour=mismatch")
    browser.wait("document.querySelector('article.at-hand .note')?.innerText.includes('no log-probs of the trainer')")


CONTRAST = """
(() => {
  const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  const luminance = (c) => { const [r, g, b] = light(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (e) => {
    const c = channels(getComputedStyle(e).backgroundColor);
    return c[3] === 0 ? ground(e.parentElement) : c;
  };
  const told = {};
  const texts = ".run-name, .detail :is(pre span, .faint, .note, .bad, .fixes, .chip, .verdict)";
  for (const e of document.querySelectorAll(texts)) {
    const style = getComputedStyle(e);
    const pair = [luminance(channels(style.color)), luminance(ground(e).slice(0, 3))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) told[e.className] = contrast;
  }
  return told;
})()
"""
"""By class, the contrast of text that has less than 4.5 with what is behind it (WCAG 2, level AA)."""


def test_text_is_legible_in_light_and_dark(serve: Serve, browser: Browser, small: Path) -> None:
    address = view(serve, small, small)
    for dark in (False, True):
        browser.appear(dark=dark)
        browser.open(f"{address}?{dark}#/rollouts/step_2/1")
        browser.wait("document.querySelector('.py-keyword, .py-call') && document.querySelector('.py-comment')")
        assert browser.run(CONTRAST) == {}, f"dark: {dark}"


def test_a_narrow_window_shows_list_and_rollout(serve: Serve, browser: Browser, small: Path) -> None:
    browser.appear(size=(400, 800))
    browser.open(view(serve, small))
    browser.wait(READY)
    for part in ("aside .row.selected", "article.at-hand header"):
        left, right, top = browser.run(
            f"(() => {{ const b = document.querySelector('{part}').getBoundingClientRect();"
            "return [b.left, b.right, b.top]; })()"
        )
        assert 0 <= left < right <= 400 and 0 < top < 800, part


def test_the_kinds_of_tokens_are_named_in_their_colours(serve: Serve, browser: Browser, small: Path) -> None:
    browser.open(f"{view(serve, small)}#/rollouts/step_2/1?colour=kind")
    browser.wait("document.querySelectorAll('article.at-hand .token').length > 0")
    painted = "(e) => getComputedStyle(e).backgroundColor"
    used = browser.run(f"[...new Set([...document.querySelectorAll('article.at-hand .token')].map({painted}))]")
    named = browser.run(f"[...document.querySelectorAll('.legend .token')].map({painted})")
    assert len(set(named)) >= 6 and set(used) <= set(named)


def test_an_address_leads_back_to_what_was_looked_at(serve: Serve, browser: Browser, small: Path) -> None:
    address = view(serve, small)
    browser.open(f"{address}#/rollouts/step_0/6?show=failed&q=crop-1")
    browser.wait("document.querySelector('article.at-hand header')?.innerText.includes('rollout 1')")
    assert browser.text("#count") == "1 of 8" and browser.run("document.querySelector('#search').value") == "crop-1"
    browser.open(f"{address}#/curves?metrics=code")
    browser.wait("document.querySelectorAll('.curve').length === 1")
    browser.open(f"{address}#/rollouts/step_99/1?show=nonsense&colour=nonsense")
    browser.wait(READY)


def test_curves_and_steps(serve: Serve, browser: Browser, small: Path) -> None:
    with (small / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "step": 3, "reward/mean": 0.5}\nnonsense\n{"stage": "rl", "st')
    browser.open(f"{view(serve, small)}#/curves")
    browser.wait("document.querySelectorAll('.curve polyline').length >= 3")
    assert browser.text(".curve figcaption") == "reward/mean 0.5"
    assert browser.count(".curve .alarm") == 1 and "step 2 entropy: it fell" in browser.text()
    assert "line 5 cannot be read" in browser.text() and "line 6 is half-written" in browser.text()
    browser.click(".curve svg")
    browser.wait("location.hash.startsWith('#/rollouts/step_2')")
    browser.press("s")
    browser.wait("document.querySelectorAll('.steps tr').length === 3")
    assert "step 2" in browser.text(".steps") and "0.667" in browser.text(".steps")
    browser.click(".steps a")
    browser.wait("location.hash.startsWith('#/rollouts/step_0')")


def test_scores_of_an_evaluation_come_first(serve: Serve, browser: Browser, small: Path, tmp_path: Path) -> None:
    table = "| Benchmark | score | Thyme-7B |\n| --- | --- | --- |\n| V* | 81.5 | 82.2 |\n\nV* under controls:\n"
    (small / "table.md").write_text(table)
    other = tmp_path / "other"
    runs.write_step(other, 4, runs.group_of_four(1, "crop-1"))
    browser.open(view(serve, small, other))
    browser.wait("document.querySelectorAll('.scores td').length === 3")
    assert browser.text(".scores") == "Benchmark\tscore\tThyme-7B\nV*\t81.5\t82.2"
    assert "V* under controls:" in browser.text("main") and "other" not in browser.text("main")
    browser.press("r")
    browser.wait("location.hash.startsWith('#/rollouts')")
    browser.press("t")
    browser.wait("location.hash === '#/scores'")
    (small / "table.md").unlink()
    browser.open(view(serve, small))
    browser.wait("document.querySelectorAll('.tab').length === 3")


def test_two_runs_side_by_side(serve: Serve, browser: Browser, small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    runs.write_metrics(other, 5)
    theirs = runs.group_of_four(1, "crop-1")[:2]
    runs.write_step(other, 4, theirs)
    browser.open(f"{view(serve, small, other)}#/curves")
    browser.wait("document.querySelectorAll('.curve polyline').length >= 6")
    strokes = "new Set([...document.querySelectorAll('.curve polyline')].map((p) => p.getAttribute('stroke'))).size"
    assert browser.run(strokes) == 2
    browser.press("r")
    browser.wait("document.querySelector('.band-b')?.innerText.includes('other has no rollout of this question')")
    browser.press("n")
    browser.wait("document.querySelectorAll('.band-b > article header').length === 2")
    assert "other · step_4" in browser.text(".bands") and browser.count(".band-a > article") == 4


def test_text_of_a_rollout_is_text(serve: Serve, browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    bad = runs.HOSTILE
    asked = dataclasses.replace(runs.question(bad, runs.photograph(0), bad), solution=bad, meta={bad: bad})
    closer = runs.looked_closer(asked)
    assert closer.result is not None
    closer = dataclasses.replace(closer, text=bad + closer.text, code=f"{closer.code}\n# {bad}")
    closer = dataclasses.replace(closer, result=dataclasses.replace(closer.result, stdout=bad))
    made = [
        runs.rollout(asked, [closer, runs.failed(bad), runs.said(f"{bad}<answer>{bad}</answer>")], bad, index=0),
        runs.rollout(asked, [runs.said(bad)], bad, index=1),
    ]
    path = runs.write_step(folder, 0, made)
    (folder / "metrics.jsonl").write_text(json.dumps({"stage": bad, "step": 0, bad: 1.0}) + "\n")
    (folder / "alarms.jsonl").write_text(json.dumps({"step": 0, "alarm": bad, "metric": bad, "text": bad}) + "\n")
    (folder / "table.md").write_text(f"| {bad} |\n| --- |\n| {bad} |\n{bad}\n")
    hostile = path.with_name(f"{bad.replace('/', '_')}.jsonl")
    path.rename(hostile)
    (folder / "config.toml").write_text('model = "tiny"')
    address = view(serve, folder)
    key = quote(hostile.name.removesuffix(".jsonl"), safe="")
    for look in (f"#/rollouts/{key}/1", f"#/rollouts/{key}/1?colour=kind", "#/curves", "#/steps", "#/scores"):
        browser.open(f"{address}{look}")
        browser.wait("document.body.dataset.ready")
        browser.wait("document.body.innerText.includes('window.hit')")
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        time.sleep(0.1)
        assert browser.run("window.hit === undefined && document.scripts.length") == len(VIEW)
        assert browser.count("img[src='x']") == 0
    assert runs.HOSTILE in browser.run(
        f"fetch('/api/a/rollout/{key}/1').then((r) => r.json()).then((v) => v.question.text)"
    )


def test_what_is_missing_or_damaged_is_said_in_the_page(serve: Serve, browser: Browser, small: Path) -> None:
    path = small / "rollouts" / "step_2.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    picture, crop = row["question"]["image"], row["turns"][0]["result"]["images"][0]
    (small / "images" / f"{picture}.png").unlink()
    (small / "images" / f"{crop}.png").write_bytes(b"no picture")
    for name in ("logprobs", "entropies"):
        del row["tokens"][name]
    path.write_text("\n".join([json.dumps(row), '{"question": 3}', *lines[2:-1], lines[-1][:100]]))
    shutil.rmtree(small / "checkpoints", ignore_errors=True)
    (small / "config.toml").write_text('model = "gone"')
    (small / "run.json").write_text("{")
    browser.open(view(serve, small))
    browser.wait(READY)
    notes = browser.text()
    for said in (
        "run.json cannot be read",
        "tokens are shown by their ids: the run has no checkpoint",
        "line 2 is no rollout and is left out",
        "line 8 is no rollout and is left out: it ends in the middle",
        f"picture missing: {picture[:12]}",
        f"picture {crop[:12]}: {crop}.png is damaged",
        "written by another version: the tokens lack logprobs, entropies",
    ):
        assert said in notes, f"{said} not in {notes[:3000]}"


def test_a_run_under_way_is_followed(serve: Serve, browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "live"
    folder.mkdir()
    (folder / "config.toml").write_text('model = "tiny"')
    (folder / "run.json").write_text(json.dumps({"verb": "rl", "is_finished": False}))
    browser.open(view(serve, folder))
    browser.wait("document.body.innerText.includes('no rollouts yet')")
    assert browser.count(".live") == 1
    made = runs.group_of_four()
    with Journal(folder / "rollouts" / ".step_0.jsonl", "someone", tiny_processor()) as journal:
        journal.add_begun(made[0])
        browser.wait("document.querySelector('#count')?.textContent === '1 of 1'")
        browser.wait(READY)
        assert "under way" in browser.text(".band-a") and "step 0 (under way)" in browser.text("nav")
        for one in made:
            journal.add(one)
        browser.wait("document.querySelector('#count').textContent === '4 of 4'")
    (folder / "rollouts" / ".step_0.jsonl").unlink()
    runs.write_step(folder, 0, made)
    runs.write_metrics(folder, 1)
    (folder / "run.json").write_text(json.dumps({"verb": "rl", "is_finished": True}))
    browser.wait("document.querySelectorAll('.live').length === 0")
    browser.wait("document.querySelector('.band-a')?.innerText.includes('1.5')")
    # Between two looks at the folder the page may ask for a journal that has just become the step's file.
    browser.errors[:] = [error for error in browser.errors if "rollout/.step_0/" not in error]


@pytest.mark.parametrize("rollouts", [800, pytest.param(5_000, marks=pytest.mark.soak)])
def test_many_rollouts_stay_responsive(rollouts: int, serve: Serve, browser: Browser, tmp_path: Path) -> None:
    """The page holds only the rows in sight, the group at hand, and curves of few points."""
    browser.open(view(serve, runs.large_run(tmp_path / "large", rollouts)))
    browser.wait(f"document.querySelector('#count')?.textContent === '{rollouts} of {rollouts}'")
    browser.wait(READY)
    assert browser.count(".row") < 80
    browser.press("1")
    browser.wait(f"document.querySelector('#count').textContent === '{rollouts // 4} of {rollouts}'")
    browser.press("1")
    browser.wait(f"document.querySelector('#count').textContent === '{rollouts} of {rollouts}'")
    browser.run("document.querySelector('.long-list').scrollTop = 1e9")
    browser.wait(f"[...document.querySelectorAll('.row')].some((r) => r.dataset.position === '{rollouts - 1}')")
    assert browser.count(".row") < 80
    browser.click(f".row[data-position='{rollouts - 1}']")
    browser.wait(f"document.querySelector('.question').innerText.includes('Question {rollouts // 8 - 1}?')")
    assert browser.count(".band-a > article") == 8 and browser.run("document.querySelectorAll('*').length") < 5_000
    for _ in range(5):
        browser.press("k")
    browser.wait(f"location.hash.startsWith('#/rollouts/step_0/{rollouts - 5}')")
    browser.press("g")
    browser.wait("document.querySelectorAll('.curve').length >= 43")
    longest = browser.run(
        "Math.max(...[...document.querySelectorAll('polyline')].map((p) => p.getAttribute('points').length))"
    )
    assert longest < 20_000, "2,000 steps are thinned"
