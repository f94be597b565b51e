"""The rows of benchmarks, asked by this machine's engine or by Ray workers, all of them or a shard's. No verb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from thyme.progress import progress
from thyme.shard import Shard
from thyme.verbs.notes import note

if TYPE_CHECKING:
    from thyme.cluster import Workers
    from thyme.data.refusal import Refusal
    from thyme.evals.benchmarks.answers import Answered
    from thyme.evals.benchmarks.keeping import Asked, Kept
    from thyme.evals.benchmarks.paper_protocol import PaperProtocol
    from thyme.evals.benchmarks.rows import Rows
    from thyme.evals.benchmarks.source import BenchmarkFile
    from thyme.rewards import Scorer
    from thyme.rollout.config import RolloutConfig
    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.sampling import Sampling
    from thyme.verbs.config import EvaluatedConfig

ALL = Shard()
_BATCHES = 4
"""That a worker has of one run at least, where there are rows enough: who is faster gets more."""
_CHUNKS = 4
"""Of `eval.at_once` questions, that a batch has at most."""


def rows_of(config: EvaluatedConfig) -> Sequence[Rows]:
    """What is asked: the benchmarks named, or held-out questions. All files are opened before a model is."""
    return open_files(config) if config.eval.benchmark else _held_out(config)


def open_files(config: EvaluatedConfig) -> list[BenchmarkFile]:
    """The files of the benchmarks named."""
    from thyme.evals.benchmarks.known import benchmark
    from thyme.evals.benchmarks.source import BenchmarkFile

    named = [name.strip() for name in config.eval.benchmark.split(",") if name.strip()]
    known = {found.name: found for found in map(benchmark, named)}
    if not known:
        raise ValueError("eval.benchmark: which benchmark are they predictions for?")
    path = Path(config.eval.data)
    if len(known) > 1 and path.is_file():
        raise ValueError(f"eval.data: {path} is one file, {len(known)} benchmarks are named: give their folder")
    return [BenchmarkFile(one, path) for one in known.values()]


def protocol_of(config: EvaluatedConfig) -> PaperProtocol | None:
    """The paper's, where the config asks for it."""
    from thyme.evals.benchmarks.paper_protocol import PaperProtocol

    return PaperProtocol(config.eval.paper_retries) if config.eval.paper_protocol else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of asking the rows of one benchmark."""

    number: int
    """Of the benchmark, among those of the config."""
    control: str
    """That it is asked under, "tools" if under none."""
    disturbance: str
    """Of its pictures; "": they are as they are."""

    def name(self, rows: Rows) -> str:
        """Of its files."""
        from thyme.evals.benchmarks.controls import TOOLS

        parts = [rows.benchmark.name, self.disturbance, self.control if self.control != TOOLS else ""]
        return ".".join(part for part in parts if part)

    def rows(self, config: EvaluatedConfig, rows: Rows, traces: Path) -> Rows:
        """The benchmark's rows in this way.

        Args:
            config: of the run.
            rows: as they are.
            traces: of the run with tools.
        """
        from thyme.evals.benchmarks import controls
        from thyme.evals.benchmarks.robustness import DisturbedRows

        if self.disturbance:
            rows = DisturbedRows(rows, self.disturbance, config.eval.seed, config.eval.limit)
        return rows if self.control == controls.TOOLS else controls.rows_of(self.control, rows, traces)

    def sampling(self, config: EvaluatedConfig, rollout: RolloutConfig) -> Sampling:
        """How answers are drawn."""
        from thyme.evals.benchmarks.controls import sampling_of

        return sampling_of(self.control, rollout.sampling(**config.eval.drawn()))


class Asker(Protocol):
    """What has a model and asks it."""

    @property
    def weights(self) -> str:
        """Fingerprint of the model."""

    @property
    def rollout(self) -> RolloutConfig:
        """In the model's dialect."""

    def ask(self, way: Way, rows: Rows, numbers: Sequence[int], kept: Kept, traces: Path) -> None:
        """Asks rows, by number, and has what comes of them kept."""


@dataclass(frozen=True, slots=True)
class _Here:
    """Asks the engine of this process."""

    config: EvaluatedConfig
    loop: RolloutLoop
    scorer: Scorer | None
    weights: str

    @property
    def rollout(self) -> RolloutConfig:
        return self.loop.config

    def ask(self, way: Way, rows: Rows, numbers: Sequence[int], kept: Kept, traces: Path) -> None:
        self.asking(way, rows).run(numbers, kept)

    def asking(self, way: Way, rows: Rows) -> Any:
        """How rows, in their way, are asked here."""
        from thyme.evals.benchmarks.run import Asking

        return Asking(
            rows=rows,
            loop=self.loop,
            sampling=way.sampling(self.config, self.rollout),
            scorer=self.scorer,
            protocol=protocol_of(self.config),
            at_once=self.config.eval.at_once,
        )


@contextmanager
def _here(config: EvaluatedConfig) -> Iterator[_Here]:
    from thyme.model.fingerprint import fingerprint
    from thyme.rewards.config import RewardConfig
    from thyme.rewards.opening import open_scorer
    from thyme.verbs.opening import open_loop, open_model

    judge = nullcontext() if config.judge.url is None else open_scorer(RewardConfig(mode="result"), config.judge)
    with judge as scorer, open_loop(config, open_model(config)) as loop:
        yield _Here(config, loop, scorer, fingerprint(loop.engine.model))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Rows for a worker, in one way."""

    way: Way
    numbers: Sequence[int]
    earlier: dict[str, list[str]]
    """Lines of attempts that an interrupted run has left, by question."""
    tools: Path
    """The traces of the run with tools."""
    picture_bytes: int
    """Of disk that the questions' pictures of this run may take, from this worker."""
    looks: bool
    """Whether evidence is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What a worker made of a batch."""

    weights: str
    rollout: RolloutConfig
    asked: list[Asked]
    refusals: list[Refusal]


@contextmanager
def _worker(config: EvaluatedConfig, folder: Path) -> Iterator[Callable[[_Batch | None], _Done]]:
    """What a worker has: rows, model, sandbox. Without a batch it only says what it has.

    Args:
        config: of the run.
        folder: runs/<name>, which all workers see: pictures go there, and traces are read there.
    """
    from thyme.evals.benchmarks.keeping import Gathered
    from thyme.evals.benchmarks.traces import Traces

    files = rows_of(config)
    with _here(config) as here:
        opened: dict[Way, tuple[Rows, Traces]] = {}

        def done(batch: _Batch | None) -> _Done:
            if batch is None:
                return _Done(weights=here.weights, rollout=here.rollout, asked=[], refusals=[])
            way = batch.way
            if way not in opened:  # pictures that the worker has counted in one batch count in the next
                rows = way.rows(config, files[way.number], batch.tools)
                opened[way] = rows, Traces(folder / "rollouts" / "worker.jsonl", batch.picture_bytes)
            rows, traces = opened[way]
            with Gathered(traces, batch.earlier, looks=batch.looks) as gathered:
                here.asking(way, rows).run(batch.numbers, gathered)
                asked, refusals = gathered.done()
            return _Done(weights=here.weights, rollout=here.rollout, asked=asked, refusals=refusals)

        yield done


@dataclass(frozen=True, slots=True)
class _OnRay:
    """Asks engines of workers, each of which has a model and a sandbox of its own."""

    config: EvaluatedConfig
    workers: Workers[_Batch | None, _Done]
    weights: str
    rollout: RolloutConfig

    def ask(self, way: Way, rows: Rows, numbers: Sequence[int], kept: Kept, traces: Path) -> None:
        from thyme.data.refusal import BadRow

        how = self.config.eval
        size = max(1, min(_CHUNKS * how.at_once, -(-len(numbers) // (_BATCHES * how.ray_workers))))
        batches = (
            _Batch(
                way=way,
                numbers=part,
                earlier=kept.earlier_lines(part),
                tools=traces,
                picture_bytes=int(how.picture_gib * 2**30) // how.ray_workers,
                looks=kept.looks,
            )
            for part in (numbers[start : start + size] for start in range(0, len(numbers), size))
        )
        for done in self.workers.each(batches):
            if done.weights != self.weights:
                raise ValueError(
                    f"model {self.config.model}: two workers loaded different weights from it: it must be the same "
                    "folder on all machines"
                )
            for refusal in done.refusals:
                kept.refused(BadRow(*refusal))
            for asked in done.asked:
                kept.take(asked)


@contextmanager
def asker(config: EvaluatedConfig, folder: Path) -> Iterator[Asker]:
    """What asks the model of the config, until the end of the block.

    Args:
        config: of the run.
        folder: runs/<name>.
    """
    if not config.eval.ray_workers:
        with _here(config) as here:
            yield here
        return
    from thyme.cluster import Workers

    how = config.eval
    with Workers(partial(_worker, config, folder), how.ray_workers, how.ray_address, _said) as workers:
        (first,) = workers.each([None])
        yield _OnRay(config, workers, first.weights, first.rollout)


def ask_rows(
    config: EvaluatedConfig, folder: Path, asker: Asker, way: Way, rows: Rows, shard: Shard = ALL
) -> dict[str, Answered]:
    """The answers to the rows that the config asks for, or to a shard of them, by index. What other shards have
    answered is added to those of the whole.

    Args:
        config: of the run.
        folder: runs/<name>.
        asker: has the model.
        way: how rows are asked.
        rows: of the benchmark, as they are.
        shard: which of them are asked here.
    """
    from thyme.evals.benchmarks.answers import Answers
    from thyme.evals.benchmarks.keeping import Kept
    from thyme.evals.benchmarks.shards import put_together
    from thyme.evals.evidence import EvidenceFile

    suffix = ".jsonl" if shard == ALL else f".{shard.name}.jsonl"
    tools = folder / "rollouts" / f"{rows.benchmark.name}{suffix}"
    name, rows = way.name(rows), way.rows(config, rows, tools)
    numbers = [number for number in range(len(rows.items[: config.eval.limit or None])) if shard.has(number)]
    if not numbers:
        left = "every row's answer depends on sides or directions" if shard == ALL else "the shard has no row of it"
        note(f"{name}: {left}: none is asked")
        return {}
    sampling = way.sampling(config, asker.rollout)
    settings, path = _settings(config, asker, rows, sampling), folder / "predictions" / f"{name}{suffix}"
    resume = config.eval.resume
    if shard == ALL and (resume or not path.is_file()):
        resume |= put_together(folder, name, settings) > 0
    answers = Answers(path, settings, resume=resume)
    right = sum(one.value for one in answers.done.values())
    looks = config.eval.evidence and sampling.allow_code and sampling.show_results
    evidence = EvidenceFile(folder / "evidence" / f"{name}{suffix}") if looks else None
    traces = folder / "rollouts" / f"{name}{suffix}"
    with (
        closing(answers),
        nullcontext() if evidence is None else closing(evidence),
        progress(len(numbers), name, "question") as line,
    ):

        def told(answered: Answered) -> None:
            nonlocal right
            right += answered.value
            tokens = answered.tokens * max(1, len(answered.values))
            line.at(len(answers.done), tokens=tokens, numbers={"right": right / len(answers.done)})

        with Kept(rows, answers, traces, int(config.eval.picture_gib * 2**30), evidence, told) as kept:
            todo = [number for number in numbers if rows.items[number].index not in answers.done]
            asker.ask(way, rows, todo, kept, tools)
    if not answers.done and shard == ALL:
        raise ValueError(f"{name}: no row could be asked: {rows.summary()}")
    return answers.done


def _settings(config: EvaluatedConfig, asker: Asker, rows: Rows, sampling: Sampling) -> dict[str, Any]:
    """What answers depend on."""
    judge, protocol = config.judge, protocol_of(config)
    return {
        **rows.identity,
        "paper_protocol": None if protocol is None else asdict(protocol),
        "weights": asker.weights,
        "sampling": asdict(sampling),
        "rollout": asdict(asker.rollout),
        "judge": judge.model if judge.url else None,
    }


def _held_out(config: EvaluatedConfig) -> list[Rows]:
    from thyme.evals.benchmarks.rows import HeldOut
    from thyme.verbs.rows import heldout_questions, require_rows

    require_rows(config, "heldout")
    return [HeldOut(heldout_questions(config, config.eval.num_questions))]


def _said(batch: _Batch | None) -> str:
    return "its model" if batch is None else f"rows {batch.numbers[0] + 1} and up"
