"""`thyme eval` on published benchmarks: asks, scores, and writes tables. Not a verb of its own."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.interrupt import goes_on_with
from thyme.progress import progress
from thyme.verbs.notes import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thyme.evals.benchmarks.answers import Answered
    from thyme.evals.benchmarks.paper_protocol import PaperProtocol
    from thyme.evals.benchmarks.report import Score
    from thyme.evals.benchmarks.rows import Rows
    from thyme.evals.benchmarks.source import BenchmarkFile
    from thyme.rewards import Scorer
    from thyme.rollout.rollout import RolloutLoop
    from thyme.rollout.sampling import Sampling
    from thyme.verbs.config import EvaluatedConfig


def score_file(config: EvaluatedConfig, path: Path, control: str = "") -> dict[str, Any]:
    """Scores predictions that somebody made; writes score.json, and returns what it says.

    Raises:
        ValueError: nothing to score by or with, or a setting, such as `control`, that only an asked model has.
    """
    from thyme.evals.benchmarks.predictions import read_predictions
    from thyme.evals.benchmarks.report import score_predictions, table
    from thyme.verbs.folders import run_dir

    asking = {
        "control": control,
        "eval.robustness": config.eval.robustness,
        "eval.against": config.eval.against,
        "eval.paper_protocol": config.eval.paper_protocol,
    }
    if said := [name for name, value in asking.items() if value]:
        raise ValueError(f"{said[0]}: --score asks no model: leave it out")
    rows, *others = _open(config)
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


def evaluate_rows(config: EvaluatedConfig, control: str = "") -> dict[str, Any] | list[dict[str, Any]]:
    """Asks the model every row of the benchmarks, or held-out questions, with tools and under each control; writes
    predictions, traces, score.json and table.md.

    Args:
        config: of the run.
        control: names of controls by commas, or "all".

    Returns:
        What score.json says: an object of each benchmark, of one alone not in a list.
    """
    from thyme.evals import disturbances
    from thyme.evals.benchmarks.controls import named
    from thyme.verbs.folders import run_dir

    controls, disturbing = named(control), disturbances.named(config.eval.robustness)
    files: Sequence[Rows] = _open(config) if config.eval.benchmark else _held_out(config)
    if "base" in controls and not config.eval.base:
        note("control base: eval.base names no model to compare with: left out")
        controls.remove("base")
    for rows in files if config.eval.against else ():
        _theirs(config, rows)  # what is wrong with them is said before anything is asked
    with run_dir(config) as folder:
        return _evaluated(config, folder, files, controls, disturbing)


def _evaluated(
    config: EvaluatedConfig, folder: Path, files: Sequence[Rows], controls: Sequence[str], disturbing: Sequence[str]
) -> dict[str, Any] | list[dict[str, Any]]:
    from thyme.evals.benchmarks.controls import TOOL_FREE, TOOLS
    from thyme.evals.benchmarks.report import table
    from thyme.verbs.opening import open_loop, open_model

    told = [rows.summary() for rows in files]
    scores, sections, tables = [], [], []
    how = "the same command" + " with --eval.resume true" * (not config.eval.resume)
    with goes_on_with(f"answers are kept; {how} goes on"), _judge(config) as scorer:
        runs: dict[tuple[str, str], list[dict[str, Answered]]] = {}
        asked = [(name, "") for name in (TOOLS, *(n for n in controls if n != "base"))]
        if disturbing and TOOL_FREE not in controls:
            asked.append((TOOL_FREE, ""))
        asked += [(name, disturbance) for disturbance in disturbing for name in (TOOLS, TOOL_FREE)]
        for model, names in ((config.model, asked), (config.eval.base, [("base", "")] * ("base" in controls))):
            if not names:
                continue
            opened = open_model(replace(config, model=model))
            with open_loop(config, opened) as loop:
                for name in names:
                    runs[name] = [_Run(config, folder, loop, scorer, *name).ask(rows) for rows in files]
    for number, rows in enumerate(files):
        if rows.summary() != told[number]:
            note(rows.summary())
        score, section = _figures(config, folder, rows, runs[TOOLS, ""][number])
        if controls:
            of_controls = {name: runs[name, ""][number] for name in (TOOLS, *controls)}
            text, section["controls"] = _controls(rows, of_controls, _protocol(config))
            tables.append(text)
        if disturbing:
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


@dataclass(frozen=True, slots=True)
class _Run:
    """A model on all rows, under one control or none ("tools"), the pictures disturbed or as they are ("")."""

    config: EvaluatedConfig
    folder: Path
    loop: RolloutLoop
    scorer: Scorer | None
    control: str
    disturbance: str = ""

    def ask(self, rows: Rows) -> dict[str, Answered]:
        """The answers to the rows that the config asks for, by index."""
        from thyme.evals.benchmarks import controls
        from thyme.evals.benchmarks.answers import Answers
        from thyme.evals.benchmarks.robustness import DisturbedRows
        from thyme.evals.benchmarks.run import Asking
        from thyme.evals.evidence import EvidenceFile

        config, name = self.config, rows.benchmark.name
        traces = self.folder / "rollouts" / f"{name}.jsonl"
        if self.disturbance:
            name = f"{name}.{self.disturbance}"
            rows = DisturbedRows(rows, self.disturbance, config.eval.seed, config.eval.limit)
            if not rows.items:
                note(f"{name}: every row's answer depends on sides or directions: none is asked")
                return {}
        if self.control != controls.TOOLS:
            rows, name = controls.rows_of(self.control, rows, traces), f"{name}.{self.control}"
        sampling = controls.sampling_of(self.control, self.loop.config.sampling(**config.eval.drawn()))
        items = rows.items[: config.eval.limit or None]
        answers = Answers(
            self.folder / "predictions" / f"{name}.jsonl", self._settings(rows, sampling), resume=config.eval.resume
        )
        right = sum(one.value for one in answers.done.values())
        looks = config.eval.evidence and sampling.allow_code and sampling.show_results
        evidence = EvidenceFile(self.folder / "evidence" / f"{name}.jsonl") if looks else None
        with (
            closing(answers),
            nullcontext() if evidence is None else closing(evidence),
            progress(len(items), name, "question") as line,
        ):

            def told(answered: Answered) -> None:
                nonlocal right
                right += answered.value
                tokens = answered.tokens * max(1, len(answered.values))
                line.at(len(answers.done), tokens=tokens, numbers={"right": right / len(answers.done)})

            asking = Asking(
                rows=rows,
                loop=self.loop,
                sampling=sampling,
                answers=answers,
                traces=self.folder / "rollouts" / f"{name}.jsonl",
                picture_bytes=int(config.eval.picture_gib * 2**30),
                scorer=self.scorer,
                evidence=evidence,
                protocol=_protocol(config),
                at_once=config.eval.at_once,
                on_answer=told,
            )
            asking.run(range(len(items)))
        if not answers.done:
            raise ValueError(f"{name}: no row could be asked: {rows.summary()}")
        return answers.done

    def _settings(self, rows: Rows, sampling: Sampling) -> dict[str, Any]:
        """What answers depend on."""
        from thyme.model.fingerprint import fingerprint

        judge, protocol = self.config.judge, _protocol(self.config)
        return {
            **rows.identity,
            "paper_protocol": None if protocol is None else asdict(protocol),
            "weights": fingerprint(self.loop.engine.model),
            "sampling": asdict(sampling),
            "rollout": asdict(self.loop.config),
            "judge": judge.model if judge.url else None,
        }


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
    if (protocol := _protocol(config)) is not None:
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


def _held_out(config: EvaluatedConfig) -> list[Rows]:
    from thyme.evals.benchmarks.rows import HeldOut
    from thyme.verbs.rows import heldout_questions, require_rows

    require_rows(config, "heldout")
    return [HeldOut(heldout_questions(config, config.eval.num_questions))]


def _protocol(config: EvaluatedConfig) -> PaperProtocol | None:
    from thyme.evals.benchmarks.paper_protocol import PaperProtocol

    return PaperProtocol(config.eval.paper_retries) if config.eval.paper_protocol else None


def _theirs(config: EvaluatedConfig, rows: Rows) -> dict[str, Answered]:
    """The answers of the run that this one is compared with.

    Raises:
        ValueError: there are none, or they were asked for by another protocol.
    """
    from thyme.evals.benchmarks.answers import read_answers

    other, protocol = Path(config.eval.against), _protocol(config)
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


def _open(config: EvaluatedConfig) -> list[BenchmarkFile]:
    """The files of the benchmarks named, all of them opened before a model is."""
    from thyme.evals.benchmarks.known import benchmark
    from thyme.evals.benchmarks.source import BenchmarkFile

    named = [name.strip() for name in config.eval.benchmark.split(",") if name.strip()]
    known = {found.name: found for found in map(benchmark, named)}
    if not known:
        raise ValueError("eval.benchmark: which benchmark are they predictions for?")
    path = Path(config.eval.data)
    if len(known) > 1 and path.is_file():
        raise ValueError(f"eval.data: {path} is one file, {len(known)} benchmarks are named: give their folder")
    files = [BenchmarkFile(one, path) for one in known.values()]
    for rows in files:
        if rows.left_out:
            note(rows.summary())
    return files


def _judge(config: EvaluatedConfig) -> Any:
    from thyme.rewards.config import RewardConfig
    from thyme.rewards.opening import open_scorer

    return nullcontext() if config.judge.url is None else open_scorer(RewardConfig(mode="result"), config.judge)


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
