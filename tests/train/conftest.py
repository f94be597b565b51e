"""What the RL tests start from."""

import pytest

from tests.train.sft_material import train_rows
from thyme.data.streams import endless
from thyme.model import Model, Processor, build
from thyme.rollout.types import Question
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations, questions
from thyme.train.config import SftConfig


@pytest.fixture(scope="session")
def taught(processor: Processor) -> Model:
    """Knows by heart one product, computed by code."""
    model = build(tiny_config(), processor, seed=0)
    config = SftConfig(steps=30, batch_size=1, optimizer="adamw", learning_rate=3e-3)
    rows = endless(demonstrations(0, 1, {"arithmetic": 1.0}))
    train_rows(model, processor, rows, config)
    return model


@pytest.fixture(scope="session")
def asked() -> list[Question]:
    """The product it knows and a picture it does not."""
    return [demonstrations(0, 1, {"arithmetic": 1.0})[0].question, *questions(0, 1, {"direct": 1.0})]
