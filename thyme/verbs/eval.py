"""Measure held-out accuracy, or a published benchmark's figures, with 95 % intervals."""

from __future__ import annotations

import json
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.evals.config import EvalConfig
from thyme.interrupt import goes_on_with
from thyme.progress import progress
from thyme.result import Result
from thyme.shard import Shard
from thyme.verbs import benchmarks
from thyme.verbs.config import EvaluatedConfig, ScoredConfig
from thyme.verbs.notes import note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from thyme.evals import EvalResult
    from thyme.evals.evidence import EvidenceFigures
    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.types import Question, Rollout
    from thyme.verbs.opening import Opened


@dataclass(frozen=True, kw_only=True)
class Config(EvaluatedConfig):
    """An evaluation on held-out questions, or on benchmarks."""

    name: str = "eval"
    score: str = ""
    """Predictions that somebody made for `eval.benchmark`, to be scored: JSON lines of {"index", "prediction"}, or
    VLMEvalKit's tsv or xlsx."""
    control: str = ""
    """The same questions again under controls, by commas, or all: tool_free, format_only, result_only, blind, ats_off,
    base."""
    shard: str = ""
    """This machine's part of the rows, such as 2/8, in a folder that all share; empty: all of them, with what shards
    have answered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Shard.read(self.shard)
        if self.eval.ray_workers and self.shard:
            raise ValueError("shard: with eval.ray_workers the work is one: leave shard out, or Ray")
        told = {"shard": self.shard, "control": self.control, "eval.robustness": self.eval.robustness}
        if (said := [name for name, value in told.items() if value]) and (self.eval.best_of > 1 or self.eval.retries):
            raise ValueError(f"{said[0]}: each answer is drawn once: leave eval.best_of and eval.retries out")


def run(config: Config) -> Result:
    """Evaluates, prints the figures and writes eval.json; of benchmarks score.json and table.md."""
    if config.score:
        return Result(benchmarks.score_file(config, Path(config.score), control=config.control, shard=config.shard))
    how = config.eval
    by_rows = how.benchmark or how.robustness or how.paper_protocol or how.ray_workers or config.control or config.shard
    if by_rows or benchmarks.has_shards(config):
        whole = replace(config, shard="")  # which is what the folder's recipe repeats
        return Result(benchmarks.evaluate_rows(whole, config.control, Shard.read(config.shard)))
    return Result(evaluate_heldout(config))


def evaluate_heldout(config: Config) -> dict[str, Any]:
    """Evaluates on held-out questions; returns what eval.json says. Answers of a run that was interrupted are kept."""
    from thyme.verbs.folders import run_dir
    from thyme.verbs.rows import require_rows

    require_rows(config, "heldout")
    with run_dir(config) as folder:
        return _heldout(config, folder)


def _heldout(config: Config, folder: Path) -> dict[str, Any]:
    from thyme.evals.evidence import shown
    from thyme.verbs.opening import open_model

    journal = folder / "rollouts" / ".eval.jsonl"
    result = measure(config, open_model(config), journal)
    looked_at = _kept_for_pages(config, result, folder)
    figures = result.to_json() | {"evidence": None if looked_at is None else asdict(looked_at)}
    (folder / "eval.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "table.md").write_text(_table(result))
    journal.unlink(missing_ok=True)
    width = max(12, *map(len, result.scenarios))
    for name, summary in [*result.scenarios.items(), ("all", result.overall)]:
        code = "no code" if summary.code_ok is None else f"code {summary.code_share:.0%}, ok {summary.code_ok:.0%}"
        interval = f"[{summary.low:.1%}, {summary.high:.1%}]"
        print(f"{name:<{width}} n {summary.n:>4}   accuracy {summary.accuracy:6.1%} {interval:<17} {code}")
    if result.overall.by_judge or result.overall.errors:
        print(f"right on the judge's word: {result.overall.by_judge}, not judged: {result.overall.errors}")
    if looked_at is not None:
        print(shown(looked_at))
    print(f"figures: {folder}/eval.json; thyme view {folder}")
    return figures


def _table(result: EvalResult) -> str:
    """The figures as a Markdown table."""
    lines = ["| scenario | n | accuracy | 95 % | code | of it ran |", "| --- " * 6 + "|"]
    for name, one in [*result.scenarios.items(), ("all", result.overall)]:
        shares = ["", ""] if one.code_ok is None else [f"{100 * one.code_share:.0f} %", f"{100 * one.code_ok:.0f} %"]
        interval = f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        lines.append(f"| {' | '.join([name, str(one.n), f'{100 * one.accuracy:.1f}', interval, *shares])} |")
    return "\n".join(lines) + "\n"


def _kept_for_pages(config: Config, result: EvalResult, folder: Path) -> EvidenceFigures | None:
    """Writes the rollouts with their pictures and verdicts, and what evidence their tools returned, as `thyme view`
    reads them; the shares of evidence, None where it is not looked for or no answer called a tool."""
    from thyme.evals.evidence import EvidenceFile, evidence_figures
    from thyme.rollout.records import write_rollouts

    pairs = [
        (rollout, verdict)
        for group, verdicts in zip(result.rollouts, result.verdicts, strict=True)
        for rollout, verdict in zip(group, verdicts, strict=True)
    ]
    rewards = [{"result": said.value, "by_judge": float(said.by_judge), "error": said.error} for _, said in pairs]
    write_rollouts(folder / "rollouts" / "eval.jsonl", [rollout for rollout, _ in pairs], rewards)
    path = folder / "evidence" / "eval.jsonl"
    path.unlink(missing_ok=True)  # of another evaluation of that name
    if not config.eval.evidence:
        return None
    with closing(EvidenceFile(path)) as evidence:
        for rollout, _ in pairs:
            evidence.add(rollout.question.id, rollout)
    right = {(rollout.question.id, rollout.index): verdict.value == 1.0 for rollout, verdict in pairs}
    return evidence_figures(list(evidence.done.values()), right)


def measure(config: Config, opened: Opened, journal: Path | None = None) -> EvalResult:
    """Held-out accuracy of the model.

    Args:
        journal: keeps the answers, and those that it has are not asked for again; None: they are not kept.
    """
    from thyme.verbs.opening import open_loop
    from thyme.verbs.rows import heldout_questions

    asked = heldout_questions(config, config.eval.num_questions, opened.processor)
    with (
        open_loop(config, opened) as loop,
        _kept(config, loop, asked, journal) as num_kept,
        progress(len(asked) * config.eval.samples, "eval", "answer") as line,
    ):
        line.begin(num_kept)
        ends = count()

        def told(rollout: Rollout) -> None:
            if next(ends) >= num_kept:  # what was kept comes first
                line.advance(tokens=rollout.num_sampled)

        return judged(config, config.eval, loop, asked, told)


@contextmanager
def _kept(config: Config, loop: RolloutLoop, asked: Sequence[Question], path: Path | None) -> Iterator[int]:
    """Inside the block answers are kept at `path`; how many of them are there already.

    Raises:
        ValueError: `eval.resume`, and what is there are answers to something else.
    """
    if path is None:
        yield 0
        return
    sampling = loop.config.sampling(**config.eval.drawn())
    with (
        goes_on_with("answers are kept; the same command goes on"),
        loop.journaled(path, sampling, asked, must_match=config.eval.resume) as journal,
    ):
        if journal.kept:
            note(f"{len(journal.kept)} answers are there already: {path}")
        yield len(journal.kept)


def judged(
    config: ScoredConfig,
    how: EvalConfig,
    loop: RolloutLoop,
    asked: Sequence[Question],
    on_end: Callable[[Rollout], object] | None = None,
) -> EvalResult:
    """An evaluation by rules, and by the config's judge, if it has one, where rules do not decide."""
    from thyme.evals import evaluate
    from thyme.rewards.config import RewardConfig
    from thyme.rewards.opening import open_scorer

    sampling = loop.config.sampling(**how.drawn())
    if config.judge.url is None:
        return evaluate(loop, asked, sampling, best=how.best_of, retries=how.retries, on_end=on_end)
    with open_scorer(RewardConfig(mode="result"), config.judge) as scorer:
        more = {"best": how.best_of, "retries": how.retries}
        return evaluate(loop, asked, sampling, scorer=scorer, on_end=on_end, **more)
