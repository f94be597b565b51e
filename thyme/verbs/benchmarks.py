"""`thyme eval` on published benchmarks: asks, scores, and writes tables. Not a verb of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.interrupt import goes_on_with
from thyme.shard import Shard
from thyme.verbs.benchmark_runs import ALL, Way, ask_rows, asker, open_files, protocol_of, rows_of
from thyme.verbs.notes import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thyme.evals.benchmarks.answers import Answered
    from thyme.evals.benchmarks.paper_protocol import PaperProtocol
    from thyme.evals.benchmarks.report import Score
    from thyme.evals.benchmarks.rows import Rows
    from thyme.verbs.config import EvaluatedConfig

    Runs = dict[tuple[str, str], list[dict[str, Answered]]]
    """The answers of each benchmark, by control ("tools" without one) and disturbance of the pictures ("" without)."""


def score_file(config: EvaluatedConfig, path: Path, **asking: str) -> dict[str, Any]:
    """Scores predictions that somebody made; writes score.json, and returns what it says.

    Args:
        config: of the run.
        path: of the predictions.
        asking: settings by name that only an asked model has, such as a control: none may be given.

    Raises:
        ValueError: nothing to score by or with, or a setting that only an asked model has.
    """
    from thyme.evals.benchmarks.predictions import read_predictions
    from thyme.evals.benchmarks.report import score_predictions, table
    from thyme.verbs.folders import run_dir

    asking |= {
        "eval.robustness": config.eval.robustness,
        "eval.against": config.eval.against,
        "eval.paper_protocol": str(config.eval.paper_protocol or ""),
        "eval.ray_workers": str(config.eval.ray_workers or ""),
    }
    if said := [name for name, value in asking.items() if value]:
        raise ValueError(f"{said[0]}: --score asks no model: leave it out")
    rows, *others = open_files(config)
    if rows.left_out:
        note(rows.summary())
    if others:
        raise ValueError(f"eval.benchmark: --score takes one benchmark, not {len(others) + 1}")
    predictions = read_predictions(path)
    if config.judge.url is not None:
        note("--score goes by rules alone: a judge is asked where the model answers itself")
    score, _ = score_predictions(
        rows.benchmark,
        rows.items[: config.eval.limit or None],
        predictions,
        others=rows.known,
        unread=rows.left_out.total(),
    )
    with run_dir(config) as folder:
        (folder / "score.json").write_text(json.dumps(score.to_json(), indent=2) + "\n")
    print(table([score]), end="")
    _say(score)
    print(f"figures: {folder}/score.json")
    return score.to_json()


def has_shards(config: EvaluatedConfig) -> bool:
    """Whether shards have answered held-out questions in the run's folder, which are not put together yet."""
    from thyme.evals.benchmarks.rows import HELD_OUT
    from thyme.evals.benchmarks.shards import shards_of
    from thyme.verbs.folders import RUNS

    return bool(shards_of(RUNS / config.name, HELD_OUT.name))


def evaluate_rows(
    config: EvaluatedConfig, control: str = "", shard: Shard = ALL
) -> dict[str, Any] | list[dict[str, Any]]:
    """Asks the model every row of the benchmarks, or held-out questions, with tools and under each control; writes
    predictions, traces, score.json and table.md.

    Args:
        config: of the run.
        control: names of controls by commas, or "all".
        shard: of the rows, which alone are asked; figures come of the whole, once all shards have answered.

    Returns:
        What score.json says: an object of each benchmark, of one alone not in a list. Of a shard how many rows of each
        benchmark it has answered.
    """
    from thyme.evals import disturbances
    from thyme.evals.benchmarks.controls import TOOLS, named
    from thyme.verbs.folders import run_dir

    controls, disturbing = named(control), disturbances.named(config.eval.robustness)
    files = rows_of(config)
    for rows in files:
        if rows.left_out:
            note(rows.summary())
    if "base" in controls and not config.eval.base:
        note("control base: eval.base names no model to compare with: left out")
        controls.remove("base")
    for rows in files if config.eval.against else ():
        _theirs(config, rows)  # what is wrong with them is said before anything is asked
    with run_dir(config, part="" if shard == ALL else shard.name) as folder:
        told = [rows.summary() for rows in files]
        runs = _asked(config, folder, files, controls, disturbing, shard)
        for rows, before in zip(files, told, strict=True):
            if rows.summary() != before:
                note(rows.summary())
        if shard == ALL:
            return _evaluated(config, folder, files, controls, runs)
        answered = {rows.benchmark.name: len(run) for rows, run in zip(files, runs[TOOLS, ""], strict=True)}
        print(
            f"shard {shard.index} of {shard.count}: {sum(answered.values())} rows answered; once all shards have, the "
            "same command without --shard puts them together"
        )
        return {"shard": f"{shard.index}/{shard.count}", "answered": answered}


def _asked(
    config: EvaluatedConfig,
    folder: Path,
    files: Sequence[Rows],
    controls: Sequence[str],
    disturbing: Sequence[str],
    shard: Shard,
) -> Runs:
    """The answers of every run, of each benchmark in the order of the files."""
    from thyme.evals.benchmarks.controls import TOOL_FREE, TOOLS

    how = "the same command" + " with --eval.resume true" * (not config.eval.resume)
    asked = [(name, "") for name in (TOOLS, *(n for n in controls if n != "base"))]
    if disturbing and TOOL_FREE not in controls:
        asked.append((TOOL_FREE, ""))
    asked += [(name, disturbance) for disturbance in disturbing for name in (TOOLS, TOOL_FREE)]
    runs: Runs = {}
    with goes_on_with(f"answers are kept; {how} goes on"):
        for model, names in ((config.model, asked), (config.eval.base, [("base", "")] * ("base" in controls))):
            if not names:
                continue
            with asker(replace(config, model=model), folder) as it:
                for control, disturbance in names:
                    ways = [Way(number=n, control=control, disturbance=disturbance) for n in range(len(files))]
                    runs[control, disturbance] = [
                        ask_rows(config, folder, it, way, rows, shard) for way, rows in zip(ways, files, strict=True)
                    ]
    return runs


def _evaluated(
    config: EvaluatedConfig, folder: Path, files: Sequence[Rows], controls: Sequence[str], runs: Runs
) -> dict[str, Any] | list[dict[str, Any]]:
    """Writes and prints the figures of all runs."""
    from thyme.evals.benchmarks.controls import TOOLS
    from thyme.evals.benchmarks.report import table

    scores, sections, tables = [], [], []
    for number, rows in enumerate(files):
        score, section = _figures(config, folder, rows, runs[TOOLS, ""][number])
        if controls:
            of_controls = {name: runs[name, ""][number] for name in (TOOLS, *controls)}
            text, section["controls"] = _controls(rows, of_controls, protocol_of(config))
            tables.append(text)
        if config.eval.robustness:
            text, section["robustness"] = _robustness(rows, {name: run[number] for name, run in runs.items()})
            tables.append(text)
        scores.append(score)
        sections.append(score.to_json() | section)
    text = table(scores) + "".join(f"\n{one}" for one in tables)
    figures = sections[0] if len(sections) == 1 else sections
    (folder / "score.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "table.md").write_text(text)
    print(text, end="")
    for score, section in zip(scores, sections, strict=True):
        _say(score, section["tools"])
    print(f"figures: {folder}/score.json, {folder}/table.md; predictions: {folder}/predictions/; thyme view {folder}")
    return figures


def _figures(
    config: EvaluatedConfig, folder: Path, rows: Rows, answers: dict[str, Answered]
) -> tuple[Score, dict[str, Any]]:
    """The figures of the run with tools, and how tools were used."""
    from thyme.evals.benchmarks.report import summarize
    from thyme.evals.benchmarks.scorers import Scored
    from thyme.evals.benchmarks.tool_use import tool_figures
    from thyme.evals.evidence import evidence_figures, read_evidence

    answered = [(item, answers[item.index]) for item in rows.items if item.index in answers]
    scored = [Scored(one.value, one.extracted, one.by_judge) for _, one in answered]
    tools = tool_figures([one for _, one in answered], config.eval.samples)
    if config.eval.against:
        tools["against"] = _difference(config, rows, answers)
    score = summarize(rows.benchmark, [item for item, _ in answered], scored)
    if (protocol := protocol_of(config)) is not None:
        score = replace(score, protocol=protocol.figures([one for _, one in answered]))
    if config.eval.evidence:
        found = read_evidence(folder / "evidence" / f"{rows.benchmark.name}.jsonl")
        right = {(one.index, i): value >= 0.5 for _, one in answered for i, value in enumerate(one.values)}
        if (figures := evidence_figures(found, right)) is not None:
            tools["evidence"], score = asdict(figures), replace(score, held=figures.held)
    return score, {"tools": tools, "left_out": dict(rows.left_out)}


def _controls(
    rows: Rows, answers: dict[str, dict[str, Answered]], protocol: PaperProtocol | None
) -> tuple[str, dict[str, Any]]:
    """The table of the controls, and the same as JSON."""
    from thyme.evals.benchmarks.controls import TOOL_FREE, TOOLS, compare, control_table, solved

    compared = [compare(name, mine, answers[TOOLS], protocol) for name, mine in answers.items()]
    shares = solved(answers[TOOL_FREE], answers[TOOLS]) if TOOL_FREE in answers else None
    text = f"{rows.benchmark.name} under controls:\n\n" + control_table(compared, shares)
    return text, {"runs": [asdict(one) for one in compared], "shares": shares}


def _robustness(rows: Rows, runs: dict[tuple[str, str], dict[str, Answered]]) -> tuple[str, list[dict[str, Any]]]:
    """The table of the disturbances, and the same as JSON."""
    from thyme.evals.benchmarks.controls import TOOL_FREE, TOOLS
    from thyme.evals.benchmarks.robustness import robustness, robustness_table

    clean = runs[TOOLS, ""], runs[TOOL_FREE, ""]
    names = [name for control, name in runs if name and control == TOOLS]
    every = (robustness(name, runs[TOOLS, name], runs[TOOL_FREE, name], *clean) for name in names)
    found = [one for one in every if one is not None]
    text = f"{rows.benchmark.name} with disturbed pictures:\n\n" + robustness_table(found)
    return text, [asdict(one) for one in found]


def _theirs(config: EvaluatedConfig, rows: Rows) -> dict[str, Answered]:
    """The answers of the run that this one is compared with.

    Raises:
        ValueError: there are none, or they were asked for by another protocol.
    """
    from thyme.evals.benchmarks.answers import read_answers

    other, protocol = Path(config.eval.against), protocol_of(config)
    settings, answers = read_answers(other / "predictions" / f"{rows.benchmark.name}.jsonl")
    theirs = settings.get("paper_protocol")
    if theirs != (None if protocol is None else asdict(protocol)):
        has = f"by the paper's protocol with {theirs['retries']} retries" if theirs else "without the paper's protocol"
        raise ValueError(f"eval.against: {other} was asked {has}, this run is not: they are not to be compared")
    return answers


def _difference(config: EvaluatedConfig, rows: Rows, mine: dict[str, Answered]) -> dict[str, Any]:
    from thyme.evals.benchmarks.report import mcnemar

    other, theirs = config.eval.against, _theirs(config, rows)
    both = [index for index in mine if index in theirs]
    if not both:
        raise ValueError(f"eval.against: {other} answered no row of {rows.benchmark.name} that this run has")
    values = [mine[index].value for index in both], [theirs[index].value for index in both]
    gained, lost, p = mcnemar(*values)
    mean = 100 * (sum(values[0]) - sum(values[1])) / len(both)
    return {"run": other, "n": len(both), "difference": mean, "gained": gained, "lost": lost, "p": p}


def _say(score: Score, tools: dict[str, Any] | None = None) -> None:
    """What a table does not say: what was not understood, who judged, and how tools were used."""
    from thyme.evals.benchmarks.report import shown_p
    from thyme.evals.evidence import EvidenceFigures, shown

    parts = [f"{score.unparsed} of {score.n} not understood"] if score.unparsed else []
    if score.missing:
        parts.append(f"{score.missing} of {score.n} missing, counted as wrong")
    if score.published_by == "judge":
        said = f"{score.by_judge} right on the judge's word" if score.by_judge else "scored by rules"
        parts.append(said + ("; the paper's figures are a judge's" if score.paper else ""))
    if score.protocol is not None:
        parts.append(score.protocol.told())
    if tools is not None:
        ran = f", {tools['calls_ok']:.0%} of them ran, {tools['calls_repaired']:.0%} repaired" if tools["calls"] else ""
        parts.append(f"{tools['calls']:.2f} calls a question{ran}")
        parts.append(f"{tools['rounds']:.1f} rounds, {tools['tokens']:.0f} tokens")
        if (mended := tools["failed_mended"]) is not None:
            parts.append(f"the next round mended {mended:.0f} % of failed calls")
        if (looked_at := tools.get("evidence")) is not None:
            parts.append(shown(EvidenceFigures(**looked_at)))
        if (other := tools.get("against")) is not None:
            gained, lost = other["gained"], other["lost"]
            parts.append(
                f"against {other['run']}: {other['difference']:+.1f} points ({gained} gained, {lost} lost of "
                f"{other['n']}, p {shown_p(other['p'])})"
            )
    if parts:
        print(f"{score.benchmark}: {'; '.join(parts)}")
