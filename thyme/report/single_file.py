"""Pages in one file: a run, or a single rollout, with all that a server would have been asked for inside."""

import base64
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from thyme.report.page import single_page
from thyme.report.picture_store import Pictures, PictureStore
from thyme.report.rollout_file import COLUMNS
from thyme.report.rollout_summary import summary_of
from thyme.report.rollout_view import Spelling, rollout_view
from thyme.report.run_folder import RunFolder

PICTURE_SIZE = 480
"""Longer side of the pictures in a page, in pixels."""


class ReportPage(NamedTuple):
    """A page, and how much of the run is in it."""

    text: str
    rollouts: int
    of: int
    """Rollouts that the run has."""


def report_page(run: RunFolder, most: int) -> ReportPage:
    """A run in one file.

    Args:
        most: rollouts, in whole groups: the first group of each file from the newest back, then the second, and so on.
    """
    described = run.described()
    tables = {file["key"]: run.table(file["key"]) for file in described["files"]}
    chosen = _chosen(tables, most)
    answers: dict[str, Any] = {"/api/a/metrics": run.metrics(), "/api/a/alarms": run.alarms()}
    problems: dict[str, str] = {}
    for key, table in tables.items():
        answers[_address("table", key)] = _cut(table, chosen[key])
        for line in chosen[key]:
            address = f"{_address('rollout', key)}/{line}"
            try:
                answers[address] = run.rollout(key, line)
            except ValueError as error:
                problems[address] = str(error)
    files = [file | {"rollouts": len(chosen[file["key"]])} for file in described["files"]]
    answers["/api/runs"] = {"a": described | {"files": files, "finished": True}}
    text = _page(f"{run.name} - thyme report", answers, run.pictures, problems)
    return ReportPage(text, sum(map(len, chosen.values())), sum(len(table["line"]) for table in tables.values()))


def trace_page(title: str, row: Mapping[str, Any], pictures: Pictures, spelling: Spelling | None) -> str:
    """One rollout in one file.

    Args:
        title: of the page, and the name of the run in it.
        row: what `thyme.rollout.records.to_row` makes of a rollout.
        pictures: the row's.
        spelling: of its tokens.
    """
    summary = summary_of(row, sum(row["tokens"]["sampled"]), None)
    table: dict[str, Any] = {name: [getattr(summary, name)] for name in COLUMNS}
    table |= {"line": [1], "seed": [str(summary.seed)], "problems": [], "stamp": ""}
    file = {"key": "trace", "step": None, "is_journal": False, "rank": None, "rollouts": 1, "stamp": ""}
    described = {"name": title, "files": [file], "scores": [], "notes": [], "finished": True, "max_mismatch": 0.1}
    answers = {
        "/api/runs": {"a": described | {"metrics_stamp": "", "stamp": ""}},
        "/api/a/metrics": {"stages": {}, "problems": []},
        "/api/a/alarms": [],
        "/api/a/table/trace": table,
        "/api/a/rollout/trace/1": rollout_view(row, pictures, spelling),
    }
    return _page(title, answers, PictureStore(pictures))


def _page(
    title: str, answers: Mapping[str, Any], store: PictureStore, problems: Mapping[str, str] | None = None
) -> str:
    pictures: dict[str, str] = {}
    for name in set(_picture_names(answers)):
        try:
            data, kind = store.encoded(name, PICTURE_SIZE)
        except (OSError, ValueError):
            continue  # the rollout's notes say so
        pictures[name] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return single_page(title, {"answers": answers, "pictures": pictures, "problems": problems or {}})


def _picture_names(value: Any) -> Iterator[str]:
    """Of every picture in the answers: what has a name and a size, and what a region lies in."""
    if isinstance(value, Mapping):
        if "width" in value and "height" in value:
            yield str(value.get("name", value.get("source")))
        for part in value.values():
            yield from _picture_names(part)
    elif isinstance(value, list):
        for part in value:
            if isinstance(part, dict | list):
                yield from _picture_names(part)


def _chosen(tables: Mapping[str, Mapping[str, Any]], most: int) -> dict[str, list[int]]:
    """The lines of each file that are shown."""
    groups: dict[str, list[list[int]]] = {}
    for key, table in tables.items():
        by_group: dict[tuple[int, str], list[int]] = {}
        for line, group, question in zip(table["line"], table["group"], table["question_id"], strict=True):
            by_group.setdefault((group, question), []).append(line)
        groups[key] = list(by_group.values())
    chosen: dict[str, list[int]] = {key: [] for key in tables}
    left = most
    for place in range(max((len(found) for found in groups.values()), default=0)):
        for key in reversed(list(groups)):
            if place < len(groups[key]) and len(groups[key][place]) <= left:
                chosen[key] += groups[key][place]
                left -= len(groups[key][place])
    return chosen


def _cut(table: Mapping[str, Any], lines: list[int]) -> dict[str, Any]:
    """The table with these lines only, and how many it had."""
    kept = set(lines)
    places = [place for place, line in enumerate(table["line"]) if line in kept]
    columns = {name: [table[name][place] for place in places] for name in ("line", *COLUMNS)}
    return {**columns, "problems": table["problems"], "stamp": table["stamp"], "of": len(table["line"])}


def _address(what: str, key: str) -> str:
    """As the page spells it (encodeURIComponent)."""
    unreserved = "-_.!~*'()"
    return f"/api/a/{what}/{quote(key, safe=unreserved)}"
