"""The pictures of the pages in README: `python -m tests.report.screenshots runs/demo docs/pictures` after `make demo`.

Writes view.png (a group of the newest step, at a rollout with code that is right) and curves.png; with a file of rows
(`thyme data synth rows`) as a third argument, review.png too.
"""

import io
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from tests.report.browser import Browser
from tests.report.conftest import served
from thyme.report.decisions import Decisions
from thyme.report.review_app import Review, review_app
from thyme.report.view_app import view_app
from thyme.sandbox import SandboxConfig
from thyme.verbs.data_review import Config, ReviewRows, open_rows, problems, rerun
from thyme.verbs.spelling import open_run

COLOURS = 128
"""Of a picture that is kept: a page has few, and a palette makes its file a third as large."""
SETTLED = "[...document.images].every((image) => image.complete)"


def keep(photograph: bytes, path: Path) -> None:
    """Writes a photograph with few colours."""
    picture = Image.open(io.BytesIO(photograph)).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def view_pictures(run: Path, out: Path) -> None:
    opened = open_run(run)
    file = opened.described()["files"][-1]["key"]
    table = opened.table(file)
    worth = [
        line
        for line, codes, right in zip(table["line"], table["codes"], table["right"], strict=True)
        if codes and right
    ]
    line = (worth or table["line"])[0]
    with served(view_app({"a": opened})) as address, Browser(1500, 1100) as browser:
        browser.open(f"{address}#/rollouts/{file}/{line}")
        browser.wait(f"document.querySelector('article.at-hand header') && {SETTLED}")
        keep(browser.photograph(), out / "view.png")
        browser.press("g")
        browser.wait("document.querySelectorAll('.curve').length > 0")
        keep(browser.photograph(), out / "curves.png")


def review_picture(rows: Path, out: Path) -> None:
    data = open_rows(Config(rows=(rows,)))
    with (
        TemporaryDirectory() as folder,
        closing(Decisions(Path(folder) / "decisions.sqlite")) as decisions,
        rerun(SandboxConfig(workers=1)) as (again, why_not),
    ):
        review = Review(
            ReviewRows(data),
            title=rows.name,
            summary=data.summary(),
            decisions=decisions,
            reviewer="ann",
            rerun=again,
            problems=problems,
            why_not=why_not,
        )
        with served(review_app(review)) as address, Browser(1500, 900) as browser:
            place = next((i for i in range(len(data)) if "crop(" in data[i].response), 0)
            browser.open(f"{address}#/{place + 1}")
            browser.wait("document.querySelector('.asked')")
            browser.press("u")
            browser.wait(f"document.querySelector('#again .card') && {SETTLED}")
            keep(browser.photograph(), out / "review.png")


if __name__ == "__main__":
    run, out, *rows = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    view_pictures(run, out)
    for path in rows:
        review_picture(path, out)
