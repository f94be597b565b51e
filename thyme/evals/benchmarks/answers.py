"""The predictions of a benchmark's run on disk: a line a question, as soon as it is answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.scorers import Scored
from thyme.evals.whole_lines import cut_to_whole_lines
from thyme.rollout.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What is kept of one question: a line of predictions.jsonl."""

    index: str
    prediction: str
    """The answer; of several samples the one that most of them gave, the earliest of these. "" where none was given."""
    value: float
    """What it is worth: the mean over the samples."""
    extracted: str | None
    """What the prediction was taken to say."""
    best: float
    """What the best sample is worth (pass@k)."""
    majority: float
    """What `prediction` is worth."""
    by_judge: bool
    status: str
    """Why the first sample ended."""
    calls: int
    """Code blocks run, over all samples and attempts; the next three are of these."""
    calls_ok: int
    repairs: int
    """Calls whose code was repaired before it ran."""
    pictures: int
    """Pictures that calls returned to the model."""
    rounds: float
    """Decoded rounds a sample."""
    tokens: float
    """Tokens drawn a sample."""
    mended: int = 0
    """Calls that failed and whose next one in the same sample ran."""
    values: tuple[float, ...] = ()
    """What each sample is worth."""
    attempt: int = 0
    """Which attempt the answer is of (`thyme.evals.benchmarks.paper_protocol`)."""


class Answers:
    """The predictions of one benchmark on disk. A file that ends in half a line, because the run was killed in it, is
    cut back to its last whole one.

    Args:
        path: predictions.jsonl.
        settings: what an answer depends on; those of a file that is gone on with must be the same.
        resume: go on with a file that is there.

    Raises:
        ValueError: the file is there and `resume` is off, or its settings are others.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.done: dict[str, Answered] = {}
        if path.is_file() and not resume:
            raise ValueError(f"{path} is there already: --eval.resume true goes on with it, another --name begins anew")
        cut_to_whole_lines(path)
        self.goes_on = path.is_file() and path.stat().st_size > 0
        """Whether there was such a file."""
        if self.goes_on:
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_line({"settings": dict(settings)}))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def add(self, answered: Answered) -> None:
        """One more line, on disk when this returns."""
        self._file.write(_line(asdict(answered)))
        self._file.flush()
        self.done[answered.index] = answered

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self, settings: Mapping[str, Any]) -> None:
        before, self.done = _parsed(self.path)
        require_same(self.path, before, settings)


def require_same(path: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: answers of this run depend on settings that were others in the file.
    """
    if changed := _changed(before, json.loads(json.dumps(settings))):
        name, theirs, ours = changed
        raise ValueError(
            f"{path} was made with {name} = {theirs!r}, this run has {ours!r}: repeat it as it was, or take another "
            "--name"
        )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs, by its full name, as it was and as it is; of those in `now` alone."""
    for name, value in now.items():
        was = before.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            if inner := _changed(was, value):
                return (f"{name}.{inner[0]}", *inner[1:])
        elif value != was:
            return name, was, value
    return None


def read_answers(path: Path) -> tuple[dict[str, Any], dict[str, Answered]]:
    """What the answers of another run depend on, and these by index.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file: give the folder of a run of `thyme eval` on this benchmark")
    return _parsed(path)


def _parsed(path: Path) -> tuple[dict[str, Any], dict[str, Answered]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        first, *rows = [json.loads(line) for line in lines if line]
        answers = [Answered(**row | {"values": tuple(row.get("values", ()))}) for row in rows]
        return first["settings"], {one.index: one for one in answers}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no predictions of an evaluation ({error!r}): take another --name") from None


def answered(
    item: Item, rollouts: Sequence[Rollout], scored: Sequence[Scored], given_up: Sequence[Rollout] = ()
) -> Answered:
    """What is kept of a question.

    Args:
        item: the question.
        rollouts: its samples.
        scored: what each is worth.
        given_up: earlier attempts of its only sample: what they did counts, what they said does not.
    """
    said = [one.extracted if one.extracted is not None else "" for one in scored]
    most = max(said, key=lambda text: (bool(text), said.count(text), -said.index(text)))
    chosen = said.index(most)
    drawn = [*given_up, *rollouts]
    results = [turn.result for rollout in drawn for turn in rollout.turns if turn.result is not None]
    return Answered(
        index=item.index,
        prediction=rollouts[chosen].answer or "",
        value=sum(one.value for one in scored) / len(scored),
        extracted=scored[chosen].extracted,
        best=max(one.value for one in scored),
        majority=scored[chosen].value,
        by_judge=any(one.by_judge for one in scored),
        status=rollouts[0].status.value,
        calls=len(results),
        calls_ok=sum(result.status.name == "OK" for result in results),
        repairs=sum(bool(result.fixes) for result in results),
        pictures=sum(turn.num_images for rollout in drawn for turn in rollout.turns),
        rounds=sum(len(rollout.turns) for rollout in drawn) / len(rollouts),
        tokens=sum(rollout.num_sampled for rollout in drawn) / len(rollouts),
        mended=sum(map(_mended, drawn)),
        values=tuple(one.value for one in scored),
        attempt=len(given_up),
    )


def _mended(rollout: Rollout) -> int:
    """Calls that failed and whose next one ran."""
    ran = [turn.result.status.name == "OK" for turn in rollout.turns if turn.result is not None]
    return sum(not before and after for before, after in pairwise(ran))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
