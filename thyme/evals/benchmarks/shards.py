"""Files of shards, put together: what each machine has answered becomes what one machine would have written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from glob import escape
from pathlib import Path
from typing import Any

from thyme.evals.benchmarks.answers import Answers, read_answers, require_same
from thyme.evals.evidence import EvidenceFile, read_evidence
from thyme.evals.whole_lines import cut_to_whole_lines

FOLDERS = ("rollouts", "evidence", "predictions")
"""Of a run, in the order in which they are put together: what a row needs is there before its answer is."""
_PARTS = "?????-of-?????"


def shards_of(folder: Path, name: str) -> list[str]:
    """The names of the shards that have answered rows of `name` (a benchmark, perhaps under a control), in order."""
    paths = sorted((folder / "predictions").glob(f"{escape(name)}.{_PARTS}.jsonl"))
    return [path.stem.removeprefix(f"{name}.") for path in paths]


def put_together(folder: Path, name: str, settings: Mapping[str, Any]) -> int:
    """Adds what shards have answered to the files of the whole, and removes theirs. A run that is killed in the middle
    goes on with the next one: no line comes twice.

    Args:
        folder: runs/<name>.
        name: of the benchmark, perhaps under a control.
        settings: what answers depend on.

    Returns:
        The number of shards that had answered.

    Raises:
        ValueError: a shard was asked under other settings; names the file and the first of them.
    """
    found = shards_of(folder, name)
    for shard in found:
        rollouts, evidence, predictions = (folder / kind / f"{name}.{shard}.jsonl" for kind in FOLDERS)
        for path in (rollouts, evidence, predictions):
            cut_to_whole_lines(path)
        before, answered = read_answers(predictions)
        require_same(predictions, before, settings)
        if rollouts.is_file():
            _add_lines(rollouts, folder / "rollouts" / f"{name}.jsonl")
        if evidence.is_file():
            with closing(EvidenceFile(folder / "evidence" / f"{name}.jsonl")) as whole:
                for one in read_evidence(evidence):
                    whole.put(one)
        with closing(Answers(folder / "predictions" / f"{name}.jsonl", settings, resume=True)) as answers:
            for index, answer in answered.items():
                if index not in answers.done:
                    answers.add(answer)
        for path in (rollouts, evidence, predictions):  # while the last one stands, a run that goes on comes here again
            path.unlink(missing_ok=True)
    return len(found)


def _add_lines(part: Path, whole: Path) -> None:
    """Adds the lines of a file of rollouts to another one."""
    cut_to_whole_lines(whole)
    with whole.open("a", encoding="utf-8", newline="\n") as file:
        for line in _fewer(part, whole):
            file.write(line)
            file.flush()


def _fewer(part: Path, whole: Path) -> Iterator[str]:
    """The lines that the other file has not yet: of each question and sample all that it has fewer, since a killed run
    may have added the first ones."""
    had = Counter(key for key, _ in _keyed(whole))
    seen = Counter[tuple[str, int]]()
    for key, line in _keyed(part):
        seen[key] += 1
        if seen[key] > had[key]:
            yield line


def _keyed(path: Path) -> Iterator[tuple[tuple[str, int], str]]:
    """The lines of a file of rollouts by question and sample."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
                key = row["question"]["id"], row["index"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number + 1} is no rollout ({error!r}): take another --name") from None
            yield key, line
