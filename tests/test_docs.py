"""The pages of docs: what they tell to run runs, what they tell to write is read, and no link of their site is dead."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from transformers import PreTrainedTokenizerFast

from tests.pages import DOCS, LANGUAGES, PAGES, ROOT, Block, Command, blocks
from tests.reader import Reader, furnish, verb_of
from thyme.cli import main
from thyme.config import from_dict, load_recipe
from thyme.options import keys
from thyme.verbs.config import RunConfig
from thyme.verbs.opening import open_model, save_model
from thyme.verbs.recipe import Recipe
from thyme.verbs.table import VERBS

CHAPTERS = ("index", "train", "evaluate", "build_data", "serve", "add_an_op", "sandbox", "performance", "benchmarks")
QUICK = {"sandbox.md"}
"""Pages whose commands take a few seconds; the others are followed in the long form."""
FILES = re.compile(r"`((?:[\w.<>*-]+/)+[\w.<>*-]+)(?:::\w+)?`")


def names(page: Path) -> str:
    return page.stem


def all_blocks() -> list[Block]:
    return [block for page in [*PAGES, ROOT / "README.md"] for block in blocks(page)]


@pytest.fixture(scope="session")
def belongings(
    tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Path]:
    """What a reader has, to be copied for each page."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("reader")
    toy = open_model(RunConfig(threads=1))
    furnish(folder, byte_level_tokenizer, lambda place: save_model(toy, place))
    yield folder


def follow(page: Path, belongings: Path, folder: Path) -> None:
    subprocess.run(["cp", "-a", f"{belongings}/.", folder], check=True)
    with Reader(folder) as reader:
        for block in blocks(page):
            reader.follow(block)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in QUICK], ids=names)
def test_a_page_can_be_followed(page: Path, belongings: Path, tmp_path: Path) -> None:
    follow(page, belongings, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in QUICK], ids=names)
def test_every_page_can_be_followed(page: Path, belongings: Path, tmp_path: Path) -> None:
    follow(page, belongings, tmp_path)


def test_a_reader_fails_where_a_page_is_wrong(belongings: Path, tmp_path: Path) -> None:
    """Else the two above would say nothing."""
    page = tmp_path / "page.md"
    page.write_text("```sh\nthyme sandbox run missing.py\n```\n```sh\n# needs a GPU\nfalse\n```\n```sh\nfalse\n```\n")
    place = tmp_path / "place"
    place.mkdir()
    missing, gpu, false = blocks(page)
    with Reader(place) as reader:
        with pytest.raises(AssertionError, match=r"page.md:2: thyme sandbox run missing.py: exit code 2"):
            reader.follow(missing)
        reader.follow(gpu)
        with pytest.raises(AssertionError, match=r"page.md:9: false"):
            reader.follow(false)


@pytest.mark.parametrize("block", all_blocks(), ids=lambda block: block.where)
def test_a_block_says_what_it_is_and_can_be_read(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that is not run here: verbs, recipes and options of its commands are looked up."""
    assert block.language in LANGUAGES, f"{block.where}: ```{block.language}"
    if block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language == "json":
        json.loads("\n".join(line for line in block.text.splitlines() if not line.startswith("#")))
    elif block.language == "toml":
        tomllib.loads(block.text)
        path = tmp_path / "recipe.toml"
        path.write_text(block.text)
        from_dict(Recipe, load_recipe(path, Recipe))
    elif block.language == "sh":
        monkeypatch.chdir(tmp_path)
        for other in blocks(block.page):
            if other.saved_as and other.language == "toml":
                (tmp_path / other.saved_as).write_text(other.text)
        commands = list(block.commands())
        assert commands, f"{block.where}: no command"
        for command in commands:
            understood(command, block, monkeypatch)


def understood(command: Command, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """thyme takes these words; make has this target; pip knows this extra; a file that Python runs exists."""
    words = command.words
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "thyme" or "-m thyme " in command.text:
        args = words[words.index("thyme") + 1 :]
        if args[0].startswith("-"):
            return
        assert verb_of(args), f"{command.where}: {command.text}: no such verb"
        module = import_module(VERBS[verb_of(args)])
        monkeypatch.setattr(module, "run", lambda config: 0)
        try:
            main(args)
        except SystemExit as ended:
            assert not ended.code, f"{command.where}: {command.text}: refused"
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command.where
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for found in re.findall(r"thyme\[([\w,]+)\]", command.text):
            assert set(found.split(",")) <= set(extras), command.where
    elif words[0] in ("python", "pytest", "bash") and words[1].endswith((".py", ".sh")):
        is_theirs = block.needs is not None and "/" not in words[1]  # a program that the reader must have
        is_saved = any(other.saved_as == words[1] for other in blocks(block.page))
        assert is_theirs or is_saved or (ROOT / words[1]).exists(), f"{command.where}: {words[1]}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_options_and_files_that_a_page_speaks_of_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    known = {verb: {key for key, _ in keys(import_module(module).Config)} for verb, module in VERBS.items()}
    for command in re.findall(r"`thyme ([^`]+)`", text):
        verb = verb_of(command.split())
        assert verb, f"{page.name}: thyme {command}"
        for option in re.findall(r"--([\w.-]+)", command):
            key = option.replace("-", "_")
            is_known = key in known[verb] or key in ("dry_run", "help", "help_all") or key.startswith("rollout.phases.")
            assert is_known, f"{page.name}: thyme {verb} --{option}"
    for name in FILES.findall(text):
        top = name.partition("/")[0]
        # Runs are the reader's: some may be there, as after `make demo`.
        if top != "runs" and (ROOT / top).exists() and not re.search(r"[<*]", name):
            assert (ROOT / name).exists(), f"{page.name} names {name}, which does not exist"


def test_every_chapter_has_a_page() -> None:
    assert {f"{name}.md" for name in CHAPTERS} <= {page.name for page in PAGES}


def test_pictures_are_small_and_each_is_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    pictures = sorted((DOCS / "pictures").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.suffix == ".png" and picture.stat().st_size < 150_000, picture.name
        assert f"(pictures/{picture.name})" in text, f"no page shows {picture.name}"


# The site.


class Page(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value for name, value in attrs if value is not None}
        self.anchors |= {said[name] for name in ("id", "name") if name in said}
        if tag == "a" and "href" in said:
            self.links.append(said["href"])
        self.loads += [said[name] for name in ("src", "href") if tag != "a" and name in said]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a link or an anchor that leads nowhere is an error of mkdocs."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_no_link_of_it_is_dead(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    built = {path.relative_to(site).parts[0] for path in pages}
    assert {page.stem for page in PAGES} - {"index"} <= built and "index.html" in built
    checked = 0
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc or path.name == "404.html":
                continue
            target = path if not url.path else (path.parent / unquote(url.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.relative_to(site)}: {link}"
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].anchors, f"{path.relative_to(site)}: {link}"
            checked += 1
    assert checked > 200


def test_the_site_loads_nothing_from_elsewhere_and_shows_no_markdown(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not [url for url in Page(text).loads if urlsplit(url).netloc], path
        shown = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r"```|\| --- \||\]\([\w./]+\)", shown), f"{path.relative_to(site)}: Markdown was left"


def test_a_dead_link_and_a_dead_anchor_fail_the_build(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    for link in ("nowhere.md", "index.md#nowhere", "../nowhere.md"):
        docs = tmp_path / link.replace("/", "_") / "docs"
        docs.mkdir(parents=True)
        (docs / "index.md").write_text(f"# A\n\n[b]({link})\n")
        for name in ("mkdocs.yml", "docs/site.py"):
            (docs.parent / name).write_text((ROOT / name).read_text())
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        done = subprocess.run(command, cwd=docs.parent, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "nowhere" in done.stdout + done.stderr, link
