"""`thyme eval` on published benchmarks: asks, scores, and writes tables. Not a verb of its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.verbs.notes import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thyme.evals.benchmarks.report import Score
    from thyme.evals.benchmarks.run import Answered
    from thyme.evals.benchmarks.source import BenchmarkFile
    from thyme.rewards import Scorer
    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.sampling import Sampling
    from thyme.verbs.config import EvaluatedConfig


def score_file(config: EvaluatedConfig, path: Path) -> None:
    """Scores predictions that somebody made, and writes score.json."""
    from thyme.evals.benchmarks.predictions import read_predictions
    from thyme.evals.benchmarks.report import score_predictions, table
    from thyme.verbs.folders import run_dir

    rows, *others = _open(config)
    if others:
        raise ValueError(f"eval.benchmark: --score takes one benchmark, not {len(others) + 1}")
    predictions = read_predictions(path)
    if config.judge.url is not None:
        note("--score goes by rules alone: a judge is asked where the model answers itself")
    score, _ = score_predictions(rows.benchmark, _asked(rows, config), predictions)
    folder = run_dir(config)
    (folder / "score.json").write_text(json.dumps(score.to_json(), indent=2) + "\n")
    print(table([score]), end="")
    _say(score)
    print(f"figures: {folder}/score.json")


def evaluate_benchmarks(config: EvaluatedConfig) -> None:
    """Asks the model every row, and writes predictions, traces, score.json and table.md."""
    from thyme.evals.benchmarks.report import table
    from thyme.verbs.folders import run_dir
    from thyme.verbs.opening import open_loop, open_model

    files = _open(config)
    folder = run_dir(config)
    opened = open_model(config)
    scores, sections = [], []
    with open_loop(config, opened) as loop, _judge(config) as scorer:
        for rows in files:
            score, tools = _one(config, folder, rows, loop, scorer)
            scores.append(score)
            sections.append(score.to_json() | {"tools": tools})
    text = table(scores)
    (folder / "score.json").write_text(json.dumps(sections[0] if len(sections) == 1 else sections, indent=2) + "\n")
    (folder / "table.md").write_text(text)
    print(text, end="")
    for score, section in zip(scores, sections, strict=True):
        _say(score, section["tools"])
    print(f"figures: {folder}/score.json, {folder}/table.md; predictions: {folder}/predictions/")


def _one(
    config: EvaluatedConfig, folder: Path, rows: BenchmarkFile, loop: RolloutLoop, scorer: Scorer | None
) -> tuple[Score, dict[str, Any]]:
    from thyme.evals.benchmarks.report import summarize
    from thyme.evals.benchmarks.run import Answers, Asking
    from thyme.evals.benchmarks.scorers import Scored
    from thyme.train.metrics import progress

    sampling = loop.config.sampling(**config.eval.drawn())
    items = _asked(rows, config)
    answers = Answers(
        folder / "predictions" / f"{rows.benchmark.name}.jsonl",
        _settings(config, rows, loop, sampling),
        resume=config.eval.resume,
    )
    try:
        with progress(len(items), rows.benchmark.name, {"right": "right"}) as show:
            total = sum(one.value for one in answers.done.values())

            def told(answered: Answered) -> None:
                nonlocal total
                total += answered.value
                if show is not None:
                    show({"step": len(answers.done) - 1, "right": total / len(answers.done)})

            asking = Asking(
                rows=rows,
                loop=loop,
                sampling=sampling,
                answers=answers,
                folder=folder,
                scorer=scorer,
                at_once=config.eval.at_once,
                on_answer=told,
            )
            asking.run(range(len(items)))
    finally:
        answers.close()
    if rows.left_out:
        note(rows.summary())
    answered = [(item, answers.done[item.index]) for item in items if item.index in answers.done]
    if not answered:
        raise ValueError(f"{rows.benchmark.name}: no row could be asked: {rows.summary()}")
    scored = [Scored(one.value, one.extracted, one.by_judge) for _, one in answered]
    score = summarize(rows.benchmark, [item for item, _ in answered], scored)
    tools = tool_figures([one for _, one in answered], sampling.n)
    if config.eval.against:
        tools["against"] = _difference(rows, answers.done, Path(config.eval.against))
    return score, tools


def tool_figures(answered: Sequence[Answered], samples: int) -> dict[str, Any]:
    """How tools were used, per question and sample."""
    n, calls = len(answered), sum(one.calls for one in answered)
    figures = {
        "calls": calls / n / samples,
        "with_calls": sum(one.calls > 0 for one in answered) / n,
        "calls_ok": sum(one.calls_ok for one in answered) / calls if calls else None,
        "calls_repaired": sum(one.repairs for one in answered) / calls if calls else None,
        "pictures": sum(one.pictures for one in answered) / n / samples,
        "rounds": sum(one.rounds for one in answered) / n,
        "tokens": sum(one.tokens for one in answered) / n,
        "ended": {status: sum(one.status == status for one in answered) for status in {one.status for one in answered}},
    }
    if samples > 1:
        figures[f"pass_at_{samples}"] = 100 * sum(one.best for one in answered) / n
        figures["majority"] = 100 * sum(one.majority for one in answered) / n
    return figures


def _difference(rows: BenchmarkFile, mine: dict[str, Answered], other: Path) -> dict[str, Any]:
    from thyme.evals.benchmarks.report import mcnemar
    from thyme.evals.benchmarks.run import read_answers

    theirs = read_answers(other / "predictions" / f"{rows.benchmark.name}.jsonl")
    both = [index for index in mine if index in theirs]
    if not both:
        raise ValueError(f"eval.against: {other} answered no row of {rows.benchmark.name} that this run has")
    values = [mine[index].value for index in both], [theirs[index].value for index in both]
    gained, lost, p = mcnemar(*values)
    mean = 100 * (sum(values[0]) - sum(values[1])) / len(both)
    return {"run": str(other), "n": len(both), "difference": mean, "gained": gained, "lost": lost, "p": p}


def _open(config: EvaluatedConfig) -> list[BenchmarkFile]:
    """The files of the benchmarks named, all of them opened before a model is."""
    from thyme.evals.benchmarks.known import benchmark
    from thyme.evals.benchmarks.source import BenchmarkFile

    names = [name.strip() for name in config.eval.benchmark.split(",") if name.strip()]
    if not names:
        raise ValueError("eval.benchmark: which benchmark are they predictions for?")
    path = Path(config.eval.data)
    if len(names) > 1 and path.is_file():
        raise ValueError(f"eval.data: {path} is one file, {len(names)} benchmarks are named: give their folder")
    files = [BenchmarkFile(benchmark(name), path) for name in names]
    for rows in files:
        if rows.left_out:
            note(rows.summary())
    return files


def _asked(rows: BenchmarkFile, config: EvaluatedConfig) -> list[Any]:
    return rows.items[: config.eval.limit or None]


def _settings(config: EvaluatedConfig, rows: BenchmarkFile, loop: RolloutLoop, sampling: Sampling) -> dict[str, Any]:
    from thyme.model.fingerprint import fingerprint

    return {
        "benchmark": rows.benchmark.name,
        "bytes": [path.stat().st_size for path in rows.files],
        "model": config.model,
        "weights": fingerprint(loop.engine.model),
        "sampling": asdict(sampling),
        "rollout": asdict(loop.config),
        "judge": config.judge.model if config.judge.url else None,
    }


def _judge(config: EvaluatedConfig) -> Any:
    from contextlib import nullcontext

    from thyme.rewards.config import RewardConfig
    from thyme.rewards.opening import open_scorer

    return nullcontext() if config.judge.url is None else open_scorer(RewardConfig(mode="result"), config.judge)


def _say(score: Score, tools: dict[str, Any] | None = None) -> None:
    """What a table does not say: what was not understood, who judged, and how tools were used."""
    parts = [f"{score.unparsed} of {score.n} not understood"] if score.unparsed else []
    if score.missing:
        parts.append(f"{score.missing} of {score.n} missing, counted as wrong")
    if score.published_by == "judge":
        said = f"{score.by_judge} right on the judge's word" if score.by_judge else "scored by rules"
        parts.append(f"{said}; the paper's figures are a judge's")
    if tools is not None:
        ran = f", {tools['calls_ok']:.0%} of them ran, {tools['calls_repaired']:.0%} repaired" if tools["calls"] else ""
        parts.append(f"{tools['calls']:.2f} calls a question{ran}")
        parts.append(f"{tools['rounds']:.1f} rounds, {tools['tokens']:.0f} tokens")
        if (other := tools.get("against")) is not None:
            gained, lost = other["gained"], other["lost"]
            parts.append(
                f"against {other['run']}: {other['difference']:+.1f} points ({gained} gained, {lost} lost of "
                f"{other['n']}, p {other['p']:.3f})"
            )
    if parts:
        print(f"{score.benchmark}: {'; '.join(parts)}")
