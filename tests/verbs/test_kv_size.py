"""The KV cache beside a training run has what the plan leaves it, to the byte."""

from dataclasses import replace

import pytest

from thyme.engine import Engine, EngineConfig
from thyme.model import LoraConfig, Model
from thyme.train.config import RlConfig
from thyme.train.memory import GIB, Job, plan
from thyme.verbs.kv_size import RESERVE, beside_training

OPEN = EngineConfig(max_sequences=64, max_batch_tokens=256, max_context=512, quiet=True)


def test_it_gets_what_the_plan_leaves(model: Model) -> None:
    job = Job(model=model.config, stage=RlConfig(), itemsize=4, longest=512, step_tokens=256, sequences=64)
    standing = plan(job).total("rollout")
    total = RESERVE + standing + 10 * 512 * plan(job).kv_token
    sized = beside_training(OPEN, model, RlConfig(), LoraConfig(), total=total)
    assert sized == replace(OPEN, kv_bytes=10 * 512 * plan(job).kv_token)
    assert Engine(model, sized).stats()["blocks"] == 10 * 512 // 16
    more = beside_training(OPEN, model, RlConfig(kl_coef=0.0), LoraConfig(), total=total)
    assert more.kv_bytes == (sized.kv_bytes or 0) + sum(p.nbytes for p in model.parameters())  # no reference


def test_it_takes_no_more_than_its_sequences_can_use(model: Model) -> None:
    sized = beside_training(OPEN, model, RlConfig(), LoraConfig(), total=80 * GIB)
    assert Engine(model, sized).stats()["blocks"] == 64 * 512 // 16


def test_what_is_said_is_kept_and_a_cpu_is_left_alone(model: Model) -> None:
    for said in (replace(OPEN, num_blocks=40), replace(OPEN, kv_bytes=12_345)):
        assert beside_training(said, model, RlConfig(), LoraConfig(), total=80 * GIB) is said
    assert beside_training(OPEN, model, RlConfig(), LoraConfig()) is OPEN


def test_no_room_is_refused_in_words(model: Model) -> None:
    with pytest.raises(ValueError, match=r"one sequence of engine\.max_context = 512 needs .*`thyme plan`"):
        beside_training(OPEN, model, RlConfig(), LoraConfig(), total=RESERVE + 1000)
    with pytest.raises(ValueError, match="leave nothing for a KV cache"):
        beside_training(replace(OPEN, max_context=None), model, RlConfig(), LoraConfig(), total=RESERVE + 1000)
