"""Name rows that repeat others, and pictures that leak from evaluation files; write the rows that are left."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.data.config import Format
from thyme.result import Result
from thyme.verbs.rows import row_progress


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared with what."""

    paths: tuple[Path, ...] = field(metadata=POSITIONAL)
    """Files, or folders of *.parquet, *.jsonl and *.json."""
    against: tuple[Path, ...] = ()
    """Evaluation files, whose pictures may not be trained on: any of these, or benchmarks' TSV."""
    format: Format = "auto"
    """How rows are laid out: thyme, messages, openai, verl or sharegpt; auto tells by each row's keys."""
    images: Path | None = None
    """The folder that relative paths of pictures start from; none: the folder of the file that names them."""
    distance: int = 6
    """Bits of 64 that the hashes of the same picture may differ in, from 0 to 7."""
    out: Path | None = None
    """A folder for the files without the rows that repeat or leak, under their own names; none: they are only named."""
    report: Path | None = None
    """A file for every match, a JSON object a line; none: the first hundred are printed."""


SHOWN = 100


def run(config: Config) -> Result:
    """Prints each match as it is found, and the counts."""
    from thyme.data.dedup import DedupReport, Match, dedup
    from thyme.data.kept import copies, write_kept
    from thyme.data.tables.opening import data_files

    files = data_files(config.paths)
    places = {} if config.out is None else copies(files, config.out)
    found: list[dict[str, object]] = []

    def tell(match: Match) -> None:
        kind = "leaks" if match.leaks else "repeats" if match.same_question else "shows the picture of"
        found.append(_as_json(match, kind))
        if config.report is None and len(found) <= SHOWN and kind != "shows the picture of":
            row, like = match.row, match.like
            at = f"{row.path}: row {row.row}, picture {row.picture}"
            print(f"{at} {kind} {like.path}: row {like.row}, picture {like.picture} ({match.bits} bits of 64 differ)")
        if config.report is not None:
            with config.report.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")

    if config.report is not None:
        config.report.unlink(missing_ok=True)
    with row_progress(files, "dedup") as line:
        report: DedupReport = dedup(
            files,
            config.against,
            layout=config.format,
            images=config.images,
            distance=config.distance,
            on_match=tell,
            on_row=line.advance,
        )
    print(
        f"{report.rows} rows, {report.pictures} pictures: {len(report.repeated)} rows repeat, {report.shared} share a "
        f"picture with another question; {len(report.leaked)} leak from "
        f"{report.evaluation_pictures} evaluation pictures"
    )
    for reason, count in report.unreadable.most_common():
        print(f"not compared: {count} rows, {reason}: the first is {report.examples[reason]}")
    written: dict[Path, int] = {}
    for path, place in places.items():
        written[place] = write_kept(path, place, {row for file, row in report.repeated | report.leaked if file == path})
        print(f"{place}: {written[place]} rows")
    counts = {"rows": report.rows, "pictures": report.pictures, "shared": report.shared}
    counts |= {"repeated": len(report.repeated), "leaked": len(report.leaked)}
    counts |= {"evaluation_pictures": report.evaluation_pictures}
    return Result(counts | {"unreadable": report.unreadable, "matches": found, "written": written})


def _as_json(match: object, kind: str) -> dict[str, object]:
    from thyme.data.dedup import Match

    assert isinstance(match, Match)
    row, like = ({"file": str(p.path), "row": p.row, "picture": p.picture} for p in (match.row, match.like))
    return {"kind": kind, "of": row, "like": like, "bits": match.bits}
