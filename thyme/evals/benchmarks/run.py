"""A benchmark through the rollout loop: every prediction saved with its trace as it ends, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from thyme.data.refusal import BadRow
from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.looking import Looking, look_again
from thyme.evals.benchmarks.rows import Rows
from thyme.evals.benchmarks.scorers import Scored
from thyme.evals.evidence import EvidenceFile
from thyme.evals.scoring import by_scorer
from thyme.rewards import Scorer
from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.records import images_beside, to_row
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout


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
    """Code blocks run, over all samples; the next three are of these."""
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
    values: Sequence[float] = ()
    """What each sample is worth."""


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
        if path.is_file():
            if not resume:
                raise ValueError(
                    f"{path} is there already: --eval.resume true goes on with it, another --name begins anew"
                )
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
        _without_half_a_line(self.path)
        before, self.done = _parsed(self.path)
        now = json.loads(json.dumps(settings))
        if changed := [name for name in now if now[name] != before.get(name)]:
            name = changed[0]
            raise ValueError(
                f"{self.path} was made with {name} = {before.get(name)!r}, this run has {now[name]!r}: "
                "repeat it as it was, or take another --name"
            )


def read_answers(path: Path) -> dict[str, Answered]:
    """What another run has answered, by index.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file: give the folder of a run of `thyme eval` on this benchmark")
    return _parsed(path)[1]


def _without_half_a_line(path: Path) -> None:
    """Cuts off what a killed run began to write and did not end."""
    if path.is_file() and not (data := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def _parsed(path: Path) -> tuple[dict[str, Any], dict[str, Answered]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        rows = [json.loads(line) for line in lines if line]
        return rows[0]["settings"], {row["index"]: Answered(**row) for row in rows[1:]}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: no predictions of an evaluation ({error!r}): take another --name") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """One benchmark on its way through the loop."""

    rows: Rows
    loop: RolloutLoop
    sampling: Sampling
    answers: Answers
    """Where they go; what it has is not asked again."""
    traces: Path
    """The file that rollouts are added to; what the sandbox returned goes to images/ beside its folder."""
    scorer: Scorer | None = None
    """Is asked about answers that the rules do not accept, where the published figures are a judge's."""
    evidence: EvidenceFile | None = None
    """Where it goes whether tools returned what answers say; None: nobody looks."""
    at_once: int = 64
    """Questions whose pictures are in memory at one time; the next ones are decoded meanwhile."""
    on_answer: Callable[[Answered], object] | None = None
    """Is told of each."""

    def run(self, numbers: Sequence[int]) -> None:
        """Asks those rows that are not answered yet, and keeps every answer as soon as all of its samples ended. A row
        whose picture cannot be read is left out (`rows.left_out`)."""
        asked = [number for number in numbers if self.rows.items[number].index not in self.answers.done]
        self.traces.parent.mkdir(parents=True, exist_ok=True)
        _without_half_a_line(self.traces)
        # Compressing pictures and reading text off them take longer than the loop may be kept.
        with (
            self.traces.open("a", encoding="utf-8", errors="replace") as file,
            ThreadPoolExecutor(1, thread_name_prefix="traces") as writer,
            Looking(self.evidence) as looking,
        ):
            traces = _Traces(file, ImageFolder(images_beside(self.traces)))

            def record(item: Item, rollout: Rollout) -> Future[None]:
                looking.add(item.index, rollout)
                return writer.submit(traces.add, rollout)

            for items, questions in self._chunks(asked):
                for future in self._chunk(items, questions, record):
                    future.result()
        if self.evidence is not None:
            look_again(self.evidence, self.traces, self.rows, self.answers.done.keys())

    def _chunks(self, numbers: Sequence[int]) -> Iterator[tuple[list[Item], list[Question]]]:
        """Questions with their pictures, `at_once` at a time, the next ones on their way meanwhile."""
        parts = [numbers[start : start + self.at_once] for start in range(0, len(numbers), self.at_once)]
        with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
            ahead = [pool.submit(self._decoded, part) for part in parts[:1]]
            for after in [*parts[1:], None]:
                if not ahead:
                    return
                found = ahead.pop().result()
                if after is not None:
                    ahead.append(pool.submit(self._decoded, after))
                if found:
                    yield [item for item, _ in found], [question for _, question in found]

    def _decoded(self, numbers: Sequence[int]) -> list[tuple[Item, Question]]:
        found = []
        for number in numbers:
            try:
                found.append((self.rows.items[number], self.rows.question(number)))
            except BadRow as error:
                self.rows.refuse(error)
        return found

    def _chunk(
        self, items: Sequence[Item], questions: Sequence[Question], record: Callable[[Item, Rollout], Future[None]]
    ) -> list[Future[None]]:
        ended: dict[int, list[Rollout]] = {}
        undecided: dict[int, list[Scored]] = {}
        written = []

        def end(rollout: Rollout) -> None:
            written.append(record(items[rollout.group], rollout))
            group = ended.setdefault(rollout.group, [])
            group.append(rollout)
            if len(group) < self.sampling.n:
                return
            group.sort(key=lambda one: one.index)
            item = items[rollout.group]
            scored = [self.rows.benchmark.score(item, one.answer or "") for one in group]
            if self._has_no_say(scored):
                self._keep(item, ended.pop(rollout.group), scored)
            else:
                undecided[rollout.group] = scored

        self.loop.run(questions, self.sampling, on_end=end)
        if undecided:  # all at once: a judge answers many in the time of one
            assert self.scorer is not None
            verdicts = by_scorer(self.scorer, [ended[group] for group in undecided])
            for (group, scored), given in zip(undecided.items(), verdicts, strict=True):
                judged = [
                    Scored(verdict.value, one.extracted, by_judge=True) if verdict.value > one.value else one
                    for one, verdict in zip(scored, given, strict=True)
                ]
                self._keep(items[group], ended[group], judged)
        return written

    def _has_no_say(self, scored: Sequence[Scored]) -> bool:
        """Whether a judge is not asked: there is none, the benchmark has rules, or all is right."""
        by_rules = self.rows.benchmark.published_by == "rules"
        return self.scorer is None or by_rules or all(one.value for one in scored)

    def _keep(self, item: Item, rollouts: Sequence[Rollout], scored: Sequence[Scored]) -> None:
        answered = _answered(item, rollouts, scored)
        self.answers.add(answered)
        if self.on_answer is not None:
            self.on_answer(answered)


class _Traces:
    """Rollouts as records, without the question's pictures: the benchmark's file has them."""

    def __init__(self, file: IO[str], store: ImageFolder) -> None:
        self._file, self._store = file, store

    def add(self, rollout: Rollout) -> None:
        bare = replace(rollout.question, image=None, more_images=())
        row = to_row(replace(rollout, question=bare), self._store) | {"rewards": None}
        self._file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
        self._file.flush()


def _answered(item: Item, rollouts: Sequence[Rollout], scored: Sequence[Scored]) -> Answered:
    said = [one.extracted if one.extracted is not None else "" for one in scored]
    most = max(said, key=lambda text: (bool(text), said.count(text), -said.index(text)))
    chosen = said.index(most)
    results = [turn.result for rollout in rollouts for turn in rollout.turns if turn.result is not None]
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
        pictures=sum(turn.num_images for rollout in rollouts for turn in rollout.turns),
        rounds=sum(len(rollout.turns) for rollout in rollouts) / len(rollouts),
        tokens=sum(rollout.num_sampled for rollout in rollouts) / len(rollouts),
        mended=sum(map(_mended, rollouts)),
        values=tuple(one.value for one in scored),
    )


def _mended(rollout: Rollout) -> int:
    """Calls that failed and whose next one ran."""
    ran = [turn.result.status.name == "OK" for turn in rollout.turns if turn.result is not None]
    return sum(not before and after for before, after in pairwise(ran))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
