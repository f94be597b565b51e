"""Records hold the trainer's log-probs beside the engine's, also of what was then masked."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.rl_material import by_index, make_loop
from tests.train.test_rl_mismatch import RL, by_hand, lie
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.report.rollout_summary import token_mismatches
from thyme.rewards import RuleScorer
from thyme.rollout.records import read_rollouts
from thyme.rollout.types import Question
from thyme.sandbox import Sandbox
from thyme.train.config import MismatchConfig, RlConfig
from thyme.train.rl import train_rl
from thyme.train.trainer_logprobs import trainer_logprobs


def recorded(
    model: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], config: RlConfig, by: float, out: Path
) -> list[dict[str, list[float]]]:
    """The tokens of one recorded step on rollouts whose log-probs are all off by so much."""
    model = copy.deepcopy(model)
    loop = make_loop(model, sandbox)
    honest = loop.run
    loop.run = lambda *a, **k: [[lie(r, by) for r in group] for group in honest(*a, **k)]  # type: ignore[method-assign]
    train_rl(
        model,
        processor,
        loop,
        endless(asked),
        replace(config, record_steps=1),
        scorer=RuleScorer(by_index),
        run_dir=out,
    )
    path = out / "rollouts" / "step_0.jsonl"
    assert len(list(read_rollouts(path))) == len(path.read_text().splitlines()), "read as any other"
    return [json.loads(line)["tokens"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("by", [0.0, 1.0])
def test_a_step_records_what_the_trainer_gave(
    by: float, taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    """Off by 1 all tokens are masked, and still recorded."""
    config = replace(RL, mismatch=MismatchConfig(mask="sequence"))
    tokens = recorded(taught, processor, sandbox, asked, config, by, tmp_path)
    assert len(tokens) == 4
    for row in tokens:
        found = token_mismatches(row)
        assert [value is not None for value in found] == [bool(drawn) for drawn in row["sampled"]]
        assert [value for value in found if value is not None] == pytest.approx([-by] * sum(row["sampled"]), abs=1e-6)


def test_where_they_are_not_computed_there_is_no_column(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    assert all("trainer_logprobs" not in row for row in recorded(taught, processor, sandbox, asked, RL, 0.0, tmp_path))


def test_a_name_that_two_samples_share_has_none(processor: Processor) -> None:
    batch = by_hand(processor, [0.0, 1.0], [2.0])
    shorter, longer = batch.names  # packed by length
    both = trainer_logprobs([[batch]])
    assert {name: len(part) for name, part in both.items()} == {shorter: 1, longer: 2}
    assert trainer_logprobs([[batch], [batch]]) == {} == trainer_logprobs([[replace(batch, old_logprobs=None)]])
