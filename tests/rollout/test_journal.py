"""An interrupted step keeps the rollouts that had ended, under the same weights and settings only."""

import copy
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rollout.test_records import rollout as rollout_record
from tests.rollout.test_records import same
from tests.train.sft_material import train_rows
from thyme.engine import Engine, EngineConfig
from thyme.model import Model, Processor, build
from thyme.model.fingerprint import fingerprint
from thyme.rollout import RolloutConfig, RolloutLoop
from thyme.rollout.executor import Executor
from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.phases import PhaseConfig
from thyme.rollout.replay import replay
from thyme.rollout.types import Question, Rollout, Turn
from thyme.sandbox import Sandbox
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations, questions
from thyme.train.config import SftConfig

ROLLOUT = RolloutConfig(prompt_style="short", group_size=4, max_tokens_per_round=40, max_tokens=64, max_rounds=1)


@pytest.fixture(scope="module")
def taught(processor: Processor) -> Model:
    """Writes code that runs, for any question."""
    model = build(tiny_config(), processor, seed=0)
    rows = demonstrations(0, 1, {"arithmetic": 1.0})
    train_rows(model, processor, lambda start, n: rows * n, SftConfig(steps=25, batch_size=1, learning_rate=3e-3))
    return model


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return [demonstrations(0, 1, {"arithmetic": 1.0})[0].question, *questions(0, 2, {"crop": 1.0})]


def make_loop(model: Model, sandbox: Sandbox, config: RolloutConfig = ROLLOUT) -> RolloutLoop:
    assert model.processor is not None
    engine_config = EngineConfig(num_blocks=64, max_sequences=8, max_batch_tokens=512, deterministic=True, quiet=True)
    engine = Engine(model, engine_config, phases=config.known_phases)
    return RolloutLoop(engine, sandbox, model.processor, config)


class Killed(Exception):
    pass


THINKING = replace(
    ROLLOUT,
    temperatures={"think": 0.7, "number": 0.4},
    phases={"think": PhaseConfig(start="<think>", end="</think>")},
)


def sampled(
    loop: RolloutLoop, asked: Sequence[Question], path: Path, *, ends_after: int = 1000, rounds: int = 1000
) -> tuple[list[list[Rollout]], int, int]:
    """All rollouts, how many were kept, and the tokens drawn; the run breaks off after so many ends or code blocks."""
    ended: list[Rollout] = []

    def on_end(rollout: Rollout) -> None:
        ended.append(rollout)
        if len(ended) == ends_after:
            raise Killed

    with loop.journaled(path) as journal:
        add_begun, begun = journal.add_begun, []

        def on_round(rollout: Rollout) -> None:
            add_begun(rollout)
            begun.append(rollout)
            if len(begun) == rounds:
                raise Killed

        journal.add_begun = on_round  # type: ignore[method-assign]
        groups = loop.run(asked, loop.config.sampling(seed=3), on_end=on_end)
        assert len(ended) == sum(map(len, groups))
        assert loop.timing is not None
        return groups, len(journal.kept), loop.timing.sampled_tokens


def alike(groups: list[list[Rollout]], others: list[list[Rollout]]) -> bool:
    """To the bit, but for times."""

    def timeless(rollout: Rollout) -> Rollout:
        turns = [
            turn if turn.result is None else replace(turn, result=replace(turn.result, wall_s=0, cpu_s=0, peak_mib=0))
            for turn in rollout.turns
        ]
        return replace(rollout, turns=turns, wall_s=0, sandbox_s=0)

    return same([list(map(timeless, group)) for group in groups], [list(map(timeless, group)) for group in others])


def test_what_had_ended_is_kept_and_the_rest_comes_out_the_same(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    expected, kept, tokens = sampled(make_loop(taught, sandbox), asked, tmp_path / "rollouts" / ".whole.jsonl")
    assert kept == 0
    assert any(turn.code for group in expected for rollout in group for turn in rollout.turns)
    for ends_after in (1, 5, 11):
        path = tmp_path / "rollouts" / f".{ends_after}.jsonl"
        with pytest.raises(Killed):
            sampled(make_loop(taught, sandbox), asked, path, ends_after=ends_after)
        groups, kept, fewer = sampled(make_loop(taught, sandbox), asked, path)
        assert kept == ends_after and fewer < tokens
        assert alike(groups, expected)
        assert sampled(make_loop(taught, sandbox), asked, path)[1:] == (12, 0)  # and now all are


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_rollout_goes_on_after_its_last_code_block(
    rounds: int, taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    expected, _, tokens = sampled(make_loop(taught, sandbox), asked, tmp_path / "rollouts" / ".whole.jsonl")
    path = tmp_path / "rollouts" / ".step_0.jsonl"
    with pytest.raises(Killed):
        sampled(make_loop(taught, sandbox), asked, path, rounds=rounds)
    loop = make_loop(taught, sandbox)
    with loop.journaled(path) as journal:
        ended, begun = dict(journal.kept), dict(journal.begun)
    drawn = sum(int(r.sampled.sum()) for r in [*ended.values(), *begun.values()])
    assert begun and drawn > 0
    groups, _, fewer = sampled(loop, asked, path)
    assert alike(groups, expected) and fewer == tokens - drawn
    assert loop.timing is not None and loop.timing.restarted == 0


def test_questions_that_are_at_hand_are_not_written(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    path, sampling = tmp_path / "rollouts" / ".heldout.jsonl", ROLLOUT.sampling(seed=3)
    asked = [replace(asked[0], id=f"pictured-{n}", image=asked[-1].image, image_path="a.png") for n in range(3)]
    loop = make_loop(taught, sandbox)
    expected = loop.run(asked, sampling)
    with pytest.raises(Killed), loop.journaled(path, sampling, asked) as journal:
        add = journal.add_begun

        def on_round(rollout: Rollout) -> None:
            add(rollout)
            if rollout.question.image is not None:
                raise Killed

        journal.add_begun = on_round  # type: ignore[method-assign]
        loop.run(asked, sampling)
    assert asked[-1].image is not None and not ImageFolder(tmp_path / "images").path(digest_of(asked[-1])).exists()
    loop = make_loop(taught, sandbox)
    others = replace(sampling, seed=sampling.seed + 1), [*asked[:-1], replace(asked[-1], question="What else?")]
    for args, name in (((others[0], asked), "sampling"), ((sampling, others[1]), "questions")):
        with (
            pytest.raises(ValueError, match=f"heldout.jsonl was made with other {name}: repeat it as it was, or"),
            loop.journaled(path, *args, must_match=True),
        ):
            pass
    with loop.journaled(path, sampling, asked, must_match=True) as journal:
        assert any(rollout.question in asked and rollout.images for rollout in journal.begun.values())
        assert alike(loop.run(asked, sampling), expected)
    assert loop.timing is not None and loop.timing.restarted == 0
    with loop.journaled(path, others[0], asked) as journal:
        assert not journal.kept and not journal.begun


def digest_of(question: Question) -> str:
    """The name under which a store would keep its picture."""
    assert question.image is not None
    with tempfile.TemporaryDirectory() as elsewhere:
        return ImageFolder(elsewhere).add(question.image)


def test_a_rollout_whose_code_gives_something_else_starts_over(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _, _ = sampled(make_loop(taught, sandbox), asked, tmp_path / "rollouts" / ".whole.jsonl")
    path = tmp_path / "rollouts" / ".step_0.jsonl"
    with pytest.raises(Killed):
        sampled(make_loop(taught, sandbox), asked, path, rounds=3)
    header, *rows = map(json.loads, path.read_text().splitlines())
    spoilt = next(row for row in rows if not row["has_ended"])
    spoilt["turns"][0]["result"]["stdout"] += "!"
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    loop = make_loop(taught, sandbox)
    assert alike(sampled(loop, asked, path)[0], expected)
    assert loop.timing is not None and loop.timing.restarted == 1
    assert caplog.text.count("its code gives something else now: it starts over") == 1


def test_a_session_goes_on_with_its_variables(
    model: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    """What a later code block finds is what the earlier ones left, also when they ran in another process."""
    question, code = asked[0], ("import random\nx = [random.random()]\nprint(x)", "x.append(random.random())\nprint(x)")
    with Executor(sandbox, processor, ROLLOUT) as executor:
        results = [executor.run(1, question, 5, text).result()[0] for text in code]
        turns = [
            Turn(text="", code=text, result=result, output_text="", num_images=0)
            for text, result in zip(code, results, strict=True)
        ]
        before = rollout_record(processor)
        for number, shown in ((2, turns[:1]), (3, turns), (4, [turns[0], replace(turns[1], result=results[0])])):
            begun = replace(before, seed=5, turns=shown)
            assert replay(executor, {number: (question, begun)}) == ({4} if number == 4 else set())
        assert executor.run(2, question, 5, code[1]).result()[0].stdout == results[1].stdout


def test_a_kept_rollout_belongs_to_its_question_wherever_that_stands(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "rollouts" / ".step_0.jsonl"
    expected, _, _ = sampled(make_loop(taught, sandbox), asked, path)
    turned, kept, _ = sampled(make_loop(taught, sandbox), asked[::-1], path)
    assert kept == 12
    for group, other in zip(expected, turned[::-1], strict=True):
        assert [r.seed for r in group] == [r.seed for r in other]
        assert all((a.token_ids == b.token_ids).all() for a, b in zip(group, other, strict=True))
    assert [[r.group for r in group] for group in turned] == [[i] * 4 for i in range(3)]


def test_other_weights_or_settings_keep_nothing(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "rollouts" / ".step_0.jsonl"
    moved = copy.deepcopy(taught)
    with torch.no_grad():
        next(moved.parameters()).view(-1)[7] += 1e-6
    warmer = replace(ROLLOUT, temperature=1.5)
    for loop in (make_loop(moved, sandbox), make_loop(taught, sandbox, warmer)):
        sampled(make_loop(taught, sandbox), asked[:1], path)
        expected, _, _ = sampled(loop, asked[:1], tmp_path / "rollouts" / f".{id(loop)}.jsonl")
        groups, kept, _ = sampled(loop, asked[:1], path)
        assert kept == 0 and alike(groups, expected)


def test_a_line_that_was_not_written_to_its_end_is_sampled_again(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rollouts" / ".step_0.jsonl"
    expected, _, _ = sampled(make_loop(taught, sandbox), asked[:1], path)
    whole = path.read_bytes()
    header, *lines = whole.splitlines(keepends=True)
    assert b'"has_ended":true' in lines[-1]
    for left in (whole[:-1], whole[:-40], header + lines[0] + b"\0" * 4096, header, header[:-5], b""):
        path.write_bytes(left)
        groups, kept, _ = sampled(make_loop(taught, sandbox), asked[:1], path)
        assert kept == left.count(b'"has_ended":true}\n') and alike(groups, expected)
        assert {json.loads(line)["seed"] for line in path.read_bytes().splitlines()[1:]} == {
            r.seed for r in expected[0]
        }
    assert caplog.text.count("sampled again") == 3


def test_a_disk_that_refuses_costs_the_journal_and_not_the_run(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rollouts").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        groups, kept, _ = sampled(make_loop(taught, sandbox), asked[:1], tmp_path / "rollouts" / ".step_0.jsonl")
    assert len(groups[0]) == 4 and kept == 0
    assert caplog.text.count("an interrupted step will repeat its rollouts") == 1


def test_the_fingerprint_sees_every_bit(processor: Processor) -> None:
    model = build(tiny_config(), processor, seed=0)
    seen = {fingerprint(model)}
    parameters = dict(model.named_parameters())
    for name, place in (("decoder.norm.weight", 0), ("lm_head.weight", 5), ("lm_head.weight", 6)):
        bits = parameters[name].detach().view(torch.int32).view(-1)
        bits[place] ^= 1
        seen.add(fingerprint(model))
        bits[place] ^= 1
    assert len(seen) == 4 and fingerprint(model) in seen
    with torch.no_grad():
        weight = parameters["lm_head.weight"].view(-1)
        weight[5], weight[6] = weight[6].clone(), weight[5].clone()
    assert fingerprint(model) not in seen
    assert fingerprint(model.to(torch.bfloat16)) not in seen


def test_a_phase_that_is_open_stays_open_in_a_rollout_that_goes_on(
    taught: Model, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    """Every demonstration opens <think> before its code and closes it in the last round."""
    expected, _, _ = sampled(make_loop(taught, sandbox, THINKING), asked, tmp_path / "rollouts" / ".whole.jsonl")
    path = tmp_path / "rollouts" / ".step_0.jsonl"
    with pytest.raises(Killed):
        sampled(make_loop(taught, sandbox, THINKING), asked, path, rounds=2)
    loop = make_loop(taught, sandbox, THINKING)
    with loop.journaled(path) as journal:
        assert len(journal.begun) >= 1
    assert alike(sampled(loop, asked, path)[0], expected)
    later = [r.temperatures[r.sampled & (r.rounds == 1)] for group in expected for r in group if r.num_code]
    assert len(later) >= 2
    assert np.mean([temperatures[0] == np.float32(0.7) for temperatures in later]) > 0.8
