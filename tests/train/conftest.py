"""What the RL tests start from."""

import pytest

from thyme.data.streams import endless
from thyme.model import Model, Processor, build
from thyme.rollout.types import Question
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations, questions
from thyme.train.config import SftConfig
from thyme.train.sft import train_sft


@pytest.fixture(scope="session")
def taught(processor: Processor) -> Model:
    """Knows by heart one product, computed by code."""
    model = build(tiny_config(), processor, seed=0)
    config = SftConfig(steps=30, batch_size=1, optimizer="adamw", learning_rate=3e-3)
    train_sft(model, processor, endless(demonstrations(0, 1, {"arithmetic": 1.0})), config)
    return model


@pytest.fixture(scope="session")
def asked() -> list[Question]:
    """The product it knows and a picture it does not."""
    return [demonstrations(0, 1, {"arithmetic": 1.0})[0].question, *questions(0, 1, {"direct": 1.0})]
