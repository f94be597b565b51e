"""README's map is the territory, links lead somewhere, and a table of figures says what it was measured with."""

import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from thyme.cli import VERBS
from thyme.options import keys

ROOT = Path(__file__).parent.parent
DESCRIPTION = 37  # the column at which the tree says what a path is


def tracked() -> set[str]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(out.splitlines())


def tree_block() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.search(r"## The tree\n+```\n(.*?)```", text, re.DOTALL).group(1).splitlines()  # type: ignore[union-attr]


def test_every_path_in_the_tree_exists_and_every_source_is_in_it() -> None:
    named: set[str] = set()
    folder = ""
    for line in tree_block():
        paths = line[:DESCRIPTION].split()
        if line[0] != " ":
            folder = paths[0] if paths[0].endswith("/") else ""
        named |= {(folder if line[0] == " " else "") + path.rstrip("/") for path in paths}
    files = tracked()
    folders = {str(parent) for f in files for parent in Path(f).parents}
    for path in named:
        assert path in files or path in folders, f"README's tree names {path}, which does not exist"
    covered = {n for n in named if n in folders and n not in {"thyme", "kernels", "csrc", "bench", "."}}
    for f in files:  # an __init__.py or a py.typed goes with its folder
        marker = f.endswith(("__init__.py", "/py.typed")) or f == "thyme/kernels"
        if f.startswith(("thyme/", "kernels/", "csrc/")) and not marker:
            assert f in named or any(f.startswith(c + "/") for c in covered), f"README's tree does not name {f}"


def make_targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = make_targets()
    named = set(re.findall(r"`?make (\w+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "soak", "bench"} <= named
    assert named <= targets


def test_hook_and_workflow_run_what_the_makefile_has() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split() for repository in hooks for hook in repository["hooks"]]
    assert [repository["repo"] for repository in hooks] == ["local"] and entries == [["make", "lint"]]

    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    steps = [step["run"].split() for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    matrix = workflow["jobs"]["make"]["strategy"]["matrix"]
    assert matrix["command"] == ["test", "demo"], "README's two commands"
    made = {word for step in steps if step[0] == "make" for word in step[1:2]} - {"${{"} | set(matrix["command"])
    assert made == {"test", "demo", "soak"} <= make_targets()


def test_links_between_documents_lead_somewhere() -> None:
    documents = [ROOT / name for name in tracked() if name.endswith(".md")]
    assert len(documents) >= 3
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


def test_files_that_the_guides_name_exist() -> None:
    files = tracked()
    folders = {f"{parent}/" for f in files for parent in Path(f).parents}
    for guide in ("CONTRIBUTING.md", "SECURITY.md"):
        named = set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", (ROOT / guide).read_text()))
        assert len(named) >= (20 if guide == "CONTRIBUTING.md" else 1)
        for path in named:
            assert path in files | folders, f"{guide} names {path}, which does not exist"


def test_figures_say_what_they_were_measured_with() -> None:
    sections = (ROOT / "docs" / "performance.md").read_text().split("\n## ")[1:]
    assert sections
    for section in sections:
        rows = re.findall(r"^\| (\w+) \| (.+) \|$", section, re.MULTILINE)
        frame = {name: value for name, value in rows if name in {"machine", "versions", "commit", "command", "figures"}}
        title = section.splitlines()[0]
        assert len(frame) == 5, f"docs/performance.md, {title}: the frame has only {sorted(frame)}"
        assert re.fullmatch("[0-9a-f]{7,40}", frame["commit"]) and "torch" in frame["versions"], title
        assert re.search(r"medians? of \d+", frame["figures"]), f"{title}: how many measurements?"


def test_no_path_of_a_machine_is_tracked() -> None:
    pattern = re.compile(r"(?<![A-Za-z0-9_.])/(?:home|root|work|Users)/[A-Za-z0-9_.]")
    for name in sorted(tracked()):
        path = ROOT / name
        if path.suffix in {".png", ".jpg"} or path.is_symlink() or not path.exists():
            continue
        assert not pattern.search(path.read_text()), name


def test_the_walks_name_files_that_exist_in_the_order_of_the_story() -> None:
    text = (ROOT / "README.md").read_text()
    walk = text.split("## A request's life")[1].split("\n## ")[0]
    named = re.findall(r"`((?:thyme|kernels)/[\w/]+(?:\.py|/))`", walk)
    assert len(named) >= 20
    for name in named:
        assert (ROOT / name).exists(), f"README's walk names {name}, which does not exist"
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", walk, re.MULTILINE)]
    assert numbers == list(range(1, 13))


def test_the_verbs_of_the_readme_are_verbs_and_the_verbs_are_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    commands = re.findall(
        r"^(?:\.venv/bin/)?thyme "
        r"(\w+(?: (?:build|check|compose|convert|dedup|review|rollout|run|stats|synth|train)\b)?)",
        text,
        re.MULTILINE,
    )
    assert commands and set(commands) <= set(VERBS)
    for option in re.findall(r"^thyme .*?--([\w.-]+)", text, re.MULTILINE):
        assert option == "dry-run" or any(option.replace("-", "_") in HELP_KEYS[verb] for verb in VERBS), option


HELP_KEYS = {verb: {key for key, _ in keys(import_module(module).Config)} for verb, module in VERBS.items()}
