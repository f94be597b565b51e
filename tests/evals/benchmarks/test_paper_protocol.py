"""The paper's protocol against a scripted engine and sandbox: what is drawn again, how, and what is counted."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.test_rollout import ANSWER, IM_END, SOME_CODE, Behavior, printed, question, returns
from tests.rollout.test_rollout import loop as scripted
from thyme.evals.benchmarks.answers import Answered, Answers
from thyme.evals.benchmarks.controls import rows_of
from thyme.evals.benchmarks.keeping import Kept
from thyme.evals.benchmarks.paper_protocol import PaperProtocol
from thyme.evals.benchmarks.rows import HeldOut
from thyme.evals.benchmarks.run import Asking
from thyme.rollout.prompts import direct_prompt, text_prompt
from thyme.sandbox import SandboxResult, Status

Round = tuple[str, str, str | None]
SILENT: Round = ("nothing" + chr(IM_END), "eos", None)
WRONG: Round = ("<answer>8</answer>", "stop", "</answer>")
BROKEN = returns(SandboxResult(status=Status.ERROR, stdout="half"))


class Killed(BaseException):
    """The process went away."""


class Run:
    """Questions q0, q1, ... whose solution is 7, asked one after the other.

    Args:
        folder: where answers and traces are, which are gone on with.
        generations: rounds of each sequence that the engine is given, in order; None: the process dies there.
    """

    def __init__(
        self,
        folder: Path,
        generations: Sequence[Sequence[Round] | None],
        protocol: PaperProtocol | None,
        *,
        count: int = 1,
        behavior: Behavior | None = None,
        style: str = "thyme",
    ) -> None:
        def script(sequence: int, round_index: int) -> Round:
            rounds = generations[sequence]
            if rounds is None:
                raise Killed
            return rounds[round_index]

        self.loop = scripted(script, behavior, prompt_style=style, max_in_flight=1, max_rounds=9, max_tokens=9999)
        self.loop.engine.max_context = 9999
        self.rows = HeldOut([question(f"q{number}") for number in range(count)])
        self.traces = folder / "rollouts" / "heldout.jsonl"
        answers = Answers(folder / "predictions.jsonl", {}, resume=True)
        asking = Asking(
            rows=self.rows,
            loop=self.loop,
            sampling=self.loop.config.sampling(n=1).greedy(),
            protocol=protocol,
        )
        todo = [number for number in range(count) if f"q{number}" not in answers.done]
        with suppress(Killed), Kept(self.rows, answers, self.traces) as kept:
            asking.run(todo, kept)
        answers.close()
        self.answers: dict[str, Answered] = answers.done

    @property
    def params(self) -> list[Any]:
        """How each sequence was drawn."""
        return list(self.loop.engine.params)

    def prompt(self, sequence: int) -> str:
        """What a sequence was asked; the system prompt is not among the fake's tokens."""
        text: str = self.loop.processor.decode(self.loop.engine.sequences[sequence].token_ids)
        return text


def without_times(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in rows]


def test_what_succeeds_at_once_is_what_it_is_without_the_protocol(tmp_path: Path) -> None:
    generations: list[list[Round]] = [[SOME_CODE, ANSWER], [WRONG]]
    off = Run(tmp_path / "off", generations, None, count=2)
    on = Run(tmp_path / "on", generations, PaperProtocol(retries=4), count=2)
    assert on.answers == off.answers and [one.value for one in on.answers.values()] == [1.0, 0.0]
    assert without_times(on.traces) == without_times(off.traces) and on.params == off.params


@pytest.mark.parametrize(
    ("failed", "behavior"),
    [
        ([SILENT], None),
        ([("ab", "length", None)], None),
        ([("abab", "repetition", None)], None),
        ([SOME_CODE, ANSWER], BROKEN),
        ([SOME_CODE, ANSWER], printed("")),
        ([SOME_CODE] * 5 + [ANSWER], None),
    ],
)
def test_a_failed_generation_is_drawn_again_at_temperature_1(
    failed: list[Round], behavior: Behavior | None, tmp_path: Path
) -> None:
    run = Run(tmp_path, [failed, [WRONG]], PaperProtocol(retries=4), behavior=behavior)
    answer = run.answers["q0"]
    assert (answer.attempt, answer.prediction, answer.value) == (1, "8", 0.0)
    first, again = run.params
    assert (first.temperature, first.code_temperature) == (0.0, 0.0)
    assert (again.temperature, again.code_temperature) == (1.0, 1.0) and again.seed != first.seed
    assert run.prompt(0).startswith(text_prompt("what?")) and run.prompt(1).startswith(text_prompt("what?"))
    assert answer.calls == len(failed) - 1 and answer.rounds == len(failed) + 1
    assert len(without_times(run.traces)) == 2


def test_five_rounds_are_not_too_many(tmp_path: Path) -> None:
    assert Run(tmp_path, [[SOME_CODE] * 4 + [ANSWER]], PaperProtocol(retries=4)).answers["q0"].attempt == 0


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("7", "7"),
        ("I think so.", "I think so."),
        ("so \\boxed{7} it is", "7"),
        ("hm <answer> 7 </answer>", "7"),
        ("it is <answer>7", "it is <answer>7"),
        ("no <code>", "no <code>"),
        (" ", ""),
    ],
)
def test_what_fails_to_the_end_is_answered_without_tools(said: str, answer: str, tmp_path: Path) -> None:
    last = (said + chr(IM_END), "eos", None)
    run = Run(tmp_path, [[SILENT], [SILENT], [SILENT], [last]], PaperProtocol(retries=2))
    found = run.answers["q0"]
    assert (found.attempt, found.prediction, found.value) == (3, answer, float(answer == "7"))
    assert [params.temperature for params in run.params] == [0.0, 1.0, 1.0, 0.0]
    assert len({params.seed for params in run.params}) == 4
    assert run.prompt(3).startswith(direct_prompt("what?")) and "<code>" in run.params[3].stop
    assert [row["answer"] for row in without_times(run.traces)] == [None, None, None, answer]


def test_a_model_of_short_prompts_gets_a_short_one_without_tools_too(tmp_path: Path) -> None:
    run = Run(tmp_path, [[SILENT], [ANSWER]], PaperProtocol(retries=0), style="short")
    assert run.answers["q0"].attempt == 1 and run.prompt(1).startswith("what?A")


def test_answers_are_counted_by_where_they_come_from(tmp_path: Path) -> None:
    protocol = PaperProtocol(retries=1)
    # q0 at once, q1 at its retry, q2 and q3 at neither
    generations: list[list[Round]] = [
        [ANSWER],
        [SILENT],
        [SILENT],
        [SILENT],
        [WRONG],
        [SILENT],
        [SILENT],
        [ANSWER],
        [ANSWER],
    ]
    run = Run(tmp_path, generations, protocol, count=4)
    assert [one.attempt for one in sorted(run.answers.values(), key=lambda one: one.index)] == [0, 1, 2, 2]
    figures = protocol.figures(list(run.answers.values()))
    assert (figures.retries, figures.from_retry, figures.from_fallback) == (1, 1, 2)
    assert figures.shown() == "1 / 2"


def test_what_tools_returned_is_what_the_counted_attempt_was_shown(tmp_path: Path) -> None:
    results = iter(["", "42"])

    async def behavior(session: object) -> SandboxResult:
        return SandboxResult(status=Status.OK, stdout=next(results))

    code: list[Round] = [SOME_CODE, ANSWER]
    run = Run(tmp_path, [code, code], PaperProtocol(retries=1), behavior=behavior)
    assert run.answers["q0"].attempt == 1
    assert rows_of("result_only", run.rows, run.traces).question(0).question == "what?\nA tool returned: 42"


WHOLE: list[list[Round]] = [[ANSWER], [SILENT], [SILENT], [WRONG], [SILENT], [SILENT], [ANSWER]]
"""q0 at once, q1 at the first retry, q2 without tools after two."""


@pytest.mark.parametrize("killed_at", range(len(WHOLE)))
def test_a_run_that_is_killed_repeats_nothing_that_ended(killed_at: int, tmp_path: Path) -> None:
    protocol = PaperProtocol(retries=2)
    whole = Run(tmp_path / "whole", WHOLE, protocol, count=3)
    assert [one.attempt for one in whole.answers.values()] == [0, 1, 3]
    begun = Run(tmp_path / "killed", [*WHOLE[:killed_at], None], protocol, count=3)
    again = Run(tmp_path / "killed", WHOLE[killed_at:], protocol, count=3)
    assert again.answers == whole.answers
    assert len(begun.params) + len(again.params) == len(WHOLE) + 1  # the one that was under way
    assert begun.params[:killed_at] + again.params == whole.params
    traces = [without_times(tmp_path / name / "rollouts" / "heldout.jsonl") for name in ("whole", "killed")]
    assert [row | {"group": 0} for row in traces[0]] == [row | {"group": 0} for row in traces[1]]


def test_a_trace_whose_answer_was_lost_is_scored_and_not_drawn_again(tmp_path: Path) -> None:
    whole = Run(tmp_path, WHOLE, PaperProtocol(retries=2), count=3)
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.read_text()[: -len(path.read_text().splitlines()[-1]) // 2])
    again = Run(tmp_path, [], PaperProtocol(retries=2), count=3)
    assert again.answers == whole.answers and not again.params
    assert len(without_times(again.traces)) == len(WHOLE)
