"""Which checkpoints a run has: the newest intact one to resume from, the best one, and those that are kept."""

import json
import logging
import re
from pathlib import Path
from typing import Literal

from thyme.train.durable import delete_folder, write_text
from thyme.train.manifest import Damaged, Manifest, read_manifest, verify

BEST = "best.json"
"""In the folder of the checkpoints: by stage, the name of the best one with its metric, step and value."""
_log = logging.getLogger(__name__)


def numbered(folder: Path, stage: str) -> dict[int, Path]:
    """The checkpoints of a stage that were written on its way, by step, in order."""
    pattern = re.compile(re.escape(stage) + r"_(\d+)")
    found = {int(m[1]): p for p in _folders(folder) if (m := pattern.fullmatch(p.name))}
    return dict(sorted(found.items()))


def newest_intact(folder: Path, stage: str) -> tuple[Path, Manifest] | None:
    """The checkpoint of a stage with most steps whose every file has the digest that its manifest says.

    A damaged one is passed over with a warning that names the file.
    """
    found: list[tuple[int, bool, Path, Manifest]] = []
    own = set(numbered(folder, stage).values())
    for path in _folders(folder):
        try:
            manifest = read_manifest(path)
        except Damaged as error:
            if path in own:
                _log.warning("thyme: %s; passed over", error)
            continue
        if manifest.stage == stage and any(name.startswith("trainer/") for name in manifest.files):
            found.append((manifest.step, path in own, path, manifest))
    for _, _, path, manifest in sorted(found, key=lambda entry: entry[:2], reverse=True):
        try:
            verify(path, manifest, digests=True)
        except Damaged as error:
            _log.warning("thyme: %s; going back to an earlier checkpoint", error)
            continue
        return path, manifest
    return None


def keep(folder: Path, stage: str, *, step: int, newest: int, best: Path | None = None) -> None:
    """Deletes the older checkpoints of a stage, now that the one of `step` is complete.

    Args:
        folder: of the checkpoints.
        step: of the newest. What lies beyond it was damaged when the run was resumed; it is replaced when its step
            comes, counts for nothing and stays.
        newest: so many stay; 0: all. What a stage writes at its end (`checkpoints/rl`) is not counted and stays.
        best: stays too.
    """
    done = [path for number, path in numbered(folder, stage).items() if number <= step]
    for path in done[:-newest] if newest else []:
        if path != best:
            delete_folder(path)


def name_best(folder: Path, stage: str, metric: str, mode: Literal["max", "min"], *, step: int) -> Path | None:
    """Finds the checkpoint up to `step` with the best score, the earliest of equals, and writes its name to best.json.

    Scores are those of the manifests, so a crash between a checkpoint and this file loses nothing.
    """
    scored: list[tuple[float, int, Path]] = []
    for number, path in numbered(folder, stage).items():
        try:
            score = read_manifest(path).score
        except Damaged:
            continue
        if score is not None and number <= step:
            scored.append((-score if mode == "max" else score, number, path))
    if not scored:
        return None
    value, number, path = min(scored)
    entry = {"checkpoint": path.name, "metric": metric, "step": number, "value": -value if mode == "max" else value}
    known = _read_best(folder)
    if known.get(stage) != entry:
        write_text(folder / BEST, json.dumps(known | {stage: entry}, indent=2) + "\n")
    return path


def _read_best(folder: Path) -> dict[str, object]:
    try:
        known = json.loads((folder / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _folders(folder: Path) -> list[Path]:
    """What may be a checkpoint; hidden names are half written or half deleted."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
