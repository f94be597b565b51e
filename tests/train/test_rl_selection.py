"""Dynamic sampling, and the best of more groups than a batch holds: what is asked, what is kept, where it goes on."""

import copy
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.rl_material import ROLLOUT, group_of, hand_rollout, make_loop
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.rewards import Reward, RuleScorer, Scorer
from thyme.rollout import read_rollouts
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox
from thyme.train.batch_selection import Drawn, draw_batch, select, spread
from thyme.train.config import RlConfig, SelectConfig
from thyme.train.distributed import World
from thyme.train.group_scores import GroupScores, ScoredGroup
from thyme.train.metrics import Metrics
from thyme.train.rl import ask_round, train_rl
from thyme.train.rl_metrics import Laps


def numbered(number: int) -> Question:
    return Question(id=str(number), image=None, image_path="", question="?", solution="")


class Asked:
    """A stream of numbered questions and their groups; remembers what was asked, with which seed."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.seeds: list[int] = []

    def questions(self, start: int, n: int) -> list[Question]:
        self.rounds.append(list(range(start, start + n)))
        return [numbered(number) for number in range(start, start + n)]

    def ask(self, scorer: Scorer, asked: Sequence[Question], seed: int) -> list[ScoredGroup]:
        self.seeds.append(seed)
        scores = GroupScores(scorer, 2)
        groups = [
            [hand_rollout(question=question, group=place, index=index) for index in (0, 1)]
            for place, question in enumerate(asked)
        ]
        for group in groups:
            for rollout in group:
                scores.ended(rollout)
        return scores.collect(groups)


class Planted(RuleScorer):
    """The rewards of a question are 0 and its number's spread; a negative one cannot be scored.

    Args:
        spreads: by number; the rest have none.
    """

    def __init__(self, spreads: dict[int, float]) -> None:
        super().__init__(self.reward)
        self.spreads = spreads

    def reward(self, rollout: Rollout) -> Reward:
        total = rollout.index * self.spreads.get(int(rollout.question.id), 0.0)
        return Reward(total=total, result=0.0, consistency=0.0, formatting=0.0)

    def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
        if self.spreads.get(int(group[0].question.id), 0.0) >= 0:
            return super().submit(group)
        future: Future[list[Reward]] = Future()
        future.set_exception(ConnectionError("away"))
        return future


def drawn(
    spreads: dict[int, float], batch_size: int, start: int = 0, **selection: Any
) -> tuple[Drawn, list[list[int]], list[int]]:
    """The batch, the numbers of its groups' questions, and those that are kept."""
    asked = Asked()
    config = RlConfig(batch_size=batch_size, select=SelectConfig(**selection))
    batch = draw_batch(partial(asked.ask, Planted(spreads)), asked.questions, config, start=start, seed=7)
    assert [int(group.rollouts[0].question.id) for group in batch.groups] == list(chain(*asked.rounds))
    assert [r.group for group in batch.groups for r in group.rollouts] == [
        i for i in range(len(batch.groups)) for _ in "ab"
    ]
    assert len(set(asked.seeds)) == len(asked.seeds) and asked.seeds[0] == 7
    return batch, asked.rounds, [int(group.rollouts[0].question.id) for group in batch.kept]


def test_as_it_stands_every_group_is_kept() -> None:
    batch, rounds, kept = drawn({1: 1.0, 2: -1.0}, 3, start=4)
    assert rounds == [[4, 5, 6]] and kept == [4, 5, 6]
    assert batch.metrics() == {"batch/groups": 3.0, "batch/kept_share": 1.0, "batch/refills": 0.0}


def test_what_has_no_spread_is_asked_again_with_the_next_questions() -> None:
    batch, rounds, kept = drawn({11: 1.0, 14: 1.0, 15: 0.5, 99: 1.0}, 3, start=10, max_refills=5)
    assert rounds == [[10, 11, 12], [13, 14], [15]]
    assert kept == [11, 14, 15]
    assert batch.metrics() == {"batch/groups": 3.0, "batch/kept_share": 0.5, "batch/refills": 2.0}


def test_refills_end_at_their_number_and_the_batch_is_smaller_for_it() -> None:
    batch, rounds, kept = drawn({1: 1.0}, 2, max_refills=2)
    assert rounds == [[0, 1], [2], [3]] and kept == [1]
    assert batch.refills == 2
    _, rounds, kept = drawn({}, 2, max_refills=1)
    assert rounds == [[0, 1], [2, 3]] and kept == []


def test_what_could_not_be_scored_is_refilled_but_not_when_nothing_could() -> None:
    _, rounds, kept = drawn({0: 1.0, 1: -1.0, 2: 1.0}, 2, max_refills=3)
    assert rounds == [[0, 1], [2]] and kept == [0, 2]
    batch, rounds, kept = drawn({0: -1.0, 1: -1.0, 2: 1.0}, 2, max_refills=3)
    assert rounds == [[0, 1]] and kept == [] and batch.refills == 0


def test_oversampling_keeps_the_largest_spreads_in_the_order_asked() -> None:
    batch, rounds, kept = drawn({0: 1.0, 1: 0.5, 2: 2.0, 4: 1.5}, 2, oversample=2.5)
    assert rounds == [[0, 1, 2, 3, 4]] and kept == [2, 4]
    assert batch.metrics()["batch/kept_share"] == 0.4
    _, rounds, _ = drawn({}, 3, oversample=1.1)
    assert rounds == [[0, 1, 2, 3]]  # rounded up


def test_of_equal_spreads_the_earlier_is_kept() -> None:
    assert drawn({1: 1.0, 2: 0.1, 3: 0.1, 4: 0.1}, 3, oversample=2)[2] == [1, 2, 3]
    # Without refills groups without spread fill the batch up, and one without rewards never does.
    assert drawn({2: 1.0, 0: -1.0}, 2, oversample=1.5)[2] == [1, 2]


def test_both_together() -> None:
    """Each round asks for what is missing, times the factor; only spread counts."""
    _, rounds, kept = drawn({2: 1.0, 5: 1.0, 6: 3.0, 7: 2.0}, 2, max_refills=2, oversample=2)
    assert rounds == [[0, 1, 2, 3], [4, 5]] and kept == [2, 5]
    _, rounds, kept = drawn({1: 0.5, 2: 1.0, 3: 3.0}, 2, max_refills=2, oversample=2)
    assert rounds == [[0, 1, 2, 3]] and kept == [2, 3]


def test_spread_by_hand() -> None:
    rollouts = [hand_rollout() for _ in range(3)]
    assert spread(group_of(*rollouts, totals=(0.1, 0.1, 0.1)), RlConfig()) == 0.0
    assert spread(group_of(*rollouts, totals=(0.0, 0.0, 1.5)), RlConfig()) == pytest.approx(0.5**0.5)
    assert spread(ScoredGroup(rollouts=rollouts, rewards=None), RlConfig()) == 0.0
    assert select([], RlConfig(select=SelectConfig(max_refills=1))) == []


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"oversample: 0.5 must be at least 1"):
        SelectConfig(oversample=0.5)
    with pytest.raises(ValueError, match="max_refills: -1 must be at least 0"):
        SelectConfig(max_refills=-1)


# On the real engine.


def uneven(rollout: Rollout) -> Reward:
    """Questions of odd number have a spread."""
    number = int(rollout.question.id[-1], 36) % 2
    return Reward(total=float(rollout.index * number), result=0.0, consistency=0.0, formatting=0.0)


@pytest.fixture
def six(asked: list[Question]) -> list[Question]:
    """Questions of which those of odd number have a spread."""
    return [replace(asked[0], id=f"q{number}") for number in range(6)]


def test_a_resumed_run_goes_on_at_the_right_question(
    taught: Model, processor: Processor, sandbox: Sandbox, six: list[Question], tmp_path: Path
) -> None:
    config = RlConfig(
        steps=3, batch_size=2, kl_coef=0.0, save_steps=1, record_steps=1, select=SelectConfig(max_refills=1)
    )

    def train(name: str, resume_from: Path | None = None) -> tuple[Model, list[Metrics], list[list[str]]]:
        model, folder = copy.deepcopy(taught), tmp_path / name
        stream = endless(six, seed=3)
        history = train_rl(
            model,
            processor,
            make_loop(model, sandbox),
            stream,
            config,
            scorer=RuleScorer(uneven),
            run_dir=folder,
            resume_from=resume_from,
        )
        steps = sorted((folder / "rollouts").iterdir())
        return model, history, [[rollout.question.id for rollout, _ in read_rollouts(step)][::2] for step in steps]

    whole, expected, ids = train("whole")
    assert any(metrics["batch/refills"] for metrics in expected[:2])
    order = [question.id for question in endless(six, seed=3)(0, 12)]
    assert list(chain(*ids)) == order[: sum(map(len, ids))]  # no question is skipped, none asked twice
    resumed, history, ids_again = train("resumed", tmp_path / "whole" / "checkpoints" / "rl_2")
    assert ids_again == ids[2:]
    assert history[0]["loss"] == expected[2]["loss"]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["batch/groups"] <= 2 for line in lines)


def test_a_question_asked_twice_in_a_step_is_answered_anew(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    config = RlConfig(batch_size=1, select=SelectConfig(max_refills=1))
    loop = make_loop(taught, sandbox)
    scorer = RuleScorer(lambda _: Reward(total=1.0, result=1.0, consistency=0.0, formatting=0.0))
    batch = draw_batch(partial(ask_round, loop, scorer, Laps(), World()), endless(asked[:1]), config, start=0, seed=0)
    assert len(batch.groups) == 2 and loop.config == ROLLOUT
    seeds = [rollout.seed for group in batch.groups for rollout in group.rollouts]
    assert len(set(seeds)) == 4
